"""EMR-Merging against a float64 version of the paper and known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge.methods.unified import l1_norms, scales_of

BASE = np.array([0.5, -1, 2, 0, 1.5, -0.5, 0.25, 3])
DELTAS = np.array(
    [
        [1, -2, 0.5, 0, 3, -0.1, 0.2, -4],
        [0.8, 1.5, -0.5, 0, -2, -0.3, 0.1, 0.4],
        [-0.2, 1, 0.7, 0, 2.5, 0.6, -0.3, 0.5],
    ]
)
SPECS = {"a": P("data", None), "b": P(), "c": P(None, "model", "data")}


def random_case(count=3):
    draw = np.random.default_rng(0).standard_normal
    shapes = {"a": (12, 8), "b": (5,), "c": (3, 2, 4)}
    base = {k: np.float32(draw(s)) for k, s in shapes.items()}
    models = [
        {k: np.float32(b + 0.1 * draw(b.shape)) for k, b in base.items()}
        for _ in range(count)
    ]
    return base, models


def assert_close(got, want, atol=1e-6):
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=atol)


def assert_same_masks(masks, want):
    for mask, expected in zip(masks, want, strict=True):
        for name in expected:
            assert mask[name].dtype == bool
            np.testing.assert_array_equal(mask[name], expected[name])


def test_worked_example():
    # Task vectors exactly as given: that of the seventh entry sums to zero, and only
    # just above it in these numbers.
    zero = {"w": np.zeros(8)}
    with jax.enable_x64(True):
        merged = jm.emr(zero, [{"w": delta} for delta in DELTAS])
    want = [1, 1.5, 0.7, 0, 3, 0.6, 0.2, -4]
    np.testing.assert_allclose(merged.vector["w"], want)
    rows = ["".join(str(int(x)) for x in mask["w"]) for mask in merged.masks]
    assert rows == ["10101011", "11000010", "01101100"]
    np.testing.assert_allclose(merged.scales, [1.213483, 2.074074, 1], atol=1e-6)


@pytest.mark.parametrize("rescale", ["sums", "means"])
def test_follows_the_paper(rescale):
    base, models = random_case()
    merged = jm.emr(base, models, rescale=rescale)
    vector, masks, scales = oracles.emr(base, models, rescale=rescale)
    assert_close(merged.vector, vector)
    assert_same_masks(merged.masks, masks)
    np.testing.assert_allclose(merged.scales, scales, rtol=1e-5)
    for task in range(3):
        delta = {k: scales[task] * masks[task][k] * vector[k] for k in base}
        assert_close(merged.params(base, task), oracles.apply(base, delta))


def test_sums_and_means_weigh_small_leaves_differently():
    base = {"big": np.zeros(8), "small": np.zeros(1)}
    models = [
        {"big": np.ones(8), "small": np.ones(1)},
        {"big": np.ones(8), "small": np.full(1, -3.0)},
    ]
    sums = jm.emr(base, models).scales
    means = jm.emr(base, models, rescale="means").scales
    np.testing.assert_allclose(sums, [9 / 8, 11 / 11])
    np.testing.assert_allclose(means, [2 / 1, 4 / 4])


def test_every_task_keeps_its_l1_norm():
    base, models = random_case()
    merged = jm.emr(base, models)
    for task, model in enumerate(models):
        rebuilt = merged.params(base, task)
        norms = [
            sum(np.abs(np.float64(tree[k]) - base[k]).sum() for k in base)
            for tree in (rebuilt, model)
        ]
        np.testing.assert_allclose(*norms, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_one_task_and_equal_tasks_are_recovered(count):
    base, (model, *_) = random_case()
    model["b"] = base["b"]
    merged = jm.emr(base, [model] * count)
    moved = {k: model[k] != base[k] for k in base}
    assert_same_masks(merged.masks, [moved] * count)
    np.testing.assert_allclose(merged.scales, 1, rtol=1e-6)
    assert_close(merged.params(base, count - 1), model)


def test_disjoint_tasks_are_recovered():
    base, models = random_case()
    owner = {k: np.arange(b.size).reshape(b.shape) % 3 for k, b in base.items()}
    models = [
        {k: np.where(owner[k] == i, m[k], base[k]) for k in base}
        for i, m in enumerate(models)
    ]
    merged = jm.emr(base, models)
    for task, model in enumerate(models):
        assert_close(merged.params(base, task), model)


def test_where_tasks_cancel_the_sign_is_negative():
    zero, delta = {"w": np.zeros(3)}, np.array([1.0, -2.0, 0.0])
    merged = jm.emr(zero, [{"w": delta}, {"w": -delta}])
    assert merged.vector["w"].tolist() == [-1, -2, 0]
    want = [[False, True, False], [True, False, False]]
    assert_same_masks(merged.masks, [{"w": np.array(mask)} for mask in want])


def test_a_task_that_is_outvoted_or_that_is_the_base_has_scale_one():
    zero = {"w": np.zeros(2)}
    models = [{"w": np.full(2, x)} for x in (3.0, -1.0, 0.0)]
    merged = jm.emr(zero, models)
    assert merged.scales.tolist() == [1, 1, 1]
    assert [merged.params(zero, task)["w"].tolist() for task in (1, 2)] == [[0, 0]] * 2


def test_signs_agree_however_small_the_update():
    zero, tiny = {"w": np.zeros(1, np.float32)}, {"w": np.full(1, -1e-30, np.float32)}
    merged = jm.emr(zero, [tiny])
    assert merged.masks[0]["w"].tolist() == [True]


def test_scales_add_up_from_parts_of_the_leaves():
    base, models = random_case()
    for rescale in ("sums", "means"):
        merged = jm.emr(base, models, rescale=rescale)
        norms = []
        for name in base:
            part = {name: base[name]}, [{name: model[name]} for model in models]
            alone = jm.emr(*part)
            assert_close(alone.vector, {name: merged.vector[name]}, atol=0)
            assert_same_masks(alone.masks, [{name: m[name]} for m in merged.masks])
            norms += l1_norms(*part).values()
        np.testing.assert_allclose(scales_of(norms, rescale), merged.scales, rtol=1e-6)


def test_sharded_equals_unsharded_and_keeps_the_sharding(mesh):
    base, models = random_case()
    want = jm.emr(base, models)
    rebuilt = want.params(base, 1)
    placed = jm.place(base, mesh, SPECS)
    others = [jm.place(model, mesh, SPECS) for model in models]
    merged = jm.emr(placed, others)
    assert_close(jax.device_get(merged.vector), want.vector)
    assert_same_masks(jax.device_get(merged.masks), want.masks)
    np.testing.assert_allclose(merged.scales, want.scales, rtol=1e-5)
    got = merged.params(placed, 1)
    assert_close(jax.device_get(got), rebuilt)
    for tree in (merged.vector, *merged.masks, got):
        for name, leaf in placed.items():
            assert tree[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    call = jax.jit(lambda b, ms: jm.emr(b, ms).params(b, 1))
    assert "all-gather" not in call.lower(placed, others).compile().as_text()
    assert_close(jax.device_get(call(placed, others)), rebuilt)
    assert_close(jax.device_get(want.params(placed, 1)), rebuilt)


def test_leaves_without_floats_are_empty_and_copied_and_dtypes_kept():
    base = {"w": jnp.ones(2, jnp.bfloat16), "steps": jnp.array(7)}
    models = [{"w": jnp.array([1.001, 1.0]), "steps": jnp.array(1)}]
    merged = jm.emr(base, models)
    assert merged.vector["steps"].shape == merged.masks[0]["steps"].shape == (0,)
    assert merged.vector["w"].dtype == jnp.float32
    np.testing.assert_allclose(merged.vector["w"], [0.001, 0], rtol=1e-3)
    rebuilt = merged.params(base, 0)
    assert rebuilt["steps"] == 7
    assert rebuilt["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, ms: jm.emr(b, []), "emr: needs at least one model"),
        (lambda b, ms: jm.emr(b, ms, rescale="l2"), "emr: rescale is 'l2'"),
        (
            lambda b, ms: jm.emr({"n": np.arange(2)}, [{"n": np.arange(2)}]),
            "emr: base has no floating-point leaves",
        ),
        (
            lambda b, ms: jm.emr(b, ms).params(b, 3),
            "EMR.params: task is 3; there are 3, from 0 on",
        ),
        (
            lambda b, ms: jm.emr(b, ms).params({"a": b["a"]}, 0),
            "EMR.params: .*only vector has leaf 'b'",
        ),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_case())
