"""One safetensors file: its layout, and reading it leaf by leaf without copying.

A file is the length of the header (u64, little endian), the header (JSON: name ->
dtype, shape, byte range) and the values without gaps. The reader is our own because
the library's numpy reader knows no float8.
"""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import ml_dtypes
import numpy as np

from jaxmerge.checkpoints.files import blake3_of, require_weights
from jaxmerge.checkpoints.interface import CheckpointError, Index, LeafInfo
from jaxmerge.checkpoints.names import require_leaf

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LENGTH_BYTES = 8
_ALIGNMENT = 64  # what XLA asks of a host buffer that it shares instead of copying
_METADATA = "__metadata__"


class Layout(NamedTuple):
    """Where everything goes in a file.

    Attributes:
        head: the bytes in front of the values.
        offsets: position of each leaf's first byte in the file.
        nbytes: size of the whole file.
    """

    head: bytes
    offsets: dict[str, int]
    nbytes: int


def lay_out(leaves: Mapping[str, LeafInfo], metadata: Mapping[str, str]) -> Layout:
    """Computes a file's layout from shapes and dtypes alone.

    Leaves of wide dtypes come first, so that every leaf is aligned to its dtype.

    Example:
        >>> layout = lay_out({"w": LeafInfo((3,), np.dtype("float32"))}, {})
        >>> len(layout.head) % 64, layout.nbytes - layout.offsets["w"]
        (0, 12)
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    relative = {}
    end = 0
    for name in sorted(leaves, key=lambda name: -leaves[name].dtype.itemsize):
        info = leaves[name]
        relative[name] = end
        end += info.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [relative[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    head = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    offsets = {name: len(head) + start for name, start in relative.items()}
    return Layout(head, offsets, len(head) + end)


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file, opened for reading leaf by leaf (a `Checkpoint`)."""

    path: Path
    leaves: Mapping[str, LeafInfo]
    _offsets: Mapping[str, int] = field(repr=False)
    _mappings: WeakValueDictionary[Path, mmap.mmap] = field(
        default_factory=WeakValueDictionary, repr=False, compare=False
    )

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Maps the file into memory; only the pages that are used are read."""
        require_leaf(name, self.leaves, self.path)
        shape, dtype = self.leaves[name]
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)[index]
        start, count = self._offsets[name], math.prod(shape)
        flat = np.frombuffer(self._mapping(), dtype, count, start)
        # Other writers need not align their leaves, and some kernels insist on it.
        return np.require(flat.reshape(shape)[index], requirements=["A"])

    def _mapping(self) -> mmap.mmap:
        """The mapping that all living leaves share.

        It goes with the last of them, so that neither file descriptors nor resident
        pages pile up while the shards of a large checkpoint pass by.
        """
        mapping = self._mappings.get(self.path)
        if mapping is None:
            with self.path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._mappings[self.path] = mapping
        return mapping

    def sidecars(self) -> list[Path]:
        return []

    def digest(self) -> dict[str, str]:
        return blake3_of([self.path])


def open_safetensors(path: Path) -> SafetensorsFile:
    """Opens one file and checks its whole header against its size.

    Raises:
        CheckpointError: the file is missing, truncated or malformed.
    """
    require_weights(path)
    header, data_start, data_bytes = _read_header(path)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise CheckpointError(
            f"{path}: {_METADATA} in the header must map text to text, but is "
            f"{metadata!r}. Write the file again without it."
        )
    spans = {name: _parse_entry(path, name, entry) for name, entry in header.items()}
    _check_coverage(path, spans, data_bytes)
    return SafetensorsFile(
        path,
        {name: span.info for name, span in spans.items()},
        {name: data_start + span.start for name, span in spans.items()},
    )


class _Span(NamedTuple):
    start: int
    end: int
    info: LeafInfo


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Reads the header; also returns where the values start and their size."""
    file_bytes = path.stat().st_size
    if file_bytes < _LENGTH_BYTES:
        raise CheckpointError(
            f"{path} is truncated: {file_bytes} bytes are too few for a safetensors "
            "file. Copy or download it again."
        )
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        data_start = _LENGTH_BYTES + header_bytes
        if data_start > file_bytes:
            raise CheckpointError(
                f"{path} announces a header of {header_bytes} bytes, but the file has "
                f"only {file_bytes}: it is truncated or no safetensors file. "
                "Copy or download it again."
            )
        text = file.read(header_bytes)

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(
                f"{path}: the header names {twice!r} twice, so it is ambiguous which "
                "values count. Write the file again with distinct names."
            )
        return names

    try:
        header = json.loads(text.decode(), object_pairs_hook=without_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the header is not JSON ({error}); the file is damaged or no "
            "safetensors file. Copy or download it again."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: the header is JSON but no object; this is no safetensors file."
        )
    return header, data_start, file_bytes - data_start


def _parse_entry(path: Path, name: str, entry: Any) -> _Span:
    """Checks what the header says about one leaf."""
    match entry:
        case {
            "dtype": str(dtype_name),
            "shape": [*shape],
            "data_offsets": [int(start), int(end)],
        } if all(type(size) is int and size >= 0 for size in (*shape, start, end)):
            pass
        case _:
            raise CheckpointError(
                f"{path}: the header entry of leaf {name!r} is malformed: {entry!r}. "
                "It needs a dtype, a shape and two data_offsets; write the file again."
            )
    if dtype_name not in DTYPES:
        raise CheckpointError(
            f"{path}: leaf {name!r} has dtype {dtype_name!r}, which is not supported; "
            f"cast it to one of {', '.join(DTYPES)}."
        )
    info = LeafInfo(tuple(shape), DTYPES[dtype_name])
    if end - start != info.nbytes:
        raise CheckpointError(
            f"{path}: leaf {name!r} has {end - start} bytes at data_offsets "
            f"[{start}, {end}], but shape {info.shape} of {dtype_name} takes "
            f"{info.nbytes}. The file is damaged; copy or download it again."
        )
    return _Span(start, end, info)


def _check_coverage(path: Path, spans: Mapping[str, _Span], data_bytes: int) -> None:
    """Checks that the leaves cover the values exactly, without gap or overlap."""
    covered, previous = 0, "the header"
    for name, span in sorted(spans.items(), key=lambda item: item[1][:2]):
        if span.start != covered:
            problem = "overlaps" if span.start < covered else "leaves a hole after"
            raise CheckpointError(
                f"{path}: leaf {name!r} at data_offsets [{span.start}, {span.end}] "
                f"{problem} {previous}, which ends at {covered}. "
                "The file is damaged; copy or download it again."
            )
        if span.end > data_bytes:
            raise CheckpointError(
                f"{path} is truncated: leaf {name!r} ends at byte {span.end} of the "
                f"values, but the file has only {data_bytes} of them. "
                "Copy or download it again."
            )
        covered, previous = span.end, f"leaf {name!r}"
    if covered != data_bytes:
        raise CheckpointError(
            f"{path} has {data_bytes - covered} bytes after {previous} that belong "
            "to no leaf. The file is damaged; copy or download it again."
        )
