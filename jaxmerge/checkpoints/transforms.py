"""What can become of a leaf when it is read: axes rearranged, one layer, another dtype.

Each transform knows which part of its source a part of its result needs, so that
reading a slice of the result reads no more than that.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import ml_dtypes
import numpy as np

from jaxmerge.checkpoints.indexing import ranges, shifted
from jaxmerge.checkpoints.interface import Index, LeafInfo

Read = Callable[[Index], np.ndarray]
"""Reads the part of a leaf that an index selects."""


class Transform(Protocol):
    """What becomes of a leaf on its way into a view."""

    def info(self, source: LeafInfo) -> LeafInfo:
        """Shape and dtype of the result; raises ValueError where it does not fit."""
        ...

    def read(self, read: Read, source: LeafInfo, index: Index) -> np.ndarray:
        """The part `index` of the result, through `read`, which reads the source."""
        ...


class Layer(NamedTuple):
    """One entry along the leading axis of a leaf that stacks layers."""

    number: int

    def info(self, source: LeafInfo) -> LeafInfo:
        if not source.shape or self.number >= source.shape[0]:
            raise ValueError(f"there is no layer {self.number} along its first axis")
        return source._replace(shape=source.shape[1:])

    def read(self, read: Read, source: LeafInfo, index: Index) -> np.ndarray:
        within = () if index is ... else index
        return read((slice(self.number, self.number + 1), *within))[0]


class Cast(NamedTuple):
    """Another floating-point dtype.

    Reading raises OverflowError where a finite entry is too large for it.
    """

    dtype: np.dtype

    def info(self, source: LeafInfo) -> LeafInfo:
        return source._replace(dtype=self.dtype)

    def read(self, read: Read, source: LeafInfo, index: Index) -> np.ndarray:
        array = read(index)
        if ml_dtypes.finfo(self.dtype).max >= ml_dtypes.finfo(source.dtype).max:
            return array.astype(self.dtype, copy=False)
        with np.errstate(over="ignore"):
            rounded = array.astype(self.dtype)
        if (np.isinf(rounded) & ~np.isinf(array)).any():
            raise OverflowError(
                f"an entry is too large for {self.dtype}; choose another dtype, such "
                "as bfloat16."
            )
        return rounded


Axes = tuple[tuple[str, ...], ...]
"""The axes of an array, each a product of named ones of which the last varies first."""


class Rearrange(NamedTuple):
    """Axes in another order, split or merged, as a pattern of their names says.

    Attributes:
        before: the axes of the source.
        after: the axes of the result, of the same names.
        sizes: those names whose sizes the shape of the source does not tell.

    Example:
        >>> heads = Rearrange.parse("(h=2 d) i -> i h d")
        >>> heads.info(LeafInfo((6, 5), np.dtype("float32"))).shape
        (5, 2, 3)
        >>> str(heads.inverse)
        'i h=2 d -> (h=2 d) i'
    """

    before: Axes
    after: Axes
    sizes: Mapping[str, int]

    @classmethod
    def parse(cls, pattern: str) -> Self:
        """Reads a pattern such as `o i -> i o` or `(h=12 d) i -> i h d`.

        Raises:
            ValueError: the pattern is not of this form, names an axis twice on one
                side, or not on both.
        """
        sides = [_parse_axes(side, pattern) for side in pattern.split("->")]
        if len(sides) != 2:
            raise ValueError(f"{pattern!r} is not of the form 'o i -> i o'")
        (before, sizes), (after, more) = sides
        for names in (_names(before), _names(after)):
            if sorted(names) != sorted(set(_names(before))):
                raise ValueError(f"{pattern!r} must have each name once on either side")
        if any(sizes[name] != more[name] for name in sizes.keys() & more.keys()):
            raise ValueError(f"{pattern!r} gives one name two sizes")
        return cls(before, after, sizes | more)

    @property
    def inverse(self) -> "Rearrange":
        """The pattern that brings the axes back."""
        return Rearrange(self.after, self.before, self.sizes)

    def __str__(self) -> str:
        return " -> ".join(
            " ".join(self._spell(axis) for axis in side)
            for side in (self.before, self.after)
        )

    def _spell(self, axis: tuple[str, ...]) -> str:
        known = (f"{n}={self.sizes[n]}" if n in self.sizes else n for n in axis)
        text = " ".join(known)
        return text if len(axis) == 1 else f"({text})"

    def info(self, source: LeafInfo) -> LeafInfo:
        sizes = self._all_sizes(source.shape)
        shape = tuple(math.prod(sizes[name] for name in axis) for axis in self.after)
        return source._replace(shape=shape)

    def read(self, read: Read, source: LeafInfo, index: Index) -> np.ndarray:
        sizes = self._all_sizes(source.shape)
        wanted = ranges(index, self.info(source).shape)
        if not all(wanted):
            return np.empty([len(along) for along in wanted], source.dtype)
        # Of an axis that is a product, whole slices along its first name are taken.
        parts = {name: range(size) for name, size in sizes.items()}
        for axis, along in zip(self.after, wanted, strict=True):
            step = _step(axis, sizes)
            parts[axis[0]] = range(min(along) // step, max(along) // step + 1)
        array = self._read_parts(read, parts, sizes)
        names = _names(self.before)
        array = array.transpose([names.index(name) for name in _names(self.after)])
        lengths = [math.prod(len(parts[name]) for name in axis) for axis in self.after]
        remaining = (
            shifted(along, parts[axis[0]].start * _step(axis, sizes))
            for axis, along in zip(self.after, wanted, strict=True)
        )
        return array.reshape(lengths)[tuple(remaining)]

    def _read_parts(
        self, read: Read, parts: Mapping[str, range], sizes: Mapping[str, int]
    ) -> np.ndarray:
        """Reads what holds the parts and cuts them out, with an axis for each name."""
        index, lengths, cut = [], [], []
        for axis in self.before:
            first, step = parts[axis[0]], _step(axis, sizes)
            index.append(slice(first.start * step, first.stop * step))
            lengths += [len(first), *(sizes[name] for name in axis[1:])]
            inner = (slice(parts[n].start, parts[n].stop) for n in axis[1:])
            cut += [slice(None), *inner]
        return read(tuple(index)).reshape(lengths)[tuple(cut)]

    def _all_sizes(self, shape: Sequence[int]) -> dict[str, int]:
        """The size of every name; at most one per axis follows from the shape."""
        if len(shape) != len(self.before):
            raise ValueError(
                f"the pattern '{self}' is for {len(self.before)} axes; give a rule "
                "for this leaf before"
            )
        sizes = dict(self.sizes)
        for axis, length in zip(self.before, shape, strict=True):
            open_names = [name for name in axis if name not in self.sizes]
            known = math.prod(self.sizes[name] for name in axis if name in self.sizes)
            if len(open_names) > 1:
                raise ValueError(
                    f"the pattern '{self}' leaves the sizes of {open_names} open; "
                    f"write {open_names[0]}=12, for example"
                )
            if open_names:
                sizes[open_names[0]] = length // known
            if math.prod(sizes[name] for name in axis) != length:
                raise ValueError(
                    f"the pattern '{self}' does not fit an axis of size {length}"
                )
        return sizes


_AXIS = re.compile(r"\s*(?:\(([^()]*)\)|([^()\s]+))")
_NAME = re.compile(r"([A-Za-z]\w*)(?:=([1-9]\d*))?")


def _parse_axes(side: str, pattern: str) -> tuple[Axes, dict[str, int]]:
    axes, sizes, end = [], {}, 0
    side = side.rstrip()
    while end < len(side):
        found = _AXIS.match(side, end)
        words = (
            (found[1] if found[1] is not None else found[2]).split() if found else []
        )
        names = [_NAME.fullmatch(word) for word in words]
        if found is None or not names or None in names:
            raise ValueError(f"{pattern!r} is not of the form '(h=12 d) i -> i h d'")
        axes.append(tuple(name[1] for name in names if name))
        sizes |= {name[1]: int(name[2]) for name in names if name and name[2]}
        end = found.end()
    return tuple(axes), sizes


def _names(axes: Axes) -> list[str]:
    return [name for axis in axes for name in axis]


def _step(axis: Sequence[str], sizes: Mapping[str, int]) -> int:
    """How many entries of an axis the first of its names spans."""
    return math.prod(sizes[name] for name in axis[1:])
