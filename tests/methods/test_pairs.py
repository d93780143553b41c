"""One model merged into its base: NearSwap and Arcee Fusion."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_methods import BASE, DELTAS

import jaxmerge as jm
from jaxmerge.methods.pairs import _divergence

ROWS = {"w": "oi"}


def draw(seed, step, shape=(12, 9)):
    noise = np.random.default_rng(seed).standard_normal((2, *shape))
    base = np.float32(noise[0])
    return base, np.float32(base + step * noise[1])


def fuse(base, model, **options):
    options = {"matrices": ROWS} | options
    return np.asarray(jm.arcee_fusion({"w": base}, [{"w": model}], **options)["w"])


def test_worked_example_of_nearswap():
    base, model = np.float32(BASE), np.float32(BASE + DELTAS[0])
    merged = jm.nearswap({"w": base}, [{"w": model}], t=0.5)["w"]
    want = [1, -1.5, 2.5, 0, 2, -0.6, 0.45, 2.5]
    np.testing.assert_allclose(merged, want, atol=1e-6)


@pytest.mark.parametrize("t", [1e-4, 0.01, 10.0])
def test_nearswap_is_the_published_formula(t):
    base, model = draw(0, 0.01)
    merged = jm.nearswap({"w": base}, [{"w": model}], t=t)["w"]
    np.testing.assert_allclose(merged, oracles.nearswap(base, model, t), atol=1e-6)
    assert np.abs(merged - base).max() <= t + 1e-6


def test_nearswap_of_nothing_is_the_base_and_of_everything_the_model():
    base, model = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, 3.0, -2.0])}
    assert jm.nearswap(base, [model], t=0.0)["w"].tolist() == [1, 1, 1]
    assert jm.nearswap(base, [model], t=9.0)["w"].tolist() == [1, 3, -2]


def test_the_limit_of_nearswap_can_be_mapped_over_and_follow_rules():
    base, model = {"a": jnp.zeros(2), "b": jnp.zeros(2)}, {"a": jnp.ones(2)}
    model["b"] = -jnp.ones(2)
    swept = jax.vmap(lambda t: jm.nearswap(base, [model], t=t))(jnp.array([0.25, 0.5]))
    assert swept["b"].tolist() == [[-0.25, -0.25], [-0.5, -0.5]]
    merged = jm.nearswap(base, [model], t={"a": 0.5, ".*": 0.25})
    assert (merged["a"].tolist(), merged["b"].tolist()) == ([0.5, 0.5], [-0.25, -0.25])


@pytest.mark.parametrize("step", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("seed", range(4))
def test_arcee_fusion_is_its_float64_version(seed, step):
    base, model = draw(seed, step)
    got = fuse(base, model)
    np.testing.assert_array_equal(got, oracles.arcee_fusion(base, model))
    assert 0 < (got != base).mean() < 0.25
    np.testing.assert_array_equal(fuse(base.T, model.T, matrices={"w": "io"}).T, got)


def test_arcee_fusion_by_leaf_has_one_softmax():
    base, model = draw(5, 0.1)
    got = fuse(base, model, scope="leaf", matrices=None)
    want = oracles.arcee_fusion(base.ravel(), model.ravel())
    np.testing.assert_array_equal(got.ravel(), want)


@pytest.mark.parametrize("step", [1e-5, 1e-4, 1e-2, 1.0, 30.0])
def test_the_divergence_of_small_changes_is_not_lost_to_rounding(step):
    base, model = draw(6, step, (16, 512))
    p, q = oracles.softmax(model), oracles.softmax(base)
    want = (p * np.log(p / q)).sum(-1, keepdims=True)
    got = _divergence(jnp.asarray(model), jnp.asarray(base), (1,))
    np.testing.assert_allclose(got, want, rtol=1e-2 if step < 1e-4 else 1e-3)
    assert (got > 0).all()


def test_arcee_fusion_of_equal_models_is_the_base_of_equal_changes_the_model():
    base, model = draw(7, 0.1)
    np.testing.assert_array_equal(fuse(base, base), base)
    flat, moved = np.zeros((2, 4), np.float32), np.float32([[1, -1, 1, -1]] * 2)
    np.testing.assert_array_equal(fuse(flat, moved), moved)
    # Rows of one entry diverge nowhere.
    column = (base[:, :1], model[:, :1])
    np.testing.assert_array_equal(fuse(*column), column[1])


def test_huge_changes_stay_finite():
    base, model = draw(8, 1e4)
    merged = fuse(base, model)
    assert np.isfinite(merged).all()
    assert (merged != base).any()


def test_tiny_bfloat16_changes_stay_finite():
    base = jnp.full((4, 4), 1e-40, jnp.bfloat16)
    for method in (jm.nearswap, jm.arcee_fusion):
        merged = method({"kernel": base}, [{"kernel": 2 * base}])["kernel"]
        assert jnp.isfinite(merged).all()


@pytest.mark.parametrize("method", [jm.nearswap, jm.arcee_fusion])
def test_two_models_are_refused(method):
    tree = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="one model into the base, got 2"):
        method(tree, [tree, tree])


def test_misuse_is_named():
    base, model = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"t of leaf 'w' is -1; it must be in"):
        jm.nearswap(base, [model], t=-1)
    with pytest.raises(ValueError, match=r"^arcee_fusion: .*models\[0\] leaf 'w' has"):
        jm.arcee_fusion(base, [{"w": jnp.ones(3)}])
    with pytest.raises(ValueError, match="scope is 'model'"):
        jm.arcee_fusion(base, [model], scope="model")
