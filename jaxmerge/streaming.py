"""From checkpoints to a checkpoint in bounded memory: read, compute, write at once.

Leaves are worked on by a few threads. Each checks the inputs of its leaf, which brings
them from disk, computes, and writes while others compute. Those that take much memory,
and those that LAPACK has a part in, compute one at a time. (LAPACK waits inside the
pool of threads that all computations on a CPU share, for tasks that it gives to this
very pool: several that wait there leave no thread to run them, and wait for ever.)
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxmerge.checkpoints import Checkpoint, Index
from jaxmerge.lazy import Deferred, LazyLeaf, slices
from jaxmerge.sharding import mesh_only_if, of
from jaxmerge.slicing import Reader

WORKERS = 3
"""Threads, each with one leaf."""

_AT_ONCE = 48_000_000  # Bytes that a leaf takes at most, where it comes by rows.
_BLOCK = 1 << 18  # Entries that are looked at together: small enough for the cache.
_BLOCK_BYTES = 1 << 24  # What is read at a time of leaves that are copied or checked.

turns = threading.Lock()
"""Held by computations that are not to run beside each other."""


class StoredLeaf(LazyLeaf):
    """A leaf of a checkpoint, read when it is asked for.

    Args:
        checkpoint: where it is.
        name: its name there.
        memory: how many bytes a computation with it may take.
        dtype: what it is cast to.
        sharding: how it comes to lie on a mesh. Each process reads its own parts.
        whole: whether it is read and computed whole in any case.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        memory: int,
        dtype: np.dtype,
        sharding: NamedSharding | None = None,
        whole: bool = False,
    ):
        info = checkpoint.leaves[name]
        self.shape, self.dtype, self.memory = info.shape, dtype, memory
        self.sharding, self.whole = sharding, whole or sharding is not None
        self.nbytes = info.nbytes
        self._checkpoint, self._name = checkpoint, name

    @property
    def cost(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Any:
        if self.sharding is None:
            return self._part(...)
        return jax.make_array_from_callback(self.shape, self.sharding, self._part)

    def reader(self) -> Reader:
        return lambda start, stop: self._part((slice(start, stop),))

    def _part(self, index: Index | None) -> np.ndarray:
        part = self._checkpoint.read(self._name, ... if index is None else index)
        return part.astype(self.dtype, copy=False)


def stream(names: Iterable[str], work: Callable[[str], None]) -> None:
    """Calls `work` for each name, some at a time; raises the first error there is."""
    if jax.process_count() > 1:
        # They compute together: in the same order, up to the same error.
        for name in names:
            work(name)
        return
    with ThreadPoolExecutor(WORKERS) as pool:
        tasks = [pool.submit(work, name) for name in names]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for task in tasks:
        if not task.cancelled():
            task.result()


def share_of(memory: int, *, on_mesh: bool) -> int:
    """How many bytes each of the leaves that are worked on may take, of all there are.

    On a mesh leaves come whole, and matrices together, as many as fit. Elsewhere more
    than some megabytes do not make it faster: the operating system has to clear the
    memory of large arrays each time, that of small ones is there already.
    """
    share = memory // WORKERS
    return share if on_mesh else min(share, _AT_ONCE)


def computed(leaf: Any, wide: bool) -> Iterator[tuple[Index, np.ndarray]]:
    """The values of a leaf, in parts that fit into memory; on a mesh, its own parts.

    Args:
        leaf: an array, or a lazy leaf.
        wide: whether to compute in float64, which JAX has off.

    Yields:
        Where in the leaf a part is, and its values. Of copies of a part in several
        processes, one has it.
    """
    parts, sharded = slices(leaf), of(leaf) is not None
    beside = isinstance(leaf, Deferred) and not sharded and not leaf.is_alone()
    while True:
        alone = contextlib.nullcontext() if beside else turns
        with alone, precision(wide), mesh_only_if(sharded):
            part = next(parts, None)
            if part is None:
                return
            start, rows = part[0], jax.block_until_ready(part[1])
        if sharded:
            shards = [s for s in rows.addressable_shards if s.replica_id == 0]
            yield from ((shard.index, np.asarray(shard.data)) for shard in shards)
        else:
            whole = np.shape(rows) == leaf.shape
            index = ... if whole else (slice(start, start + len(rows)),)
            yield index, np.asarray(rows)


def own_parts(shape: tuple[int, ...], sharding: NamedSharding | None) -> list[Index]:
    """The parts of an array that this process reads and writes, and no other one."""
    if sharding is None:
        return [...]
    first: dict[Any, Any] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        first.setdefault(tuple((i.start, i.stop) for i in index), (device, index))
    here = jax.process_index()
    return [index for device, index in first.values() if device.process_index == here]


def blocks(shape: tuple[int, ...], index: Index, itemsize: int) -> Iterator[Index]:
    """Cuts a part of an array into parts of some rows, small enough to copy."""
    if not shape:
        yield index
        return
    rest = () if index is ... else index[1:]
    start, stop, _ = (slice(None) if index is ... else index[0]).indices(shape[0])
    step = max(1, _BLOCK_BYTES // max(1, itemsize * math.prod(shape[1:])))
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop)), *rest


def precision(wide: bool) -> contextlib.AbstractContextManager[Any]:
    """Switches float64 on, which JAX has off, if leaves need it."""
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def all_finite(array: np.ndarray) -> bool:
    """Whether floating-point numbers hold no NaN and no infinity."""
    if array.dtype.itemsize == 1:  # Not all of these know infinity.
        array = array.astype(np.float32)
    bits = np.ascontiguousarray(array).reshape(-1).view(f"i{array.dtype.itemsize}")
    unsigned = bits.view(f"u{array.dtype.itemsize}")
    # NaN and infinity have all bits of the exponent set: none of their sign is larger.
    least = np.asarray([np.inf, -np.inf], array.dtype)
    positive = least.view(bits.dtype)[0]
    negative = least.view(unsigned.dtype)[1]
    return not any(
        bits[start : start + _BLOCK].max() >= positive
        or unsigned[start : start + _BLOCK].max() >= negative
        for start in range(0, bits.size, _BLOCK)
    )
