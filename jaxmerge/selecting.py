"""The k-th largest of many integers in the memory of the host, exactly.

XLA has to count all of them for every few bits of the answer. NumPy can leave out those
that the answer is not among: it looks at most of them once.
"""

from collections.abc import Iterator

import numpy as np

_FEW = 1 << 14  # Integers that are ranked at once. A sample has about as many,
_STEP = 64  # or, of more than a million integers, one out of so many.
_BLOCK = 1 << 19  # Integers that are looked at together: fewer, and threads would wait
# for each other; more, and what is made of them would not fit into the cache.


def kth_largest_integer(integers: np.ndarray, k: int) -> np.integer:
    """The k-th largest of integers; those that tie count one by one.

    A sample of them tells about where the answer is. It is one of two integers then, or
    among those between, or (one time in many thousands) those above or below.

    Args:
        integers: any shape.
        k: from 1 to their number.

    Example:
        >>> kth_largest_integer(np.array([[3, 1], [3, 2]]), 3).item()
        2
    """
    rest = integers.reshape(-1)
    while rest.size > _FEW:
        rest, k = _narrow(rest, k)
    return np.partition(rest, rest.size - k)[rest.size - k]


def _narrow(integers: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    """Fewer integers that the k-th largest is among, and its rank among them."""
    low, high = _around(integers, k)
    above_low, from_high, between = 0, 0, []
    for x in _blocks(integers):
        is_above, is_from = x > low, x >= high
        above_low += int(np.count_nonzero(is_above))
        from_high += int(np.count_nonzero(is_from))
        between.append(x[is_above > is_from])
    if from_high < k <= above_low:
        return np.concatenate(between), k - from_high
    edge, beyond, rank = (
        (high, np.greater, k)
        if k <= from_high
        else (low, np.less, integers.size + 1 - k)
    )
    outside = sum(int(np.count_nonzero(beyond(x, edge))) for x in _blocks(integers))
    if rank > outside:
        return np.array([edge]), 1
    rest = np.concatenate([x[beyond(x, edge)] for x in _blocks(integers)])
    return rest, k if k <= from_high else outside + 1 - rank


def _around(integers: np.ndarray, k: int) -> tuple[np.integer, np.integer]:
    """Two of many integers that the k-th largest is most probably between."""
    # No power of two, so that a sample of a matrix has entries of all columns.
    sample = np.sort(integers[:: min(integers.size // _FEW, _STEP) | 1])
    share = 1 - k / integers.size
    # Ranks in a sample are off by one such deviation or less in two of three cases.
    off = 4 * np.sqrt(share * (1 - share) * sample.size) + 1
    ranks = np.array([share * sample.size - off, share * sample.size + off])
    low, high = sample[np.clip(ranks, 0, sample.size - 1).astype(int)]
    return low, high


def _blocks(integers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, integers.size, _BLOCK):
        yield integers[start : start + _BLOCK]
