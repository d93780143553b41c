"""The matrix methods against float64 versions and the known answers of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.linalg import least_squares, polar

METHODS = [jm.sftm, jm.tsv_merge, jm.iso_c, jm.iso_cts]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)


def merged_matrix(method, matrices, **options):
    """Merges task matrices (outputs, inputs) and returns the merged one."""
    base = {"kernel": np.zeros(matrices[0].T.shape, np.float32)}
    models = [{"kernel": np.float32(m.T)} for m in matrices]
    return np.asarray(method(base, models, **options)["kernel"]).T


def random_matrices(count=4, shape=(12, 9), rank=None, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    rank = rank or min(shape)
    return [draw((shape[0], rank)) @ draw((rank, shape[1])) for _ in range(count)]


def orthogonal_tasks(count=3, rank=2, shape=(12, 9), seed=0):
    """Tasks whose singular vectors are orthogonal, with distinct singular values."""
    draw = np.random.default_rng(seed).standard_normal
    u, v = (np.linalg.qr(draw((n, count * rank)))[0] for n in shape)
    spectra = np.arange(1, count * rank + 1.0).reshape(count, rank)
    blocks = [slice(t * rank, (t + 1) * rank) for t in range(count)]
    return [(u[:, b] * s) @ v[:, b].T for b, s in zip(blocks, spectra, strict=True)]


def features(matrices, rank):
    svds = [np.linalg.svd(m, full_matrices=False) for m in matrices]
    u = np.concatenate([x[:, :rank] for x, _, _ in svds], 1)
    s = np.concatenate([x[:rank] for _, x, _ in svds])
    v = np.concatenate([x[:rank] for _, _, x in svds]).T
    kept = s > 1e-10 * s.max()
    return u[:, kept], s[kept], v[:, kept]


def sftm_by_pseudo_inverse(matrices, rank=None, ridge=0.0):
    u, s, v = features(matrices, rank)
    gram = (u.T @ u) * (v.T @ v)
    if ridge:
        c = np.linalg.solve(gram + ridge * np.eye(len(s)), s)
    else:
        c = np.linalg.pinv(gram, rcond=1e-9, hermitian=True) @ s
    return (u * c) @ v.T


def polar_by_eigenvalues(x):
    values, q = np.linalg.eigh(x.T @ x)
    kept = values > 1e-10 * values.max()
    return x @ (q[:, kept] / np.sqrt(values[kept])) @ q[:, kept].T


def close(got, want, rtol=2e-5):
    scale = np.abs(want).max() or 1.0
    np.testing.assert_allclose(got, want, atol=rtol * scale)


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1e-1])
def test_sftm_is_the_least_norm_solution(rank, ridge):
    tasks = random_matrices(rank=4)
    got = merged_matrix(jm.sftm, tasks, rank=rank, ridge=ridge, rtol=1e-7)
    close(got, sftm_by_pseudo_inverse(tasks, rank, ridge), rtol=1e-4)


def test_sftm_meets_its_constraints_and_says_so():
    tasks = random_matrices(rank=2)
    base = {"kernel": np.zeros((9, 12), np.float32)}
    models = [{"kernel": np.float32(m.T)} for m in tasks]
    merged, info = jm.sftm(base, models, ridge=0.0, rtol=1e-7, info=True)
    u, s, v = features(tasks, 2)
    errors = np.sum(u * (merged["kernel"].T @ v), 0) - s
    assert np.abs(errors).max() <= 1e-5 * s.max()
    assert info["kernel"].residual <= 1e-5
    assert 1 < info["kernel"].steps < 50


def test_sftm_of_singular_and_contradicting_systems():
    (task,) = random_matrices(1, rank=3)
    options = {"ridge": 0.0}
    close(merged_matrix(jm.sftm, [task] * 4, **options), task)
    copies = [k * task for k in (1, 2, 3, 4)]
    close(merged_matrix(jm.sftm, copies, **options), 2.5 * task)
    close(merged_matrix(jm.sftm, [task, -task], **options), 0 * task)
    other = random_matrices(1, rank=2, seed=1)[0]
    shared = [task, 2 * task + 0 * other, other]
    close(
        merged_matrix(jm.sftm, shared, **options), sftm_by_pseudo_inverse(shared), 1e-4
    )


def test_sftm_of_equally_correlated_tasks_lies_between_sum_and_mean():
    rho, count = 0.6, 3
    gram = np.full((count, count), rho) + (1 - rho) * np.eye(count)
    u = np.linalg.cholesky(gram)
    v = np.array([[0.6, 0.8]])
    tasks = [np.outer(u[t], v) for t in range(count)]
    got = merged_matrix(jm.sftm, tasks, ridge=0.0)
    close(got, sum(tasks) / (1 + (count - 1) * rho))


@pytest.mark.parametrize("method", [jm.sftm, jm.tsv_merge])
def test_orthogonal_tasks_add_up(method):
    tasks = orthogonal_tasks()
    options = {"ridge": 0.0} if method is jm.sftm else {}
    close(merged_matrix(method, tasks, **options), sum(tasks))


def test_tsv_merge_follows_the_paper():
    tasks = random_matrices()
    u, s, v = features(tasks, 9 // 4)
    want = polar_by_eigenvalues(u) * s @ polar_by_eigenvalues(v).T
    got = merged_matrix(jm.tsv_merge, tasks)
    close(got, want, rtol=1e-4)


def test_tsv_merge_counts_a_shared_direction_once():
    (task,) = random_matrices(1, shape=(12, 8))
    u, s, vt = np.linalg.svd(task, full_matrices=False)
    truncated = (u[:, :2] * s[:2]) @ vt[:2]
    close(merged_matrix(jm.tsv_merge, [task] * 4), truncated, rtol=1e-4)


def test_tsv_merge_with_more_tasks_than_rank_keeps_one_feature_each():
    tasks = random_matrices(5, shape=(3, 4))
    assert np.linalg.matrix_rank(merged_matrix(jm.tsv_merge, tasks), tol=1e-4) == 3


def test_iso_c_flattens_the_spectrum_of_the_sum():
    tasks = random_matrices()
    u, s, vt = np.linalg.svd(sum(tasks), full_matrices=False)
    got = merged_matrix(jm.iso_c, tasks)
    close(got, s.mean() * u @ vt, rtol=1e-4)
    assert np.linalg.norm(got, "nuc") == pytest.approx(s.sum(), rel=1e-4)


def test_iso_cts_follows_the_paper():
    tasks = random_matrices(count=2, shape=(20, 15))
    full, count = 15, 2
    own = round((full - int(full * 0.6)) / count)
    shared = full - count * own
    u, s, vt = np.linalg.svd(sum(tasks), full_matrices=False)
    u, s, vt = u[:, :shared], s[:shared], vt[:shared]
    parts = [np.linalg.svd(d - u @ (u.T @ d), full_matrices=False) for d in tasks]
    left = np.concatenate([*(p[0][:, :own] for p in parts), u], 1)
    right = np.concatenate([*(p[2][:own] for p in parts), vt]).T
    mean = np.concatenate([*(p[1][:own] for p in parts), s]).mean()
    want = mean * polar_by_eigenvalues(left) @ polar_by_eigenvalues(right).T
    close(merged_matrix(jm.iso_cts, tasks, common=0.6), want, rtol=1e-3)


def test_iso_cts_with_everything_common_is_iso_c():
    tasks = random_matrices()
    want = merged_matrix(jm.iso_c, tasks)
    close(merged_matrix(jm.iso_cts, tasks, common=1.0), want)


@every_method
def test_order_scale_and_layout_of_tasks(method):
    tasks = random_matrices()
    want = merged_matrix(method, tasks)
    close(merged_matrix(method, tasks[::-1]), want, rtol=1e-4)
    close(merged_matrix(method, [3 * t for t in tasks]), 3 * want, rtol=1e-4)
    base = {"layer.weight": np.zeros((12, 9), np.float32)}
    models = [{"layer.weight": np.float32(t)} for t in tasks]
    np.testing.assert_allclose(method(base, models)["layer.weight"], want, atol=1e-5)


@every_method
def test_zero_and_opposite_tasks_and_single_rows_are_defined(method):
    task, other = random_matrices(2)
    for tasks in ([0 * task, 0 * task], [task, 0 * task], [task, -task]):
        assert np.isfinite(merged_matrix(method, tasks)).all()
    close(merged_matrix(method, [task * 0] * 3), task * 0)
    rows = [task[:1], other[:1]]
    assert np.isfinite(merged_matrix(method, rows)).all()


@every_method
def test_leaves_that_are_no_matrices_follow_a_policy(method):
    base = {"bias": jnp.zeros(2), "embedding": jnp.zeros((3, 2))}
    models = [jax.tree.map(lambda x, i=i: x + i, base) for i in (1.0, 2.0)]
    expected = {"average": 1.5, "task_arithmetic": 3.0, "base": 0.0}
    for others, value in expected.items():
        merged = method(base, models, others=others, scale=2.0)
        for leaf in merged.values():
            np.testing.assert_allclose(leaf, 2 * value)
    with pytest.raises(ValueError, match="others is 'mean'; it must be one of"):
        method(base, models, others="mean")


@every_method
def test_leaves_of_one_shape_are_merged_as_each_alone(method):
    names = [f"block_{i}" for i in range(3)]
    draw = np.random.default_rng(0).standard_normal
    trees = [
        {n: {"query": {"kernel": np.float32(draw((6, 2, 4)))}} for n in names}
        for _ in range(4)
    ]
    scale = {"block_0.*": 0.5, ".*": 1.0}
    together = method(trees[0], trees[1:], scale=scale)
    for name in names:
        base, *models = ({name: tree[name]} for tree in trees)
        alone = method(base, models, scale=scale)[name]["query"]["kernel"]
        np.testing.assert_allclose(together[name]["query"]["kernel"], alone, atol=1e-5)


@every_method
def test_no_collective_inside_and_layers_spread_over_devices(method, mesh):
    draw = np.random.default_rng(0).standard_normal
    base, *models = (
        {f"block_{i}": {"kernel": np.float32(draw((16, 8)))} for i in range(8)}
        for _ in range(3)
    )
    want = method(base, models)
    rules = {".*": jax.sharding.PartitionSpec("data", "model")}
    placed = [jm.place(tree, mesh, rules) for tree in (base, *models)]
    got = method(placed[0], placed[1:])
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name]["kernel"], leaf["kernel"], atol=2e-5)
        assert got[name]["kernel"].sharding == placed[0][name]["kernel"].sharding


@every_method
def test_a_leaf_that_no_rule_knows_is_named_with_the_remedy(method):
    tree = {"odd": {"tensor": np.zeros((2, 3, 4))}}
    with pytest.raises(ValueError, match=r"odd/tensor.*are the option `matrices`"):
        method(tree, [tree])
    merged = method(tree, [tree], matrices={".*tensor": "iio"})
    assert merged["odd"]["tensor"].shape == (2, 3, 4)


@every_method
def test_gradients_by_scale_and_where_there_are_any_by_models(method):
    base, *models = ({"kernel": np.float32(m)} for m in random_matrices(3))

    def total(scale, models):
        return jnp.sum(method(base, models, scale=scale)["kernel"] ** 2)

    slope = jax.grad(total)(0.5, models)
    numeric = (total(0.51, models) - total(0.49, models)) / 0.02
    assert slope == pytest.approx(float(numeric), rel=1e-2)
    if method is jm.sftm:
        with pytest.raises(ValueError, match="Reverse-mode differentiation"):
            jax.grad(total, argnums=1)(0.5, models)
    elif method is not jm.iso_cts:
        slopes = jax.grad(total, argnums=1)(0.5, models)
        assert all(np.isfinite(leaf["kernel"]).all() for leaf in slopes)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
def test_ranks_are_whole_and_positive(bad):
    tree = {"kernel": np.ones((2, 2), np.float32)}
    for method in (jm.sftm, jm.tsv_merge):
        with pytest.raises(ValueError, match=r"rank is .*whole number of at least 1"):
            method(tree, [tree], rank=bad)


def test_polar_is_unique_without_full_rank():
    x = np.array([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
    want = np.outer([1, 2, 0], [1, 1]) / np.sqrt(10)
    np.testing.assert_allclose(polar(jnp.asarray(x, jnp.float32)), want, atol=1e-6)


def test_least_squares_stops_each_system_on_its_own():
    def solve(scales):
        return least_squares(lambda x: scales * x, lambda y: scales * y, jnp.ones(3))

    systems = jnp.array([[1.0, 1, 1], [1.0, 2, 3]])
    x, info = jax.vmap(solve)(systems)
    np.testing.assert_allclose(x, 1 / systems, rtol=1e-5)
    assert info.steps.tolist() == [1, 3]
    np.testing.assert_allclose(info.residual, 0, atol=1e-5)
