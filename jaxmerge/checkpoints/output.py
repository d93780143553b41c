"""What appears whole or not at all: the part of a writer that no format changes."""

import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from jaxmerge.checkpoints.files import lack_of_space, sync
from jaxmerge.checkpoints.interface import CheckpointError, Index, LeafInfo
from jaxmerge.checkpoints.journal import Journal, completed

_JOURNALS = "journal-{}.jsonl"


class Part(NamedTuple):
    """A part of an array: where it begins along each axis, and its shape."""

    starts: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of the part."""
        ends = zip(self.starts, self.shape, strict=True)
        return tuple(slice(start, start + size) for start, size in ends)


class LeafWriter:
    """Writes leaves in any order; the output appears when all of them are there.

    Everything is written into a hidden directory beside `out_dir`, which is synced to
    disk and renamed when the `with` block ends well, and removed when it does not. The
    memory needed is that of the values being written. `write` may be called from
    several threads, for different leaves.

    A writer with an `identity` can be interrupted: if its process dies, the next writer
    of the same output and identity goes on with the leaves that are not complete. If
    that one fails, whatever the reason, what it found stays for yet another.

    A format says with `reserved`, `_create`, `_put` and `_conclude` what goes into the
    directory.

    Args:
        out_dir: the directory to create; it must not exist.
        leaves: name -> shape and dtype of everything that will be written.
        identity: what is written, from what: JSON. None if it cannot be told.
        process: the number of this process, if several write one output together.
        agree: waits for all of them, and raises in all if one has an error, which is
            its argument.

    Attributes:
        done: the leaves that an interrupted writer completed, with its notes on them.
        unfinished: the directory that becomes the output.

    Raises:
        FileExistsError: `out_dir` exists.
        CheckpointError: the disk is too small, a leaf is written twice, not at all, or
            with another shape or dtype than announced; the beginning of an output of
            another identity is there.
    """

    reserved: frozenset[str]
    """What the directory holds of the format's own, by name."""

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        leaves: Mapping[str, LeafInfo],
        identity: Any = None,
        process: int = 0,
        agree: Callable[[BaseException | None], None] | None = None,
    ):
        self.path = Path(out_dir).absolute()
        self._refuse_existing()
        if self.path.suffix in (".safetensors", ".msgpack", ".bin"):
            raise CheckpointError(
                f"{self.path} is a name for a file, but a checkpoint is written as a "
                f"directory; choose {self.path.stem!r}, for example."
            )
        self.leaves = dict(leaves)
        self._missing = {name: info.entries for name, info in self.leaves.items()}
        self._identity = identity
        self._process, self._agree = process, agree or _raise
        self._alone = agree is None
        self._journal: Journal | None = None
        self._removable = False
        self.done: Mapping[str, Any] = {}
        ending = "writing-" + uuid.uuid4().hex[:8] if identity is None else "partial"
        self.unfinished = self.path.with_name(f".{self.path.name}.{ending}")
        if not self.unfinished.exists():
            self._check_free_space()

    def _create(self) -> None:
        """Makes ready for values, whatever an interrupted writer may have left."""
        raise NotImplementedError

    def _put(self, name: str, array: np.ndarray, part: Part) -> None:
        """Writes a part of a leaf, or all of it; it is as it was announced."""
        raise NotImplementedError

    def _conclude(self) -> None:
        """Writes what comes after all leaves."""

    def _unsynced(self) -> Iterable[Path]:
        """The files whose values need not be on disk yet."""
        return ()

    def write(self, name: str, array: Any, index: Index = ...) -> None:
        """Writes a leaf, or a part of it, whatever the memory layout, in C order.

        Args:
            name: a key of the announced leaves.
            array: NumPy or JAX array of the announced dtype, and of the announced shape
                or that of the part.
            index: which part it is: one slice per leading axis; no part is written
                twice.
        """
        if name not in self.leaves:
            raise CheckpointError(
                f"Leaf {name!r} was not announced to the writer of {self.path}; "
                "add it to `leaves`."
            )
        array = np.asarray(array)
        info = self.leaves[name]
        part = _part(info.shape, index)
        if LeafInfo(array.shape, array.dtype) != (part.shape, info.dtype):
            raise CheckpointError(
                f"Leaf {name!r} of {self.path} was announced as "
                f"{info.dtype}{list(part.shape)}, "
                f"but the array is {array.dtype}{list(array.shape)}; "
                "reshape or cast it before writing."
            )
        if array.size > self._missing[name]:
            raise CheckpointError(
                f"Leaf {name!r} of {self.path} is written twice; write each leaf once."
            )
        self._put(name, array, part)
        self._missing[name] -= array.size

    def row_step(self, name: str) -> int:
        """Of how many rows, or a multiple, a leaf is best written at a time."""
        return 1

    def complete(self, name: str, note: Any) -> None:
        """Notes, for a writer that goes on after an interruption, that a leaf is there.

        Args:
            name: a leaf of which everything is written.
            note: what there is to say about it: JSON.
        """
        if self._journal is not None:
            self._journal.add(name, note)

    def start_anew(self) -> None:
        """Forgets what an interrupted writer completed: it is written again."""
        if self._journal is not None:
            self._journal.start_anew()
        self.done = {}
        self._missing = {name: info.entries for name, info in self.leaves.items()}

    def add_file(self, name: str, content: bytes | str | os.PathLike[str]) -> None:
        """Puts a further file next to the weights; of several processes, the first.

        Args:
            name: its file name in the output.
            content: its bytes, or the path of a file to copy.
        """
        if self._process != 0:
            return
        target = self.unfinished / name
        if Path(name).name != name:
            raise CheckpointError(
                f"{name!r} is no plain file name; files go directly into {self.path}."
            )
        if name in self.reserved or target.exists():
            raise CheckpointError(
                f"{self.path} gets a file {name} already; choose another name."
            )
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)

    def __enter__(self) -> Self:
        try:
            self._together(self._open if self._process == 0 else _nothing)
            if self._identity is not None:
                self._together(self._open_journal)
                # No process writes on before all have read what is complete.
                self._together(self._go_on)
            if not self.done:
                self._together(self._create if self._process == 0 else _nothing)
        except BaseException:
            self._close(keep=False)
            raise
        return self

    def _together(self, step: Callable[[], None]) -> None:
        """Takes a step; if it fails in one process, it fails in all."""
        error = None
        try:
            step()
        except BaseException as raised:
            error = raised
        self._agree(error)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.unfinished.mkdir(exist_ok=self._identity is not None)
        self._removable = self._identity is None

    def _open_journal(self) -> None:
        path = self.unfinished / _JOURNALS.format(self._process)
        self._journal = Journal(path, self._identity, self._sync_values)
        # A directory with a journal was begun by another writer, which may be alive.
        self._removable = self._journal.is_new

    def _go_on(self) -> None:
        """Finds out what all processes have completed."""
        assert self._journal is not None
        complete = set.intersection(*map(completed, _journals(self.unfinished)))
        self.done = {n: x for n, x in self._journal.done.items() if n in complete}
        self._missing |= dict.fromkeys(self.leaves.keys() & complete, 0)
        if self._process == 0:
            self._remove_further_files()

    def _remove_further_files(self) -> None:
        """They are added again: they may be half written, or not wanted any more."""
        for path in set(self.unfinished.iterdir()) - _journals(self.unfinished):
            if path.name not in self.reserved:
                path.unlink()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        try:
            if error is None:
                self._together(self._finish)
                self._together(self._publish if self._process == 0 else _nothing)
            elif interrupted and self._journal is not None:
                self._journal.flush()
        finally:
            self._close(keep=interrupted and self._journal is not None)

    def _close(self, keep: bool) -> None:
        if self._journal is not None:
            self._journal.close()
        if self._removable and not keep and self._process == 0:
            shutil.rmtree(self.unfinished, ignore_errors=True)

    def _finish(self) -> None:
        missing = [name for name, entries in self._missing.items() if entries]
        if missing and self._alone:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise CheckpointError(
                f"Leaf {missing[0]!r}{more} of {self.path} was never written; "
                "write all leaves that were announced."
            )
        if self._journal is not None:
            self._journal.flush()
        self._sync_values()

    def _sync_values(self) -> None:
        for path in self._unsynced():
            sync(path)

    def _publish(self) -> None:
        self._conclude()
        for path in self.unfinished.rglob("*"):
            sync(path)
        sync(self.unfinished)
        self._refuse_existing()
        self.unfinished.rename(self.path)
        self._removable = False  # A directory of this name is another writer's now.
        sync(self.path.parent)
        # Last of all: without them, nobody could go on with what is complete.
        for journal in _journals(self.path):
            journal.unlink()

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.path):
            raise FileExistsError(
                f"{self.path} exists already, and mixing two checkpoints in one place "
                "would corrupt both. Remove it or choose another name."
            )

    def _check_free_space(self) -> None:
        needed = sum(info.nbytes for info in self.leaves.values())
        if problem := lack_of_space(self.path, needed):
            raise CheckpointError(problem)


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def _nothing() -> None:
    pass


def runs(
    shape: tuple[int, ...], part: Part, array: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts the values of a part into stretches of the flattened whole.

    Several hosts can write them into one file, as nothing between them is touched; of a
    file mapped into memory, whole pages would be written.

    Args:
        shape: of the whole.
        part: where in it `array` is.
        array: values of the shape of the part, in any memory layout.

    Yields:
        The first entry of a stretch, and its values: a flat view, no copy, if the array
        is in C order.

    Example:
        >>> columns = Part((0, 1), (2, 2))
        >>> [(i, x.tolist()) for i, x in runs((2, 4), columns, np.ones((2, 2)))]
        [(1, [1.0, 1.0]), (5, [1.0, 1.0])]
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    partial = [axis for axis, n in enumerate(shape) if part.shape[axis] != n]
    last = max(partial, default=0)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    length = math.prod(part.shape[last:])
    first = sum(i * stride for i, stride in zip(part.starts, strides, strict=True))
    for done, outer in enumerate(np.ndindex(*part.shape[:last])):
        start = first + sum(i * n for i, n in zip(outer, strides, strict=False))
        yield start, flat[done * length : (done + 1) * length]


def _journals(directory: Path) -> set[Path]:
    """The journals of all processes."""
    return set(directory.glob(_JOURNALS.format("*")))


def _part(shape: tuple[int, ...], index: Index) -> Part:
    cuts = () if index is ... else index
    ranges = [c.indices(n)[:2] for c, n in zip(cuts, shape, strict=False)]
    ranges += [(0, n) for n in shape[len(ranges) :]]
    return Part(tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))
