import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmerge import sharding


@pytest.fixture
def matrix():
    return np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)


def on(mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def make_mesh(*axis_types):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=axis_types)


# A sort of all entries, an orthogonal factor and a scatter: none of them traces when
# `base` and `model` are sharded along Explicit axes.
def unshardable(base, model):
    ranked = jnp.sort(base.ravel()).reshape(base.shape)
    orthogonal = jnp.linalg.qr(model)[0]
    return (ranked + orthogonal).at[0, 0].add(1.0)


def test_of_is_the_sharding_of_concrete_arrays_alone(mesh, matrix):
    x = on(mesh, matrix, "data", "model")
    seen = []
    jax.jit(lambda x: seen.append(sharding.of(x)))(x)
    assert sharding.of(x).spec == P("data", "model")
    assert seen == [None]
    assert sharding.of(matrix) is None
    assert sharding.of(1.0) is None


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_mesh_of_needs_no_mesh_in_context(axis_type, matrix):
    mesh = make_mesh(axis_type, axis_type)
    x = on(mesh, matrix, "data")
    seen = []
    jax.jit(lambda x: seen.append(sharding.mesh_of(x)))(x)
    assert sharding.mesh_of(matrix, x) == mesh
    assert seen == [mesh.abstract_mesh]


def test_mesh_of_falls_back_on_the_context(mesh, matrix):
    assert sharding.mesh_of(matrix) == mesh.abstract_mesh
    assert sharding.mesh_of() == mesh.abstract_mesh


def test_mesh_of_is_none_without_any_mesh(matrix):
    assert sharding.mesh_of(matrix, jnp.asarray(matrix)) is None


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("model_spec", [(None, "model"), ("model", "data"), (), None])
def test_auto_runs_what_explicit_sharding_refuses(mesh, matrix, transform, model_spec):
    base = on(mesh, matrix, "data", "model")
    model = matrix if model_spec is None else on(mesh, matrix, *model_spec)

    @transform
    def run(base, model):
        return sharding.auto(unshardable, like=base)(base, model)

    result = run(base, model)
    np.testing.assert_allclose(result, unshardable(matrix, matrix), rtol=1e-4)
    if mesh.explicit_axes:
        assert result.sharding.is_equivalent_to(base.sharding, 2)
        with pytest.raises(Exception, match=r"[Ss]hard"):
            unshardable(base, model)


def test_auto_needs_no_mesh_in_context(matrix):
    mesh = make_mesh(AxisType.Explicit, AxisType.Explicit)
    base = on(mesh, matrix, "model", "data")
    result = sharding.auto(unshardable, like=base)(base, matrix)
    assert result.sharding == base.sharding


def test_auto_restores_the_explicit_part_of_a_mixed_mesh(matrix):
    mesh = make_mesh(AxisType.Explicit, AxisType.Auto)
    base, model = on(mesh, matrix, "data", "model"), on(mesh, matrix, "model", "data")

    @jax.jit
    def run(base, model):
        result = sharding.auto(unshardable, like=base)(base, model)
        return sharding.keep(result, NamedSharding(mesh, P("data", "model")))

    result = run(base, model)
    np.testing.assert_allclose(result, unshardable(matrix, matrix), rtol=1e-4)
    assert result.sharding.is_equivalent_to(base.sharding, 2)


def test_auto_takes_trees_and_gives_trees(mesh, matrix):
    tree = {"w": on(mesh, matrix, "data", "model"), "b": jnp.ones(3)}
    fn = sharding.auto(lambda t: jax.tree.map(lambda x: jnp.sort(x, 0), t), like=tree)
    result = jax.jit(fn)(tree)
    np.testing.assert_array_equal(result["w"], np.sort(matrix, 0))
    np.testing.assert_array_equal(result["b"], np.ones(3))


def test_auto_changes_nothing_without_a_mesh(matrix):
    result = sharding.auto(unshardable, like=matrix)(matrix, matrix)
    np.testing.assert_array_equal(result, unshardable(matrix, matrix))


def test_auto_can_be_differentiated_and_mapped(mesh, matrix):
    base = on(mesh, matrix, "data", "model")

    def loss(scale, base):
        fn = sharding.auto(lambda x, s: s * jnp.sort(x, 0), like=base)
        return jnp.sum(fn(base, scale) ** 2)

    scales = jnp.array([1.0, 2.0, 3.0])
    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None)))(scales, base)
    np.testing.assert_allclose(gradients, 2 * scales * np.sum(matrix**2), rtol=1e-4)


def test_keep_pins_a_sharding(mesh, matrix):
    base = on(mesh, matrix, "data", "model")
    wanted = NamedSharding(mesh, P("model", "data"))
    result = jax.jit(lambda x: sharding.keep(x, wanted))(base)
    assert result.sharding.is_equivalent_to(wanted, 2)
    np.testing.assert_array_equal(result, matrix)


def test_keep_ignores_what_is_not_sharded(matrix):
    x = jnp.asarray(matrix)
    assert sharding.keep(x, None) is x
    assert sharding.keep(x, x.sharding) is x


def test_join_brings_arrays_from_elsewhere(mesh, matrix):
    base = on(mesh, matrix, "data", "model")
    for x in (matrix, jax.device_put(matrix, jax.devices()[3])):
        joined = sharding.join(x, base)
        assert joined.sharding == base.sharding
        np.testing.assert_array_equal(joined, matrix)


def test_join_brings_arrays_from_another_mesh(mesh, matrix):
    other = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    base = on(mesh, matrix, "data", "model")
    joined = sharding.join(on(other, matrix, "devices"), base)
    assert joined.sharding == base.sharding


def test_join_leaves_what_fits(mesh, matrix):
    base = on(mesh, matrix, "data", "model")
    model = on(mesh, matrix, None, "data")
    assert sharding.join(model, base) is model
    assert sharding.join(model, matrix) is model
    assert sharding.join(model, jnp.asarray(matrix)) is model
    jax.jit(lambda x: [sharding.join(x, base), sharding.join(base, x)])(model)


def test_place_takes_the_first_rule_that_matches(mesh, matrix):
    params = {"mlp": {"kernel": matrix, "bias": np.ones(8)}, "scale": np.ones(3)}
    rules = {
        ".*/kernel": P("data", "model"),
        "mlp/.*": P("model"),
        "mlp/bias": P("data"),
        ".*": P(),
    }
    placed = sharding.place(params, mesh, rules)
    specs = jax.tree.map(lambda x: x.sharding.spec, placed)
    assert specs == {
        "mlp": {"kernel": P("data", "model"), "bias": P("model")},
        "scale": P(),
    }
    jax.tree.map(np.testing.assert_array_equal, placed, params)


def test_place_replicates_without_rules(mesh, matrix):
    assert sharding.place({"w": matrix}, mesh)["w"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"w": P("data")}, "no rule matches leaf 'odd'; end the rules with '.*'"),
        (
            {".*": P("data")},
            r"leaf 'odd' of shape \(6, 2\) .* axis 0 of size 6 .* 4 dev",
        ),
        ({".*": P(None, ("data", "model"))}, "axis 1 of size 2 .* the 8 devices"),
        ({".*": P(None, None, "data")}, "leaf 'odd' .* it has 2 axes; shorten it"),
        ({"odd": P("layers"), ".*": P()}, "the mesh has axes .* not .'layers'"),
    ],
)
def test_place_says_what_does_not_fit(mesh, matrix, rules, message):
    with pytest.raises(ValueError, match=message):
        sharding.place({"w": matrix, "odd": np.ones((6, 2))}, mesh, rules)


@pytest.mark.parametrize(
    ("layers", "spec"),
    [
        (1, (None, "data", "model")),
        (12, (None, "model", "data")),
        (12, (None, ("model", "data"))),
        (12, ("model", None, "data")),
        (4, ("data",)),
        (16, (("model", "data"),)),
        (10, ()),
    ],
    ids=str,
)
def test_spread_makes_matrices_whole_and_comes_back(mesh, layers, spec):
    x = np.random.default_rng(1).standard_normal((layers, 8, 16)).astype(np.float32)
    stack = on(mesh, x, *spec)
    plan = sharding.plan_spread(stack, mesh)
    padded = -(-layers // 8) * 8

    def there_and_back(stack):
        layers = sharding.spread(stack, plan)
        return layers, sharding.unspread(layers, plan)

    spread_out = NamedSharding(mesh, plan.whole)
    whole = jax.ShapeDtypeStruct((padded, 8, 16), x.dtype, sharding=spread_out)
    fn = sharding.auto(there_and_back, like=(whole, stack))
    whole, back = jax.jit(fn)(stack)
    assert {piece.data.shape[1:] for piece in whole.addressable_shards} == {(8, 16)}
    assert len(whole) == padded
    assert {row.tobytes() for row in np.asarray(whole)} == {row.tobytes() for row in x}
    np.testing.assert_array_equal(back, x)
    assert back.sharding.is_equivalent_to(stack.sharding, 3)


def test_spread_moves_one_mesh_axis_at_a_time(mesh):
    stack = on(mesh, np.zeros((16, 8, 16)), None, "data", "model")
    assert sharding.plan_spread(stack, mesh).path == (
        P(None, "data", "model"),
        P("data", None, "model"),
        P(("data", "model"), None, None),
    )


def test_spread_slices_copies_before_it_sends_anything(mesh):
    stack = on(mesh, np.zeros((16, 8, 16)), None, "data")
    assert sharding.plan_spread(stack, mesh).path == (
        P(None, "data", None),
        P("model", "data", None),
        P(("model", "data"), None, None),
    )


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((12, 16, 8), P("data", None, "model")),
        ((3, 16, 8), P(None, "data", "model")),
        ((3, 1, 16), P(None, None, ("data", "model"))),
        ((3, 16, 1), P(None, ("data", "model"), None)),
        ((3, 7, 5), P(None, ("data", "model"), None)),
        ((2, 3, 4, 8), P(None, None, "data", "model")),
    ],
    ids=str,
)
def test_spread_starts_from_all_devices_where_a_tracer_does_not_tell(shape, spec):
    mesh = make_mesh(AxisType.Auto, AxisType.Auto)
    plans = []
    jax.eval_shape(
        lambda x: plans.append(sharding.plan_spread(x, mesh)),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    assert plans[0].spec == spec
