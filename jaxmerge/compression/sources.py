"""What stores are built from: checkpoints, and pytrees that are read like them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmerge.checkpoints import Checkpoint, LeafInfo, open_checkpoint
from jaxmerge.checkpoints.interface import Index
from jaxmerge.checkpoints.names import flatten
from jaxmerge.compression.files import StoreError
from jaxmerge.tree import Params, check_alike, is_float

Source = str | os.PathLike[str] | Params
"""A checkpoint on disk, by its path, or a pytree of arrays."""


@dataclass(frozen=True)
class InMemory:
    """A pytree of arrays on any devices, read leaf by leaf (a `Checkpoint`)."""

    path: Path
    leaves: Mapping[str, LeafInfo]
    _arrays: Mapping[str, Any] = field(repr=False)

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Brings a leaf to the host."""
        return np.asarray(self._arrays[name])[index]

    def sidecars(self) -> list[Path]:
        return []

    def digest(self) -> dict[str, str]:
        return {}


def open_source(
    caller: str, label: str, source: Source, base: Checkpoint | None
) -> Any:
    """Opens a checkpoint, or wraps a pytree.

    Args:
        caller: for messages.
        label: what messages call the source.
        source: a path or a pytree.
        base: what a LoRA adapter belongs to.

    Raises:
        CheckpointError: it cannot be opened, or is no tree of arrays.
    """
    if isinstance(source, str | os.PathLike):
        return open_checkpoint(source, base)
    arrays = flatten(source)
    for name, leaf in arrays.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise StoreError(
                f"{caller}: {label} leaf {name!r} is a {type(leaf).__name__}, not an "
                "array; give a checkpoint's path, or a tree of arrays."
            )
    leaves = {
        n: LeafInfo(leaf.shape, np.dtype(leaf.dtype)) for n, leaf in arrays.items()
    }
    return InMemory(Path("memory"), leaves, arrays)


def check_sources(
    caller: str, base: Checkpoint, models: Mapping[str, Checkpoint]
) -> None:
    """Checks that models have the leaves of the base.

    Raises:
        StoreError: names, shapes, or kinds of numbers differ.
    """

    def shapes(checkpoint: Checkpoint) -> dict[str, jax.ShapeDtypeStruct]:
        return {n: jax.ShapeDtypeStruct(*i) for n, i in checkpoint.leaves.items()}

    labels = [f"models[{name!r}]" for name in models]
    try:
        check_alike(
            shapes(base), [shapes(m) for m in models.values()], names=["base", *labels]
        )
    except ValueError as error:
        raise StoreError(f"{caller}: {error}") from None
    for label, model in zip(labels, models.values(), strict=True):
        for name, info in model.leaves.items():
            expected = base.leaves[name].dtype
            if not is_float(info) and info.dtype != expected:
                raise StoreError(
                    f"{caller}: {label} leaf {name!r} is {info.dtype}, base has "
                    f"{expected}; leaves without floating-point numbers are kept as "
                    "they are, so convert it first."
                )


def checked_name(caller: str, name: Any) -> str:
    """The name of a task, which is also that of a directory.

    Raises:
        StoreError: it is no plain name.
    """
    if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
        raise StoreError(
            f"{caller}: {name!r} is no name for a task; it names a directory, so give "
            "plain text without '/' that does not begin with '.'."
        )
    return name
