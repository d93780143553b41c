"""Writes flax msgpack leaf by leaf, whole or not at all.

Shapes and dtypes alone say where every byte goes, so leaves are written in place, in
any order, and the file is never in memory. It is, byte for byte, the one that
`flax.serialization.to_bytes` makes.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxmerge.checkpoints.interface import CheckpointError, LeafInfo
from jaxmerge.checkpoints.msgpack import FLAX_NAME
from jaxmerge.checkpoints.names import nest
from jaxmerge.checkpoints.output import LeafWriter, Part, runs

MAX_PIECE_BYTES = 2**30  # above which flax cuts arrays into pieces

_NDARRAY = 1  # as flax numbers its extension types
_THREE_ITEMS = b"\x93"  # the head of an array in msgpack


class MsgpackWriter(LeafWriter):
    """Writes `flax_model.msgpack` in a directory, as `LeafWriter` says.

    Names with "/" become nested dicts, others stay whole.

    Raises:
        FileExistsError: `out_dir` exists.
        CheckpointError: see `LeafWriter`; or a dtype is one that flax does not read.

    Example:
        >>> import tempfile
        >>> from flax.serialization import msgpack_restore
        >>> path = Path(tempfile.mkdtemp()) / "model"
        >>> leaves = {"a/w": LeafInfo((2,), np.dtype("int8"))}
        >>> with MsgpackWriter(path, leaves) as writer:
        ...     writer.write("a/w", np.ones(2, np.int8))
        >>> msgpack_restore((path / FLAX_NAME).read_bytes())
        {'a': {'w': array([1, 1], dtype=int8)}}
    """

    reserved = frozenset({FLAX_NAME})

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        leaves: Mapping[str, LeafInfo],
        **options: Any,
    ):
        super().__init__(out_dir, leaves, **options)
        for name, info in self.leaves.items():
            _check_storable(name, info)
        tree = nest({name: _Leaf(name, info) for name, info in self.leaves.items()})
        self._pieces: list[tuple[int, bytes]] = []
        self._places: dict[str, list[_Place]] = {name: [] for name in self.leaves}
        self._nbytes = 0
        for piece in _pieces(tree):
            if isinstance(piece, bytes):
                self._pieces.append((self._nbytes, piece))
                self._nbytes += len(piece)
            else:
                self._places[piece.name].append(_Place(self._nbytes, piece.entries))
                self._nbytes += piece.nbytes

    def _create(self) -> None:
        with (self.unfinished / FLAX_NAME).open("wb") as file:
            for offset, piece in self._pieces:
                file.seek(offset)
                file.write(piece)
            file.truncate(self._nbytes)

    def _put(self, name: str, array: np.ndarray, part: Part) -> None:
        with (self.unfinished / FLAX_NAME).open("r+b") as file:
            for start, values in runs(self.leaves[name].shape, part, array):
                self._write_run(file, name, start, values)

    def _write_run(
        self, file: BinaryIO, name: str, start: int, values: np.ndarray
    ) -> None:
        for offset, entries in self._places[name]:
            low = max(entries.start, start)
            high = min(entries.stop, start + values.size)
            if low < high:
                file.seek(offset + (low - entries.start) * values.itemsize)
                # tobytes would copy the values; a byte view does not.
                file.write(values[low - start : high - start].view(np.uint8).data)

    def _unsynced(self) -> list[Path]:
        return [self.unfinished / FLAX_NAME]


class _Place(NamedTuple):
    """Where entries of a leaf, flattened, are in the file."""

    offset: int
    entries: range


class _Leaf(NamedTuple):
    name: str
    info: LeafInfo


class _Values(NamedTuple):
    """Room for entries of a leaf, flattened."""

    name: str
    entries: range
    nbytes: int


def _pieces(tree: Mapping[str, Any]) -> Iterator[bytes | _Values]:
    """The file from start to end: bytes, and places for values."""
    yield _map_head(len(tree))
    for key, node in tree.items():
        yield _packed(key)
        yield from _leaf_pieces(*node) if isinstance(node, _Leaf) else _pieces(node)


def _leaf_pieces(name: str, info: LeafInfo) -> Iterator[bytes | _Values]:
    size = info.entries
    if info.nbytes <= MAX_PIECE_BYTES:
        yield from _array_pieces(name, info.shape, info.dtype, range(size))
        return
    step = max(1, MAX_PIECE_BYTES // info.dtype.itemsize)
    parts = [range(i, min(i + step, size)) for i in range(0, size, step)]
    shape = {str(axis): length for axis, length in enumerate(info.shape)}
    yield _map_head(3)
    yield _packed("__msgpack_chunked_array__") + _packed(True)
    yield _packed("shape") + _packed(shape)
    yield _packed("chunks") + _map_head(len(parts))
    for number, part in enumerate(parts):
        yield _packed(str(number))
        yield from _array_pieces(name, (len(part),), info.dtype, part)


def _array_pieces(
    name: str, shape: tuple[int, ...], dtype: np.dtype, entries: range
) -> Iterator[bytes | _Values]:
    """An extension that holds the shape, the dtype's name and the values."""
    nbytes = len(entries) * dtype.itemsize
    head = _THREE_ITEMS + _packed(shape) + _packed(dtype.name)
    head += _sized(nbytes, fixed=(), codes=b"\xc4\xc5\xc6")
    yield _sized(len(head) + nbytes, fixed=(1, 2, 4, 8, 16), codes=b"\xc7\xc8\xc9")
    yield bytes([_NDARRAY]) + head
    yield _Values(name, entries, nbytes)


def _packed(value: Any) -> Any:
    import msgpack

    return msgpack.packb(value)


def _map_head(items: int) -> Any:
    import msgpack

    return msgpack.Packer().pack_map_header(items)


def _sized(nbytes: int, fixed: tuple[int, ...], codes: bytes) -> bytes:
    """The shortest head of a binary (or extension) of so many bytes."""
    if nbytes in fixed:
        return bytes([0xD4 + fixed.index(nbytes)])
    width = 0 if nbytes < 2**8 else 1 if nbytes < 2**16 else 2
    return codes[width : width + 1] + nbytes.to_bytes(2**width, "big")


def _check_storable(name: str, info: LeafInfo) -> None:
    try:
        known = (
            info.dtype.kind not in "OSUMm" and np.dtype(info.dtype.name) == info.dtype
        )
    except TypeError:
        known = False
    if not known:
        raise CheckpointError(
            f"Leaf {name!r} has dtype {info.dtype}, which flax does not read; cast it "
            "to float32, for example."
        )
