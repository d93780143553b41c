"""Trying many coefficients of a merge at once."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.recipe_syntax import size_in_bytes
from jaxmerge.tree import Params
from jaxmerge.tuning.batching import Batched, batch
from jaxmerge.tuning.candidates import Candidate, fill, numbers
from jaxmerge.tuning.scoring import Score, checked_score, means_of, table_of

Merge = Callable[..., Params]
"""A merge of given models: from options, by name, to parameters."""


class Sweep(NamedTuple):
    """What a sweep found.

    Attributes:
        candidates: all that were tried, as they were given.
        scores: of each, (candidates,), or (candidates, numbers) if a score is several,
            in float64.
        tasks: the names of these numbers, if a score is a dict; else none.
        best: the candidate with the best mean score, the first of equally good ones:
            `merge(**best)` are its parameters.
        static: the options that cannot be traced, and were compiled value by value.
        together: how many candidates were merged and evaluated at a time.
    """

    candidates: list[Candidate]
    scores: np.ndarray
    tasks: tuple[str, ...]
    best: Candidate
    static: tuple[str, ...]
    together: int

    @property
    def best_score(self) -> float:
        """The mean score of the best candidate."""
        return float(np.nanmax(means_of(self.scores)))


def sweep(
    merge: Merge,
    candidates: Sequence[Candidate],
    score: Score,
    *,
    memory: int | str = "1GB",
) -> Sweep:
    """Merges with every candidate, in one compiled call, and keeps the best.

    All candidates run through one program, vmapped: what does not depend on them, such
    as trimmed task vectors, is computed once. Options that cannot be traced, because
    they set a count or are no numbers, are compiled once for each value.

    Args:
        merge: `merge(**candidate)` merges, as `functools.partial(jaxmerge.ties, base,
            models)` does, or any function of options that JAX can trace.
        candidates: dicts of options, from `grid`, `random_set` or your own: numbers,
            one per model, or rules.
        score: `score(params)`, a number, or several of which the mean counts: an array
            (numbers,), or a dict of numbers by task, as `evaluate` returns for one
            metric; higher is better. JAX must be able to trace it, as it can
            `evaluate`. It sees validation data, never test data: the best of many
            scores on test data is no estimate of anything.
        memory: bytes, or a size such as "4GB", on each device, for what is computed
            from candidates; as many run at a time. What is computed once for all comes
            on top.

    Returns:
        All scores, and the best candidate. NaN counts as no score. Numbers of
        candidates are in float32, or in float64 with `jax_enable_x64`.

    Raises:
        ValueError: no candidates, invalid options, a score that is neither a number nor
            several or that JAX cannot trace, or no score but NaN.

    Example:
        >>> import functools, jaxmerge
        >>> base, model = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
        >>> merge = functools.partial(jaxmerge.task_arithmetic, base, [model])
        >>> score = lambda params: -jnp.abs(params["w"] - 0.3).sum()
        >>> sweep(merge, [{"scale": s} for s in (0.0, 0.25, 0.5)], score).best
        {'scale': 0.25}
    """
    method = "sweep"
    candidates = list(candidates)
    check_candidates(method, candidates)
    bytes_ = bytes_of(method, memory)
    static = static_options(merge, candidates)
    results: dict[int, np.ndarray] = {}
    tasks: tuple[str, ...] = ()
    together = 0
    for members in _groups(candidates, static):
        tried = [candidates[i] for i in members]
        check_ends(method, merge, tried, static)
        compiled = compile_scores(method, merge, score, tried[0], static, bytes_)
        rows = [row_of(candidate, static) for candidate in tried]
        found = compiled.run(jnp.array(rows))
        tasks = tuple(found) if isinstance(found, Mapping) else ()
        results |= zip(members, table_of(found), strict=True)
        together = max(together, min(compiled.together, len(tried)))
    scores = np.array([results[i] for i in range(len(candidates))])
    means = means_of(scores)
    if np.isnan(means).all():
        raise ValueError(
            f"{method}: all scores are NaN; check score on parameters that are good."
        )
    best = candidates[int(np.nanargmax(means))]
    return Sweep(candidates, scores, tasks, best, static, together)


def bytes_of(method: str, memory: int | str) -> int:
    """A bound on memory in bytes.

    Raises:
        ValueError: it is no size.
    """
    try:
        return size_in_bytes(memory)
    except ValueError as error:
        raise ValueError(f"{method}: memory is {error}") from None


def check_candidates(method: str, candidates: Sequence[Candidate]) -> None:
    """Checks that there are candidates, and that all are of the same options.

    Raises:
        ValueError: they are not.
    """
    if not candidates:
        raise ValueError(f"{method}: there are no candidates; give at least one.")
    for i, candidate in enumerate(candidates):
        if not isinstance(candidate, Mapping) or not candidate:
            raise ValueError(
                f"{method}: candidates[{i}] is {candidate!r}; give a dict of options."
            )
        if candidate.keys() != candidates[0].keys():
            raise ValueError(
                f"{method}: candidates[{i}] has options {sorted(candidate)}, "
                f"candidates[0] has {sorted(candidates[0])}; give all of them the same."
            )


def static_options(merge: Merge, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """The options that cannot be traced: no numbers, or numbers that set a count.

    Found by trying, one option at a time with all others at their first value; nothing
    is computed.
    """
    first = candidates[0]

    def traces(name: str) -> bool:
        fixed = {other: value for other, value in first.items() if other != name}

        def alone(row: Array) -> Params:
            return merge(**fixed, **fill({name: first[name]}, iter(row)))

        try:
            jax.eval_shape(alone, _row_like({name: first[name]}))
        except (TypeError, ValueError):
            return False  # Wrong options are so as well; with numbers, they say why.
        return True

    return tuple(
        name
        for name in first
        if not all(map(_is_number, numbers([each[name] for each in candidates])))
        or not traces(name)
    )


def compile_scores(
    method: str,
    merge: Merge,
    score: Score,
    like: Candidate,
    static: Sequence[str],
    memory: int,
) -> Batched:
    """The scores of candidates whose static options are those of `like`, by rows."""
    fixed, traced = _split_static(like, static)

    def score_of(row: Array) -> Any:
        return checked_score(method, score(merge(**fixed, **fill(traced, iter(row)))))

    try:
        return batch(score_of, len(row_of(like, static)), memory)
    except _LOOKS_AT_VALUES:
        raise ValueError(
            f"{method}: score cannot be traced by JAX, as it looks at values; write it "
            "with jax.numpy, or let `evolve` call it with `workers`."
        ) from None


_LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def row_of(candidate: Candidate, static: Sequence[str] = ()) -> list[float]:
    """The numbers of a candidate that are traced."""
    return [float(number) for number in numbers(_split_static(candidate, static)[1])]


def _split_static(
    candidate: Candidate, static: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that are compiled in, and those that are traced."""
    fixed = {name: candidate[name] for name in candidate if name in static}
    return fixed, {name: candidate[name] for name in candidate if name not in static}


def _row_like(traced: Candidate) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((len(row_of(traced)),), jnp.result_type(float))


def _groups(
    candidates: Sequence[Candidate], static: Sequence[str]
) -> Iterable[list[int]]:
    """The places of candidates that one program can serve."""
    groups: dict[Any, list[int]] = {}
    for i, candidate in enumerate(candidates):
        fixed, traced = _split_static(candidate, static)
        structure = fill(traced, itertools.repeat(None))
        groups.setdefault((_key(fixed), _key(structure)), []).append(i)
    return groups.values()


def _key(option: Any) -> Any:
    """What is equal for equal options."""
    if isinstance(option, Mapping):
        return tuple((name, _key(value)) for name, value in option.items())
    if isinstance(option, list | tuple):
        return tuple(map(_key, option))
    if isinstance(option, np.ndarray | jax.Array):
        return np.shape(option), np.asarray(option).tobytes()
    known = option if option.__hash__ else id(option)
    return isinstance(option, bool), known  # True equals 1.


def check_ends(
    method: str, merge: Merge, tried: Sequence[Candidate], static: Sequence[str]
) -> None:
    """Lets the merge check the least and the largest numbers, which tracers hide."""
    rows = np.array([row_of(candidate, static) for candidate in tried])
    if not np.isfinite(rows).all():
        wrong = int(np.argmin(np.isfinite(rows).all(axis=1)))
        raise ValueError(f"{method}: {tried[wrong]!r} has a number that is not finite.")
    fixed, traced = _split_static(tried[0], static)
    for ends in (rows.min(axis=0), rows.max(axis=0)):
        options = fill(traced, iter(ends.tolist()))
        jax.eval_shape(lambda options=options: merge(**fixed, **options))


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    return number and np.ndim(value) == 0 and not isinstance(value, bool)
