"""The formats that checkpoints are written in, each by its name."""

import os
from collections.abc import Mapping
from typing import Any

from jaxmerge.checkpoints.interface import CheckpointError, LeafInfo
from jaxmerge.checkpoints.msgpack_writer import MsgpackWriter
from jaxmerge.checkpoints.orbax_writer import OrbaxWriter
from jaxmerge.checkpoints.output import LeafWriter
from jaxmerge.checkpoints.writer import MAX_SHARD_BYTES, Writer

FORMATS = ("safetensors", "orbax", "msgpack")
"""Names of formats: safetensors in Hugging Face layout, Orbax (v1), flax msgpack."""


def open_writer(
    path: str | os.PathLike[str],
    leaves: Mapping[str, LeafInfo],
    format: str = "safetensors",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **options: Any,
) -> LeafWriter:
    """Chooses the writer of a format.

    Args:
        path: the directory to create; it must not exist.
        leaves: name -> shape and dtype of everything that will be written.
        format: one of `FORMATS`.
        max_shard_bytes: values per file of safetensors; the others know no such files.
        options: `identity`, `process` and `agree` of `LeafWriter`.

    Returns:
        The writer, to be used in a `with` block; nothing exists before that.

    Raises:
        FileExistsError: `path` exists.
        CheckpointError: an unknown format, a leaf that it cannot store, or a disk that
            is too small.
    """
    if format == "safetensors":
        return Writer(path, leaves, max_shard_bytes, **options)
    if format == "orbax":
        return OrbaxWriter(path, leaves, **options)
    if format == "msgpack":
        return MsgpackWriter(path, leaves, **options)
    raise CheckpointError(f"format is {format!r}; it must be one of {FORMATS}.")
