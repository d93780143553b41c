"""The demo's experiment: honest splits, right labels, training that trains."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.demo import model, tasks, training

TASK = {task.name: task for task in tasks.TASKS}
STEPS = 2 * training.SETTINGS.steps_per_call


@pytest.fixture(scope="module")
def digits():
    return tasks.load_digits(seed=0)


@pytest.fixture(scope="module")
def start(digits):
    return training.pretrain(digits.train.images, seed=0, steps=STEPS)


def fingerprints(part):
    return {image.tobytes() for image in part.images}


def test_splits_share_no_image(digits):
    parts = [fingerprints(part) for part in digits]
    assert [len(part.images) for part in digits] == [898, 359, 540]
    assert len(set.union(*parts)) == sum(len(part) for part in parts)


@pytest.mark.parametrize("task", tasks.TASKS, ids=lambda task: task.name)
def test_task_shows_the_images_of_its_split(task, digits):
    data = tasks.task_data(task, digits)
    for part, source in zip(data, digits, strict=True):
        np.testing.assert_array_equal(part.images, task.view(source.images))
        assert part.images.dtype == np.float32
        assert part.images.min() == 0.0
        assert part.images.max() == 1.0
        assert part.labels.dtype == np.int32
        assert set(part.labels) == set(range(task.classes))


def test_seed_moves_images_between_splits(digits):
    again, other = tasks.load_digits(seed=0), tasks.load_digits(seed=1)
    np.testing.assert_array_equal(again.test.images, digits.test.images)
    assert fingerprints(other.test) != fingerprints(digits.test)


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("digits", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("odd", [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]),
        ("loop", [1, 0, 0, 0, 0, 0, 1, 0, 1, 1]),
        ("large", [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]),
        ("turned", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("negative", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_answers_for_each_digit(name, answers):
    assert TASK[name].label(np.arange(10)).astype(int).tolist() == answers


def test_views_of_a_marked_image():
    image = np.zeros((1, 8, 8), np.float32)
    image[0, 0, 7] = 1.0
    turned = tasks.quarter_turn(image)
    assert turned[0, 0, 0] == 1.0
    assert turned.sum() == 1.0
    assert tasks.negative(image)[0, 0, 7] == 0.0
    assert tasks.negative(image).sum() == 63.0


def test_patches_keep_neighbours_together():
    image = jnp.arange(64.0).reshape(1, 8, 8)
    patches = model.split_patches(image)
    assert patches[0, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert patches[0, 3].tolist() == [20, 21, 22, 23, 28, 29, 30, 31]


def test_model_shapes_and_names():
    params = model.init(0)
    images = jnp.zeros((3, 8, 8))
    assert {"block_0", "block_1", "patch_embedding", "final_norm"} <= set(params)
    assert params["block_1"]["attention"]["query"]["kernel"].shape == (64, 4, 16)
    assert model.features(params, images).shape == (3, 64)
    head = model.Head(jnp.ones((64, 10)), jnp.zeros(10))
    assert model.logits(params, head, images).shape == (3, 10)


def test_head_separates_its_own_prototypes(start, digits):
    data = tasks.task_data(TASK["odd"], digits).train
    head = training.make_head(start, data, classes=2)
    scores = model.logits(start, head, data.images)
    assert set(np.asarray(scores.argmax(axis=-1))) == {0, 1}
    count = training.SETTINGS.examples_per_class
    for label in range(2):
        examples = np.flatnonzero(data.labels == label)[:count]
        assert scores[examples].mean(axis=0).argmax() == label


def test_pretraining_is_deterministic_and_learns(start, digits):
    losses = []
    again = training.pretrain(
        digits.train.images,
        seed=0,
        steps=STEPS,
        progress=lambda fraction, loss: losses.append((fraction, loss)),
    )
    chex.assert_trees_all_equal(again, start)
    assert losses[-1][0] == 1.0
    assert losses[-1][1] < losses[0][1]


def test_fine_tuning_improves_its_task(start, digits):
    data = tasks.task_data(TASK["loop"], digits)
    head = training.make_head(start, data.train, classes=2)
    tuned = training.fine_tune(start, head, data.train, seed=0, steps=STEPS)
    again = training.fine_tune(start, head, data.train, seed=0, steps=STEPS)
    chex.assert_trees_all_equal(again, tuned)
    chex.assert_trees_all_equal_shapes_and_dtypes(tuned, start)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), start, tuned)
    before, after = jax.vmap(training.accuracy, in_axes=(0, None, None, None))(
        stacked, head, data.test.images, data.test.labels
    )
    assert after > before + 0.05
    alone = training.accuracy(tuned, head, data.test.images, data.test.labels)
    assert alone == pytest.approx(float(after), abs=0.01)
