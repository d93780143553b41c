"""Orbax checkpoints, read leaf by leaf and chunk by chunk.

An Orbax checkpoint is a directory with one or more items, each a directory with a file
`_METADATA` (the keys that lead to every leaf) and one Zarr array per leaf, most often
in a key-value database (OCDBT) of many small files. Values are read with TensorStore,
as Orbax itself does: that takes a part of a leaf without the rest, is several times
faster leaf by leaf, and needs no JAX. Orbax is the oracle of the tests.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.checkpoints.files import blake3_of, contents_of, sidecar_files
from jaxmerge.checkpoints.indexing import ranges, shifted
from jaxmerge.checkpoints.interface import CheckpointError, Index, LeafInfo
from jaxmerge.checkpoints.names import nest, require_leaf

CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
ITEM_METADATA = "_METADATA"
INDICATOR = "orbax.checkpoint"
DATABASE = "manifest.ocdbt"

_UNFINISHED = ".orbax-checkpoint-tmp"
_AGAIN = "Copy or download it again, or restore it with Orbax and save it again."


@dataclass(frozen=True)
class OrbaxDirectory:
    """An Orbax checkpoint, opened for reading leaf by leaf (a `Checkpoint`)."""

    path: Path
    leaves: Mapping[str, LeafInfo]
    _item: Path = field(repr=False)
    _arrays: Mapping[str, Any] = field(repr=False)

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Reads the chunks that hold the part.

        Raises:
            CheckpointError: there is no such leaf, or a chunk is missing or damaged.
        """
        require_leaf(name, self.leaves, self.path)
        wanted = ranges(index, self.leaves[name].shape)
        if not all(wanted):
            return np.empty([len(along) for along in wanted], self.leaves[name].dtype)
        within = tuple(slice(min(along), max(along) + 1) for along in wanted)
        try:
            array = np.asarray(self._arrays[name][within].read().result())
        # What the storage layer raises, at length, depends on the kind of damage.
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: values of leaf {name!r} are missing or damaged. {_AGAIN}"
            ) from error
        return np.asarray(array[tuple(shifted(along, min(along)) for along in wanted)])

    def sidecars(self) -> list[Path]:
        return sidecar_files(self.path)

    def digest(self) -> dict[str, str]:
        """Computes the BLAKE3 of all files of the item, by path in the checkpoint."""
        files = sorted(path for path in self._item.rglob("*") if path.is_file())
        return blake3_of(files, self.path)


def is_orbax(path: Path) -> bool:
    """Whether a directory is an Orbax checkpoint, part of one, or holds several."""
    marks = (CHECKPOINT_METADATA, ITEM_METADATA, INDICATOR, DATABASE)
    return (
        _UNFINISHED in path.name
        or any((path / mark).is_file() for mark in marks)
        or bool(_with(CHECKPOINT_METADATA, path) or _with(ITEM_METADATA, path))
    )


def open_orbax(path: str | os.PathLike[str]) -> OrbaxDirectory:
    """Opens an Orbax checkpoint and checks what it says about its leaves.

    Args:
        path: a directory that `ocp.save` of the v1 API wrote, or a
            `StandardCheckpointer` or `PyTreeCheckpointer` of v0, or one step of a
            `CheckpointManager`; or one item in it, if there are several.

    Returns:
        The checkpoint. Leaves are named by the keys that lead to them, joined with
        "/"; no values are read.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, holds several items or
            steps, or leaves that are no arrays.
    """
    path = Path(path)
    item = _find_item(path)
    metadata = _read_metadata(path, item)
    arrays = _open_arrays(path, item, metadata)
    leaves = {
        name: LeafInfo(tuple(array.shape), np.dtype(array.dtype.numpy_dtype))
        for name, array in arrays.items()
    }
    return OrbaxDirectory(path, leaves, item, arrays)


def _find_item(path: Path) -> Path:
    """The directory that holds the arrays."""
    if _UNFINISHED in path.name:
        raise CheckpointError(
            f"{path} is what is left of an interrupted save; choose a complete one."
        )
    if (path / ITEM_METADATA).is_file():
        return path
    if len(items := _with(ITEM_METADATA, path)) == 1:
        return items[0]
    if items:
        raise CheckpointError(
            f"{path} holds several items, {_listed(items)}; name the one to read, such "
            f"as {items[0]}."
        )
    if steps := _with(CHECKPOINT_METADATA, path):
        raise CheckpointError(
            f"{path} holds several checkpoints, {_listed(steps)}; name the one to "
            f"read, such as {steps[-1]}."
        )
    raise CheckpointError(
        f"{path} is an incomplete Orbax checkpoint: no {ITEM_METADATA} in it or in a "
        f"directory of it; {contents_of(path)}. {_AGAIN}"
    )


def _with(name: str, path: Path) -> list[Path]:
    """The directories in `path` that contain a file `name`, in natural order."""
    found = [child for child in path.iterdir() if (child / name).is_file()]
    return sorted(found, key=lambda child: (len(child.name), child.name))


def _listed(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)


class _Metadata(NamedTuple):
    """What an item says about itself.

    Attributes:
        stored: leaf name -> name of its array, the keys joined with dots.
        driver: the format of the arrays.
        database: whether they are in an OCDBT database, not in directories.
        complete: whether every chunk is there, also those full of zeros.
    """

    stored: dict[str, str]
    driver: str
    database: bool
    complete: bool


def _read_metadata(path: Path, item: Path) -> _Metadata:
    try:
        metadata = json.loads((item / ITEM_METADATA).read_bytes())
        entries = [
            ([str(step["key"]) for step in entry["key_metadata"]], entry)
            for entry in metadata["tree_metadata"].values()
        ]
        kinds = [entry["value_metadata"] for _, entry in entries]
        stored = {
            "/".join(keys): (".".join(keys), kind["value_type"])
            for (keys, _), kind in zip(entries, kinds, strict=True)
            # Containers without leaves, and None, are noted but not stored.
            if not kind.get("skip_deserialize", False)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{item / ITEM_METADATA} is damaged, or of a version of Orbax that is not "
            f"known here. {_AGAIN}"
        ) from error
    for name, (_, kind) in stored.items():
        if kind == "string":
            raise CheckpointError(
                f"{path}: leaf {name!r} is text, not an array; save only parameters."
            )
    nest(stored)
    database = (item / DATABASE).is_file()
    if metadata.get("use_ocdbt", database) and not database:
        raise CheckpointError(
            f"{path} is an incomplete Orbax checkpoint: {item / DATABASE} is missing. "
            f"{_AGAIN}"
        )
    return _Metadata(
        {name: array for name, (array, _) in stored.items()},
        "zarr3" if metadata.get("use_zarr3") else "zarr",
        database,
        bool(metadata.get("store_array_data_equal_to_fill_value")),
    )


def _open_arrays(path: Path, item: Path, metadata: _Metadata) -> dict[str, Any]:
    """Opens all arrays at once: most of the time is waiting for files."""
    import tensorstore

    context = tensorstore.Context()
    opening = {
        name: tensorstore.open(
            {
                "driver": metadata.driver,
                "kvstore": place_of(item, array, metadata.database),
                # Else a chunk that is lost would read as zeros.
                "fill_missing_data_reads": not metadata.complete,
            },
            open=True,
            read=True,
            context=context,
        )
        for name, array in metadata.stored.items()
    }
    arrays = {}
    for name, array in opening.items():
        try:
            arrays[name] = array.result()
        except Exception as error:
            raise CheckpointError(
                f"{path}: leaf {name!r} is announced in {ITEM_METADATA}, but its array "
                f"is missing or damaged. {_AGAIN}"
            ) from error
    return arrays


def place_of(item: Path, array: str, database: bool = True) -> dict[str, Any]:
    """Where TensorStore finds an array of an item."""
    root = {"driver": "file", "path": f"{item.absolute()}/"}
    if database:
        return {"driver": "ocdbt", "base": root, "path": f"{array}/"}
    return {**root, "path": f"{root['path']}{array}/"}
