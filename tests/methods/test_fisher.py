"""Averages by entry against their formulas in float64, and what is known of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from task_statistics import statistics_of

import jaxmerge as jm

SHAPE = (6, 4)


def random_models(count=3, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return [{"kernel": jnp.float32(draw(SHAPE))} for _ in range(count)]


def with_fisher(models, fishers):
    return [
        statistics_of(model, fisher={"kernel": fisher})
        for model, fisher in zip(models, fishers, strict=True)
    ]


def random_fishers(count=3, seed=1):
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)) ** 2


def stacked(models):
    return np.stack([np.float64(model["kernel"]) for model in models])


def column(values):
    return np.reshape(values, (-1, 1, 1))


def test_fisher_average():
    models, fishers = random_models(), random_fishers()
    statistics = with_fisher(models, fishers)
    values = stacked(models)
    for weights in ([1, 1, 1], [3, 1, 0.5]):
        shares = column(weights) * fishers
        got = jm.fisher_average(models, statistics, weights=weights, floor=0.0)
        want = (shares * values).sum(0) / shares.sum(0)
        np.testing.assert_allclose(got["kernel"], want, rtol=1e-5, atol=1e-6)
    equal = with_fisher(models, [fishers[0]] * 3)
    got = jm.fisher_average(models, equal)["kernel"]
    np.testing.assert_allclose(got, values.mean(0), atol=1e-6)
    got = jm.fisher_average([models[0]] * 3, statistics)
    np.testing.assert_array_equal(got["kernel"], models[0]["kernel"])


def test_scale_and_amount_of_data_are_without_effect():
    models, fishers = random_models(), random_fishers()
    fishers[:, 0] = 0
    want = jm.fisher_average(models, with_fisher(models, fishers), floor=1e-2)
    tiny = jm.fisher_average(models, with_fisher(models, 1e-25 * fishers), floor=1e-2)
    np.testing.assert_allclose(tiny["kernel"], want["kernel"], rtol=1e-4)
    twice = statistics_of(models[0], fisher={"kernel": 2 * fishers[0]}, examples=20)
    known = [twice, *with_fisher(models[1:], fishers[1:])]
    got = jm.fisher_average(models, known, floor=1e-2)
    np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=1e-5)


def test_entries_that_no_data_speak_of_are_averaged():
    models, fishers = random_models(), random_fishers()
    fishers[:, 0] = 0
    fishers[1:, 1] = 0
    values = stacked(models)
    for floor in (0.0, 1e-6):
        known = with_fisher(models, fishers)
        got = jm.fisher_average(models, known, floor=floor, weights=[1, 2, 3])
        mean = (column([1, 2, 3]) * values).sum(0) / 6
        np.testing.assert_allclose(got["kernel"][0], mean[0], atol=1e-6)
        # Of row 1 only the first model knows something.
        np.testing.assert_allclose(got["kernel"][1], values[0, 1], atol=1e-4)
    nothing = with_fisher(models, 0 * fishers)
    got = jm.fisher_average(models, nothing)["kernel"]
    np.testing.assert_allclose(got, values.mean(0), atol=1e-6)


def test_floor_is_a_share_of_the_mean_of_each_layer():
    models = [{"kernel": x} for x in (jnp.zeros((2, 3)), jnp.ones((2, 3)))]
    fishers = np.array([[[4.0, 0, 8], [4e3, 0, 8e3]], [[0, 6, 6], [0, 6e3, 6e3]]])
    statistics = [
        statistics_of(model, fisher={"kernel": fisher}, stacked=1)
        for model, fisher in zip(models, fishers, strict=True)
    ]
    got = jm.fisher_average(models, statistics, floor=0.5)["kernel"]
    # The mean of a layer is 4, so the floor is 2.
    np.testing.assert_allclose(got, [[2 / 6, 6 / 8, 6 / 14]] * 2, rtol=1e-6)


def quadratic_tasks(base, weights, base_curvature, curvatures, seed=0):
    """Fine-tuned on quadratic losses from the base, and the minimum of all losses."""
    minima = np.random.default_rng(seed).standard_normal((len(weights), *SHAPE))
    pulled = base_curvature * base
    tuned = (curvatures * minima + pulled) / (curvatures + base_curvature)
    shares = column(weights) * curvatures
    joint = ((shares * minima).sum(0) + pulled) / (shares.sum(0) + base_curvature)
    return tuned, joint


def as_models(values):
    return [{"kernel": jnp.float32(value)} for value in values]


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, 1, 2], [1, 1, -0.2]])
def test_gradient_matching_is_exact_on_quadratic_losses(weights):
    (base,) = random_models(1)
    draw = np.random.default_rng(1).uniform
    start, *curvatures = draw(0.5, 2, (4, *SHAPE))
    curvatures = np.stack(curvatures)
    tuned, joint = quadratic_tasks(
        np.float64(base["kernel"]), weights, start, curvatures
    )
    models = as_models(tuned)
    statistics = with_fisher(models, curvatures)
    (of_base,) = with_fisher([base], [start - 0.5])
    got = jm.gradient_matching(
        base, models, statistics, weights=weights, base_statistics=of_base, prior=0.5
    )["kernel"]
    np.testing.assert_allclose(got, joint, rtol=1e-4, atol=1e-5)
    others = [
        jm.task_arithmetic(base, models, weights=weights),
        jm.fisher_average(models, statistics),
    ]
    for other in others:
        assert np.abs(other["kernel"] - joint).max() > 0.1


def test_gradient_matching_lies_between_task_arithmetic_and_fisher_average():
    base, *models = random_models(4)
    fishers = random_fishers()
    weights = [0.3, 0.5, 0.2]
    added = jm.task_arithmetic(base, models, weights=weights)
    for known, prior in [(0 * fishers, 0.0), (0 * fishers, 1.0), (fishers, 1e8)]:
        statistics = with_fisher(models, known)
        got = jm.gradient_matching(
            base, models, statistics, weights=weights, prior=prior
        )
        np.testing.assert_allclose(got["kernel"], added["kernel"], atol=1e-5)
    statistics = with_fisher(models, fishers)
    got = jm.gradient_matching(base, models, statistics, weights=weights)
    want = jm.fisher_average(models, statistics, weights=weights, floor=0.0)
    np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=1e-4, atol=1e-5)


def test_where_more_curvature_is_removed_than_there_is_tasks_are_subtracted():
    base, *models = random_models(3)
    statistics = with_fisher(models, np.ones((2, *SHAPE)))
    got = jm.gradient_matching(base, models, statistics, weights=[1.0, -1.5])
    want = jm.task_arithmetic(base, models, weights=[1.0, -1.5])
    np.testing.assert_allclose(got["kernel"], want["kernel"], atol=1e-6)


def test_leaves_without_fisher_information():
    models = [
        model | {"bias": jnp.full(2, float(i))}
        for i, model in enumerate(random_models())
    ]
    statistics = with_fisher(models, random_fishers())
    got = jm.fisher_average(models, statistics, weights=[1, 1, 2])
    np.testing.assert_allclose(got["bias"], 1.25)
    got = jm.gradient_matching(models[0], models[1:], statistics[1:], weights=[1, 2])
    np.testing.assert_allclose(got["bias"], 5.0)


def test_statistics_of_the_base_must_be_those():
    base, *models = random_models(3)
    statistics = with_fisher(models, random_fishers(2))
    with pytest.raises(
        ValueError, match=r"gradient_matching: statistics\[0\] has no f"
    ):
        jm.gradient_matching(base, models, [statistics_of(m) for m in models])
    for of_base, message in [
        (statistics_of(base), "has no fisher"),
        ({}, "is a dict"),
        (statistics_of({"bias": jnp.ones(3)}), "is of another model than base"),
    ]:
        message = f"^gradient_matching: base_statistics {message}"
        with pytest.raises(ValueError, match=message):
            jm.gradient_matching(base, models, statistics, base_statistics=of_base)
    for option in ({"prior": -1.0}, {"weights": [1]}):
        with pytest.raises(ValueError, match=r"^gradient_matching: .* of leaf 'ker"):
            jm.gradient_matching(base, models, statistics, **option)
