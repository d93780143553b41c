import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmerge import linalg, sharding
from jaxmerge.linalg import (
    leading_svd,
    map_matrices,
    matmul,
    rounding_noise,
    svd_by_polar,
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def on(mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def collectives(compiled):
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return set(re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text()))


def factored_shapes(compiled):
    """The shapes that each device hands to LAPACK's SVD."""
    calls = re.findall(r"= \((f32\S+?)\{.*lapack_sgesdd", compiled.as_text())
    return set(calls)


def truncated_svd(matrix):
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return (u[:, :2] * s[None, :2]) @ vt[:2]


def gram_values(matrix):
    return jnp.linalg.eigh(matrix.T @ matrix)[0]


def orthogonal(matrix):
    return jnp.linalg.qr(matrix)[0]


def cholesky_of_gram(matrix):
    return jnp.linalg.cholesky(matrix.T @ matrix + jnp.eye(matrix.shape[1]))


def ridge(gram_root, matrix):
    """The solve of RegMean: a matrix from each of two stacks, of two shapes."""
    gram = gram_root.T @ gram_root + jnp.eye(gram_root.shape[1])
    return jnp.linalg.solve(gram, matrix)


def loop(fn, *stacks):
    return np.stack([jax.jit(fn)(*matrices) for matrices in zip(*stacks, strict=True)])


SPECS = [
    (None, "data", "model"),
    (None, "model", "data"),
    ("model", None, "data"),
    (None, ("data", "model")),
    (None, "model"),
    (),
]


@pytest.mark.parametrize(
    ("spec", "layers"), [*zip(SPECS, [12, 16, 12, 8, 1, 12], strict=True)], ids=str
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_equals_a_loop_and_keeps_the_sharding(mesh, spec, layers, jit):
    x = random(layers, 16, 8)
    stack = on(mesh, x, *spec)
    run = functools.partial(map_matrices, truncated_svd)
    result = (jax.jit(run) if jit else run)(stack)
    np.testing.assert_allclose(result, loop(truncated_svd, x), atol=1e-4)
    if mesh.explicit_axes or not jit:
        assert result.sharding.is_equivalent_to(stack.sharding, 3)


@pytest.mark.parametrize("fn", [gram_values, orthogonal, cholesky_of_gram])
@pytest.mark.parametrize("layers", [12, 16])
def test_factorisations_equal_a_loop(mesh, fn, layers):
    x = random(layers, 16, 8)
    result = map_matrices(fn, on(mesh, x, None, "data", "model"))
    np.testing.assert_allclose(result, loop(fn, x), atol=1e-3)


@pytest.mark.parametrize("layers", [1, 12])
def test_takes_one_matrix_from_each_stack(mesh, layers):
    roots, x = random(layers, 5, 8, seed=1), random(layers, 8, 6)
    stacks = on(mesh, roots, None, None, "data"), on(mesh, x, None, "model")
    result = map_matrices(ridge, *stacks)
    np.testing.assert_allclose(result, loop(ridge, roots, x), atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 7, 5), (3, 3, 3), (5, 3, 3)])
def test_sizes_that_no_mesh_axis_divides(mesh, shape):
    x = random(*shape)
    result = jax.jit(functools.partial(map_matrices, truncated_svd))(x)
    np.testing.assert_allclose(result, loop(truncated_svd, x), atol=1e-4)


@pytest.mark.parametrize("layers", [12, 16])
def test_results_may_be_trees_of_other_shapes(mesh, layers):
    x = random(layers, 16, 8)
    stack = on(mesh, x, None, "data", "model")
    svd = functools.partial(jnp.linalg.svd, full_matrices=False)
    run = functools.partial(map_matrices, svd)
    for result in (run(stack), jax.jit(run)(stack)):
        u, s, vt = map(np.asarray, result)
        np.testing.assert_allclose(u * s[:, None] @ vt, x, atol=1e-4)


def test_results_of_other_shapes_stay_spread(mesh):
    result = map_matrices(gram_values, on(mesh, random(16, 16, 8), None, "data"))
    assert {piece.data.shape for piece in result.addressable_shards} == {(2, 8)}


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((16, 8), ("data", "model")),
        ((2, 12, 16, 8), (None, "data", "model")),
        ((2, 12, 16, 8), ("model", "data")),
        ((2, 3, 4, 16, 8), ("model", None, "data")),
    ],
    ids=str,
)
def test_any_number_of_leading_axes(mesh, shape, spec):
    x = random(*shape)
    stack = on(mesh, x, *spec)
    result = map_matrices(truncated_svd, stack)
    want = loop(truncated_svd, x.reshape(-1, *shape[-2:])).reshape(shape)
    np.testing.assert_allclose(result, want, atol=1e-4)
    assert result.sharding.is_equivalent_to(stack.sharding, len(shape))


def test_no_layers(mesh):
    assert map_matrices(gram_values, jnp.zeros((0, 4, 3))).shape == (0, 3)


def test_without_a_mesh():
    x = random(3, 2, 4, 4)
    want = loop(jnp.linalg.inv, x.reshape(6, 4, 4)).reshape(x.shape)
    np.testing.assert_allclose(map_matrices(jnp.linalg.inv, x), want, rtol=1e-3)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_arrays_bring_their_own_mesh(axis_type):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    x = random(12, 16, 8)
    stack = on(mesh, x, None, "data", "model")
    run = functools.partial(map_matrices, truncated_svd)
    for result in (run(stack), jax.jit(run)(stack)):
        np.testing.assert_allclose(result, loop(truncated_svd, x), atol=1e-4)


def test_mixed_axis_types():
    types = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    x = random(12, 16, 8)
    stack = on(mesh, x, None, "data", "model")
    run = functools.partial(map_matrices, truncated_svd)
    for result in (run(stack), jax.jit(run)(stack)):
        np.testing.assert_allclose(result, loop(truncated_svd, x), atol=1e-4)
    assert run(stack).sharding.is_equivalent_to(stack.sharding, 3)


def test_inside_the_auto_boundary_with_traced_coefficients(mesh):
    x = random(12, 16, 8)
    stack = on(mesh, x, None, "data", "model")

    def merge(stack, scale):
        def scaled(stack, scale):
            return map_matrices(lambda m: scale * truncated_svd(m), stack)

        return sharding.auto(scaled, like=stack)(stack, scale)

    scales = jnp.array([0.5, 2.0])
    result = jax.jit(jax.vmap(merge, in_axes=(None, 0)))(stack, scales)
    want = loop(truncated_svd, x)
    np.testing.assert_allclose(result, [0.5 * want, 2 * want], atol=1e-4)


def test_inside_a_shard_map(mesh):
    x = random(16, 16, 8)
    spec = P(("data", "model"))
    run = functools.partial(map_matrices, truncated_svd)
    local = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    result = jax.jit(local)(on(mesh, x, ("data", "model")))
    np.testing.assert_allclose(result, loop(truncated_svd, x), atol=1e-4)


def test_gradients(mesh):
    x = random(12, 6, 4)
    stack = on(mesh, x, None, None, "model")

    def loss(stack, scale):
        def cubes(stack, scale):
            return map_matrices(lambda m: scale * m @ m.T @ m, stack)

        return jnp.sum(sharding.auto(cubes, like=stack)(stack, scale))

    def plain(stack, scale):
        return jnp.sum(scale * stack @ jnp.swapaxes(stack, 1, 2) @ stack)

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(stack, 2.0)
    want = jax.grad(plain, argnums=(0, 1))(x, 2.0)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3), got, want)


@pytest.mark.parametrize("layers", [12, 16])
@pytest.mark.parametrize("spec", SPECS[:4], ids=str)
def test_only_all_to_alls(mesh, spec, layers):
    stack = on(mesh, random(layers, 16, 8), *spec)
    plan = sharding.plan_spread(stack, mesh)
    lowered = linalg._map_spread_eagerly.lower(truncated_svd, plan, stack)
    compiled = lowered.compile()
    assert collectives(compiled) == {"all-to-all"}
    assert factored_shapes(compiled) == {"f32[2,16,8]"}


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_only_all_to_alls_where_the_sharding_is_not_known(mesh, spec):
    stack = on(mesh, random(12, 16, 8), *spec)
    run = functools.partial(map_matrices, truncated_svd)
    compiled = jax.jit(run).lower(stack).compile()
    assert collectives(compiled) == {"all-to-all"}
    assert factored_shapes(compiled) == {"f32[2,16,8]"}


def test_layers_that_are_spread_already_stay(mesh):
    stack = on(mesh, random(16, 16, 8), ("model", "data"))
    plan = sharding.plan_spread(stack, mesh)
    lowered = linalg._map_spread_eagerly.lower(truncated_svd, plan, stack)
    assert collectives(lowered.compile()) == set()


SPECTRA = {
    "flat": np.ones(160),
    "slow": 1 / np.sqrt(np.arange(1, 161)),
    "steep": np.exp(-np.arange(160) / 8),
    "low rank": np.arange(160) < 5,
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("rank", [1, 5, 10])
def test_projected_svds_are_as_near_as_they_say(spectrum, rank):
    x = random(2, 200, 160)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    x = (u * spectrum) @ vt
    u, s, vt = jax.jit(leading_svd, static_argnums=1)(jnp.float32(x), rank)
    assert (u.shape, s.shape, vt.shape) == ((2, 200, rank), (2, rank), (2, rank, 160))
    rest = np.linalg.norm(x - (u * s[:, None]) @ vt, axis=(1, 2))
    least = np.linalg.norm(spectrum[rank:])
    assert (rest <= 1.005 * least + 1e-5 * np.linalg.norm(spectrum)).all()
    np.testing.assert_allclose(u.mT @ u, np.stack([np.eye(rank)] * 2), atol=1e-4)


def awkward_matrix(kind, m, n):
    rng, r = np.random.default_rng(0), min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((k, r)))[0] for k in (m, n))
    spectra = {
        "all sizes": 10.0 ** -np.linspace(0, 9, r),
        "equal": np.ones(r),
        "low rank": np.arange(r) < 3,
        "rank 1": np.arange(r) < 1,
        "nothing": np.zeros(r),
    }
    return jnp.asarray((u * spectra[kind]) @ v.T, jnp.float32)


@pytest.mark.parametrize(
    "kind", ["all sizes", "equal", "low rank", "rank 1", "nothing"]
)
@pytest.mark.parametrize("shape", [(12, 12), (20, 9), (9, 20)], ids=str)
def test_svd_by_polar_decomposition(kind, shape):
    x = awkward_matrix(kind, *shape)
    u, s, vt = jax.jit(svd_by_polar)(x)
    np.testing.assert_allclose(matmul(u * s[None], vt), x, atol=2e-6)
    expected = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    np.testing.assert_allclose(s, expected, atol=1e-6)
    for bases in (matmul(u.T, u), matmul(vt, vt.T)):
        np.testing.assert_allclose(bases, np.eye(min(shape)), atol=2e-6)


def test_svd_by_polar_decomposition_of_a_stack():
    x = random(2, 3, 7, 5)
    stacked = jax.jit(svd_by_polar)(x)
    mapped = jax.jit(jax.vmap(jax.vmap(svd_by_polar)))(x)
    for factor, of_each in zip(stacked, mapped, strict=True):
        np.testing.assert_array_equal(factor, of_each)
    u, s, vt = stacked
    np.testing.assert_allclose(matmul(u * s[..., None, :], vt), x, atol=1e-5)


@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev])
def test_svd_on_gpus_has_the_derivative_of_the_library(derivative):
    x = random(4, 7, 5)
    library = functools.partial(jnp.linalg.svd, full_matrices=False)
    got, expected = (
        jax.jit(jax.vmap(derivative(f)))(x) for f in (linalg._svd_on_gpus, library)
    )
    for side, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(side, other, atol=1e-4)


def test_rounding_noise_bounds_what_a_sum_loses():
    start, change = random(96, 80), random(96, 4, seed=1) @ random(4, 80, seed=2)
    change = np.float32(0.01) * change
    found = np.linalg.svd((start + change) - start)[1]
    assert 0 < found[4] < rounding_noise(jnp.asarray(start)) < 10 * found[4]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("fn", [truncated_svd, gram_values, orthogonal])
def test_lowers_for_accelerators(mesh, platform, fn):
    stack = jax.ShapeDtypeStruct(
        (12, 16, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "data", "model"))
    )
    run = jax.jit(functools.partial(map_matrices, fn))
    exported = jax.export.export(run, platforms=[platform])(stack)
    assert exported.platforms == (platform,)
    assert exported.nr_devices == 8


@pytest.mark.parametrize(
    "shapes", [[], [(3,)], [(2, 4, 4), (3, 4, 4)], [(2, 4, 4), (4, 4)]], ids=str
)
def test_says_which_shapes_do_not_fit(shapes):
    with pytest.raises(ValueError, match="give one or more arrays"):
        map_matrices(lambda *matrices: matrices[0], *map(np.zeros, shapes))
