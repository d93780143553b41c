"""What benchmarks/vision.py relies on: it resumes, and claims no more than it saw."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from images import claims, data, pages, training
from images.model import Network, make_head

SETTINGS = training.Settings(
    Network(width=16, blocks=1), tuning=training.Course(steps=4, batch=8, rate=1e-3)
)


@pytest.fixture
def task():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(12, 32, 32, 3), dtype=np.uint8)
    labelled = data.Labelled(images, np.arange(12, dtype=np.int32) % 3)
    return data.Task("noise", 3, labelled, labelled, labelled)


def test_interrupted_training_ends_where_it_would_have(task, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    start = SETTINGS.network.init(seed=0)
    head = make_head(SETTINGS.network, start, task, outputs=5)

    def tune(place):
        return training.fine_tune(SETTINGS, start, head, task.train, 0, place)

    whole = tune(tmp_path / "whole.npz")
    save = training._save_state

    def save_and_stop(place, done, state):
        save(place, done, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "half.npz")
    monkeypatch.setattr(training, "_save_state", save)
    resumed = tune(tmp_path / "half.npz")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole, start)
    assert max(jax.tree.leaves(moved)) > 0


def test_heads_never_choose_classes_that_the_task_has_not(task):
    start = SETTINGS.network.init(seed=0)
    head = make_head(SETTINGS.network, start, task, outputs=5)
    logits = SETTINGS.network.logits(start, (task.test.images, head))
    assert logits.shape == (12, 5)
    assert logits.argmax(axis=-1).max() < 3


def test_no_data_is_told_with_what_is_expected(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)no images .*x_train.*--data") as raised:
        data.load_tasks(tmp_path)
    assert "Kannada-MNIST" in str(raised.value)


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([0.02, 0.03], claims.CONFIRMED),
        ([-0.02, -0.03], claims.NOT_CONFIRMED),
        ([0.06, -0.01], claims.NOT_TESTABLE),
        ([0.004, 0.003], claims.NOT_TESTABLE),
    ],
)
def test_claims_need_all_seeds_and_more_than_the_error_of_the_test(differences, said):
    assert claims.verdict(differences, resolution=0.01) == said


def test_the_error_of_a_mean_is_that_of_all_images():
    # Two tasks of 50 images at one half are 100 draws of a fair coin.
    assert claims.standard_error(np.array([0.5, 0.5]), 50) == pytest.approx(0.05)


def test_correlation_is_of_ranks():
    assert claims.correlation(np.array([1, 2, 90]), np.array([9, 8, 7])) == -1
    assert claims.correlation(np.array([1, 2, 3]), np.array([9, 8, 90])) == 0.5


def test_tables_have_the_worst_first_and_the_range_of_scales():
    def run(scale):
        row = {"accuracies": [0.5], "others": [0.9, 0.4], "scale": None, "data": ""}
        better = {**row, "accuracies": [0.7], "scale": scale, "data": "2 images"}
        return {"better": better, "start": row, "individual": row, "worse": row}

    runs = [run(0.1), run(0.4), run(0.2)]
    table = pages.table_of(["a", "b"], 1, ["own"], runs)
    assert list(table.rows) == ["start", "worse", "better"]
    assert table.notes["scale"] == {"better": "0.1 to 0.4"}
    assert table.data == {"better": "2 images"}
    assert (table.seen, table.held_out, table.own) == (["a"], ["b"], ["own"])
    assert table.mean("better") == pytest.approx(0.7)
