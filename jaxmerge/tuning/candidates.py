"""Coefficients to try: grids, random sets, and the spaces that they are drawn from.

A candidate is a dict of options of a merge: numbers, one per model, or rules. Rules
keep their order, in which the first match wins; a dict that passes through `jax.tree`
does not.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Candidate = dict[str, Any]
"""Options of a merge by name, as keyword arguments."""

Space = Mapping[str, Any]
"""Options by name, with `(low, high)` where a number is to be found: `{"scale": (0, 2),
"weights": [(0, 1), (0, 1)], "density": {".*bias": (0.5, 1), ".*": (0.1, 0.5)}}`."""


def grid(**values: Sequence[Any]) -> list[Candidate]:
    """All combinations of values of options; the last option varies fastest.

    Args:
        values: by option, the values to try.

    Raises:
        ValueError: no options, or one without values.

    Example:
        >>> grid(scale=[0.5, 1.0], vote=["mass"])
        [{'scale': 0.5, 'vote': 'mass'}, {'scale': 1.0, 'vote': 'mass'}]
    """
    if not values:
        raise ValueError("grid: needs at least one option.")
    for name, tried in values.items():
        # Its values may differ in shape, so that it need not be an array.
        several = isinstance(tried, Sequence) or getattr(tried, "ndim", 0) > 0
        if isinstance(tried, str) or not several:
            raise ValueError(f"grid: {name} is {tried!r}; give a list of values.")
        if not len(tried):
            raise ValueError(f"grid: {name} has no values.")
    return [
        dict(zip(values, combination, strict=True))
        for combination in itertools.product(*values.values())
    ]


def random_set(space: Space, count: int, *, seed: int = 0) -> list[Candidate]:
    """Draws candidates uniformly from a space.

    Args:
        space: options by name, with `(low, high)` where a number is drawn: alone, in a
            list of one per model, or in rules.
        count: how many, at least 1.
        seed: of the draw.

    Raises:
        ValueError: an invalid space, or a `count` below 1.

    Example:
        >>> (candidate,) = random_set({"weights": [(0, 1), (2, 3)]}, 1)
        >>> [round(weight, 2) for weight in candidate["weights"]]
        [0.64, 2.27]
    """
    intervals = intervals_of("random_set", space)
    if count < 1:
        raise ValueError(f"random_set: count is {count}; it must be at least 1.")
    low, high = intervals.T
    draws = np.random.default_rng(seed).uniform(low, high, (count, len(intervals)))
    return [fill(space, iter(row.tolist()), pairs=True) for row in draws]


def intervals_of(method: str, space: Space) -> np.ndarray:
    """The intervals of a space in order, (numbers, 2).

    Raises:
        ValueError: an empty space, or what is no interval.
    """
    found = []
    for name, option in space.items():
        for pair in numbers(option, pairs=True):
            if not isinstance(pair, tuple) or not np.isfinite(pair).all():
                raise ValueError(
                    f"{method}: {name} has {pair!r} in its space; give (low, high), "
                    "both finite, wherever a number is to be found."
                )
            if pair[0] >= pair[1]:
                raise ValueError(
                    f"{method}: {name} has the interval {pair!r}; low must be below "
                    "high. A value that is fixed belongs into the merge."
                )
            found.append(pair)
    if not found:
        raise ValueError(f"{method}: the space is empty; give at least one option.")
    return np.array(found, float)


def numbers(option: Any, *, pairs: bool = False) -> Iterator[Any]:
    """The numbers of an option in order; with `pairs`, the intervals of a space."""
    for value in _parts(option, pairs):
        if value is option:
            yield option
        else:
            yield from numbers(value, pairs=pairs)


def fill(like: Any, values: Iterator[Any], *, pairs: bool = False) -> Any:
    """An option, or several, like this one with other numbers, given in order.

    Example:
        >>> fill({"weights": [1, 2], "scale": {".*": 3}}, iter("abc"))
        {'weights': ['a', 'b'], 'scale': {'.*': 'c'}}
    """
    parts = _parts(like, pairs)
    if len(parts) == 1 and parts[0] is like:
        return next(values)
    filled = [fill(part, values, pairs=pairs) for part in parts]
    return dict(zip(like, filled, strict=True)) if isinstance(like, Mapping) else filled


def _parts(option: Any, pairs: bool) -> list[Any]:
    """The values of rules or of a list; what is neither is its own only part."""
    if isinstance(option, Mapping):
        return list(option.values())
    if isinstance(option, list | tuple):
        return [option] if pairs and _is_pair(option) else list(option)
    arrays = hasattr(option, "shape") and np.ndim(option) > 0
    return list(option) if arrays else [option]


def _is_pair(option: Sequence[Any]) -> bool:
    ends = isinstance(option, tuple) and len(option) == 2
    return ends and all(isinstance(end, int | float | np.number) for end in option)
