"""Coefficients by evolution, for scores that are no function that JAX can trace.

Hansen, "The CMA Evolution Strategy: A Tutorial", 2016, arXiv:1604.00772. As a search
over merges: Akiba et al., "Evolutionary Optimization of Model Merging Recipes", 2024,
arXiv:2403.13187.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmerge.checkpoints.files import as_json, sync
from jaxmerge.options import number, whole_number, without_effect
from jaxmerge.tuning.candidates import Candidate, Space, fill, intervals_of, numbers
from jaxmerge.tuning.scoring import Score, mean_score, means_of, table_of
from jaxmerge.tuning.sweeping import (
    Merge,
    bytes_of,
    check_ends,
    compile_scores,
    static_options,
)

FORMAT = 1
_MEMORY = "1GB"
_TOLERANCE = 1e-3


class Evolution(NamedTuple):
    """What an evolution found.

    Attributes:
        best: the candidate with the best score, the first of equally good ones:
            `merge(**best)` are its parameters.
        best_score: its score.
        candidates: all, generation after generation.
        scores: (generations, population), in float64.
    """

    best: Candidate
    best_score: float
    candidates: list[list[Candidate]]
    scores: np.ndarray


def evolve(
    merge: Merge,
    score: Score,
    space: Space,
    *,
    generations: int = 20,
    population: int | None = None,
    initial: Candidate | None = None,
    step_size: float = 1 / 6,
    seed: int = 0,
    workers: int | None = None,
    path: str | os.PathLike[str] | None = None,
    tolerance: float = _TOLERANCE,
    memory: int | str = _MEMORY,
) -> Evolution:
    """Searches coefficients by CMA-ES, from nothing but scores.

    Needs the package cmaes, which `pip install 'jaxmerge[evolution]'` brings. Numbers
    are searched in units of their intervals, and never leave them.

    Args:
        merge: `merge(**candidate)` merges, as `functools.partial(jaxmerge.ties, base,
            models)` does, or any function of options.
        score: `score(params)`, a number, or several of which the mean counts, as in
            `sweep`; higher is better, NaN is worst. On validation data, never on test
            data.
        space: options by name, with `(low, high)` where a number is to be found: alone,
            in a list of one per model, or in rules.
        generations: how many at most; fewer if CMA-ES sees that it has converged.
        population: candidates in each, at least 2. By default 4 + floor(3 ln n), for n
            numbers.
        initial: the candidate to begin at; by default, the middle of the space.
        step_size: the first standard deviation, in units of the intervals.
        seed: of all draws. The same seed gives the same candidates for the same scores.
        workers: None evaluates a generation as `sweep` does, in one vmapped call of a
            program that is compiled once: merge and score must be traceable. A number
            calls them from so many threads, with concrete numbers and parameters, so
            that they may do anything.
        path: of a file that gets all scores after each generation. If it is there, the
            search goes on from it and ends as if it had never been interrupted; it
            may also be told to run for more generations. The file knows the space and
            the options of the search, but neither models nor data: the best candidate
            in it is scored again, and another score than before is an error.
        tolerance: by how much this score may differ, as a fraction of its magnitude
            plus the median magnitude in the first generation. Scores that are not
            deterministic need a larger one than rounding does.
        memory: without `workers`, as in `sweep`; an error with them.

    Returns:
        The best candidate of all, and the course of the search.

    Raises:
        ImportError: cmaes is not installed.
        ValueError: an invalid space or option, options that cannot be traced without
            `workers`, a file of another search or of other scores, something else than
            a score, or no score but NaN.
        OSError: `path` cannot be written, before anything is scored.

    Example:
        >>> import jaxmerge
        >>> base, model = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
        >>> def merge(scale):
        ...     return jaxmerge.task_arithmetic(base, [model], scale=scale)
        >>> score = lambda params: -jnp.abs(params["w"] - 0.3).sum()
        >>> found = evolve(merge, score, {"scale": (0, 2)})
        >>> round(found.best["scale"], 2)
        0.3
    """
    method = "evolve"
    cma = _cma(method)
    intervals = intervals_of(method, space)
    low, high = intervals.T
    whole_number(method, "generations", generations, least=1)
    number(method, "step_size", step_size, "(0, inf)", static=True)
    number(method, "tolerance", tolerance, "[0, inf)", static=True)
    if population is not None:
        whole_number(method, "population", population, least=2)
    if workers is not None:
        whole_number(method, "workers", workers, least=1)
        without_effect(method, "memory", memory, _MEMORY, "workers=None")
    if path is None:
        without_effect(method, "tolerance", tolerance, _TOLERANCE, "path")
    middle = _position(method, space, initial, intervals)
    score_all = _scorer(method, merge, score, space, intervals, workers, memory)
    search = cma(
        middle, step_size, np.tile([0.0, 1.0], (len(low), 1)), 100, seed, population
    )
    settings = {
        "space": fill(space, iter(intervals.tolist()), pairs=True),
        "population": search.population_size,
        "initial": middle.tolist(),
        "step_size": step_size,
        "seed": seed,
    }
    known = [] if path is None else _read(method, Path(path), settings)[:generations]
    if path is not None and not known:
        # Shows that it can be written before hours go into the first generation.
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _write(Path(path), settings, [], [])
    asked, scores = [], []
    while len(scores) < generations and not search.should_stop():
        places = np.array([search.ask() for _ in range(search.population_size)])
        rows = low + places * (high - low)
        if len(scores) < len(known):
            found = _replay(method, path, known[len(scores)], rows)
        else:
            found = score_all(rows)
        search.tell(list(zip(places, _costs(found).tolist(), strict=True)))
        asked.append(rows)
        scores.append(found)
        if len(scores) == len(known):
            _score_again(method, path, asked, scores, score_all, tolerance)
        elif path is not None and len(scores) > len(known):
            _write(Path(path), settings, asked, scores)
    course = np.array(scores)
    if np.isnan(course).all():
        raise ValueError(
            f"{method}: all scores are NaN; check score on parameters that are good."
        )
    candidates = [[_candidate(space, row) for row in rows] for rows in asked]
    best = divmod(int(np.nanargmax(course)), course.shape[1])
    return Evolution(
        candidates[best[0]][best[1]], float(course[best]), candidates, course
    )


def _costs(scores: np.ndarray) -> np.ndarray:
    """What CMA-ES minimises: only the order counts, infinities have no differences."""
    return np.nan_to_num(-scores, nan=_WORST, posinf=_WORST, neginf=-_WORST)


_WORST = 1e100


def _cma(method: str) -> Any:
    try:
        from cmaes import CMA
    except ImportError as error:
        raise ImportError(
            f"{method} needs the package cmaes; "
            "install it with: pip install 'jaxmerge[evolution]'"
        ) from error
    return CMA


def _candidate(space: Space, row: np.ndarray) -> Candidate:
    return fill(space, iter(row.tolist()), pairs=True)


def _position(
    method: str, space: Space, initial: Candidate | None, intervals: np.ndarray
) -> np.ndarray:
    """Where a candidate is in the space, from 0 to 1 along each interval."""
    low, high = intervals.T
    if initial is None:
        return np.full(len(low), 0.5)
    row = [float(x) for name in space for x in numbers(initial.get(name, []))]
    if initial.keys() != space.keys() or len(row) != len(low):
        raise ValueError(
            f"{method}: initial is {initial!r}; give a candidate of the space."
        )
    inside = (low <= row) & (row <= high)
    if not inside.all():
        i = int(np.argmin(inside))
        raise ValueError(
            f"{method}: initial has {row[i]:g}, outside of the interval "
            f"({low[i]:g}, {high[i]:g})."
        )
    return (row - low) / (high - low)


def _scorer(
    method: str,
    merge: Merge,
    score: Score,
    space: Space,
    intervals: np.ndarray,
    workers: int | None,
    memory: int | str,
) -> Callable[[np.ndarray], np.ndarray]:
    """From rows of numbers (population, n) to scores (population,)."""
    ends = [_candidate(space, row) for row in intervals.T]
    if workers is not None:

        def alone(row: np.ndarray) -> float:
            return mean_score(method, score(merge(**_candidate(space, row))))

        def in_threads(rows: np.ndarray) -> np.ndarray:
            with ThreadPoolExecutor(workers) as pool:
                return np.array(list(pool.map(alone, rows)))

        return in_threads
    if static := static_options(merge, ends):
        raise ValueError(
            f"{method}: {', '.join(static)} cannot be traced; give workers=1, which "
            "merges with concrete numbers, or more."
        )
    check_ends(method, merge, ends, ())
    compiled = compile_scores(
        method, merge, score, ends[0], (), bytes_of(method, memory)
    )

    def at_once(rows: np.ndarray) -> np.ndarray:
        return means_of(table_of(compiled.run(jnp.array(rows))))

    return at_once


def _read(method: str, path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The generations that an earlier run left in a file."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        found, generations = content["settings"], content["generations"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{method}: {path} holds no search ({error}); give another path."
        ) from error
    # As text, in which rules have an order.
    differing = [
        name
        for name, value in settings.items()
        if json.dumps(found.get(name)) != json.dumps(value)
    ]
    if content.get("format") != FORMAT or differing:
        raise ValueError(
            f"{method}: {path} is of another search: "
            f"{', '.join(differing) or 'its format'} differs; give another path."
        )
    return generations


def _replay(
    method: str, path: Any, generation: dict[str, Any], rows: np.ndarray
) -> np.ndarray:
    """The scores that a generation got earlier."""
    if not np.array_equal(generation["numbers"], rows):
        raise ValueError(
            f"{method}: {path} has candidates that this version of cmaes or NumPy "
            "does not draw; give another path."
        )
    return np.array(generation["scores"], float)


def _score_again(
    method: str,
    path: Any,
    asked: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    score_all: Callable[[np.ndarray], np.ndarray],
    tolerance: float,
) -> None:
    """Checks that the best candidate of a file still has its score.

    Nothing else tells models, data and the score from others.
    """
    rows, known = np.concatenate(asked), np.concatenate(scores)
    best = int(np.argmin(_costs(known)))
    (now,) = score_all(rows[[best]])
    # The best score may have come close to zero, and what rounds in it has not.
    begun = np.abs(scores[0][np.isfinite(scores[0])])
    least = tolerance * float(np.median(begun)) if len(begun) else 0.0
    if not np.isclose(now, known[best], rtol=tolerance, atol=least, equal_nan=True):
        raise ValueError(
            f"{method}: {path} is of other models, data or scores: its best candidate "
            f"has {known[best]:g} there and {now:g} now; give another path, or a "
            "larger tolerance if scores are not deterministic."
        )


def _write(
    path: Path,
    settings: dict[str, Any],
    asked: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
) -> None:
    """Puts the file in the place of the one before, whole or not at all."""
    generations = [
        {"numbers": rows.tolist(), "scores": found.tolist()}
        for rows, found in zip(asked, scores, strict=True)
    ]
    content = {"format": FORMAT, "settings": settings, "generations": generations}
    new = path.with_name(path.name + ".new")
    new.write_bytes(as_json(content))
    sync(new)
    new.replace(path)
    sync(path.parent)
