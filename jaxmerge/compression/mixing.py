"""The multi-task vectors of stores: sums, or TIES, of models read leaf by leaf.

Within leaves, TIES needs to know of nothing but the leaf. Where it ranks the whole
model, as its authors do, it must know what is trimmed, and which sign most entries
elect, before the first leaf is merged: that takes passes over the files, which have one
leaf of every model in memory at a time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.methods.election import majority_sign, sign_counts, votes
from jaxmerge.methods.multitask import TIES, TIES_DENSITY
from jaxmerge.methods.trimming import merge_trimmed, trim_all
from jaxmerge.numerics import Count, entries
from jaxmerge.options import choice, without_effect

_DIGIT_BITS = 16
# NumPy counts digits as integers of 64 bits.
_CHUNK = 1 << 20


class Passes(NamedTuple):
    """The task vectors of models, which are read anew in every pass.

    Attributes:
        read: begins a pass: yields those of each leaf, by task; leaves out task vectors
            that are zero throughout, and leaves that have no others.
        entries: how many floating-point entries a model has.
        dtype: the widest dtype of a task vector.
    """

    read: Callable[[], Iterable[Mapping[str, Array]]]
    entries: int
    dtype: np.dtype


class Cuts(NamedTuple):
    """What TIES has to know of the whole model.

    Attributes:
        thresholds: by task, the smallest magnitude that is kept.
        majority: the sign that most entries elect.
    """

    thresholds: dict[str, np.ndarray]
    majority: Array


def check_mixture(caller: str, multi_task: str, scope: str) -> None:
    """Checks the options of a multi-task vector.

    Raises:
        ValueError: a choice is unknown, or has no effect.
    """
    choice(caller, "multi_task", multi_task, list(MIXTURES))
    choice(caller, "scope", scope, ["leaf", "model"])
    if multi_task != "ties":
        without_effect(caller, "scope", scope, "leaf", "multi_task='ties'")


def passes_before(dtype: np.dtype) -> int:
    """How many passes `measure_cuts` makes over task vectors of a dtype."""
    return 8 * dtype.itemsize // _DIGIT_BITS + 1


def measure_cuts(passes: Passes) -> Cuts:
    """Measures what TIES has to know, exactly."""
    keep = entries(TIES_DENSITY, passes.entries, rounding="floor_plus_one")
    thresholds = kth_magnitudes(passes.read, keep, passes.dtype)
    counts = [
        _sign_counts(list(deltas.values()), _of_tasks(thresholds, deltas))
        for deltas in passes.read()
    ]
    return Cuts(thresholds, majority_sign(counts))


def kth_magnitudes(
    read: Callable[[], Iterable[Mapping[str, Array]]], k: int, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """The k-th largest magnitude of each of several vectors, in a pass per 16 bits.

    Magnitudes sort as their bit patterns do. Each pass counts, among the entries that
    begin with the digits found so far, how often each next digit occurs.

    Args:
        read: as in `Passes`; entries that it leaves out are zero.
        k: from 1, the largest.
        dtype: what magnitudes are compared in.

    Returns:
        Scalars of `dtype` by name.

    Example:
        >>> read = lambda: [{"a": np.float32([1, -4])}, {"a": np.float32([2])}]
        >>> kth_magnitudes(read, 2, np.dtype(np.float32))["a"].item()
        2.0
    """
    unsigned = np.dtype(f"u{dtype.itemsize}")
    found: dict[str, int] = {}
    left: dict[str, int] = {}
    for shift in range(8 * dtype.itemsize - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts: dict[str, np.ndarray] = {}
        for deltas in read():
            for name, delta in deltas.items():
                bits = np.abs(np.asarray(delta, dtype)).reshape(-1).view(unsigned)
                digits = _count_digits(bits >> shift, found.get(name, 0))
                counts[name] = counts.get(name, 0) + digits
        for name, of_digits in counts.items():
            # How many entries have the digit or a larger one.
            reached = np.append(of_digits[::-1].cumsum()[::-1], 0)
            rank = left.get(name, k)
            digit = int(np.count_nonzero(reached[1:-1] >= rank))
            left[name] = rank - int(reached[digit + 1])
            found[name] = found.get(name, 0) << _DIGIT_BITS | digit
    return {n: np.array(bits, unsigned).view(dtype) for n, bits in found.items()}


def _count_digits(leading: np.ndarray, before: int) -> np.ndarray:
    """How often each last digit occurs in numbers that are `before` in front of it."""
    base = 1 << _DIGIT_BITS
    counts = np.zeros(base, np.int64)
    for start in range(0, leading.size, _CHUNK):
        part = leading[start : start + _CHUNK]
        last = part[part >> _DIGIT_BITS == before] % base
        counts += np.bincount(last, minlength=base)
    return counts


def _of_tasks(
    thresholds: Mapping[str, np.ndarray], deltas: Mapping[str, Array]
) -> list[np.ndarray]:
    """The thresholds of the task vectors of a leaf, in their dtype, rounded up."""
    return [_round_up(thresholds[name], delta.dtype) for name, delta in deltas.items()]


def _round_up(threshold: np.ndarray, dtype: np.dtype) -> np.ndarray:
    rounded = threshold.astype(dtype)
    above = np.nextafter(rounded, np.array(np.inf, dtype))
    return rounded if rounded >= threshold else above


@jax.jit
def _sign_counts(
    deltas: Sequence[Array], thresholds: Sequence[Array]
) -> tuple[Count, Count]:
    trimmed = trim_all(deltas, thresholds=thresholds)
    return sign_counts(votes(trimmed, _equal(deltas), TIES))


def _add(deltas: Mapping[str, Array], cuts: Cuts | None) -> Array:
    return sum(deltas.values())  # type: ignore[return-value]


def _elect(deltas: Mapping[str, Array], cuts: Cuts | None) -> Array:
    ends = list(deltas.values())
    if cuts is None:
        keep = Count.of(entries(TIES_DENSITY, ends[0].size))
        return _merge_trimmed(ends, keep=[keep] * len(ends))
    thresholds = _of_tasks(cuts.thresholds, deltas)
    return _merge_trimmed(ends, thresholds=thresholds, majority=cuts.majority)


@jax.jit
def _merge_trimmed(
    deltas: Sequence[Array],
    keep: Sequence[Count] | None = None,
    thresholds: Sequence[Array] | None = None,
    majority: Array | None = None,
) -> Array:
    return merge_trimmed(
        deltas,
        weights=_equal(deltas),
        election=TIES,
        keep=keep,
        thresholds=thresholds,
        majority=majority,
    )


def _equal(deltas: Sequence[Array]) -> list[Array]:
    return [jnp.ones(())] * len(deltas)


MIXTURES = {"task_arithmetic": _add, "ties": _elect}
"""How the task vectors of a leaf, by task, are mixed, once `Cuts` are known or not."""
