"""NuSLERP, Multi-SLERP and the Karcher mean: known answers, and float64 versions."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_methods import BASE, DELTAS

import jaxmerge as jm

MEANS = [jm.nuslerp, jm.multislerp, jm.karcher]
every_mean = pytest.mark.parametrize("mean", MEANS)
properties = settings(deadline=None, max_examples=30)


def draw(seed, count, shape=(6, 5)):
    draws = np.random.default_rng(seed).standard_normal((count, *shape))
    return list(draws.astype(np.float32))


def merge(method, vectors, **options):
    return np.asarray(method([{"w": jnp.asarray(v)} for v in vectors], **options)["w"])


def length(x):
    return float(np.linalg.norm(np.float64(x)))


def test_worked_example_of_multislerp_on_task_vectors():
    want = [1.447549, 1.889923, 0.524193, 0, 2.376442, 0.275916, -0.106417, -1.45059]
    origin = {"w": jnp.asarray(BASE, jnp.float32)}
    got = merge(jm.multislerp, np.float32(BASE + DELTAS), origin=origin)
    np.testing.assert_allclose(got - BASE, want, atol=2e-6)


@pytest.mark.parametrize("weights", [[1, 1, 1], [3, 1, 0.5], [0, 1, 1]])
def test_means_follow_their_float64_versions(weights):
    vectors = draw(0, 3)
    for method, oracle in ((jm.multislerp, oracles.multislerp), (jm.karcher, None)):
        oracle = oracle or oracles.karcher
        want = oracle(vectors, np.array(weights) / np.sum(weights))
        options = {"max_steps": 60} if method is jm.karcher else {}
        got = merge(method, vectors, weights=weights, **options)
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_multislerp_is_the_first_point_of_karcher():
    vectors = draw(1, 4)
    start = merge(jm.karcher, vectors, max_steps=0)
    np.testing.assert_array_equal(merge(jm.multislerp, vectors), start)
    assert np.abs(merge(jm.karcher, vectors) - start).max() > 1e-3


@properties
@given(st.integers(0, 1000), st.floats(0.05, 0.95), st.floats(0.1, 10))
def test_karcher_of_two_is_slerp_of_directions_times_the_mean_length(seed, t, scale):
    u, v = draw(seed, 2)
    v *= np.float32(scale)
    weights = [1 - t, t]
    arc = oracles.slerp(u / length(u), v / length(v), t)
    want = arc * ((1 - t) * length(u) + t * length(v))
    got = merge(jm.karcher, [u, v], weights=weights, max_steps=40)
    np.testing.assert_allclose(got, want, atol=2e-5 * scale)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("step", [1.0, 0.02, 1e-4])
def test_nuslerp_follows_the_arc_however_small_its_angle(t, step):
    u, other = draw(2, 2)
    v = u + np.float32(step) * other
    got = merge(jm.nuslerp, [u, v], weights=[1 - t, t])
    np.testing.assert_allclose(got, oracles.slerp(u, v, t), atol=2e-6)


def test_nuslerp_is_slerp_where_that_leaves_the_line():
    u, v = draw(3, 2)
    want = merge(jm.slerp, [u, v], t=0.25)
    np.testing.assert_array_equal(merge(jm.nuslerp, [u, v], weights=[3, 1]), want)


def test_nuslerp_with_an_origin_interpolates_task_vectors():
    origin, u, v = draw(4, 3)
    got = merge(jm.nuslerp, [origin + u, origin + v], origin={"w": origin})
    np.testing.assert_allclose(got, origin + oracles.slerp(u, v, 0.5), atol=2e-6)


def test_nuslerp_by_row_is_nuslerp_of_each_row_in_either_layout():
    u, v = draw(5, 2)
    rows = [merge(jm.nuslerp, pair) for pair in zip(u, v, strict=True)]
    options = {"scope": "row", "matrices": {"w": "oi"}}
    np.testing.assert_allclose(merge(jm.nuslerp, [u, v], **options), rows, atol=1e-6)
    options["matrices"] = {"w": "io"}
    transposed = merge(jm.nuslerp, [u.T, v.T], **options)
    np.testing.assert_allclose(transposed.T, rows, atol=1e-6)


def test_equal_lengths_are_kept_and_unequal_ones_mixed_or_averaged():
    u, v = np.eye(2, dtype=np.float32)
    for mean in MEANS:
        assert length(merge(mean, [u, v])) == pytest.approx(1)
    assert length(merge(jm.nuslerp, [u, 3 * v])) == pytest.approx(np.sqrt(5))
    for mean in (jm.multislerp, jm.karcher):
        np.testing.assert_allclose(merge(mean, [u, 3 * v]), [np.sqrt(2)] * 2, rtol=1e-6)


def test_the_middle_of_a_symmetric_triple_is_its_axis():
    angles = np.arange(3) * 2 * np.pi / 3
    around = np.stack([np.cos(angles), np.sin(angles), np.full(3, 0.7)], 1)
    for mean in (jm.multislerp, jm.karcher):
        got = merge(mean, np.float32(around))
        np.testing.assert_allclose(got, [0, 0, np.sqrt(1.49)], atol=1e-6)


@every_mean
def test_equal_models_come_back(mean):
    u, _ = draw(6, 2)
    np.testing.assert_allclose(merge(mean, [u, u]), u, rtol=1e-5)


@every_mean
def test_opposite_and_zero_vectors_meet_on_the_line_between_them(mean):
    u, _ = draw(7, 2)
    np.testing.assert_allclose(merge(mean, [u, -2 * u]), -u / 2, rtol=1e-5)
    np.testing.assert_allclose(merge(mean, [u, 0 * u]), u / 2, rtol=1e-5)
    np.testing.assert_array_equal(merge(mean, [0 * u, 0 * u]), 0 * u)


def test_slerp_without_a_threshold_has_no_poles():
    u, _ = draw(8, 2)
    for v, want in ((u, u), (-2 * u, -u / 2)):
        got = merge(jm.slerp, [u, v], threshold=1.0)
        np.testing.assert_allclose(got, want, rtol=1e-5)


@every_mean
@pytest.mark.parametrize("step", [1e-7, 1e-5, 1e-3, 0.03])
def test_nearly_opposite_vectors_stay_bounded(mean, step):
    u, other = draw(9, 2)
    got = merge(mean, [u, np.float32(step) * other - 2 * u])
    assert length(got) < 50 * length(u)
    if mean is not jm.nuslerp:
        assert length(got) < 1.6 * length(u)


@every_mean
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_no_scale_of_any_dtype_gives_nan(mean, dtype):
    limits = jnp.finfo(dtype)
    for scale in (limits.smallest_subnormal, limits.tiny, limits.max / 16):
        vectors = [jnp.asarray(v * np.float64(scale), dtype) for v in draw(10, 2)]
        assert np.isfinite(np.float32(merge(mean, vectors))).all()


def test_bfloat16_models_have_the_mean_of_their_float32_values():
    vectors = [jnp.asarray(v, jnp.bfloat16) for v in draw(11, 3)]
    want = merge(jm.karcher, [v.astype(jnp.float32) for v in vectors])
    got = merge(jm.karcher, vectors)
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_weights_that_cancel_mean_equal_shares_to_nuslerp():
    u, v = draw(12, 2)
    want = merge(jm.nuslerp, [u, v])
    np.testing.assert_array_equal(merge(jm.nuslerp, [u, v], weights=[1, -1]), want)


def test_weights_can_be_mapped_over_and_differentiated():
    models = [{"w": jnp.asarray(v)} for v in draw(13, 2)]
    weights = jnp.array([[1.0, 1.0], [1.0, 3.0]])
    for mean in MEANS:
        swept = jax.vmap(lambda w: mean(models, weights=w)["w"])(weights)  # noqa: B023
        one = mean(models, weights=[1.0, 3.0])["w"]
        np.testing.assert_allclose(swept[1], one, atol=1e-6)

        def first(w, mean=mean):
            return mean(models, weights=w)["w"][0, 0]

        slope, step = jax.grad(first)(weights[1])[1], jnp.array([0, 1e-2])
        numeric = (first(weights[1] + step) - first(weights[1] - step)) / 2e-2
        np.testing.assert_allclose(slope, numeric, rtol=2e-2)


@every_mean
def test_gradients_are_finite_where_directions_are_lost(mean):
    x, zero = jnp.array([1.0, 2.0]), jnp.zeros(2)
    for pair in ([x, x], [x, zero], [x, -x], [zero, zero]):
        slope = jax.grad(lambda p: mean([{"w": v} for v in p])["w"].sum())(pair)
        assert all(np.isfinite(leaf).all() for leaf in slope)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ms: jm.nuslerp([*ms, ms[0]]), "between two models, got 3"),
        (lambda ms: jm.karcher(ms, weights=[1, -1]), r"-1; it must be in \[0, inf\)"),
        (lambda ms: jm.karcher(ms, max_steps=0.5), "max_steps is 0.5"),
        (lambda ms: jm.multislerp(ms, normalize="no"), "normalize is 'no'"),
        (lambda ms: jm.multislerp(ms, origin={"w": jnp.ones(3)}), r"shape \(2,\)"),
        (lambda ms: jm.nuslerp(ms, matrices={"w": "o"}), "matrices has no effect"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call([{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}])
