"""What every merge method promises, checked for every registered method.

A new method is covered as soon as it is registered.
"""

import inspect

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from task_statistics import layer_of, random_statistics

import jaxmerge
from jaxmerge import leafwise
from jaxmerge.registry import Method, methods

METHODS = list(methods().values())
IDS = [method.name for method in METHODS]
every_method = pytest.mark.parametrize("method", METHODS, ids=IDS)

VARIANTS = [
    pytest.param(method, {"scope": scope} if scope else {}, id=f"{method.name}-{scope}")
    for method in METHODS
    for scope in method.scopes or (None,)
]
every_scope = pytest.mark.parametrize(("method", "options"), VARIANTS)

SHAPES = {"block": {"kernel": (16, 8), "bias": (8,)}, "scale": ()}
SPECS = {"block": {"kernel": P("data", "model"), "bias": P("model")}, "scale": P()}


def random_tree(seed, shapes=SHAPES, dtype=jnp.float32):
    draw = np.random.default_rng(seed).standard_normal
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(draw(s), dtype), shapes, is_leaf=is_shape)


def random_models(method: Method, count=3, **kwargs):
    base = random_tree(0, **kwargs)
    count = min(count, method.max_models or count)
    moved = [random_tree(i + 1, **kwargs) for i in range(count)]
    return base, [
        jax.tree.map(lambda b, m: (b + 0.3 * m).astype(b.dtype), base, model)
        for model in moved
    ]


STATIC = ("common", "rank_share")  # They set counts of singular vectors: shapes.


def merge(method: Method, base, models, statistics=None, **options):
    if method.needs_key:
        options = {"key": jax.random.key(0)} | options
    inputs = (base, models) if method.needs_base else (models,)
    if method.needs_statistics:
        known = random_statistics(models) if statistics is None else statistics
        inputs = (*inputs, known)
    return method.function(*inputs, **options)


def assert_close(got, want, **tolerance):
    chex.assert_trees_all_close(
        jax.device_get(got),
        jax.device_get(want),
        **({"rtol": 1e-5, "atol": 1e-6} | tolerance),
    )


@every_method
def test_inputs_are_left_alone_and_dtype_and_shape_kept(method):
    base, models = random_models(method, dtype=jnp.bfloat16)
    before = jax.device_get((base, models))
    merged = merge(method, base, models)
    chex.assert_trees_all_equal(jax.device_get((base, models)), before)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, base)


@every_scope
def test_jit_equals_eager(method, options):
    base, models = random_models(method)
    jitted = jax.jit(lambda b, ms: merge(method, b, ms, **options))(base, models)
    assert_close(jitted, merge(method, base, models, **options))


@every_scope
def test_sharded_equals_unsharded_keeps_the_sharding_and_gathers_nothing(
    method, options, mesh
):
    base, models = jax.device_get(random_models(method))
    want = merge(method, base, models, **options)
    put = lambda tree: jaxmerge.place(tree, mesh, _flat(SPECS))  # noqa: E731
    base, models = put(base), [put(model) for model in models]
    merged = merge(method, base, models, **options)
    assert_close(merged, want)
    for got, leaf in zip(jax.tree.leaves(merged), jax.tree.leaves(base), strict=True):
        assert got.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    whole = jax.jit(lambda b, ms: merge(method, b, ms, **options))
    text = whole.lower(base, models).compile().as_text()
    assert method.gathers or "all-gather" not in text


def _flat(specs):
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): spec
        for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec)
    }


@every_method
def test_models_on_another_sharding_or_on_the_host_are_welcome(method, mesh):
    base, models = jax.device_get(random_models(method))
    want = merge(method, base, models)
    base = jaxmerge.place(base, mesh, _flat(SPECS))
    models[0] = jaxmerge.place(models[0], mesh)
    assert_close(merge(method, base, models), want)


@every_scope
def test_stacked_layers_equal_a_loop_over_layers(method, options, monkeypatch):
    told = "stack_axes" in method.parameters
    if not told and not method.needs_statistics:
        pytest.skip("treats every entry alone, so layers cannot influence each other")
    if options.get("scope") == "model":
        pytest.skip("ranks the entries of all layers together")
    shapes = {"kernel": (3, 16, 8), "bias": (3, 8)}
    base, models = random_models(method, shapes=shapes)
    known = random_statistics(models, stacked=1)
    axes = {"stack_axes": 1} if told else {}
    stacked = merge(method, base, models, known, **axes, **options)
    of_leaf = leafwise.leaf_keys
    for i in range(3):
        layer = lambda tree: jax.tree.map(lambda x: x[i], tree)  # noqa: B023, E731
        keys = lambda *args: jax.vmap(jax.random.fold_in, (0, None))(  # noqa: E731
            of_leaf(*args),
            i,  # noqa: B023
        )
        monkeypatch.setattr(leafwise, "leaf_keys", keys)
        layers = [layer(model) for model in models]
        of_layer = [layer_of(k, m, i) for k, m in zip(known, layers, strict=True)]
        looped = merge(method, layer(base), layers, of_layer, **options)
        assert_close(layer(stacked), looped)


@every_method
def test_methods_that_mix_entries_can_be_told_of_stacked_layers(method):
    base, models = random_models(method, shapes={"kernel": (6, 8)})
    options = {"key": 0} if method.needs_key else {}
    if "density" in method.options:
        options["density"] = 0.5

    grown = [{"kernel": m["kernel"].at[1:].multiply(9.0)} for m in models]
    merged = [
        merge(method, {"kernel": base["kernel"]}, ms, **options)["kernel"][0]
        for ms in (models, grown)
    ]
    mixes = not np.allclose(*merged, atol=1e-5)
    # Statistics know of stacked layers.
    assert not mixes or "stack_axes" in method.parameters or method.needs_statistics


@every_method
def test_order_of_models_is_without_effect_if_declared(method):
    base, models = random_models(method)
    known = random_statistics(models)
    a = merge(method, base, models, known)
    b = merge(method, base, models[::-1], known[::-1])
    if method.symmetric:
        assert_close(a, b, atol=5e-6)  # Truncation magnifies rounding.
    elif method.needs_key:
        names = [str(i) for i in range(len(models))]
        renamed = merge(method, base, models[::-1], names=names[::-1])
        assert_close(a, renamed)
    else:
        # Ties in magnitude are what order may decide between.
        up, down = (
            jax.tree.map(lambda b: b + 0.5, base),
            jax.tree.map(lambda b: b - 0.5, base),
        )
        models = [up, down]
        options = {"t": 0.3} if "t" in method.parameters else {}
        a, b = (merge(method, base, ms, **options) for ms in (models, models[::-1]))
        assert not np.allclose(a["scale"], b["scale"]), "declare it symmetric"


@every_method
def test_one_model_at_full_strength_is_that_model(method):
    if method.identity is None:
        pytest.skip("changes a single model too, as its documentation says")
    base, (model, *_) = random_models(method)
    assert_close(merge(method, base, [model], **method.identity), model, atol=1e-5)


@every_method
def test_models_equal_to_the_base_give_the_base(method):
    base, models = random_models(method)
    assert_close(merge(method, base, [base] * len(models)), base)


@every_scope
def test_extreme_leaves_stay_finite(method, options):
    shapes = {
        "column": {"kernel": (4, 1)},
        "row": {"kernel": (1, 4)},
        "one": {"bias": (1,)},
        "scalar": (),
        "empty": {"kernel": (0, 3)},
    }
    base, models = random_models(method, shapes=shapes)
    opposite = jax.tree.map(lambda b, m: 2 * b - m, base, models[0])
    for case in (models, [models[0], opposite], [models[0]], [base, models[0]]):
        merged = merge(method, base, case[: method.max_models], **options)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(merged))


@every_method
def test_leaves_without_floats_are_copied(method):
    base, models = random_models(method)
    base["steps"] = jnp.array(7)
    for i, model in enumerate(models):
        model["steps"] = jnp.array(i + 7)
    assert merge(method, base, models)["steps"] == 7


@every_method
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(method, platform):
    base, models = random_models(method)
    call = jax.jit(lambda b, ms: merge(method, b, ms))
    exported = jax.export.export(call, platforms=[platform])(base, models)
    assert exported.platforms == (platform,)


@every_method
def test_compiles_once_per_leaf_shape_and_never_for_new_numbers(method, compilations):
    def leaves(count):
        return {str(i): {"kernel": (6, 4)} for i in range(count)}

    counts = []
    for count in (1, 5):
        base, models = random_models(method, shapes=leaves(count))
        jax.clear_caches()
        compilations.clear()
        merge(method, base, models)
        counts.append(len(compilations))
    assert counts[0] == counts[1]
    compilations.clear()
    for name, option in method.parameters.items():
        if isinstance(option.default, float) and name not in STATIC:
            for share in (0.5, 0.25):
                merge(method, base, models, **{name: share * option.default})
                assert not compilations, name


@every_method
def test_bad_input_is_refused_by_name(method):
    base, models = random_models(method)
    with pytest.raises(ValueError, match=rf"^{method.name}: needs at least one model"):
        merge(method, base, [])
    *others, last = models
    name = rf"models\[{len(others)}\]"
    wrong = {**last, "scale": jnp.zeros(2)}
    with pytest.raises(ValueError, match=rf"^{method.name}: .*{name} leaf 'scale'"):
        merge(method, base, [*others, wrong])
    missing = {"block": last["block"]}
    with pytest.raises(ValueError, match=rf"'scale', {name} has not"):
        merge(method, base, [*others, missing])


@every_method
def test_is_documented(method):
    doc = inspect.getdoc(method.function)
    assert method.summary.endswith(".")
    assert {"Args:", "Returns:", "Raises:", "Example:"} <= set(doc.split())
    assert all(option.description for option in method.parameters.values())
    assert getattr(jaxmerge, method.name) is method.function
    assert method.link.startswith("https://")
