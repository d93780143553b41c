"""What every method that merges matrices promises; a new one is covered by itself."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from matrix_tasks import close, merged_matrix, random_matrices

import jaxmerge as jm
from jaxmerge.registry import methods
from jaxmerge.statistics import trace

METHODS = [m for m in methods().values() if {"others", "fused"} <= m.parameters.keys()]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)

# Adam takes steps of a fixed length.
EQUIVARIANT = {"wudi": {"solver": "closed_form"}}


def by_leaf(method):
    """Options that keep matrices from influencing each other."""
    return {"scope": "leaf"} if method.scopes else {}


def random_trees(count, shapes):
    draw = np.random.default_rng(0).standard_normal
    return [
        {path: np.float32(draw(shape)) for path, shape in shapes.items()}
        for _ in range(count)
    ]


@every_method
def test_order_scale_and_layout_of_tasks(method):
    options = EQUIVARIANT.get(method.name, {})
    merge = method.function
    tasks = random_matrices()
    want = merged_matrix(merge, tasks, **options)
    close(merged_matrix(merge, tasks[::-1], **options), want, rtol=1e-4)
    tripled = merged_matrix(merge, [3 * t for t in tasks], **options)
    close(tripled, 3 * want, rtol=1e-4)
    base = {"layer.weight": np.zeros((12, 9), np.float32)}
    models = [{"layer.weight": np.float32(t)} for t in tasks]
    got = merge(base, models, **options)["layer.weight"]
    close(got, want)


@every_method
def test_zero_equal_and_opposite_tasks_and_single_rows_are_defined(method):
    task, other = random_matrices(2)
    merge = method.function
    cases = [task, 0 * task], [task] * 3, [task, -task], random_matrices(12)
    for tasks in cases:
        assert np.isfinite(merged_matrix(merge, tasks)).all()
    close(merged_matrix(merge, [task * 0] * 3), task * 0)
    for rows in ([task[:1], other[:1]], [task[:, :1], other[:, :1]]):
        assert np.isfinite(merged_matrix(merge, rows)).all()


@every_method
def test_leaves_that_are_no_matrices_follow_a_policy(method):
    base = {"bias": jnp.zeros(2), "embedding": jnp.zeros((3, 2))}
    models = [jax.tree.map(lambda x, i=i: x + i, base) for i in (1.0, 2.0)]
    expected = {"average": 1.5, "task_arithmetic": 3.0, "base": 0.0}
    for others, value in expected.items():
        merged = method.function(base, models, others=others, scale=2.0)
        for leaf in merged.values():
            np.testing.assert_allclose(leaf, 2 * value)
    with pytest.raises(ValueError, match="others is 'mean'; it must be one of"):
        method.function(base, models, others="mean")


@every_method
def test_leaves_of_one_shape_are_merged_as_each_alone(method):
    base, *models = random_trees(
        4, {f"block_{i}/query/kernel": (6, 2, 4) for i in range(3)}
    )
    scale = {"block_0.*": 0.5, ".*": 1.0}
    merge = method.function
    together = merge(base, models, scale=scale, **by_leaf(method))
    for path in base:
        alone = [{path: tree[path]} for tree in (base, *models)]
        want = merge(alone[0], alone[1:], scale=scale, **by_leaf(method))
        close(together[path], want[path])


@every_method
def test_stacks_of_layers_and_experts_are_merged_one_by_one(method):
    base, *models = random_trees(3, {"experts/kernel": (2, 3, 8, 5)})
    merge = method.function
    stacked = merge(base, models, stack_axes=2, **by_leaf(method))["experts/kernel"]
    for at in np.ndindex(2, 3):
        alone = [{"kernel": tree["experts/kernel"][at]} for tree in (base, *models)]
        want = merge(alone[0], alone[1:], **by_leaf(method))["kernel"]
        np.testing.assert_allclose(stacked[at], want, atol=2e-5)


@every_method
@pytest.mark.parametrize("parts", [3, [6, 4, 2]], ids=["equal", "by size"])
@pytest.mark.parametrize("name", ["in_proj_weight", "kernel"])
def test_fused_matrices_are_merged_one_by_one(method, parts, name):
    sizes = [4, 4, 4] if parts == 3 else parts
    cuts = np.cumsum(sizes)[:-1]
    base, *models = random_trees(3, {name: (2, 12, 12), "other/kernel": (2, 8, 12)})
    # The outputs are the last axis of a flax kernel, and the first in PyTorch.
    axis = 2 if name == "kernel" else 1
    options = {"stack_axes": 1, **by_leaf(method)}
    merge = method.function
    fused = merge(base, models, fused={name: parts}, **options)
    split = [
        {f"{i}/{name}": part for i, part in enumerate(np.split(tree[name], cuts, axis))}
        for tree in (base, *models)
    ]
    want = merge(split[0], split[1:], **options)
    joined = np.concatenate([want[f"{i}/{name}"] for i in range(3)], axis)
    np.testing.assert_allclose(fused[name], joined, atol=2e-5)
    with pytest.raises(ValueError, match=rf"^{method.name}: fused is 5 for leaf"):
        merge(base, models, fused={name: 5}, **options)


def attention(params, x):
    heads = jnp.einsum("btd,dhk->bthk", x, params["q"]) + params["offset"][None, None]
    mixed = jnp.tanh(heads * heads.mean(1, keepdims=True))
    x = jnp.einsum("bthk,hkd->btd", mixed, params["w[out]"])
    step = lambda x, w: (x + jnp.tanh(x) @ w.T, None)  # noqa: E731
    return jax.lax.scan(step, x, params["blocks/w"])[0]


WEIGHTS = {"q": (6, 2, 4), "offset": (2, 4), "w[out]": (2, 4, 6), "blocks/w": (3, 6, 6)}
STACKED = {"blocks/.*": 1, ".*": 0}
PATTERNS = {"q": "ioo", r"w\[out\]": "iio", "blocks/w": "oi", "offset": "oo"}


def traced(tree):
    return trace(attention, tree, jax.ShapeDtypeStruct((2, 5, 6), jnp.float32)).axes


@every_method
def test_axes_may_come_from_a_trace_of_the_model(method):
    base, *models = random_trees(4, WEIGHTS)
    options = {"others": "base", **by_leaf(method)}
    merge = method.function
    want = merge(base, models, matrices=PATTERNS, stack_axes=STACKED, **options)
    axes = traced(base)
    assert axes.keys() == {"q", "w[out]", "blocks/w"}
    # Names decide what the trace does not: that this is no matrix.
    matrices = {"offset": "oo", **axes}
    got = merge(base, models, matrices=matrices, **options)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    with pytest.raises(ValueError, match=r"No rule says .* leaf 'offset'"):
        merge(base, models, matrices=axes, **options)


@pytest.mark.parametrize("method", [jm.breadcrumbs, jm.model_stock, jm.della])
def test_rows_may_come_from_a_trace_of_the_model(method):
    base, *models = random_trees(4, WEIGHTS)
    options = {"key": 0, "density": 0.4} if method is jm.della else {"scope": "row"}
    want = method(base, models, matrices=PATTERNS, stack_axes=STACKED, **options)
    got = method(base, models, matrices={"offset": "oo", **traced(base)}, **options)
    if method is jm.della:  # Each layer draws anew, by its number.
        got, want = ({**tree, "blocks/w": None} for tree in (got, want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


@every_method
def test_layers_spread_over_devices_and_no_svd_communicates(method, mesh):
    base, *models = random_trees(
        3, {f"block_{i}/kernel": (16, 8) for i in range(8)} | {"bias": (8,)}
    )
    want = method.function(base, models)
    rules = {"bias": P(), ".*": P("data", "model")}
    base, *models = [jm.place(tree, mesh, rules) for tree in (base, *models)]
    got = method.function(base, models)
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, atol=2e-5)
        assert got[path].sharding.is_equivalent_to(base[path].sharding, leaf.ndim)

    whole = jax.jit(lambda b, ms: method.function(b, ms, **by_leaf(method)))
    text = whole.lower(base, models).compile().as_text()
    factored = re.findall(r"= \(f32\[([\d,]+)\]\S* .*lapack_sge", text)
    # One of eight layers per device; the matrices themselves are not cut.
    assert all(shape.startswith("1,") for shape in factored), factored
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert set(re.findall(rf" ({kinds})(?:-start)?\(", text)) <= {"all-to-all"}


@every_method
def test_a_leaf_that_no_rule_knows_is_named_with_the_remedy(method):
    tree = {"odd": {"tensor": np.zeros((2, 3, 4))}}
    with pytest.raises(ValueError, match=r"odd/tensor.*are the option `matrices`"):
        method.function(tree, [tree])
    merged = method.function(tree, [tree], matrices={".*tensor": "iio"})
    assert merged["odd"]["tensor"].shape == (2, 3, 4)


@every_method
@pytest.mark.parametrize("size", [0.05, 1.0])
def test_what_rounding_leaves_of_an_adapter_is_no_feature(method, size):
    """An update of low rank merges on a large base as on a base of zero."""
    draw = np.random.default_rng(0).standard_normal
    updates = [0.01 * draw((96, 4)) @ draw((4, 80)) for _ in range(3)]
    base = {"layer.weight": np.float32(size * draw((96, 80)))}
    models = [{"layer.weight": np.float32(base["layer.weight"] + u)} for u in updates]
    merged = method.function(base, models)["layer.weight"]
    got = np.float64(merged) - base["layer.weight"]
    want = merged_matrix(method.function, updates)
    close(got, want, rtol=5e-3 if method.name == "wudi" else 1e-3)


@every_method
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators_on_a_mesh(method, mesh, platform):
    base, *models = random_trees(
        3, {f"block_{i}/kernel": (48, 64) for i in range(8)} | {"bias": (8,)}
    )
    rules = {"bias": P(), ".*": P("data", "model")}
    base, *models = [jm.place(tree, mesh, rules) for tree in (base, *models)]
    options = {"rank": 2} if "rank" in method.options else {}
    whole = jax.jit(lambda b, ms: method.function(b, ms, **by_leaf(method), **options))
    exported = jax.export.export(whole, platforms=[platform])(base, models)
    assert exported.nr_devices == 8


@every_method
def test_gradient_by_models(method):
    if method.name == "iso_cts":
        pytest.skip("meets equal singular values, where the slope is infinite")
    base, *models = ({"kernel": np.float32(m)} for m in random_matrices(3))

    def total(models):
        return jnp.sum(method.function(base, models)["kernel"] ** 2)

    if method.name == "sftm":
        with pytest.raises(ValueError, match="Reverse-mode differentiation"):
            jax.grad(total)(models)
    else:
        slopes = jax.grad(total)(models)
        assert all(np.isfinite(leaf["kernel"]).all() for leaf in slopes)


@every_method
def test_gradient_by_scale(method):
    base, *models = ({"kernel": np.float32(m)} for m in random_matrices(3))

    def total(scale):
        return jnp.sum(method.function(base, models, scale=scale)["kernel"] ** 2)

    numeric = (total(0.51) - total(0.49)) / 0.02
    assert jax.grad(total)(0.5) == pytest.approx(float(numeric), rel=1e-2)
