"""Writes a directory in Hugging Face layout, leaf by leaf, whole or not at all."""

import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from jaxmerge.checkpoints.huggingface import INDEX_NAME, WEIGHTS_NAME
from jaxmerge.checkpoints.interface import CheckpointError, Index, LeafInfo
from jaxmerge.checkpoints.journal import Journal, completed
from jaxmerge.checkpoints.safetensors import DTYPE_NAMES, DTYPES, Layout, lay_out

MAX_SHARD_BYTES = 5_000_000_000
_JOURNAL = "journal"


class Writer:
    """Writes leaves in any order; the output appears when all of them are there.

    Everything is written into a hidden directory beside `out_dir`, which is synced to
    disk and renamed when the `with` block ends well, and removed when it does not. The
    memory needed is that of the values being written. `write` may be called from
    several threads, for different leaves.

    A writer with an `identity` can be interrupted: if its process dies, the next writer
    of the same output and identity goes on with the leaves that are not complete.

    Args:
        out_dir: the directory to create; it must not exist.
        leaves: name -> shape and dtype of everything that will be written.
        max_shard_bytes: values per file; above it the leaves are spread over several
            files with an index. A larger leaf gets a file of its own.
        metadata: text for the header of each file, next to `{"format": "pt"}`, which
            other loaders expect.
        identity: what is written, from what: JSON. None if it cannot be told.
        process: the number of this process, if several write one output together.
        agree: waits for all of them, and raises in all if one has an error, which is
            its argument.

    Attributes:
        done: the leaves that an interrupted writer completed, with its notes on them.
        unfinished: the directory that becomes the output.

    Raises:
        FileExistsError: `out_dir` exists.
        CheckpointError: the disk is too small, a dtype cannot be stored, a leaf is
            written twice, not at all, or with another shape or dtype than announced;
            the beginning of an output of another identity is there.

    Example:
        >>> import tempfile
        >>> out_dir = Path(tempfile.mkdtemp()) / "merged"
        >>> with Writer(out_dir, {"w": LeafInfo((2,), np.dtype("float32"))}) as writer:
        ...     writer.write("w", np.ones(2, np.float32))
        ...     writer.add_file("config.json", b"{}")
        >>> sorted(path.name for path in out_dir.iterdir())
        ['config.json', 'model.safetensors']
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        leaves: Mapping[str, LeafInfo],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
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
        if max_shard_bytes < 1:
            raise CheckpointError(
                f"max_shard_bytes is {max_shard_bytes}; it must be positive."
            )
        for name, info in leaves.items():
            _check_storable(name, info)
        self.leaves = dict(leaves)
        self._shards = _plan_shards(
            self.leaves, max_shard_bytes, _checked_metadata(metadata)
        )
        self._places = {
            name: _Place(file_name, offset)
            for file_name, layout in self._shards.items()
            for name, offset in layout.offsets.items()
        }
        self._missing = {name: info.entries for name, info in self.leaves.items()}
        self._identity = identity
        self._process, self._agree = process, agree or _raise
        self._alone = agree is None
        self._journal: Journal | None = None
        self.done: Mapping[str, Any] = {}
        ending = "writing-" + uuid.uuid4().hex[:8] if identity is None else "partial"
        self.unfinished = self.path.with_name(f".{self.path.name}.{ending}")
        if not self.unfinished.exists():
            self._check_free_space()

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
        starts, shape = _part(info.shape, index)
        if LeafInfo(array.shape, array.dtype) != (shape, info.dtype):
            raise CheckpointError(
                f"Leaf {name!r} of {self.path} was announced as "
                f"{info.dtype}{list(shape)}, "
                f"but the array is {array.dtype}{list(array.shape)}; "
                "reshape or cast it before writing."
            )
        if array.size > self._missing[name]:
            raise CheckpointError(
                f"Leaf {name!r} of {self.path} is written twice; write each leaf once."
            )
        place = self._places[name]
        path = self.unfinished / place.file_name
        if shape[1:] == info.shape[1:]:
            row = math.prod(shape[1:]) * info.dtype.itemsize
            # tobytes would copy; a flat byte view of C-ordered memory does not.
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            _write_at(path, place.offset + sum(starts[:1]) * row, flat.data)
        elif array.size:
            kwargs = {"mode": "r+", "offset": place.offset, "shape": info.shape}
            file = np.memmap(path, np.dtype(f"u{info.dtype.itemsize}"), **kwargs)
            part = tuple(slice(i, i + n) for i, n in zip(starts, shape, strict=True))
            file[part] = np.ascontiguousarray(array).view(file.dtype)
        self._missing[name] -= array.size

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
        if name == INDEX_NAME or target.exists():
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
                self._go_on()
            if not self.done:
                self._together(self._create if self._process == 0 else _nothing)
        except BaseException as error:
            # What another merge has begun stays; so does what can be finished later.
            self._close(keep=self._identity is not None and _is_refusal(error))
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

    def _create(self) -> None:
        for file_name, layout in self._shards.items():
            _create_file(self.unfinished / file_name, layout)

    def _open_journal(self) -> None:
        path = self.unfinished / f"{_JOURNAL}-{self._process}.jsonl"
        self._journal = Journal(path, self._identity, self._sync_values)

    def _go_on(self) -> None:
        """Finds out what all processes have completed."""
        assert self._journal is not None
        journals = self.unfinished.glob(f"{_JOURNAL}-*.jsonl")
        complete = set.intersection(*(completed(path) for path in journals))
        self.done = {n: x for n, x in self._journal.done.items() if n in complete}
        self._missing |= dict.fromkeys(self.leaves.keys() & complete, 0)

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
        if not keep and self._process == 0:
            shutil.rmtree(self.unfinished, ignore_errors=True)

    def _finish(self) -> None:
        missing = [name for name, entries in self._missing.items() if entries]
        if missing and self._alone:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise CheckpointError(
                f"Leaf {missing[0]!r}{more} of {self.path} was never written; "
                "the incomplete output was removed."
            )
        self._sync_values()

    def _sync_values(self) -> None:
        for file_name in self._shards:
            _sync(self.unfinished / file_name)

    def _publish(self) -> None:
        if len(self._shards) > 1:
            (self.unfinished / INDEX_NAME).write_text(self._index(), encoding="utf-8")
        for journal in self.unfinished.glob(f"{_JOURNAL}-*.jsonl"):
            journal.unlink()
        for path in self.unfinished.iterdir():
            _sync(path)
        _sync(self.unfinished)
        self._refuse_existing()
        self.unfinished.rename(self.path)
        _sync(self.path.parent)

    def _index(self) -> str:
        total_size = sum(info.nbytes for info in self.leaves.values())
        weight_map = {name: self._places[name].file_name for name in self.leaves}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        return json.dumps(index, indent=2) + "\n"

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.path):
            raise FileExistsError(
                f"{self.path} exists already, and mixing two checkpoints in one place "
                "would corrupt both. Remove it or choose another name."
            )

    def _check_free_space(self) -> None:
        needed = sum(layout.nbytes for layout in self._shards.values())
        place = next(parent for parent in self.path.parents if parent.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise CheckpointError(
                f"{self.path} needs {needed:,} bytes, but {place} has only {free:,} "
                "free. Make room, choose another disk or a smaller dtype."
            )


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def _nothing() -> None:
    pass


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, CheckpointError)


def _part(shape: tuple[int, ...], index: Index) -> tuple[list[int], tuple[int, ...]]:
    """Where a part of an array begins, and its shape."""
    cuts = () if index is ... else index
    ranges = [c.indices(n)[:2] for c, n in zip(cuts, shape, strict=False)]
    ranges += [(0, n) for n in shape[len(ranges) :]]
    return [start for start, _ in ranges], tuple(b - a for a, b in ranges)


class _Place(NamedTuple):
    file_name: str
    offset: int


def _check_storable(name: str, info: LeafInfo) -> None:
    if name in ("", "__metadata__"):
        raise CheckpointError(f"A leaf cannot have the name {name!r}; rename it.")
    if info.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype) for dtype in DTYPES.values())
        raise CheckpointError(
            f"Leaf {name!r} has dtype {info.dtype}, which safetensors cannot store; "
            f"cast it to one of {known}."
        )


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    merged = {"format": "pt", **(metadata or {})}
    for key, text in merged.items():
        if not isinstance(text, str):
            raise CheckpointError(
                f"metadata[{key!r}] is a {type(text).__name__}; the header of a "
                "safetensors file holds text only: use str or json.dumps."
            )
    return merged


def _plan_shards(
    leaves: Mapping[str, LeafInfo], max_shard_bytes: int, metadata: Mapping[str, str]
) -> dict[str, Layout]:
    """Fills files one after the other, in the order of the leaves."""
    shards: list[dict[str, LeafInfo]] = [{}]
    filled = 0
    for name, info in leaves.items():
        if shards[-1] and filled + info.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.nbytes
    if len(shards) == 1:
        return {WEIGHTS_NAME: lay_out(shards[0], metadata)}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": lay_out(shard, metadata)
        for number, shard in enumerate(shards, start=1)
    }


def _create_file(path: Path, layout: Layout) -> None:
    """Writes the head and reserves the space for the values."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, layout.nbytes)
            except OSError as error:
                # Not every file system can reserve space.
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
        file.write(layout.head)
        file.truncate(layout.nbytes)


def _write_at(path: Path, offset: int, data: memoryview) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _sync(path: Path) -> None:
    """Waits until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
