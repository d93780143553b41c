"""Writes Orbax checkpoints leaf by leaf, whole or not at all.

The layout is that of the v1 API (see `orbax`): `ocp.load(path)` restores it, and so do
the checkpointers of v0 with the item itself, `path / "state"`. Arrays are written with
TensorStore, one at a time: `ocp.partial.save` is slower by leaf, takes no empty ones,
and needs JAX.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmerge.checkpoints.files import COMMIT_NAME
from jaxmerge.checkpoints.interface import CheckpointError, LeafInfo
from jaxmerge.checkpoints.names import nest
from jaxmerge.checkpoints.orbax import (
    CHECKPOINT_METADATA,
    INDICATOR,
    ITEM_METADATA,
    place_of,
)
from jaxmerge.checkpoints.output import LeafWriter, Part

ITEM = "state"
MAX_CHUNK_BYTES = 16 * 2**20

_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_DICT_KEY = 2  # as Orbax numbers the kinds of keys


class OrbaxWriter(LeafWriter):
    """Writes an Orbax checkpoint, as `LeafWriter` says.

    Leaves are cut into chunks of at most 16 MiB, with a checksum each, so that every
    host of a mesh can read its own part. Names with "/" become nested dicts, others
    stay whole.

    Raises:
        FileExistsError: `out_dir` exists.
        CheckpointError: see `LeafWriter`; or there are no leaves, a dtype cannot be
            stored, or two leaves would be one in Orbax, which joins keys with dots.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from jaxmerge.checkpoints.orbax import open_orbax
        >>> path = Path(tempfile.mkdtemp()) / "model"
        >>> with OrbaxWriter(path, {"a/w": LeafInfo((2,), np.dtype("int8"))}) as writer:
        ...     writer.write("a/w", np.ones(2, np.int8))
        >>> open_orbax(path).read("a/w").tolist()
        [1, 1]
    """

    reserved = frozenset({ITEM, CHECKPOINT_METADATA, INDICATOR, COMMIT_NAME})

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        leaves: Mapping[str, LeafInfo],
        **options: Any,
    ):
        super().__init__(out_dir, leaves, **options)
        if not self.leaves:
            raise CheckpointError(f"There are no leaves to write to {self.path}.")
        nest(self.leaves)
        by_array: dict[str, str] = {}
        for name, info in self.leaves.items():
            _check_storable(name, info)
            other = by_array.setdefault(_array_name(name), name)
            if other != name:
                raise CheckpointError(
                    f"Leaves {other!r} and {name!r} have one name in an Orbax "
                    "checkpoint, which joins keys with dots; rename one."
                )
        self._began = time.time_ns()
        self._arrays: dict[str, Any] = {}

    def _create(self) -> None:
        shutil.rmtree(self.unfinished / ITEM, ignore_errors=True)
        (self.unfinished / ITEM).mkdir()

    def _put(self, name: str, array: np.ndarray, part: Part) -> None:
        target = self._array(name)[part.slices]
        # Without this, TensorStore would copy the values, which nobody changes here.
        target.write(array, can_reference_source_data_indefinitely=True).result()

    def row_step(self, name: str) -> int:
        return (chunk_shape(self.leaves[name]) or [1])[0]

    def _array(self, name: str) -> Any:
        import tensorstore

        if name not in self._arrays:
            place = place_of(self.unfinished / ITEM, _array_name(name))
            spec = {**_spec(self.leaves[name]), "kvstore": place}
            # It is there already if an interrupted writer did not complete it.
            opening = tensorstore.open(spec, create=True, open=True)
            self._arrays[name] = opening.result()
        return self._arrays[name]

    def _conclude(self) -> None:
        for name, info in self.leaves.items():
            if not info.entries:
                self._array(name)  # of which there is nothing to write
        item = {
            "tree_metadata": {
                str(tuple(name.split("/"))): {
                    "key_metadata": [
                        {"key": key, "key_type": _DICT_KEY} for key in name.split("/")
                    ],
                    "value_metadata": {
                        "value_type": "np.ndarray",
                        "skip_deserialize": False,
                    },
                }
                for name in self.leaves
            },
            "use_ocdbt": True,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        checkpoint = {
            "item_handlers": {ITEM: _HANDLER},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": self._began,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": {},
        }
        for name, content in {
            f"{ITEM}/{ITEM_METADATA}": json.dumps(item),
            CHECKPOINT_METADATA: json.dumps(checkpoint),
            INDICATOR: "",
            # Where directories cannot be renamed, Orbax believes this file alone.
            COMMIT_NAME: f"Checkpoint commit was successful to {self.path}",
        }.items():
            (self.unfinished / name).write_text(content, encoding="utf-8")


def _array_name(name: str) -> str:
    return name.replace("/", ".")


def _spec(info: LeafInfo) -> dict[str, Any]:
    endian = {"configuration": {"endian": "little"}} if info.dtype.itemsize > 1 else {}
    return {
        "driver": "zarr3",
        "metadata": {
            "shape": info.shape,
            "data_type": info.dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": chunk_shape(info)},
            },
            # Weights hardly compress.
            "codecs": [{"name": "bytes", **endian}, {"name": "crc32c"}],
        },
        # Else a lost chunk could not be told from one of zeros.
        "store_data_equal_to_fill_value": True,
    }


def chunk_shape(info: LeafInfo) -> list[int]:
    """Halves axes until a chunk is small enough.

    Those that stack matrices come first, so that layers are apart, and then the longer
    one of the last two, so that sharding along either reads little in vain.

    Example:
        >>> chunk_shape(LeafInfo((32, 4096, 11008), np.dtype("float32")))
        [1, 2048, 1376]
    """
    shape = [max(size, 1) for size in info.shape]
    while math.prod(shape) * info.dtype.itemsize > MAX_CHUNK_BYTES:
        stacked = (axis for axis, size in enumerate(shape[:-2]) if size > 1)
        axis = next(stacked, shape.index(max(shape)))
        shape[axis] = -(-shape[axis] // 2)
    return shape


def _check_storable(name: str, info: LeafInfo) -> None:
    import tensorstore

    try:
        tensorstore.Spec(_spec(info))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"Leaf {name!r} has dtype {info.dtype}, which Orbax cannot store; cast it "
            "to float32, for example."
        ) from error
