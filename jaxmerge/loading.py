"""Checkpoints straight onto a mesh: every process reads only what its devices hold."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxmerge import sharding
from jaxmerge.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from jaxmerge.checkpoints.names import nest, require_leaf
from jaxmerge.checkpoints.views import cast


def load_sharded(
    source: str | os.PathLike[str] | Checkpoint,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    *,
    dtype: str | None = None,
    leaves: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint of any format into arrays on a mesh.

    No process reads, or holds on the host, more than the slices of a leaf that its own
    devices get, and each of these once.

    Args:
        source: what `open_checkpoint` opens, or a checkpoint that is open, such as a
            view with other names.
        mesh: a concrete mesh of any shape, also over many processes, all of which call
            this alike.
        rules: how leaves are sharded, by name, as in `jaxmerge.place`. None replicates
            all leaves.
        dtype: of the floating-point leaves, such as "bfloat16"; by default their own.
        leaves: the leaves to read: a regular expression, which must match the whole
            name, or a list of names; all by default.

    Returns:
        Nested dict, as of `jaxmerge.load`, of JAX arrays. Without `jax_enable_x64`,
        wide numbers become narrow.

    Raises:
        CheckpointError: see `open_checkpoint`; no leaf is selected, or a name is of
            none.
        ValueError: rules that do not fit, as `jaxmerge.place`.

    Example:
        >>> import jaxmerge, pathlib, tempfile
        >>> from jax.sharding import PartitionSpec as P
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model"
        >>> jaxmerge.save(path, {"up": {"kernel": np.ones((4, 8), np.float32)}})
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> params = load_sharded(path, mesh, {".*": P("model")}, dtype="bfloat16")
        >>> params["up"]["kernel"].sharding.spec, str(params["up"]["kernel"].dtype)
        (P('model',), 'bfloat16')
    """
    if isinstance(source, str | os.PathLike):
        source = open_checkpoint(source)
    checkpoint = source if dtype is None else cast(source, dtype)
    infos = {name: checkpoint.leaves[name] for name in _select(checkpoint, leaves)}
    shapes = {name: jax.ShapeDtypeStruct(*info) for name, info in infos.items()}
    placed = sharding.shardings(shapes, mesh, rules)
    return nest(
        {
            name: jax.make_array_from_callback(
                info.shape, placed[name], _reader(checkpoint, name), dtype=info.dtype
            )
            for name, info in infos.items()
        }
    )


def _select(
    checkpoint: Checkpoint, leaves: str | Sequence[str] | None
) -> Iterable[str]:
    if leaves is None:
        return checkpoint.leaves
    if not isinstance(leaves, str):
        for name in leaves:
            require_leaf(name, checkpoint.leaves, checkpoint.path)
        return leaves
    found = [name for name in checkpoint.leaves if re.fullmatch(leaves, name)]
    if not found:
        raise CheckpointError(
            f"{checkpoint.path} has no leaf that {leaves!r} matches as a whole."
        )
    return found


def _reader(checkpoint: Checkpoint, name: str) -> Callable[[Any], np.ndarray]:
    """Reads slices of a leaf, for devices that hold the same one only once."""
    kept: dict[str, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)
        if key not in kept:
            # A copy: what aliased a file would change with it.
            kept[key] = np.array(checkpoint.read(name, index))
        return kept[key]

    return read
