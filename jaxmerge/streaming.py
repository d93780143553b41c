"""From checkpoints to a checkpoint in bounded memory: read, compute, write at once.

Leaves are worked on by a few threads. Each checks the inputs of its leaf, which brings
them from disk, waits for its turn to compute, and then writes while the next one
computes. JAX uses all cores for one computation, so there is one at a time.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np

from jaxmerge.checkpoints import Checkpoint
from jaxmerge.lazy import LazyLeaf, slices
from jaxmerge.slicing import Reader

WORKERS = 3
"""Threads: one computes, one reads, one writes."""

_BLOCK = 1 << 16  # Entries that are looked at together: small enough for the cache.
_computing = threading.Lock()


class StoredLeaf:
    """A leaf of a checkpoint, read when it is asked for (a `LazyLeaf`).

    Args:
        checkpoint: where it is.
        name: its name there.
        memory: how many bytes a computation with it may take.
        dtype: what it is cast to; by default it stays as it is.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, memory: int, dtype: Any = None
    ):
        info = checkpoint.leaves[name]
        self.shape, self.memory = info.shape, memory
        self.dtype = info.dtype if dtype is None else np.dtype(dtype)
        self.cost = info.entries * self.dtype.itemsize
        self._checkpoint, self._name = checkpoint, name

    def read(self) -> np.ndarray:
        return self._checkpoint.read(self._name).astype(self.dtype, copy=False)

    def reader(self) -> Reader:
        def read(start: int, stop: int) -> np.ndarray:
            rows = self._checkpoint.read(self._name, (slice(start, stop),))
            return rows.astype(self.dtype, copy=False)

        return read


def stream(names: Iterable[str], work: Callable[[str], None]) -> None:
    """Calls `work` for each name, some at a time; raises the first error there is."""
    with ThreadPoolExecutor(WORKERS) as pool:
        tasks = [pool.submit(work, name) for name in names]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for task in tasks:
        if not task.cancelled():
            task.result()


def computed(leaf: LazyLeaf, wide: bool) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a leaf with the number of the first, in slices that fit into memory.

    Args:
        leaf: the leaf.
        wide: whether to compute in float64, which JAX has off.
    """
    parts = slices(leaf)
    while True:
        with _computing, precision(wide):
            part = next(parts, None)
            if part is None:
                return
            start, array = part[0], np.asarray(part[1])
        yield start, array


def precision(wide: bool) -> contextlib.AbstractContextManager[Any]:
    """Switches float64 on, which JAX has off, if leaves need it."""
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def all_finite(array: np.ndarray) -> bool:
    """Whether floating-point numbers hold no NaN and no infinity."""
    kind = f"uint{8 * array.dtype.itemsize}"
    # NaN and infinity, and nothing else, have all bits of the exponent set.
    exponent = np.asarray(np.inf, array.dtype).view(kind)
    bits = np.ascontiguousarray(array).reshape(-1).view(kind)
    return not any(
        ((bits[start : start + _BLOCK] & exponent) == exponent).any()
        for start in range(0, bits.size, _BLOCK)
    )
