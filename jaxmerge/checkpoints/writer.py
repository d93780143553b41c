"""Writes a directory in Hugging Face layout, leaf by leaf, whole or not at all."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxmerge.checkpoints.huggingface import INDEX_NAME, WEIGHTS_NAME
from jaxmerge.checkpoints.interface import CheckpointError, LeafInfo
from jaxmerge.checkpoints.output import LeafWriter, Part, runs
from jaxmerge.checkpoints.safetensors import DTYPE_NAMES, DTYPES, Layout, lay_out

MAX_SHARD_BYTES = 5_000_000_000


class Writer(LeafWriter):
    """Writes safetensors in Hugging Face layout, as `LeafWriter` says.

    Args:
        out_dir: the directory to create; it must not exist.
        leaves: name -> shape and dtype of everything that will be written.
        max_shard_bytes: values per file; above it the leaves are spread over several
            files with an index. A larger leaf gets a file of its own.
        metadata: text for the header of each file, next to `{"format": "pt"}`, which
            other loaders expect.
        options: `identity`, `process` and `agree` of `LeafWriter`.

    Raises:
        FileExistsError: `out_dir` exists.
        CheckpointError: see `LeafWriter`; or a dtype cannot be stored.

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
        **options: Any,
    ):
        super().__init__(out_dir, leaves, **options)
        if max_shard_bytes < 1:
            raise CheckpointError(
                f"max_shard_bytes is {max_shard_bytes}; it must be positive."
            )
        for name, info in leaves.items():
            _check_storable(name, info)
        self._shards = _plan_shards(
            self.leaves, max_shard_bytes, _checked_metadata(metadata)
        )
        self.reserved = frozenset({INDEX_NAME, *self._shards})
        self._places = {
            name: _Place(file_name, offset)
            for file_name, layout in self._shards.items()
            for name, offset in layout.offsets.items()
        }

    def _create(self) -> None:
        for file_name, layout in self._shards.items():
            _create_file(self.unfinished / file_name, layout)

    def _put(self, name: str, array: np.ndarray, part: Part) -> None:
        info = self.leaves[name]
        place = self._places[name]
        with (self.unfinished / place.file_name).open("r+b") as file:
            for start, values in runs(info.shape, part, array):
                _write_at(file, place.offset + start * values.itemsize, values)

    def _conclude(self) -> None:
        if len(self._shards) > 1:
            (self.unfinished / INDEX_NAME).write_text(self._index(), encoding="utf-8")

    def _unsynced(self) -> list[Path]:
        return [self.unfinished / file_name for file_name in self._shards]

    def _index(self) -> str:
        total_size = sum(info.nbytes for info in self.leaves.values())
        weight_map = {name: self._places[name].file_name for name in self.leaves}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        return json.dumps(index, indent=2) + "\n"


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


def _write_at(file: BinaryIO, offset: int, values: np.ndarray) -> None:
    file.seek(offset)
    # tobytes would copy the values; a byte view does not.
    file.write(values.view(np.uint8).data)
