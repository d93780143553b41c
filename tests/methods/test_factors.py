"""LoRM against its least-squares problem, and against merges of whole matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from task_statistics import statistics_of

import jaxmerge as jm
from jaxmerge.lowrank import LowRank

OUTPUTS, INPUTS, RANK = 6, 9, 2


def draws(seed=0):
    return np.random.default_rng(seed).standard_normal


def random_adapters(shared, stack=(), count=3):
    draw = draws()
    left, right = draw((*stack, OUTPUTS, RANK)), draw((*stack, RANK, INPUTS))
    adapters = []
    for _ in range(count):
        if shared == "right":
            left = draw(left.shape)
        else:
            right = draw(right.shape)
        adapters.append({"kernel": LowRank(jnp.float32(left), jnp.float32(right))})
    return adapters


def random_statistics(adapters, inputs):
    """Those of the models that adapters make of a base of zeros."""
    stack = adapters[0]["kernel"].left.shape[:-2]
    model = {"kernel": jnp.zeros((*stack, INPUTS, OUTPUTS))}
    return [statistics_of(model, {"kernel": x}, stacked=len(stack)) for x in inputs]


def random_inputs(stack=(), count=3):
    return draws(1)((count, *stack, 30, INPUTS))


EXACT = {"shrinkage": 1.0, "ridge": 0.0}


@pytest.mark.parametrize("shared", ["right", "left"])
def test_the_merged_factor_has_the_least_squared_error(shared):
    adapters, inputs = random_adapters(shared), random_inputs()
    weights = [1.0, 2.0, 0.5]
    known = random_statistics(adapters, inputs)
    got = jm.lorm(adapters, known, shared=shared, weights=weights, **EXACT)["kernel"]
    same = "right" if shared == "right" else "left"
    np.testing.assert_array_equal(
        getattr(got, same), getattr(adapters[0]["kernel"], same)
    )

    with jax.enable_x64(True):

        def error(left, right):
            return sum(
                w * jnp.sum(((left @ right - a.left @ a.right) @ x.T) ** 2)
                for w, a, x in zip(
                    weights, [one["kernel"] for one in adapters], inputs, strict=True
                )
            )

        factors = [jnp.float64(factor) for factor in got]
        gradient = jax.grad(error, 0 if shared == "right" else 1)(*factors)
        zero = jax.grad(error, 0 if shared == "right" else 1)(
            *(jnp.float64(factor) for factor in adapters[0]["kernel"])
        )
    assert np.linalg.norm(gradient) <= 1e-5 * np.linalg.norm(zero)


def test_with_the_left_factor_shared_it_is_regmean_of_the_products():
    adapters, inputs = random_adapters("left"), random_inputs()
    known = random_statistics(adapters, inputs)
    got = jm.lorm(adapters, known, shared="left", **EXACT)["kernel"]
    base = {"kernel": jnp.zeros((INPUTS, OUTPUTS))}
    models = [jm.apply_adapter(base, adapter) for adapter in adapters]
    want = jm.regmean(models, known, **EXACT)["kernel"].T
    np.testing.assert_allclose(got.left @ got.right, want, rtol=1e-4, atol=1e-4)


def test_diagonal_moments_are_what_authors_share():
    adapters, inputs = random_adapters("left"), random_inputs()
    known = random_statistics(adapters, inputs)
    got = jm.lorm(adapters, known, shared="left", shrinkage=0.0, ridge=0.0)["kernel"]
    powers = (inputs**2).sum(1)[:, None]
    rights = np.stack([adapter["kernel"].right for adapter in adapters])
    want = (rights * powers).sum(0) / powers.sum(0)
    np.testing.assert_allclose(got.right, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", ["right", "left"])
def test_layers_are_merged_one_by_one_and_task_vectors_averaged(shared):
    adapters, inputs = random_adapters(shared, stack=(2,)), random_inputs(stack=(2,))
    known = random_statistics(adapters, inputs)
    dense = [one | {"bias": jnp.full(3, float(i))} for i, one in enumerate(adapters)]
    got = jm.lorm(dense, known, shared=shared)
    np.testing.assert_allclose(got["bias"], 1.0)
    assert list(got) == ["kernel", "bias"]
    for i in range(2):
        layers = [jax.tree.map(lambda x, i=i: x[i], one) for one in adapters]
        want = jm.lorm(layers, random_statistics(layers, inputs[:, i]), shared=shared)
        for mine, theirs in zip(got["kernel"], want["kernel"], strict=True):
            np.testing.assert_allclose(mine[i], theirs, atol=1e-4)
    jitted = jax.jit(lambda a, s: jm.lorm(a, s, shared=shared))(adapters, known)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    jax.tree.map(close, jitted["kernel"], got["kernel"])


def test_equal_adapters_come_back_as_they_are():
    adapters = random_adapters("right")[:1] * 3
    got = jm.lorm(adapters, random_statistics(adapters, random_inputs()))
    for factor, want in zip(got["kernel"], adapters[0]["kernel"], strict=True):
        np.testing.assert_array_equal(factor, want)


def test_what_does_not_fit_is_refused():
    adapters, inputs = random_adapters("right"), random_inputs()
    known = random_statistics(adapters, inputs)
    nothing = [statistics_of({"kernel": jnp.zeros((INPUTS, OUTPUTS))})] * 3
    elsewhere = [
        statistics_of({"other/kernel": np.eye(3)}, {"other/kernel": np.eye(3)})
    ] * 3
    wide = {"kernel": jnp.zeros((INPUTS + 1, OUTPUTS))}
    wider = statistics_of(wide, {"kernel": np.ones((30, INPUTS + 1))})
    narrow = {"kernel": LowRank(jnp.ones((OUTPUTS, 1)), jnp.ones((1, INPUTS)))}
    for trees, statistics, options, message in [
        ([], [], {}, "^lorm: adapters is empty; give a list"),
        (adapters[0], known, {}, "^lorm: adapters is a dict; give a list"),
        (adapters, known[:2], {}, "there are 2 statistics for 3 models"),
        (adapters, [None] * 3, {}, r"^lorm: statistics\[0\] is a NoneType; collect"),
        (adapters, nothing, {}, r"^lorm: statistics\[0\] has no gram; collect"),
        (adapters, elsewhere, {}, r"statistics\[0\] has no gram of leaf 'kernel'"),
        (
            adapters,
            [*known[:2], wider],
            {},
            r"statistics\[2\] is of another model .* \(10, 6\), where .* \(9, 6\)",
        ),
        (adapters, known, {"shared": "left"}, r"left factor .* in adapters\[1\] is an"),
        (adapters, known, {"shared": "A"}, "shared is 'A'; it must be one of"),
        ([*adapters[:2], narrow], known, {}, r"adapters\[2\] has not the leaves and"),
        (adapters, known, {"weights": [1]}, "weights of leaf 'kernel' has 1 values"),
    ]:
        with pytest.raises(ValueError, match=message):
            jm.lorm(trees, statistics, **options)


def test_few_tokens_and_negative_weights_are_told():
    adapters, inputs = random_adapters("left"), random_inputs()
    few = random_statistics(adapters, inputs[:, :2])
    message = "^lorm: .* too few tokens, .* 6 for the 9 inputs of 'kernel'"
    with pytest.warns(UserWarning, match=message) as told:
        jm.lorm(adapters, few, shared="left")
    assert [warning.filename for warning in told] == [__file__]
    known = random_statistics(adapters, inputs)
    with pytest.warns(UserWarning, match="^lorm: .* not positive definite: kernel"):
        jm.lorm(adapters, known, shared="left", weights=[1, -2, 0.5])
    # Two directions of the factor that is shared need no more tokens.
    adapters = random_adapters("right")
    jm.lorm(adapters, random_statistics(adapters, inputs[:, :2]))
