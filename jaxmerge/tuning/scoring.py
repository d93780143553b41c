"""What a score may be: one number, a row of them, or a dict of numbers by task."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmerge.evaluation.measuring import METRICS
from jaxmerge.tree import Params

Score = Callable[[Params], Any]
"""How good parameters are; higher is better. One number, or several of which the mean
counts: a row, or a dict of numbers by task, as `evaluate` returns."""


def checked_score(method: str, value: Any) -> Any:
    """A score as an array, () or (numbers,), or as a dict of numbers in its order.

    Raises:
        ValueError: it is neither.

    Example:
        >>> checked_score("sweep", [1, 2])
        array([1., 2.])
    """
    wanted = "let it return one number, a row of them, or a dict of numbers by task"
    if not isinstance(value, Mapping):
        found = _array(value)
        if found is None or found.ndim > 1 or found.size == 0:
            raise ValueError(f"{method}: score returns {_described(value)}; {wanted}.")
        return found
    if len(METRICS.keys() & value.keys()) > 1:
        raise ValueError(
            f"{method}: score returns {' and '.join(map(str, value))}, of which a mean "
            "says nothing; give evaluate one metric."
        )
    # `jax.tree` would sort the keys of a plain dict.
    numbers = OrderedDict((task, _array(number)) for task, number in value.items())
    wrong = [t for t, number in numbers.items() if number is None or number.ndim]
    if wrong:
        raise ValueError(
            f"{method}: score returns a dict with {_described(value[wrong[0]])} for "
            f"{wrong[0]!r}; {wanted}."
        )
    if not numbers:
        raise ValueError(f"{method}: score returns an empty dict; {wanted}.")
    return numbers


def mean_score(method: str, value: Any) -> float:
    """The mean of a score that is no tracer, in float64.

    Raises:
        ValueError: it is no score.
    """
    return float(np.mean(jax.tree.leaves(checked_score(method, value))))


def table_of(scores: Any) -> np.ndarray:
    """Checked scores of many in float64, (candidates,) or (candidates, numbers)."""
    if isinstance(scores, Mapping):
        return np.stack([np.asarray(x, float) for x in scores.values()], axis=1)
    return np.asarray(scores, float)


def means_of(scores: np.ndarray) -> np.ndarray:
    """The mean score of each candidate."""
    return scores.reshape(len(scores), -1).mean(axis=1)


def _array(value: Any) -> Any:
    """Numbers as an array, traced or else in float64; None for anything else."""
    try:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value)):
            return jnp.asarray(value)
        array = np.asarray(jax.device_get(value))
        # What is no number becomes an object or text; None would become NaN.
        return None if array.dtype.kind in "OSU" else array.astype(float)
    except (TypeError, ValueError):
        return None


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None else f"an array of shape {shape}"
