"""A flax msgpack file, as `flax.serialization.to_bytes` writes it.

The format has no table of contents, so the file is read whole when it is opened: the
memory it takes is that of all its leaves. Convert large ones to safetensors with
`jaxmerge convert model.msgpack OUT --to safetensors`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxmerge.checkpoints.files import blake3_of, require_weights, sidecar_files
from jaxmerge.checkpoints.interface import CheckpointError, Index, LeafInfo
from jaxmerge.checkpoints.names import flatten, require_leaf

FLAX_NAME = "flax_model.msgpack"


@dataclass(frozen=True)
class MsgpackFile:
    """A flax msgpack file, held in memory (a `Checkpoint`)."""

    path: Path
    leaves: Mapping[str, LeafInfo]
    _file: Path = field(repr=False)
    _arrays: Mapping[str, np.ndarray] = field(repr=False)

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Returns a view of the leaf in memory."""
        require_leaf(name, self.leaves, self.path)
        return np.asarray(self._arrays[name][index])

    def sidecars(self) -> list[Path]:
        return sidecar_files(self.path) if self.path.is_dir() else []

    def digest(self) -> dict[str, str]:
        return blake3_of([self._file])


def open_msgpack(path: Path) -> MsgpackFile:
    """Reads the whole file, or the `flax_model.msgpack` of a directory.

    Raises:
        CheckpointError: the file is missing, damaged, or holds leaves that are no
            arrays or numbers.
    """
    # flax brings jax with it: only who reads its format should wait for that.
    from flax.serialization import msgpack_restore

    file = path / FLAX_NAME if path.is_dir() else path
    require_weights(file)
    try:
        tree = msgpack_restore(file.read_bytes())
    # Damaged bytes fail anywhere in the decoder, with exceptions of any kind.
    except Exception as error:
        raise CheckpointError(
            f"{file} is damaged or no flax msgpack file ({error}). "
            "Copy or download it again."
        ) from error
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"{file} holds a {type(tree).__name__}, not a dict of parameters; write it "
            "with flax.serialization.to_bytes(params)."
        )
    arrays = {name: _as_array(file, name, leaf) for name, leaf in flatten(tree).items()}
    leaves = {
        name: LeafInfo(array.shape, array.dtype) for name, array in arrays.items()
    }
    return MsgpackFile(path, leaves, file, arrays)


def _as_array(path: Path, name: str, leaf: object) -> np.ndarray:
    if not isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex):
        raise CheckpointError(
            f"{path}: leaf {name!r} is a {type(leaf).__name__}, not an array; save "
            "only the parameters: flax.serialization.to_bytes(state.params)."
        )
    return np.asarray(leaf)
