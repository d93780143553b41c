"""What every format offers: leaves known without reading, then read one by one."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

Index = tuple[slice, ...] | EllipsisType

Progress = Callable[[int, int, str], None]
"""Called with the bytes done so far, those of all leaves, and the name of the leaf."""

FLOATS = tuple(
    np.dtype(kind) for kind in (ml_dtypes.bfloat16, "float16", "float32", "float64")
)
"""The floating-point dtypes that one can compute with and cast to."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message says what to do."""


class LeafInfo(NamedTuple):
    """Shape and dtype of a leaf, known without reading its values.

    Attributes:
        shape: length of each axis, `()` for a scalar.
        dtype: element type, also one of `ml_dtypes` (bfloat16, float8).

    Example:
        >>> LeafInfo((2, 3), np.dtype("float32")).nbytes
        24
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def entries(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.entries * self.dtype.itemsize


class Checkpoint(Protocol):
    """A checkpoint on disk, opened for reading leaf by leaf."""

    @property
    def path(self) -> Path:
        """The file or directory that was opened."""
        ...

    @property
    def leaves(self) -> Mapping[str, LeafInfo]:
        """Shape and dtype of every leaf, by name."""
        ...

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Reads a leaf, or the part of it that `index` selects.

        Args:
            name: a key of `leaves`.
            index: one slice per leading axis; everything by default.

        Returns:
            An array in the dtype of the file, often a read-only view of it.

        Raises:
            CheckpointError: there is no leaf of this name.
        """
        ...

    def sidecars(self) -> list[Path]:
        """Lists the files that belong next to the weights: config, tokenizer, code.

        Empty for a checkpoint that is a single file: its neighbours may be anything.
        """
        ...

    def digest(self) -> dict[str, str]:
        """Computes the BLAKE3 (hex) of every file that holds or indexes weights.

        Reads all of them once.
        """
        ...
