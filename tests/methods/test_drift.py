"""LOT Merging against its closed form in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from task_statistics import random_statistics, statistics_of

import jaxmerge as jm

few = pytest.mark.filterwarnings("ignore:.*too few tokens")


def problem(tokens=60, inputs=12, outputs=8, count=3, rank=None, seed=0):
    """A base, models and what enters their weights, of some rank."""
    draw = np.random.default_rng(seed).standard_normal
    base = {"kernel": np.float32(draw((inputs, outputs)))}
    models = [
        {"kernel": base["kernel"] + np.float32(0.3 * draw((inputs, outputs)))}
        for _ in range(count)
    ]
    span = np.eye(inputs)[:rank] + 0.5 * draw((rank or inputs, inputs)) / inputs**0.5
    data = [draw((tokens + 10 * t, len(span))) @ span for t in range(count)]
    return base, models, data


def known(models, data):
    pairs = zip(models, data, strict=True)
    return [statistics_of(model, {"kernel": x}) for model, x in pairs]


def merged(base, models, data, **options):
    return np.float64(
        jm.lot_merge(base, models, known(models, data), **options)["kernel"]
    )


def closed_form(base, models, grams):
    """Equation 9, and the projection on the directions that have data."""
    start = np.float64(base["kernel"])
    deltas = [np.float64(model["kernel"]) - start for model in models]
    inverse = np.linalg.pinv(sum(grams), rcond=1e-9, hermitian=True)
    right = sum(gram @ delta for gram, delta in zip(grams, deltas, strict=True))
    return start + inverse @ right, inverse @ sum(grams)


def close(got, want, rtol=1e-5):
    assert np.linalg.norm(got - want) <= rtol * np.linalg.norm(want)


@few
@pytest.mark.parametrize("rank", [12, 5])
def test_weights(rank):
    base, models, data = problem(rank=rank)
    means = [x.T @ x / len(x) for x in data]
    want, present = closed_form(base, models, means)
    got = merged(base, models, data)
    close(got, want)
    absent = np.eye(12) - present
    np.testing.assert_allclose(absent @ (got - base["kernel"]), 0, atol=2e-6)
    sums = [x.T @ x for x in data]
    close(
        merged(base, models, data, normalize="none"), closed_form(base, models, sums)[0]
    )
    traces = [gram / np.trace(gram) for gram in means]
    close(
        merged(base, models, data, normalize="trace"),
        closed_form(base, models, traces)[0],
    )
    weighted = [w * gram for w, gram in zip((1, 0.5, 3), means, strict=True)]
    close(
        merged(base, models, data, weights=[1, 0.5, 3]),
        closed_form(base, models, weighted)[0],
    )


def test_it_is_regmean_where_data_are_everywhere_and_else_stays_at_the_base():
    base, models, data = problem()
    exact = {"shrinkage": 1.0, "ridge": 0.0}
    want = jm.regmean(models, known(models, data), **exact)["kernel"]
    close(merged(base, models, data), np.float64(want))
    for x in data:
        x[:, [2, 7]] = 0
    got = merged(base, models, data)
    np.testing.assert_array_equal(got[[2, 7]], base["kernel"][[2, 7]])
    average = jm.regmean(models, known(models, data))["kernel"]
    assert np.abs(average[2] - base["kernel"][2]).max() > 0.1


@few
@pytest.mark.parametrize("spread", [0, 4])
def test_equal_and_single_models_come_back_in_the_span_of_the_data(spread):
    base, models, data = problem(rank=6)
    data = [x @ np.diag(np.logspace(0, -spread / 2, 12)) for x in data]
    grams = [x.T @ x for x in data]
    for ends, inputs in ([models[:1] * 3, data], [models[:1], data[:1]]):
        want, _ = closed_form(base, ends, grams[: len(ends)])
        close(merged(base, ends, inputs, rtol=1e-6), want, rtol=3e-5)
    base, models, data = problem()
    close(merged(base, models[:1] * 3, data), models[0]["kernel"], rtol=1e-6)


def test_small_directions_count_as_none_by_rtol():
    base, models, data = problem()
    rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((12, 12)))[0]
    spectrum = np.where(np.arange(12) < 8, 1.0, 1e-2)
    data = [np.linalg.qr(x)[0] * spectrum @ rotation for x in data]
    grams = [x.T @ x / len(x) for x in data]
    want, _ = closed_form(base, models, grams)
    close(merged(base, models, data), want, rtol=1e-4)
    large = rotation[:8].T @ rotation[:8]
    got = merged(base, models, data, rtol=1e-3)
    want, _ = closed_form(base, models, [large @ gram @ large for gram in grams])
    close(got, want)


def leaves_of_other_kinds():
    draw = np.random.default_rng(0).standard_normal
    base = {
        "norm": {"scale": np.float32(draw(5)), "bias": np.float32(draw(5))},
        "heads": {"scale": np.float32(draw((2, 5)))},
        "embedding": np.float32(draw((7, 5))),
        "kernel": np.float32(draw((5, 3))),
        "temperature": np.float32(1.0),
        "unused": np.float32(draw(4)),
        "steps": np.array(3),
    }
    models = [
        jax.tree.map(
            lambda x: np.float32(x + draw(x.shape)) if x.dtype == np.float32 else x,
            base,
        )
        for _ in range(3)
    ]
    squares = [{"norm": draw(5) ** 2, "heads": draw((2, 5)) ** 2} for _ in models]
    counts = np.random.default_rng(1).integers(0, 5, (3, 7))
    statistics = [
        statistics_of(
            model,
            {"kernel": draw((30, 5))},
            diagonal={
                "norm/scale": s["norm"],
                "heads/scale": s["heads"],
                "norm/bias": np.full(5, 10 * (t + 1)),
                "embedding": np.repeat(counts[t][:, None], 5, 1),
                "temperature": np.float32(t + 1),
            },
        )
        for t, (model, s) in enumerate(zip(models, squares, strict=True))
    ]
    return base, models, statistics, squares


def test_scales_are_weighted_by_the_squares_of_what_they_multiply():
    base, models, statistics, squares = leaves_of_other_kinds()
    got = jm.lot_merge(base, models, statistics)
    for kind in ("norm", "heads"):
        of_tasks = [s[kind] for s in squares]
        deltas = [m[kind]["scale"] - base[kind]["scale"] for m in models]
        pulls = sum(s * d for s, d in zip(of_tasks, deltas, strict=True))
        want = base[kind]["scale"] + pulls / sum(of_tasks)
        np.testing.assert_allclose(got[kind]["scale"], want, atol=1e-5)
    mean = jm.average(models)
    np.testing.assert_allclose(got["norm"]["bias"], mean["norm"]["bias"], atol=1e-6)
    for path in ("embedding", "temperature", "unused"):
        np.testing.assert_allclose(got[path], mean[path], atol=1e-6)
    assert got["steps"] == 3
    weighted = jm.lot_merge(base, models, statistics, weights=[1, 2, 3])
    np.testing.assert_allclose(
        weighted["norm"]["bias"],
        jm.average(models, weights=[1, 2, 3])["norm"]["bias"],
        atol=1e-6,
    )


def test_entries_of_a_scale_without_data_get_the_mean():
    base, models, statistics, _ = leaves_of_other_kinds()
    for one in statistics:
        one.diagonal["norm/scale"][2] = 0
    got = jm.lot_merge(base, models, statistics)["norm"]["scale"]
    np.testing.assert_allclose(
        got[2], jm.average(models)["norm"]["scale"][2], atol=1e-6
    )


def test_a_network_with_norms():
    def apply(params, x):
        x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))
        x = x * params["scale"][None] + params["bias"][None]
        return x @ params["kernel"]

    draw = np.random.default_rng(0).standard_normal
    shapes = {"scale": (6,), "bias": (6,), "kernel": (6, 4)}
    base, *models = (
        {path: np.float32(draw(shape)) for path, shape in shapes.items()}
        for _ in range(3)
    )
    data = [np.float32(draw((50, 6)) * np.exp(draw(6))) for _ in models]
    statistics = [
        jm.collect(apply, model, [x]) for model, x in zip(models, data, strict=True)
    ]
    got = jm.lot_merge(base, models, statistics)
    normalised = [x / np.sqrt(np.mean(x * x, -1, keepdims=True)) for x in data]
    squares = [np.sum(x * x, 0) for x in normalised]
    pairs = zip(squares, models, strict=True)
    want = sum(s * model["scale"] for s, model in pairs) / sum(squares)
    np.testing.assert_allclose(got["scale"], want, atol=1e-4)
    mean = (models[0]["bias"] + models[1]["bias"]) / 2
    np.testing.assert_allclose(got["bias"], mean, atol=1e-6)


def test_dtypes_are_those_of_the_base():
    base, models, data = problem()
    statistics = known(models, data)
    want = jm.lot_merge(base, models, statistics)["kernel"]
    start = {"kernel": jnp.bfloat16(base["kernel"])}
    got = jm.lot_merge(start, models, statistics)["kernel"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), want, atol=2e-2)


def test_what_does_not_fit_is_refused():
    base, models, data = problem()
    statistics = known(models, data)

    def refused(message, statistics=statistics, **options):
        with pytest.raises(ValueError, match=message):
            jm.lot_merge(base, models, statistics, **options)

    refused("^lot_merge: there are 2 statistics for 3 models", statistics[:2])
    refused("^lot_merge: rtol is 1; it must be in", rtol=1.0)
    refused("^lot_merge: normalize is 'sum'", normalize="sum")
    refused("weights of leaf 'kernel' has 2 values", weights=[1, 2])
    empty = [statistics_of(model) for model in models]
    refused(r"^lot_merge: statistics\[0\] has no gram", empty)
    with pytest.raises(ValueError, match=r"^lot_merge: needs a base"):
        jm.lot_merge(None, models, statistics)


def test_layers_of_a_stack_are_merged_one_by_one():
    draw = np.random.default_rng(0).standard_normal
    shapes = {"kernel": (2, 6, 4), "scale": (2, 6)}
    base, *models = (
        {path: np.float32(draw(shape)) for path, shape in shapes.items()}
        for _ in range(3)
    )
    statistics = random_statistics(models, stacked=1)
    got = jm.lot_merge(base, models, statistics)
    for i in range(2):
        grams = [s.gram["kernel"][i] / s.tokens["kernel"][i] for s in statistics]
        of_layer = [{"kernel": tree["kernel"][i]} for tree in (base, *models)]
        want, _ = closed_form(of_layer[0], of_layer[1:], np.float64(grams))
        np.testing.assert_allclose(got["kernel"][i], want, atol=1e-4)
