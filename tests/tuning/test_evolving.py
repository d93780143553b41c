"""Evolution: a known optimum, and the same search whether interrupted or not."""

import contextlib
import functools
import json
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge
from jaxmerge.tuning import evolve

SPACE = {"weights": [(0, 2), (-1, 1)], "scale": {".*b": (0, 1), ".*": (0.5, 1.5)}}
GOAL = {"a": jnp.array([0.8, -0.4]), "b": jnp.array([0.2, -0.1])}


@pytest.fixture
def merge():
    base = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    models = [{"a": jnp.eye(2)[i], "b": jnp.eye(2)[i]} for i in range(2)]
    return functools.partial(jaxmerge.task_arithmetic, base, models)


def score(params):
    """A quadratic that is zero where weights are in the ratio -2."""
    return -sum(jnp.sum((params[name] - GOAL[name]) ** 2) for name in GOAL)


def search(merge, **options):
    return evolve(merge, score, SPACE, **{"generations": 6, **options})


def test_the_optimum_of_a_quadratic_is_found(merge):
    found = search(merge, generations=60)
    assert found.best_score > -1e-5
    best = merge(**found.best)
    for name, leaf in best.items():
        np.testing.assert_allclose(leaf, GOAL[name], atol=3e-3)
    assert found.best_score == found.scores.max()
    assert list(found.best["scale"]) == [".*b", ".*"]
    everyone = [c for generation in found.candidates for c in generation]
    assert all(
        0 <= c["weights"][0] <= 2 and 0 <= c["scale"][".*b"] <= 1 for c in everyone
    )
    np.testing.assert_allclose(
        [float(score(merge(**c))) for c in everyone[:3]], found.scores[0][:3], rtol=1e-5
    )


def test_a_black_box_in_threads_gives_the_same_search(merge):
    threads = set()

    def black_box(params):
        threads.add(threading.get_ident())
        return float(np.asarray(score(params)))

    traced = search(merge, generations=2)
    found = evolve(merge, black_box, SPACE, generations=2, workers=2)
    assert found.candidates[0] == traced.candidates[0]
    np.testing.assert_allclose(found.scores, traced.scores, rtol=1e-5)
    assert threading.get_ident() not in threads


def test_a_traced_search_compiles_once_for_all_generations(merge, compilations):
    search(merge, generations=1)
    first = len(compilations)
    compilations.clear()
    search(merge, generations=8)
    assert len(compilations) <= first


def test_a_resumed_search_is_the_same_as_one_without_a_break(merge, tmp_path):
    whole = search(merge, path=tmp_path / "whole.json")
    calls = []

    def failing(params):
        calls.append(1)
        if len(calls) > 3 * 8 + 2:
            raise RuntimeError("killed")
        return float(score(params))

    path = tmp_path / "state.json"
    with pytest.raises(RuntimeError, match="killed"):
        evolve(merge, failing, SPACE, generations=6, workers=1, path=path)
    assert len(json.loads(path.read_text())["generations"]) == 3
    slow = lambda params: float(score(params))  # noqa: E731
    undisturbed = evolve(merge, slow, SPACE, generations=6, workers=1)
    resumed = evolve(merge, slow, SPACE, generations=6, workers=1, path=path)
    assert resumed.candidates == undisturbed.candidates
    np.testing.assert_array_equal(resumed.scores, undisturbed.scores)
    # It is asked once more when it is done, and may be told to go on.
    asked = []

    def once(params):
        asked.append(params)
        return slow(params)

    again = evolve(merge, once, SPACE, generations=6, workers=1, path=path)
    assert len(asked) == 1
    assert again.best == undisturbed.best
    longer = search(merge, generations=8, path=tmp_path / "whole.json")
    np.testing.assert_array_equal(longer.scores[:6], whole.scores)
    assert longer.scores.shape == (8, 8)
    assert not list(tmp_path.glob("*.new"))


def test_files_of_other_searches_are_refused(merge, tmp_path):
    path = tmp_path / "state.json"
    search(merge, generations=1, path=path)
    with pytest.raises(ValueError, match=r"state.json is of another search: seed diff"):
        search(merge, seed=1, path=path)
    swapped = {**SPACE, "scale": dict(reversed(SPACE["scale"].items()))}
    with pytest.raises(ValueError, match="another search: space differs"):
        evolve(merge, score, swapped, path=path)
    content = json.loads(path.read_text())
    content["generations"][0]["numbers"][0][0] += 0.1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="candidates that this version of cmaes"):
        search(merge, path=path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no search"):
        search(merge, path=path)


def test_files_with_scores_of_other_models_are_refused(merge, tmp_path):
    path = tmp_path / "state.json"
    search(merge, generations=2, path=path)
    base, models = merge.args
    other = functools.partial(
        merge.func, base, [{**models[0], "a": 2 * models[0]["a"]}, models[1]]
    )
    # A candidate that is far worse than others makes nothing laxer.
    content = json.loads(path.read_text())
    content["generations"][1]["scores"][-1] = -1e9
    path.write_text(json.dumps(content))
    stored = search(merge, generations=2, path=path)
    for options in ({}, {"workers": 1}):
        before = path.read_text()
        with pytest.raises(ValueError, match="of other models, data or scores: its"):
            search(other, generations=3, path=path, **options)
        assert path.read_text() == before
    assert search(merge, generations=2, path=path).best == stored.best
    # Scores that jump about have a way through.
    noise = iter(np.linspace(0.1, 0.2, 99))
    noisy = lambda params: float(score(params)) + next(noise)  # noqa: E731
    how = {"generations": 2, "workers": 1, "path": path}
    with pytest.raises(ValueError, match="a larger tolerance if scores are not"):
        evolve(merge, noisy, SPACE, **how)
    found = evolve(merge, noisy, SPACE, **how, tolerance=1.0)
    np.testing.assert_array_equal(found.scores, stored.scores)


@pytest.mark.parametrize("useless", [np.nan, -np.inf])
def test_a_search_goes_on_from_useless_candidates(merge, tmp_path, useless):
    # A generation, its best candidate once more, and the next generation.
    scores = iter([useless] * 8 + [useless] + [1.0] * 8)
    how = {"workers": 1, "path": tmp_path / "state.json"}
    with contextlib.suppress(ValueError):  # All scores are NaN.
        evolve(merge, lambda params: next(scores), SPACE, generations=1, **how)
    found = evolve(merge, lambda params: next(scores), SPACE, generations=2, **how)
    assert found.best_score == 1


def test_whether_a_file_can_be_written_is_known_before_anything_is_scored(
    merge, tmp_path
):
    def never(params):
        raise AssertionError("scored")

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        evolve(merge, never, SPACE, workers=1, path=tmp_path / "file" / "state.json")
    search(merge, generations=1, path=tmp_path / "new" / "folder" / "state.json")
    assert (tmp_path / "new" / "folder" / "state.json").exists()


def test_a_score_may_be_a_dict_by_task(merge):
    def by_task(params):
        return {"x": 2 * score(params), "a": jnp.zeros(())}

    traced = search(merge, generations=2)
    for options in ({}, {"workers": 1}):
        found = evolve(merge, by_task, SPACE, generations=2, **options)
        np.testing.assert_allclose(found.scores, traced.scores, rtol=1e-5)


def test_useless_candidates_do_no_harm(merge):
    def picky(params):
        return jnp.where(params["a"][0] > 1, jnp.nan, score(params))

    found = evolve(merge, picky, SPACE, generations=10)
    assert np.isnan(found.scores).any()
    assert found.best_score == np.nanmax(found.scores)
    assert found.best_score > -0.5


def test_one_number_and_where_to_begin():
    base, model = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    merge = functools.partial(jaxmerge.task_arithmetic, base, [model])
    near = lambda params: -jnp.sum((params["w"] - 0.9) ** 2)  # noqa: E731
    begin = {"initial": {"scale": 0.9}, "step_size": 1e-3}
    found = evolve(merge, near, {"scale": (0, 2)}, generations=1, **begin)
    scales = [candidate["scale"] for candidate in found.candidates[0]]
    np.testing.assert_allclose(scales, 0.9, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": {}}, "the space is empty"),
        ({"space": {"scale": 1.0}}, "scale has 1.0 in its space"),
        ({"generations": 0}, "generations is 0"),
        ({"population": 1}, "population is 1"),
        ({"workers": 0}, "workers is 0"),
        ({"step_size": -1}, "step_size is -1"),
        ({"memory": "lots"}, "memory is 'lots'"),
        ({"memory": "2GB", "workers": 1}, "memory has no effect without workers=None"),
        ({"tolerance": 0.1}, "tolerance has no effect without path"),
        ({"tolerance": -1.0}, "tolerance is -1"),
        ({"initial": {"scale": 1}}, "give a candidate of the space"),
        (
            {"space": {"scale": (0, 1)}, "initial": {"scale": 3}},
            r"initial has 3, outside of the interval \(0, 1\)",
        ),
        ({"score": lambda p: float(p["a"][0])}, "score cannot be traced"),
        ({"score": lambda p: jnp.nan * p["a"][0]}, "all scores are NaN"),
    ],
)
def test_errors(merge, options, message):
    given = {"merge": merge, "score": score, "space": SPACE, "generations": 1} | options
    with pytest.raises(ValueError, match=f"evolve: .*{message}"):
        evolve(**given)


def test_options_that_set_counts_need_workers():
    base, model = {"w": jnp.zeros(8)}, {"w": jnp.arange(8.0)}
    merge = functools.partial(jaxmerge.ties, base, [model])
    kept = lambda params: -abs(int((params["w"] != 0).sum()) - 4)  # noqa: E731
    with pytest.raises(ValueError, match="density cannot be traced; give workers=1"):
        evolve(merge, kept, {"density": (0.1, 1)})
    found = evolve(merge, kept, {"density": (0.1, 1)}, workers=2, generations=5)
    assert found.best_score == 0


def test_without_cmaes_it_says_what_to_install(merge, monkeypatch):
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxmerge\[evolution\]'"):
        search(merge)
