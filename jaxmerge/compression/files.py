"""The files of a store, each with what proves that it is undamaged.

    STORE/store.json          kind, options, how leaves are kept, where they came from
    STORE/base/               the base, a checkpoint like any other
    STORE/shared.safetensors what tasks share of the leaves that one of them changes
    STORE/tasks/NAME/         one task: task.json and leaves.bin

`leaves.bin` holds what the task keeps, leaf by leaf without gaps: packed masks (all
entries in C order, the first in the highest bit) and little-endian arrays, compressed
with zlib where `task.json` says so. A vector that tasks share is a leaf of
`shared.safetensors` like any other; codes of several parts are one there, of the bytes
that `leaves.bin` would have. Leaves are listed without their names, as a digest
each (the first 96 bits of a SHA-256, in base64) or null: wide dtypes first, then by
name. Of small models, names would take more than masks.
"""

import base64
import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxmerge.checkpoints import CheckpointError, LeafInfo
from jaxmerge.checkpoints.files import sync
from jaxmerge.checkpoints.safetensors import lay_out
from jaxmerge.compression.packing import flat_bits, row_bits

STORE_NAME = "store.json"
BASE_NAME = "base"
SHARED_NAME = "shared.safetensors"
TASKS_NAME = "tasks"
TASK_NAME = "task.json"
LEAVES_NAME = "leaves.bin"

_SEAL = "seal"
# Reading is faster than inflating: a little space is not worth it.
_WORTHWHILE = 0.9
_SAMPLE_BYTES = 1 << 16


class StoreError(CheckpointError):
    """A store that cannot be made, read or trusted; the message says what to do."""


def digest(data: Any) -> str:
    """What identifies the bytes of an array or buffer: 16 characters.

    Example:
        >>> digest(b"abc")
        'ungWv48Bz-pBQUDe'
    """
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()[:12]).decode()


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in C order, without a copy where they lie so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the digest of itself."""
    return {**document, _SEAL: digest(compact_json(document))}


def compact_json(document: Mapping[str, Any]) -> bytes:
    """JSON without any space to spare, as stores keep and seal it."""
    return json.dumps(document, separators=(",", ":")).encode()


def unsealed(path: Path) -> dict[str, Any]:
    """Reads a sealed document.

    Raises:
        StoreError: the file is missing or damaged.
    """
    try:
        document = json.loads(path.read_bytes())
        rest = {key: value for key, value in document.items() if key != _SEAL}
    except FileNotFoundError:
        raise StoreError(f"{path} is missing. Copy the store again.") from None
    except (ValueError, RecursionError, AttributeError) as error:
        raise StoreError(
            f"{path} is damaged: it is no JSON object ({error}). Copy the store again."
        ) from error
    if seal(rest) != document:
        raise StoreError(
            f"{path} is damaged or was edited: it does not match its own digest. Copy "
            "the store again."
        )
    return document


def part_bytes(info: LeafInfo) -> int:
    """How many bytes a part of a leaf takes, uncompressed; masks are packed."""
    return -(-math.prod(info.shape) // 8) if info.dtype == bool else info.nbytes


def to_buffer(parts: Mapping[str, np.ndarray], infos: Mapping[str, LeafInfo]) -> bytes:
    """What is kept of a leaf, as one run of bytes."""
    return b"".join(
        flat_bits(parts[name], info.shape).tobytes()
        if info.dtype == bool
        else as_bytes(parts[name]).tobytes()
        for name, info in infos.items()
    )


def from_buffer(data: Any, infos: Mapping[str, LeafInfo]) -> dict[str, np.ndarray]:
    """Takes apart what `to_buffer` put together."""
    parts, start = {}, 0
    for name, info in infos.items():
        raw = np.frombuffer(data, np.uint8, part_bytes(info), start)
        start += raw.size
        if info.dtype == bool:
            parts[name] = row_bits(raw, info.shape)
        else:
            array = raw.view(info.dtype).reshape(info.shape)
            parts[name] = np.require(array, requirements=["A"])
    return parts


def file_info(infos: Mapping[str, LeafInfo]) -> LeafInfo:
    """What a safetensors file holds parts as: one alone as it is, several as bytes."""
    if len(infos) == 1:
        return next(iter(infos.values()))
    return LeafInfo((sum(map(part_bytes, infos.values())),), np.dtype(np.uint8))


def to_array(
    parts: Mapping[str, np.ndarray], infos: Mapping[str, LeafInfo]
) -> np.ndarray:
    """The array that a safetensors file holds of parts: see `file_info`."""
    if len(infos) == 1:
        return next(iter(parts.values()))
    return np.frombuffer(to_buffer(parts, infos), np.uint8)


def from_array(
    array: np.ndarray, infos: Mapping[str, LeafInfo]
) -> dict[str, np.ndarray]:
    """Takes apart what `to_array` put together."""
    if len(infos) == 1:
        return dict.fromkeys(infos, array)
    return from_buffer(array, infos)


class Entry(NamedTuple):
    """A leaf in `leaves.bin`.

    Attributes:
        digest: of its bytes in the file.
        nbytes: how many these are if they are compressed, else None.
    """

    digest: str
    nbytes: int | None = None


class LeafFile:
    """Writes `leaves.bin`, leaf after leaf."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.entries: dict[str, Entry] = {}

    def write(self, name: str, data: bytes) -> None:
        """Appends a leaf, compressed if that saves a tenth."""
        # Most masks are all but random, and to try them whole takes long.
        sample = data[:: 1 + len(data) // _SAMPLE_BYTES]
        stored = zlib.compress(data, level=1) if _shrinks(sample) else data
        nbytes = len(stored) if stored is not data else None
        self._file.write(stored)
        self.entries[name] = Entry(digest(stored), nbytes)


def _shrinks(data: bytes) -> bool:
    return len(zlib.compress(data, level=1)) < _WORTHWHILE * len(data)


class VectorFile:
    """Writes a safetensors file whose leaves become known while it is written.

    Args:
        file: opened for writing, empty.
        leaves: all leaves that may come, the widest dtypes first; they come in this
            order.
    """

    def __init__(self, file: BinaryIO, leaves: Mapping[str, LeafInfo]):
        self._file, self._allowed = file, leaves
        self._head_bytes = len(lay_out(leaves, {"format": "pt"}).head)
        self._file.seek(self._head_bytes)
        self._written: dict[str, LeafInfo] = {}
        self.digests: dict[str, str] = {}

    def write(self, name: str, array: np.ndarray) -> None:
        """Appends a leaf."""
        data = as_bytes(array)
        self._file.write(data.data)
        self._written[name] = self._allowed[name]
        self.digests[name] = digest(data)

    def finish(self) -> None:
        """Writes the head, now that all leaves are known."""
        text = lay_out(self._written, {"format": "pt"}).head[8:]
        size = self._head_bytes - 8
        self._file.seek(0)
        self._file.write(size.to_bytes(8, "little") + text.ljust(size))


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory that appears when the block ends well, and else not at all.

    Yields:
        A hidden directory beside `path`, to write into.

    Raises:
        FileExistsError: `path` exists.
    """
    path = path.absolute()

    def refuse_existing() -> None:
        if os.path.lexists(path):
            raise FileExistsError(
                f"{path} exists already; remove it or choose another name."
            )

    refuse_existing()
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.writing-{uuid.uuid4().hex[:8]}")
    try:
        hidden.mkdir()
        yield hidden
        for written in [*hidden.rglob("*"), hidden]:
            sync(written)
        refuse_existing()
        hidden.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def check_space(path: Path, needed: int) -> None:
    """Raises if the disk that `path` will be on has less than `needed` bytes free."""
    place = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StoreError(
            f"{path} needs up to {needed:,} bytes, but {place} has only {free:,} free. "
            "Make room, or choose another disk."
        )
