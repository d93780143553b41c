"""A directory in Hugging Face layout: one safetensors file, or shards and an index."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxmerge.checkpoints.files import (
    blake3_of,
    contents_of,
    convert_pickle_message,
    pickled_weights,
    require_weights,
    sidecar_files,
)
from jaxmerge.checkpoints.interface import CheckpointError, Index, LeafInfo
from jaxmerge.checkpoints.names import require_leaf
from jaxmerge.checkpoints.safetensors import SafetensorsFile, open_safetensors

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class HuggingFaceDirectory:
    """A model directory, opened for reading leaf by leaf (a `Checkpoint`)."""

    path: Path
    leaves: Mapping[str, LeafInfo]
    _shards: Mapping[str, SafetensorsFile] = field(repr=False)
    _inputs: tuple[Path, ...] = field(repr=False)

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Reads from the shard that holds the leaf, touching no other bytes."""
        require_leaf(name, self.leaves, self.path)
        return self._shards[name].read(name, index)

    def sidecars(self) -> list[Path]:
        return sidecar_files(self.path)

    def digest(self) -> dict[str, str]:
        return blake3_of(self._inputs)


def open_directory(path: Path) -> HuggingFaceDirectory:
    """Opens a directory and checks the headers of all its shards.

    Raises:
        CheckpointError: no weights, or more than one candidate; an index that
            disagrees with the shards; a damaged file.
    """
    index_path = path / INDEX_NAME
    if index_path.is_file():
        return _open_sharded(path, index_path)
    file = open_safetensors(_find_single_file(path))
    shards = dict.fromkeys(file.leaves, file)
    return HuggingFaceDirectory(path, file.leaves, shards, (file.path,))


def _find_single_file(directory: Path) -> Path:
    if (directory / WEIGHTS_NAME).is_file():
        return directory / WEIGHTS_NAME
    candidates = sorted(p for p in directory.glob("*.safetensors") if p.is_file())
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ", ".join(path.name for path in candidates)
        raise CheckpointError(
            f"{directory} has several safetensors files ({names}) but neither "
            f"{WEIGHTS_NAME} nor {INDEX_NAME} to say which belong together. "
            "Name one of the files, or add the index."
        )
    if pickled := pickled_weights(directory.iterdir()):
        raise CheckpointError(convert_pickle_message(pickled))
    raise CheckpointError(
        f"{directory} holds no weights: looked for {WEIGHTS_NAME}, {INDEX_NAME} or a "
        f"single *.safetensors file, and for an Orbax checkpoint; "
        f"{contents_of(directory)}. Check the path, or name a .msgpack file itself."
    )


def _open_sharded(directory: Path, index_path: Path) -> HuggingFaceDirectory:
    weight_map = _read_weight_map(index_path)
    shard_names = sorted(set(weight_map.values()))
    if WEIGHTS_NAME not in shard_names and (directory / WEIGHTS_NAME).is_file():
        raise CheckpointError(
            f"{directory} holds two checkpoints: {WEIGHTS_NAME}, and the shards of "
            f"{INDEX_NAME}. Remove the stale one, or name the file to read."
        )
    for shard_name in shard_names:
        if not (directory / shard_name).is_file():
            raise CheckpointError(
                f"{index_path} names the shard {shard_name}, which is missing; "
                f"{contents_of(directory)}. Download the missing shard."
            )
    files = {name: open_safetensors(directory / name) for name in shard_names}
    for name, shard_name in weight_map.items():
        if name not in files[shard_name].leaves:
            raise CheckpointError(
                f"{index_path} says that {shard_name} holds leaf {name!r}, but it does "
                "not. Index and shards come from different saves; download both again."
            )
    for shard_name, file in files.items():
        if unnamed := file.leaves.keys() - weight_map.keys():
            raise CheckpointError(
                f"{directory / shard_name} holds leaf {min(unnamed)!r}, which "
                f"{INDEX_NAME} does not name. Index and shards come from different "
                "saves; download both again."
            )
    return HuggingFaceDirectory(
        directory,
        {name: files[shard].leaves[name] for name, shard in weight_map.items()},
        {name: files[shard] for name, shard in weight_map.items()},
        (index_path, *(directory / name for name in shard_names)),
    )


def _read_weight_map(index_path: Path) -> dict[str, str]:
    """Reads leaf name -> shard file name; refuses paths out of the directory."""
    require_weights(index_path)
    try:
        index = json.loads(index_path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{index_path} is not JSON ({error}). Download it again."
        ) from error
    match index:
        case {"weight_map": dict(weight_map)} if all(
            isinstance(shard, str) and Path(shard).name == shard
            for shard in weight_map.values()
        ):
            return weight_map
    raise CheckpointError(
        f"{index_path} has no valid 'weight_map' from leaf names to names of files in "
        "the same directory. Download it again."
    )
