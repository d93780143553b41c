"""Which axes of a leaf the axes of a reshaped, transposed, sliced-by-scan leaf are.

Models rarely use a leaf as it is stored. They transpose it, split heads off an axis or
let a scan take one layer after the other. A `View` follows that: each of its axes is a
tuple of factors, and each factor is an axis of the leaf or a part of one.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxmerge import jaxprs
from jaxmerge.matrices import MatrixAxes


class Factor(NamedTuple):
    """An axis of a leaf, or a part of it: an axis of 12 is one of 3 of stride 4 and
    one of 4 of stride 1.

    Attributes:
        axis: the axis of the leaf.
        stride: how far apart neighbours are along that axis.
        size: how many there are.
    """

    axis: int
    stride: int
    size: int


class Level(NamedTuple):
    """An axis of a view that a scan runs along.

    Attributes:
        loop: which scan.
        size: the length of the axis.
        factors: what the axis was made of.
    """

    loop: tuple[int, ...]
    size: int
    factors: tuple[Factor, ...]


class View(NamedTuple):
    """A leaf, rearranged and times a number, but otherwise as it is.

    Attributes:
        leaf: the path of the leaf.
        shape: the shape of the view.
        axes: the factors of each of its axes; none where values repeat along the axis.
        levels: the axes along which scans run outside, outermost first.
        scale: the number.
    """

    leaf: str
    shape: tuple[int, ...]
    axes: tuple[tuple[Factor, ...], ...]
    levels: tuple[Level, ...] = ()
    scale: float = 1.0

    def repeats(self, axis: int) -> bool:
        """Whether values repeat along an axis."""
        return self.shape[axis] > 1 and not self.axes[axis]


class Layout(NamedTuple):
    """How one axis of data is brought into the order in which a leaf stores its axes.

    Attributes:
        sizes: the factors that the axis is split into,
        order: and how they are then transposed, before they are flattened again.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]


class Matrices(NamedTuple):
    """A leaf as a stack of matrices, as one operation uses it.

    Attributes:
        axes: which of the leaf's axes are which.
        stack: the layout of the leading axes of statistics, flattened,
        inputs: of contracted axes, and
        outputs: of the axes of the result.
    """

    axes: MatrixAxes
    stack: Layout
    inputs: Layout
    outputs: Layout


REARRANGING = jaxprs.SAME | {
    "broadcast_in_dim",
    "reshape",
    "squeeze",
    "tile",
    "transpose",
}
"""Primitives that keep values, but for rounding, and at most arrange them anew."""


def whole(leaf: str, shape: Sequence[int]) -> View:
    """The view that is the leaf itself.

    Example:
        >>> view = rearrange(whole("w", (12, 5)), "reshape", (3, 4, 5), {})
        >>> view.axes[1]
        (Factor(axis=0, stride=1, size=4),)
    """
    axes = tuple((Factor(axis, 1, size),) for axis, size in enumerate(shape))
    return View(leaf, tuple(shape), axes)


def rearrange(
    view: View, primitive: str, shape: tuple[int, ...], params: dict[str, Any]
) -> View | None:
    """The view after a primitive of `REARRANGING`, with the result's shape.

    Returns:
        None if an axis of the result mixes parts in a way that is no order of factors,
        or if values do not stay what they are.
    """
    if primitive == "convert_element_type":
        keeps = jnp.issubdtype(params["new_dtype"], jnp.floating)
        return view if keeps else None
    if primitive == "transpose":
        axes = [view.axes[axis] for axis in params["permutation"]]
    elif primitive == "squeeze":
        gone = params["dimensions"]
        axes = [factors for axis, factors in enumerate(view.axes) if axis not in gone]
    elif primitive == "broadcast_in_dim":
        axes: Any = [() for _ in shape]
        for axis, target in enumerate(params["broadcast_dimensions"]):
            if view.shape[axis] == shape[target]:
                axes[target] = view.axes[axis]
    elif primitive == "tile":
        again = [n > 1 for n in params["reps"]]
        if any(n > 1 and twice for n, twice in zip(view.shape, again, strict=True)):
            return None
        axes = [() if twice else view.axes[axis] for axis, twice in enumerate(again)]
    elif primitive == "reshape" and view.shape != shape:
        axes = _reshape(view, shape)
        if axes is None or params.get("dimensions") is not None:
            return None
    else:
        axes = view.axes
    return view._replace(shape=shape, axes=tuple(axes))


def _reshape(view: View, shape: tuple[int, ...]) -> list[tuple[Factor, ...]] | None:
    """Deals the factors of a view out to the axes of a new shape, from the left."""
    if any(view.repeats(axis) for axis in range(len(view.shape))):
        return _reshape_repeated(view, shape)
    left = [f for factors in view.axes for f in factors if f.size > 1]
    axes = []
    for size in shape:
        taken = []
        while size > 1:
            factor = left.pop(0)
            if size % factor.size == 0:
                taken.append(factor)
                size //= factor.size
            elif factor.size % size == 0:
                inner = factor.size // size
                taken.append(Factor(factor.axis, factor.stride * inner, size))
                left.insert(0, factor._replace(size=inner))
                size = 1
            else:
                return None
        axes.append(tuple(taken))
    return axes


def _reshape_repeated(
    view: View, shape: tuple[int, ...]
) -> list[tuple[Factor, ...]] | None:
    """As `_reshape`, where axes without factors keep their sizes."""
    old = [axis for axis, size in enumerate(view.shape) if size > 1]
    new = [axis for axis, size in enumerate(shape) if size > 1]
    if [view.shape[axis] for axis in old] != [shape[axis] for axis in new]:
        return None
    axes: list[tuple[Factor, ...]] = [() for _ in shape]
    for source, target in zip(old, new, strict=True):
        axes[target] = view.axes[source]
    return axes


def broadcast(view: View, shape: tuple[int, ...]) -> View:
    """The view in an elementwise operation, which repeats axes of size one."""
    if len(view.shape) != len(shape):
        return view._replace(shape=shape, axes=((),) * len(shape))
    sizes = zip(view.axes, view.shape, shape, strict=True)
    axes = tuple(factors if old == new else () for factors, old, new in sizes)
    return view._replace(shape=shape, axes=axes)


def slice_of_scan(view: View, loop: tuple[int, ...]) -> View:
    """What the body of a scan sees of a view that the scan runs along."""
    levels = view.levels
    if view.axes[0]:
        levels = (*levels, Level(loop, view.shape[0], view.axes[0]))
    return view._replace(shape=view.shape[1:], axes=view.axes[1:], levels=levels)


def matrices_of(
    view: View,
    shape: tuple[int, ...],
    stack: Sequence[int],
    inputs: Sequence[int],
    outputs: Sequence[int],
) -> Matrices | str:
    """Reads a leaf as a stack of matrices from the axes of a view of it.

    Args:
        view: the view that an operation contracts with data.
        shape: the shape of the leaf.
        stack: the axes of the view that data and result have too,
        inputs: that are contracted, and
        outputs: that the result gets from the view.

    Returns:
        The matrices, or the reason why the leaf is not made of matrices.
    """
    if any(view.repeats(axis) for axis in (*inputs, *outputs)):
        return "its values repeat along an axis that is contracted or of the output"
    groups = [
        [factor for axis in axes for factor in view.axes[axis]]
        for axes in (stack, inputs, outputs)
    ]
    groups[0] = [f for level in view.levels for f in level.factors] + groups[0]
    axes: list[set[int]] = [{factor.axis for factor in group} for group in groups]
    for axis, size in enumerate(shape):
        homes = [group for group in axes if axis in group]
        if len(homes) > 1:
            return f"parts of its axis {axis} play different roles"
        if not homes and size == 1:
            axes[1 if axes[2] else 2].add(axis)
    return Matrices(
        MatrixAxes(*(tuple(sorted(group)) for group in axes)),
        *(_layout(group) for group in groups),
    )


def elementwise_layout(view: View) -> Layout:
    """How statistics of a view, with the axes of its levels in front, fit the leaf."""
    levels = [factor for level in view.levels for factor in level.factors]
    return _layout([*levels, *(factor for axis in view.axes for factor in axis)])


def stacked_axes(view: View) -> tuple[int, ...]:
    """The axes of the leaf that scans run along."""
    return tuple(sorted({f.axis for level in view.levels for f in level.factors}))


def _layout(factors: Sequence[Factor]) -> Layout:
    order = sorted(
        range(len(factors)), key=lambda i: (factors[i].axis, -factors[i].stride)
    )
    if order == list(range(len(factors))):
        return Layout((math.prod(factor.size for factor in factors),), (0,))
    return Layout(tuple(factor.size for factor in factors), tuple(order))


def arrange(x: Array, axis: int, layout: Layout) -> Array:
    """Brings one axis of `x` into the order of the leaf.

    Example:
        >>> print(arrange(jnp.arange(6), 0, Layout((3, 2), (1, 0))))
        [0 2 4 1 3 5]
    """
    if len(layout.order) == 1:
        return x
    axis %= x.ndim
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    split = x.reshape(*before, *layout.sizes, *after)
    moved = [axis + i for i in layout.order]
    behind = range(axis + len(layout.order), split.ndim)
    return jnp.transpose(split, (*range(axis), *moved, *behind)).reshape(x.shape)
