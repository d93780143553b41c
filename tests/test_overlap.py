"""Statistics of masks against counts in NumPy and known answers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge.overlap import gaussian_density

SPECS = {
    "block_0/kernel": P("data", "model"),
    "block_0/bias": P("model"),
    "block_1/kernel": P(None, "data"),
}


def random_masks(tasks=3):
    shapes = {
        "block_0": {"kernel": (8, 6), "bias": (4,)},
        "block_1": {"kernel": (5, 8)},
    }
    random = np.random.default_rng(0).random
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return [
        jax.tree.map(lambda s: random(s) < 0.5, shapes, is_leaf=is_shape)
        for _ in range(tasks)
    ]


def assert_statistics(got, masks):
    """Compares with counts over `masks`, which are flat."""
    tasks, size = masks.shape
    assert got.entries == size
    times = masks.sum(0)
    np.testing.assert_allclose(got.densities, masks.mean(1))
    exactly = [(times == k).mean() for k in range(tasks + 1)]
    np.testing.assert_allclose(got.agreement, exactly)
    shares = (got.catastrophic, got.selfish, got.universal)
    assert shares == pytest.approx((exactly[0], exactly[1], exactly[-1]))
    for i, j in itertools.product(range(tasks), repeat=2):
        want = (masks[i] & masks[j]).sum() / (masks[i] | masks[j]).sum()
        assert got.jaccard[i, j] == pytest.approx(want)


def flat(trees):
    return np.array(
        [np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in trees]
    )


def test_whole_layers_and_leaves_are_counted():
    masks = random_masks()
    got = jm.mask_statistics(masks)
    assert_statistics(got.total, flat(masks))
    assert list(got.layers) == ["block_0", "block_1"]
    assert_statistics(got.layers["block_0"], flat([m["block_0"] for m in masks]))
    assert set(got.leaves) == set(SPECS)
    bias = flat([m["block_0"]["bias"] for m in masks])
    assert_statistics(got.leaves["block_0/bias"], bias)
    assert np.isnan(got.total.predicted).all()


def test_sharded_masks_have_the_same_statistics(mesh):
    masks = random_masks()
    want = jm.mask_statistics(masks)
    got = jm.mask_statistics([jm.place(mask, mesh, SPECS) for mask in masks])
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_weights_that_no_model_has_moved_are_left_out():
    draw = np.random.default_rng(0).standard_normal
    base = {
        "w": np.float32(draw((6, 4))),
        "frozen": np.float32(draw(9)),
        "n": np.int32(3),
    }
    models = [{**base, "w": np.float32(base["w"] + draw((6, 4)))} for _ in range(3)]
    for model in models:
        model["w"][:2] = base["w"][:2]
    masks = jm.tall_masks(base, models)
    moved = jm.mask_statistics(masks, base=base, models=models)
    assert_statistics(moved.total, flat([{"w": m["w"][2:]} for m in masks]))
    assert moved.leaves["frozen"].entries == 0
    assert moved.leaves["frozen"].densities.tolist() == [0, 0, 0]
    assert "n" not in moved.leaves
    everything = jm.mask_statistics(masks)
    assert everything.total.entries == 33
    still = (33 - 16) / 33
    assert everything.total.catastrophic == pytest.approx(
        still + (1 - still) * moved.total.catastrophic
    )
    # Masks that are True where nothing moved do not count there either.
    loose = jm.tall_masks(base, models, strict=False)
    again = jm.mask_statistics(loose, base=base, models=models)
    np.testing.assert_allclose(again.total.agreement, moved.total.agreement)
    merged = jm.task_arithmetic(base, models)
    by_merge = jm.mask_statistics(masks, base=base, models=[merged])
    np.testing.assert_allclose(by_merge.total.agreement, moved.total.agreement)


def test_small_updates_of_bfloat16_models_are_moves():
    base = {"w": jnp.ones(4, jnp.bfloat16)}
    models = [{"w": jnp.array([1.0001, 1, 1, 1], jnp.float32)}]
    masks = jm.tall_masks(base, models)
    total = jm.mask_statistics(masks, base=base, models=models).total
    assert (total.entries, total.universal) == (1, 1.0)


@pytest.mark.parametrize(
    ("tasks", "threshold", "density"),
    [(8, 0.2, 0.690), (8, 0.4, 0.482), (8, 0.6, 0.358), (20, 0.4, 0.332), (1, 0.4, 1)],
)
def test_density_of_gaussian_noise(tasks, threshold, density):
    assert gaussian_density(threshold, tasks) == pytest.approx(density, abs=5e-4)


@pytest.mark.parametrize(
    ("threshold", "selfish", "catastrophic", "universal"),
    [
        (0.2, 0.003, 0.000, 0.177),
        (0.4, 0.102, 0.022, 0.079),
        (0.6, 0.184, 0.091, 0.041),
    ],
)
def test_noise_has_the_predicted_densities(threshold, selfish, catastrophic, universal):
    draws = np.random.default_rng(0).standard_normal((8, 50_000))
    base, models = {"w": np.zeros(50_000)}, [{"w": draw} for draw in draws]
    masks = jm.tall_masks(base, models, threshold=threshold)
    total = jm.mask_statistics(masks, threshold=threshold).total
    np.testing.assert_allclose(total.densities, total.predicted, atol=0.01)
    shares = (total.selfish, total.catastrophic, total.universal)
    assert shares == pytest.approx((selfish, catastrophic, universal), abs=0.005)


def test_predictions_follow_thresholds_by_task_and_leaf():
    masks = [{"a": np.ones(3, bool), "b": np.ones(1, bool)}] * 2
    got = jm.mask_statistics(masks, threshold={"a": [1.0, 0.0], "b": 1.0})
    np.testing.assert_allclose(got.leaves["a"].predicted, [0.5, 1])
    np.testing.assert_allclose(got.leaves["b"].predicted, [0.5, 0.5])
    np.testing.assert_allclose(got.total.predicted, [0.5, (3 + 0.5) / 4])


def test_one_mask_and_empty_masks_are_defined():
    masks = [{"w": np.array([True, False])}]
    total = jm.mask_statistics(masks).total
    assert (total.catastrophic, total.selfish, total.universal) == (0.5, 0.5, 0.5)
    none = [{"w": np.zeros(2, bool)}] * 2
    total = jm.mask_statistics(none).total
    assert total.catastrophic == 1
    assert not total.jaccard.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ms: jm.mask_statistics([]), "masks must be a list of one tree or more"),
        (lambda ms: jm.mask_statistics(ms[0]), "masks must be a list of one tree"),
        (
            lambda ms: jm.mask_statistics(ms, base=ms[0]),
            "base and models belong together",
        ),
        (
            lambda ms: jm.mask_statistics([ms[0], ms[1]["block_0"]]),
            r"mask_statistics: .*masks\[1\] has not",
        ),
        (
            lambda ms: jm.mask_statistics([{"w": np.ones(2)}]),
            r"mask_statistics: .*masks\[0\] leaf 'w' has dtype float64",
        ),
        (
            lambda ms: jm.mask_statistics([{"w": np.zeros(0, bool)}]),
            "mask_statistics: the masks have no entries",
        ),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_masks())
