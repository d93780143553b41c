"""The matrix methods against float64 versions and the known answers of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_tasks import close, merged_matrix, orthogonal_tasks, random_matrices

import jaxmerge as jm
from jaxmerge.linalg import least_squares, polar


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


def test_iso_methods_flatten_only_what_there_is():
    tasks = random_matrices(count=3, shape=(20, 15), rank=2)
    for method in (jm.iso_c, jm.iso_cts):
        spectrum = np.linalg.svd(merged_matrix(method, tasks))[1]
        kept = spectrum > 1e-3 * spectrum[0]
        assert kept.sum() <= 6
        np.testing.assert_allclose(spectrum[kept], spectrum[0], rtol=1e-4)


def test_iso_cts_with_nothing_common_shares_the_rank():
    tasks = random_matrices(count=8, shape=(12, 12))
    got = merged_matrix(jm.iso_cts, tasks, common=0.0)
    assert np.abs(got - merged_matrix(jm.iso_c, tasks)).max() > 0.1 * np.abs(got).max()


@pytest.mark.parametrize("options", [{"ridge": -0.5}, {"ridge": np.nan}, {"rtol": 0}])
def test_sftm_names_numbers_that_make_no_sense(options):
    tree = {"kernel": np.ones((2, 2), np.float32)}
    with pytest.raises(ValueError, match=rf"^sftm: {next(iter(options))} is"):
        jm.sftm(tree, [tree], **options)


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
