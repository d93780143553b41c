"""Checkpoints on disk: one lazy interface for reading, one for writing atomically."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.checkpoints.files import (
    REPORT_NAME,
    convert_pickle_message,
    pickled_weights,
    require_weights,
)
from jaxmerge.checkpoints.huggingface import open_directory
from jaxmerge.checkpoints.interface import (
    Checkpoint,
    CheckpointError,
    Index,
    LeafInfo,
    Progress,
)
from jaxmerge.checkpoints.msgpack import FLAX_NAME, open_msgpack
from jaxmerge.checkpoints.names import flatten, nest
from jaxmerge.checkpoints.orbax import is_orbax, open_orbax
from jaxmerge.checkpoints.output import LeafWriter
from jaxmerge.checkpoints.peft import load_adapter, put_on_base
from jaxmerge.checkpoints.peft_files import is_adapter, open_adapter
from jaxmerge.checkpoints.safetensors import open_safetensors
from jaxmerge.checkpoints.writer import MAX_SHARD_BYTES, Writer
from jaxmerge.checkpoints.writing import FORMATS, open_writer

__all__ = [
    "FORMATS",
    "MAX_SHARD_BYTES",
    "REPORT_NAME",
    "Checkpoint",
    "CheckpointError",
    "Index",
    "LeafInfo",
    "LeafWriter",
    "Progress",
    "Writer",
    "is_adapter",
    "load",
    "load_adapter",
    "open_adapter",
    "open_checkpoint",
    "open_writer",
    "save",
]


def open_checkpoint(
    path: str | os.PathLike[str], base: Checkpoint | None = None
) -> Checkpoint:
    """Opens a checkpoint for reading leaf by leaf.

    Args:
        path: a directory in Hugging Face layout (`model.safetensors`, or shards and
            `model.safetensors.index.json`, or a single file `*.safetensors`), a
            `.safetensors` file, an Orbax checkpoint, a `.msgpack` file of flax or a
            directory with `flax_model.msgpack`, which is read whole, or the directory
            of a PEFT LoRA adapter.
        base: the checkpoint that an adapter belongs to; others need none.

    Returns:
        The checkpoint: names, shapes and dtypes are known, no values are read. Of an
        adapter it is the model that it makes of `base`: each leaf that it changes is
        the sum of both, in float32 or wider, computed when it is read.

    Raises:
        CheckpointError: nothing there, or not complete and consistent; an adapter
            without a base, or one that does not fit it.
    """
    path = Path(path)
    if is_adapter(path):
        if base is None:
            raise CheckpointError(
                f"{path} is a LoRA adapter; it needs the base model: name its "
                "checkpoint as the base."
            )
        return put_on_base(open_adapter(path), base)
    if path.is_dir():
        if any(path.glob("*.safetensors*")):
            return open_directory(path)
        if is_orbax(path):
            return open_orbax(path)
        is_flax = (path / FLAX_NAME).is_file()
        return open_msgpack(path) if is_flax else open_directory(path)
    require_weights(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix == ".msgpack":
        return open_msgpack(path)
    if pickled := pickled_weights([path]):
        raise CheckpointError(convert_pickle_message(pickled))
    raise CheckpointError(
        f"{path} has the suffix {path.suffix!r}; a checkpoint is a .safetensors file, "
        "a .msgpack file of flax, or a directory in Hugging Face layout or of Orbax."
    )


def load(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Reads a whole checkpoint into memory.

    Args:
        path: anything that `open_checkpoint` opens.
        base: where the base of a LoRA adapter is; others need none.

    Returns:
        Nested dict of NumPy arrays in the dtypes of the file. Names with "/" become
        nested dicts; others, like "model.layers.0.mlp.up_proj.weight", stay whole.

    Raises:
        CheckpointError: see `open_checkpoint`.
    """
    checkpoint = open_checkpoint(path, None if base is None else open_checkpoint(base))
    return nest({name: np.array(checkpoint.read(name)) for name in checkpoint.leaves})


def save(
    path: str | os.PathLike[str],
    params: Any,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    sidecars: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Writes parameters as safetensors in Hugging Face layout, whole or not at all.

    Args:
        path: the directory to create; it must not exist.
        params: pytree of NumPy or JAX arrays, whole on this process, written as they
            are, NaN and infinity included. Leaves are named
            by their path joined with "/": "encoder/layer_0/kernel"; list items by
            their number. `load` gives nested dicts back.
        max_shard_bytes: values per file, see `Writer`.
        metadata: text for the header of each file.
        sidecars: files to copy next to the weights, such as
            `open_checkpoint(base).sidecars()`.

    Raises:
        FileExistsError: `path` exists.
        CheckpointError: a leaf cannot be stored or named, or the disk is too small.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model"
        >>> save(path, {"dense": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}})
        >>> load(path)["dense"]["bias"].tolist()
        [0.0, 0.0, 0.0]
    """
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(
            f"save: path is a {type(path).__name__}; call it as save(path, params)."
        )
    leaves = flatten(params)
    if not leaves:
        raise CheckpointError(f"There are no leaves to save to {path}.")
    infos = {name: _describe(name, leaf) for name, leaf in leaves.items()}
    with Writer(path, infos, max_shard_bytes, metadata) as writer:
        for sidecar in sidecars:
            writer.add_file(Path(sidecar).name, sidecar)
        for name, leaf in leaves.items():
            writer.write(name, leaf)


def _describe(name: str, leaf: Any) -> LeafInfo:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise CheckpointError(
            f"Leaf {name!r} is a {type(leaf).__name__}, not an array; "
            "convert it with numpy.asarray, or leave it out."
        )
    return LeafInfo(leaf.shape, leaf.dtype)
