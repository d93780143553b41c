"""Checkpoints made of others: leaves renamed, rearranged, cast, stacked, when read.

A view is a checkpoint like any other: it can be merged, converted or viewed again.
Nothing is read until a leaf is, and of a part only what that part needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmerge.checkpoints.indexing import ranges
from jaxmerge.checkpoints.interface import (
    FLOATS,
    Checkpoint,
    CheckpointError,
    Index,
    LeafInfo,
)
from jaxmerge.checkpoints.names import require_leaf
from jaxmerge.checkpoints.transforms import Cast, Transform


class Source(NamedTuple):
    """Where a leaf of a view comes from.

    Attributes:
        checkpoint: the checkpoint that is read.
        name: its leaf.
        transform: what is done to it; nothing by default.
    """

    checkpoint: Checkpoint
    name: str
    transform: Transform | None = None

    @property
    def info(self) -> LeafInfo:
        """Shape and dtype of the leaf in the view."""
        require_leaf(self.name, self.checkpoint.leaves, self.checkpoint.path)
        info = self.checkpoint.leaves[self.name]
        if self.transform is None:
            return info
        try:
            return self.transform.info(info)
        except ValueError as error:
            raise CheckpointError(
                f"{self.checkpoint.path}: leaf {self.name!r} of shape "
                f"{list(info.shape)}: {error}"
            ) from error

    def read(self, index: Index) -> np.ndarray:
        """Reads the part of the leaf that `index` selects."""
        if self.transform is None:
            return self.checkpoint.read(self.name, index)
        try:
            return self.transform.read(
                lambda index: self.checkpoint.read(self.name, index),
                self.checkpoint.leaves[self.name],
                index,
            )
        except OverflowError as error:
            raise CheckpointError(
                f"{self.checkpoint.path}: leaf {self.name!r}: {error}"
            ) from error

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """What is read for the leaf."""
        return [self.checkpoint]


class Stack(NamedTuple):
    """A leaf of a view that stacks leaves along a new leading axis.

    Attributes:
        layers: one source per entry of that axis, of one shape and dtype.
    """

    layers: Sequence[Source]

    @property
    def info(self) -> LeafInfo:
        """Shape and dtype of the stacked leaf."""
        first, *others = infos = [layer.info for layer in self.layers]
        for layer, info in zip(self.layers, infos, strict=True):
            if info != first:
                raise CheckpointError(
                    f"{layer.checkpoint.path}: leaf {layer.name!r} is "
                    f"{info.dtype}{list(info.shape)}, but {self.layers[0].name!r} is "
                    f"{first.dtype}{list(first.shape)}, so they cannot be stacked; "
                    "leave them apart."
                )
        return LeafInfo((1 + len(others), *first.shape), first.dtype)

    def read(self, index: Index) -> np.ndarray:
        """Reads layer by layer, only the layers that `index` selects."""
        info = self.info
        wanted = ranges(index, info.shape)
        stacked = np.empty([len(along) for along in wanted], info.dtype)
        within = ... if index is ... else index[1:]
        for number, layer in enumerate(wanted[0]):
            stacked[number] = self.layers[layer].read(within)
        return stacked

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """What is read for the leaf."""
        return [layer.checkpoint for layer in self.layers]


@dataclass(frozen=True)
class View:
    """A checkpoint whose leaves come from others (a `Checkpoint`).

    Args:
        path: what errors call it; usually the path of what is viewed.
        sources: where each leaf comes from, by its name in the view.

    Raises:
        CheckpointError: a source that does not exist, or one that its transform or the
            layers that it is stacked with do not fit.

    Example:
        >>> import tempfile
        >>> from jaxmerge.checkpoints import open_checkpoint, save
        >>> path = Path(tempfile.mkdtemp()) / "model"
        >>> save(path, {"up.weight": np.arange(6, dtype=np.float32).reshape(2, 3)})
        >>> from jaxmerge.checkpoints.transforms import Rearrange
        >>> transpose = Rearrange.parse("o i -> i o")
        >>> source = Source(open_checkpoint(path), "up.weight", transpose)
        >>> view = View(path, {"up/kernel": source})
        >>> view.read("up/kernel", (slice(1, 3),)).tolist()
        [[1.0, 4.0], [2.0, 5.0]]
    """

    path: Path
    sources: Mapping[str, Source | Stack] = field(repr=False)
    leaves: Mapping[str, LeafInfo] = field(init=False)

    def __post_init__(self) -> None:
        leaves = {name: source.info for name, source in self.sources.items()}
        object.__setattr__(self, "leaves", leaves)

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Reads what the leaf is made of and makes it."""
        require_leaf(name, self.leaves, self.path)
        return self.sources[name].read(index)

    def sidecars(self) -> list[Path]:
        """Lists those of all sources; the first of a name counts."""
        files = {}
        for checkpoint in self.viewed():
            for path in checkpoint.sidecars():
                files.setdefault(path.name, path)
        return sorted(files.values())

    def digest(self) -> dict[str, str]:
        """Computes those of all sources; of several, names start with their paths."""
        first, *others = checkpoints = self.viewed()
        if not others:
            return first.digest()
        return {
            f"{checkpoint.path}/{name}": digest
            for checkpoint in checkpoints
            for name, digest in checkpoint.digest().items()
        }

    def viewed(self) -> list[Checkpoint]:
        """Every source once, in the order of the leaves."""
        return list(
            {
                id(checkpoint): checkpoint
                for source in self.sources.values()
                for checkpoint in source.checkpoints
            }.values()
        )


def stored(checkpoint: Checkpoint) -> list[Checkpoint]:
    """The checkpoints on disk that one is read from: itself, unless it is a view."""
    if not isinstance(checkpoint, View):
        return [checkpoint]
    return [each for source in checkpoint.viewed() for each in stored(source)]


def cast(checkpoint: Checkpoint, dtype: str | np.dtype) -> View:
    """Views the floating-point leaves of a checkpoint in another dtype.

    Args:
        checkpoint: what to view. Leaves of float8 stay as they are: without their
            scales they mean nothing.
        dtype: bfloat16, float16, float32 or float64. Reading raises CheckpointError
            where a finite entry is too large for it.

    Raises:
        CheckpointError: another dtype.
    """
    names = {str(each): each for each in FLOATS}
    if str(dtype) not in names:
        raise CheckpointError(
            f"dtype is {str(dtype)!r}; it must be one of {', '.join(names)}."
        )
    target = Cast(names[str(dtype)])
    return View(
        checkpoint.path,
        {
            name: Source(checkpoint, name, target if info.dtype in FLOATS else None)
            for name, info in checkpoint.leaves.items()
        },
    )
