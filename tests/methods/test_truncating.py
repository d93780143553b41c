"""STAR, CART and DC-Merge against float64 versions and known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_tasks import close, merged_matrix, orthogonal_tasks, random_matrices

import jaxmerge as jm


def svd(x):
    return np.linalg.svd(x, full_matrices=False)


def truncate(x, rank):
    u, s, vt = svd(x)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def star_by_loop(tasks, share):
    rescaled = []
    for task in tasks:
        s = svd(task)[1]
        rank = next(
            r for r in range(1, len(s) + 1) if s[:r].sum() >= share * s.sum() - 1e-9
        )
        rescaled.append(truncate(task, rank) * s.sum() / s[:rank].sum())
    return np.mean(rescaled, 0)


def cart_by_loop(tasks, rank, strength):
    mean = np.mean(tasks, 0)
    return mean + strength * sum(truncate(task - mean, rank) for task in tasks)


def dc_merge_by_loop(tasks, density=1e-3, rank=None, smoothing=None):
    """As the authors do it: bases are buffers of the full rank, cut to a given rank."""
    count, full = len(tasks), min(tasks[0].shape)
    q = rank or full // count
    width = count * q if rank else full
    left, right = np.zeros((len(tasks[0]), full)), np.zeros((full, len(tasks[0].T)))
    truncated = []
    for t, task in enumerate(tasks):
        u, s, vt = (x.T[:q].T if i < 2 else x[:q] for i, x in enumerate(svd(task)))
        left[:, t * q : (t + 1) * q] = u
        right[t * q : (t + 1) * q] = vt
        if smoothing is not None:
            line = np.linspace(min(smoothing, s[0] / s[-1]), 1, q)
            s = s.sum() * line / line.sum()
        truncated.append(u * s @ vt)
    u, _, vt = svd(left)
    left = (u @ vt)[:, :width]
    u, _, vt = svd(right)
    right = (u @ vt)[:width]

    trimmed = []
    for task in truncated:
        x = left.T @ task @ right.T
        keep = max(1, int(density * x.size))
        trimmed.append(np.where(np.abs(x) >= np.sort(np.abs(x).ravel())[-keep], x, 0))
    merged = np.zeros((width, width))
    for t in range(count):
        for i, j in np.ndindex(q, q):
            at = t * q + i, t * q + j
            entries = np.array([x[at] for x in trimmed])
            agree = entries[np.sign(entries) == np.sign(entries.sum())]
            merged[at] = agree.mean() if entries.sum() else 0
    return left @ merged @ right


@pytest.mark.parametrize("share", [0.01, 0.4, 0.8, 1.0])
def test_star_follows_the_paper(share):
    tasks = random_matrices()
    got = merged_matrix(jm.star, tasks, share=share)
    close(got, star_by_loop(tasks, share))


def test_star_keeps_the_least_rank_that_reaches_the_share():
    u, _, vt = svd(random_matrices(1)[0])
    task = u[:, :3] * np.array([2.0, 2.0, 1.0]) @ vt[:3]
    for share, rank in ((0.39, 1), (0.41, 2), (0.79, 2), (0.81, 3)):
        s = svd(merged_matrix(jm.star, [task], share=share))[1]
        assert np.sum(s > 1e-4) == rank
        assert s.sum() == pytest.approx(5.0, rel=1e-4)


def test_star_of_equal_scaled_and_zero_tasks():
    (task,) = random_matrices(1)
    alone = merged_matrix(jm.star, [task])
    close(merged_matrix(jm.star, [task] * 3), alone)
    close(merged_matrix(jm.star, [task, 2 * task, 3 * task]), 2 * alone)
    close(merged_matrix(jm.star, [task, 0 * task]), alone / 2)


@pytest.mark.parametrize(("rank_share", "rank"), [(0.16, 1), (0.05, 1), (0.5, 4)])
def test_cart_follows_the_paper(rank_share, rank):
    tasks = random_matrices()
    for strength in (0.0, 2.3):
        got = merged_matrix(jm.cart, tasks, rank_share=rank_share, strength=strength)
        close(got, cart_by_loop(tasks, rank, strength))


def test_cart_adds_nothing_to_the_mean_where_deviations_cancel():
    tasks = random_matrices(3)
    close(merged_matrix(jm.cart, tasks, rank_share=1.0), np.mean(tasks, 0))
    close(merged_matrix(jm.cart, tasks[:2]), np.mean(tasks[:2], 0))
    close(merged_matrix(jm.cart, tasks[:1] * 3), tasks[0])


def test_cart_of_a_task_among_zeros_by_hand():
    (task,) = random_matrices(1)
    # Of rank one, the deviations 2/3 and -1/3, -1/3 of one direction cancel; the rest
    # is truncated.
    got = merged_matrix(jm.cart, [task, 0 * task, 0 * task], rank_share=0.12)
    close(got, task / 3)


@pytest.mark.parametrize("density", [1e-3, 0.05, 0.2, 1.0])
def test_dc_merge_follows_the_authors(density):
    # 33 = 4 * 8 + 1: the empty direction counts.
    tasks = random_matrices(4, shape=(40, 33))
    got = merged_matrix(jm.dc_merge, tasks, density=density)
    close(got, dc_merge_by_loop(tasks, density), rtol=1e-4)


@pytest.mark.parametrize("smoothing", [None, 1.0, 2.0, 1e4])
@pytest.mark.parametrize("density", [1e-3, 0.1])
def test_dc_merge_of_low_ranks_follows_the_authors(smoothing, density):
    tasks = random_matrices(4, shape=(40, 33), rank=5)
    options = {"rank": 5, "smoothing": smoothing, "density": density}
    got = merged_matrix(jm.dc_merge, tasks, **options)
    close(got, dc_merge_by_loop(tasks, **options), rtol=1e-4)


def test_dc_merge_of_one_task_keeps_its_largest_features():
    (task,) = random_matrices(1)
    close(merged_matrix(jm.dc_merge, [task]), truncate(task, 1))
    close(merged_matrix(jm.dc_merge, [task], density=4.5 / 81), truncate(task, 4))
    close(merged_matrix(jm.dc_merge, [task], density=1.0), task)


def test_dc_merge_of_orthogonal_tasks():
    tasks = orthogonal_tasks()
    close(merged_matrix(jm.dc_merge, tasks, density=1.0), sum(tasks), rtol=1e-4)
    largest = sum(truncate(task, 1) for task in tasks)
    close(merged_matrix(jm.dc_merge, tasks), largest, rtol=1e-4)


def test_dc_merge_leaves_equal_tasks_their_share_of_the_blocks():
    (task,) = random_matrices(1, shape=(12, 8))
    got = merged_matrix(jm.dc_merge, [task] * 4, density=1.0)
    close(got, truncate(task, 2) / 4)


@pytest.mark.parametrize("smoothing", [None, 3.0])
def test_features_of_no_strength_take_and_get_nothing(smoothing):
    tasks = random_matrices(2, shape=(12, 8), rank=2)
    options = {"smoothing": smoothing, "density": 1.0}
    want = merged_matrix(jm.dc_merge, tasks, rank=2, **options)
    padded = merged_matrix(jm.dc_merge, tasks, rank=4, **options)
    close(padded, want, rtol=1e-4)
    beside_zero = [tasks[0], 0 * tasks[0], tasks[1]]
    close(merged_matrix(jm.dc_merge, beside_zero, rank=2, **options), want, rtol=1e-4)


def test_smoothing_keeps_the_nuclear_norm_and_bounds_the_ratio():
    (task,) = random_matrices(1, shape=(12, 5))
    norm, steep = svd(task)[1].sum(), np.divide(*svd(task)[1][[0, -1]])
    for smoothing in (1.0, 2.0, 2 * steep):
        got = merged_matrix(jm.dc_merge, [task], smoothing=smoothing, density=1.0)
        s = svd(got)[1]
        assert s.sum() == pytest.approx(norm, rel=1e-4)
        assert s[0] / s[-1] == pytest.approx(min(smoothing, steep), rel=1e-3)
        np.testing.assert_allclose(np.diff(s, 2), 0, atol=1e-4 * s[0])


@pytest.mark.parametrize(
    ("method", "name", "values"),
    [
        (jm.star, "share", [0.2, 0.9]),
        (jm.cart, "strength", [0.5, 2.0]),
        (jm.dc_merge, "density", [0.01, 0.3]),
        (jm.dc_merge, "smoothing", [1.0, 4.0]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_numbers_may_be_traced(method, name, values):
    base, *models = ({"kernel": np.float32(m)} for m in random_matrices(4))
    merge = jax.jit(lambda value: method(base, models, **{name: value})["kernel"])
    swept = jax.vmap(merge)(jnp.array(values))
    for got, value in zip(swept, values, strict=True):
        close(got, method(base, models, **{name: value})["kernel"])
    assert not np.allclose(*swept, atol=1e-3)


@pytest.mark.parametrize("method", [jm.star, jm.cart, jm.dc_merge])
def test_gradients_by_models_are_those_of_differences(method):
    base, *models = ({"kernel": np.float32(m)} for m in random_matrices(4, (5, 4)))
    weights = np.float32(random_matrices(1, (5, 4), seed=1)[0])

    def total(first):
        merged = method(base, [{"kernel": first}, *models[1:]])["kernel"]
        return jnp.sum(weights * merged)

    first = models[0]["kernel"]
    slope = jnp.sum(jax.grad(total)(first) * weights)
    numeric = (total(first + 1e-2 * weights) - total(first - 1e-2 * weights)) / 2e-2
    assert slope == pytest.approx(float(numeric), rel=2e-2)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (jm.star, {"share": 0.0}, r"star: share is 0; it must be in \(0, 1\]"),
        (jm.star, {"share": [0.4]}, r"star: share is \[0.4\]; it must be one number"),
        (jm.cart, {"rank_share": 1.1}, r"cart: rank_share is 1.1; it must be in"),
        (jm.cart, {"strength": np.nan}, "cart: strength is nan, not finite"),
        (jm.dc_merge, {"density": 2}, r"dc_merge: density is 2; it must be in"),
        (jm.dc_merge, {"smoothing": 0.5}, r"smoothing is 0.5; it must be in \[1, inf"),
        (jm.dc_merge, {"rank": 0}, "dc_merge: rank is 0; it must be a whole number"),
    ],
)
def test_invalid_numbers_are_named(method, options, message):
    tree = {"kernel": np.ones((2, 2), np.float32)}
    with pytest.raises(ValueError, match=message):
        method(tree, [tree], **options)


def test_a_traced_share_of_the_rank_is_refused():
    tree = {"kernel": np.ones((2, 2), np.float32)}
    with pytest.raises(ValueError, match="rank_share is traced, but it sets a count"):
        jax.jit(lambda x: jm.cart(tree, [tree], rank_share=x))(0.5)
