"""Sweeps: the same scores as a loop, in one program, in bounded memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge
from jaxmerge.costs import footprint
from jaxmerge.tuning import grid, random_set, sweep
from jaxmerge.tuning.batching import batch


@pytest.fixture
def merge():
    """Of three models, TIES as a function of options."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (16, 8), "bias": (8,)}
    base, *models = (
        {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
        for _ in range(4)
    )
    return functools.partial(jaxmerge.ties, base, models)


def score(params):
    return -jnp.mean(jnp.tanh(params["kernel"] + params["bias"][None]) ** 2)


def loop(merge, candidates):
    return [float(score(merge(**candidate))) for candidate in candidates]


def test_a_sweep_is_a_loop_and_compiles_once(merge, compilations):
    candidates = grid(scale=np.linspace(0, 1, 30))
    want = loop(merge, candidates)
    compilations.clear()
    found = sweep(merge, candidates, score)
    # What is computed once, one candidate to measure its memory, and all of them.
    programs = len(compilations)
    np.testing.assert_allclose(found.scores, want, rtol=1e-6)
    assert found.scores.dtype == np.float64
    assert found.best == candidates[int(np.argmax(want))]
    assert found.best_score == found.scores.max()
    assert found.static == ()
    compilations.clear()
    sweep(merge, grid(scale=np.linspace(0, 1, 200)), score)
    assert len(compilations) <= programs <= 6


def test_static_options_are_found_and_compiled_value_by_value(merge):
    traced = []

    def counting(**options):
        traced.append(options["density"])
        return merge(**options)

    candidates = grid(density=[0.2, 0.6], scale=[0.1, 0.5, 0.9], vote=["mass", "count"])
    found = sweep(counting, candidates, score)
    assert set(found.static) == {"density", "vote"}
    np.testing.assert_allclose(found.scores, loop(merge, candidates), rtol=1e-6)
    # Twice to find out, and for each of four programs three times.
    assert len(traced) == 2 + 4 * 3


def test_options_by_model_and_by_rules_keep_their_order(merge):
    weights = [[0.1, 0.9, 0.0], (1.0, 2.0, 3.0), np.array([0.5, 0.5, 0.5])]
    scales = [{".*kernel": 0.2, ".*": 0.7}, {".*kernel": 1.0, ".*": 0.0}]
    candidates = grid(weights=weights, scale=scales)
    found = sweep(merge, candidates, score)
    assert found.static == ()
    np.testing.assert_allclose(found.scores, loop(merge, candidates), rtol=1e-6)


def test_only_static_options(merge):
    candidates = grid(density=[0.2, 0.6], vote=["mass", "count"])
    found = sweep(merge, candidates, score)
    np.testing.assert_allclose(found.scores, loop(merge, candidates), rtol=1e-6)


def test_memory_bounds_how_many_run_together(optimised):
    x, y = np.float32(np.random.default_rng(0).normal(size=(2, 64, 64)))

    def function(row):
        z = jnp.tanh(x + row[0] * y) @ y
        return jnp.linalg.norm(z @ z.T)

    rows = jnp.linspace(0, 1, 23)[:, None]
    want = [float(function(row)) for row in rows]
    matrix = 4 * 64 * 64
    for memory in (1, 80 * matrix, 10**9):
        batched = batch(function, 1, memory)
        np.testing.assert_allclose(batched.run(rows), want, rtol=1e-4)
        used = footprint(batched.run.func, *batched.run.args, rows).temporary
        if memory == 1:
            assert batched.together == 1
            assert used < 4 * matrix
        elif memory == 80 * matrix:
            assert 5 <= batched.together <= 80
            assert 5 * matrix < used <= memory
        else:
            assert batched.together > 23
            assert used >= 23 * matrix


def test_any_bound_on_memory_gives_the_same_scores(merge):
    candidates = grid(scale=np.linspace(0, 1, 7))
    at_once = sweep(merge, candidates, score)
    assert at_once.together == 7
    alone = sweep(merge, candidates, score, memory=1)
    assert alone.together <= 7
    np.testing.assert_allclose(alone.scores, at_once.scores, rtol=1e-6)


def test_scores_of_several_tasks_are_kept_and_averaged(merge):
    def both(params):
        return jnp.stack([score(params), -3 * score(params)])

    candidates = grid(scale=[0.0, 0.5, 1.0])
    found = sweep(merge, candidates, both)
    one = sweep(merge, candidates, score)
    assert found.scores.shape == (3, 2)
    np.testing.assert_allclose(found.scores[:, 1], -3 * one.scores, rtol=1e-6)
    assert found.best == candidates[int(np.argmin(one.scores))]
    assert found.best_score == pytest.approx(found.scores.mean(axis=1).max())


def test_a_score_may_be_what_evaluate_returns_for_several_tasks(merge):
    rng = np.random.default_rng(1)
    apply = lambda params, x: x @ params["kernel"] + params["bias"][None]  # noqa: E731
    data = {
        task: (np.float32(rng.normal(size=(20, 16))), rng.integers(0, 8, 20))
        for task in ("later", "earlier")
    }
    by_task = lambda params: jaxmerge.evaluate(apply, params, data, "accuracy")  # noqa: E731
    candidates = grid(scale=[0.0, 0.5, 1.0], vote=["mass", "count"])
    found = sweep(merge, candidates, by_task)
    assert found.tasks == ("later", "earlier")
    each = [by_task(merge(**candidate)) for candidate in candidates]
    want = [[float(row[task]) for task in data] for row in each]
    np.testing.assert_allclose(found.scores, want, rtol=1e-6)
    assert found.best == candidates[int(np.argmax(np.mean(want, axis=1)))]
    assert sweep(merge, candidates[:1], score).tasks == ()


def test_the_best_is_the_first_of_equals_and_never_nan(merge):
    base = merge.args[0]["kernel"]

    def moved(params):
        return jnp.where(jnp.all(params["kernel"] == base), jnp.nan, 1.0)

    found = sweep(merge, grid(scale=[0.0, 0.3, 0.6]), moved)
    assert np.isnan(found.scores[0])
    assert found.best == {"scale": 0.3}


def test_known_optimum():
    base, models = {"w": jnp.zeros(2)}, [{"w": jnp.eye(2)[i]} for i in range(2)]
    merge = functools.partial(jaxmerge.task_arithmetic, base, models)
    tried = np.linspace(0, 1, 11)
    weights = [list(pair) for pair in itertools.product(tried, tried)]
    goal = jnp.array([0.3, 0.8])
    found = sweep(
        merge, grid(weights=weights), lambda p: -jnp.sum((p["w"] - goal) ** 2)
    )
    assert found.best["weights"] == pytest.approx([0.3, 0.8])


def test_values_of_an_option_may_differ_in_kind(merge):
    weights = [None, [0.1, 0.9, 0.0], {".*": [1.0, 2.0, 3.0]}]
    candidates = grid(weights=weights)
    assert [candidate["weights"] for candidate in candidates] == weights
    found = sweep(merge, candidates[1:], score)
    np.testing.assert_allclose(found.scores, loop(merge, candidates[1:]), rtol=1e-6)


def test_grid_and_random_set():
    assert grid(a=[1, 2], b=["x", "y"]) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    space = {
        "scale": (0, 2),
        "weights": [(0, 1), (5, 6)],
        "t": {"b": (1, 2), "a": (3, 4)},
    }
    drawn = random_set(space, 50, seed=1)
    assert drawn == random_set(space, 50, seed=1) != random_set(space, 50, seed=2)
    assert list(drawn[0]["t"]) == ["b", "a"]
    assert all(1 <= c["t"]["b"] <= 2 and 3 <= c["t"]["a"] <= 4 for c in drawn)
    assert all(5 <= c["weights"][1] <= 6 for c in drawn)
    assert 0.8 < np.mean([c["scale"] for c in drawn]) < 1.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid(), "grid: needs at least one option"),
        (lambda: grid(scale=0.3), "grid: scale is 0.3; give a list"),
        (lambda: grid(vote="mass"), "grid: vote is 'mass'; give a list"),
        (lambda: grid(scale={".*": 1}), r"grid: scale is \{'.\*': 1\}; give a list"),
        (lambda: grid(scale=np.float32(1)), "grid: scale is .*; give a list"),
        (lambda: grid(scale=[]), "grid: scale has no values"),
        (lambda: random_set({}, 3), "random_set: the space is empty"),
        (lambda: random_set({"a": 1}, 3), r"a has 1 in its space; give \(low, high\)"),
        (lambda: random_set({"a": (1, 1)}, 3), r"interval \(1, 1\); low must be"),
        (lambda: random_set({"a": (0, np.inf)}, 3), "both finite"),
        (lambda: random_set({"a": (0, 1)}, 0), "count is 0"),
    ],
)
def test_errors_of_candidates(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("candidates", "change", "message"),
    [
        ([], {}, "there are no candidates"),
        ([0.3], {}, r"candidates\[0\] is 0.3; give a dict"),
        (
            [{"scale": 1}, {"weights": 1}],
            {},
            r"candidates\[1\] has options \['weights'",
        ),
        ([{"scale": 1.0}, {"scale": np.nan}], {}, "a number that is not finite"),
        ([{"scale": 1.0}], {"memory": "much"}, "memory is 'much'; write a size"),
        ([{"scale": 1.0}], {"score": lambda p: p["kernel"]}, r"of shape \(16, 8\)"),
        (
            [{"scale": 1.0}],
            {"score": lambda p: float(p["bias"][0])},
            "cannot be traced",
        ),
        (
            [{"scale": 1.0}],
            {"score": lambda p: [1.0, 2.0][p["bias"][0].astype(int)]},
            "cannot be traced",
        ),
        (
            [{"scale": 1.0}],
            {"score": lambda p: p["bias"][p["bias"] > 0].sum()},
            "cannot be traced",
        ),
        (
            [{"scale": 1.0}],
            {"score": lambda p: np.sum(p["bias"] * jnp.nan)},
            "all .* NaN",
        ),
        ([{"density": 0.3}, {"density": 1.3}], {}, "density .* must be in"),
        ([{"weights": [1, 2]}], {}, "has 2 values for 3 models"),
    ],
)
def test_errors(merge, candidates, change, message):
    given = {"merge": merge, "candidates": candidates, "score": score} | change
    with pytest.raises(ValueError, match=message):
        sweep(**given)


def test_bounds_of_traced_options_are_checked():
    base, models = {"w": jnp.zeros(2)}, [{"w": jnp.ones(2)}]
    merge = functools.partial(jaxmerge.consensus, base, models)
    with pytest.raises(ValueError, match=r"threshold .* is -1"):
        sweep(merge, grid(threshold=[0.4, -1.0, 0.2]), lambda p: jnp.sum(p["w"]))


def test_what_a_merge_closes_over_may_be_on_a_device(merge):
    on_device = jax.tree.map(jnp.asarray, merge.args)
    found = sweep(
        functools.partial(jaxmerge.ties, *on_device), grid(scale=[0.2, 0.4]), score
    )
    np.testing.assert_allclose(found.scores, loop(merge, found.candidates), rtol=1e-6)
