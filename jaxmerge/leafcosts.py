"""What one leaf of a merge costs: bytes, arithmetic and memory, whole or by rows."""

import math
from typing import Any, NamedTuple

import jax

from jaxmerge.costs import Operations, count_operations, footprint
from jaxmerge.lazy import (
    Deferred,
    LazyLeaf,
    Together,
    Whole,
    as_shapes,
    comes_whole,
    is_lazy,
)
from jaxmerge.planning import Part
from jaxmerge.slicing import part_size
from jaxmerge.streaming import StoredLeaf


class LeafCost(NamedTuple):
    """What one leaf costs, all devices together.

    Attributes:
        read: bytes of values that are read from inputs, in all passes.
        written: bytes of values that are written.
        operations: its arithmetic.
        traffic: bytes between a device and its memory.
        working: bytes in memory while it is computed, beside the inputs.
        held: those of the result, which another leaf may be computed beside.
        inputs: bytes of inputs that are in memory while it is computed.
        slices: how many times rows of it are computed; 1 if it comes whole, 0 if it is
            not computed at all.
        alone: whether no other is computed beside it.
    """

    read: int
    written: int
    operations: Operations = Operations()
    traffic: float = 0
    working: int = 0
    held: int = 0
    inputs: int = 0
    slices: int = 0
    alone: bool = True


def cost_of(part: Part, name: str, leaf: Any) -> LeafCost:
    """What a leaf of a part costs.

    Args:
        part: what becomes of the leaves.
        name: of the leaf.
        leaf: that the method makes, lazy; None if it makes none.
    """
    step = part.steps[name]
    if step.treatment == "skipped":
        return LeafCost(0, 0)
    stored = step.source.leaves[name].nbytes
    rounded = step.out.nbytes if step.source.leaves[name].dtype != step.out.dtype else 0
    if leaf is None:
        # It is looked at for NaN before it is read to be written.
        return LeafCost(2 * stored, step.out.nbytes, held=rounded)
    checkpoints = part.inputs.labelled.values()
    checked = sum(each.leaves[name].nbytes for each in checkpoints)
    if part.method.spans_model(part.recipe.options):
        checked *= 2
    norms = 0 if part.inputs.base is None else part.inputs.base.leaves[name].nbytes
    cost = _computation(leaf)
    rounded = step.out.nbytes if leaf.dtype != step.out.dtype else 0
    return cost._replace(
        read=checked + cost.read + norms,
        written=step.out.nbytes,
        held=cost.held + rounded // max(cost.slices, 1),
    )


def _computation(leaf: Any) -> LeafCost:
    """What it takes to compute a lazy leaf."""
    if isinstance(leaf, StoredLeaf):
        return LeafCost(leaf.nbytes, 0, held=_cast(leaf), slices=1)
    if isinstance(leaf, Whole):
        return _whole(leaf.together, _lazy_in(leaf.together.arguments))
    lazy = _lazy_in(leaf.arguments)
    whole = comes_whole(leaf, lazy[0].shape)
    cost = _whole(leaf, lazy) if whole else _by_rows(leaf, lazy)
    return cost._replace(alone=leaf.is_alone())


def _lazy_in(arguments: tuple[Any, ...]) -> list[LazyLeaf]:
    return [leaf for leaf in jax.tree.leaves(arguments) if is_lazy(leaf)]


def _whole(leaf: Deferred | Together, lazy: list[Any]) -> LeafCost:
    shapes = as_shapes(leaf.arguments)
    before = [_computation(x) for x in lazy]
    found = footprint(leaf.run, *shapes)
    large = max(math.prod(x.shape) for x in lazy)
    # Leaves that are not computed are views of files that are mapped.
    made = sum(x.held for x in before)
    return LeafCost(
        read=sum(x.read for x in before),
        written=0,
        operations=sum(
            (x.operations for x in before),
            count_operations(jax.make_jaxpr(leaf.run)(*shapes), large),
        ),
        traffic=found.traffic + sum(x.traffic for x in before),
        working=max(
            [made + found.temporary + found.results, *(x.working for x in before)]
        ),
        held=found.results,
        inputs=found.arguments,
        slices=1,
    )


def _by_rows(leaf: Deferred, lazy: list[Any]) -> LeafCost:
    leaves = jax.tree.leaves(leaf.arguments)
    number = lazy[0].shape[0]
    before = {i: _computation(x) for i, x in enumerate(leaves) if is_lazy(x)}
    rows = part_size(number, leaf.fit(list(before)))
    total, last = LeafCost(0, 0, slices=-(-number // rows)), 0
    for piece in leaf.sliced().pieces(as_shapes(leaves), leaf.fit):
        found = footprint(piece.run, *piece.arguments)
        cut = [before[i] for i in piece.cut]
        operations = count_operations(
            jax.make_jaxpr(piece.run)(*piece.arguments), math.prod(lazy[0].shape)
        )
        made = sum(x.held for x in cut) // piece.calls
        last = piece.kept + made + found.temporary + found.results
        total = total._replace(
            read=total.read + sum(x.read for x in cut),
            operations=total.operations + operations.times(piece.calls),
            traffic=total.traffic + piece.calls * found.traffic,
            working=max(total.working, last),
            held=found.results,
            inputs=max(total.inputs, found.arguments),
        )
    # A slice is still there, to be written, while the next one is computed.
    second = min(rows, number - rows) / rows
    return total._replace(working=max(total.working, int(total.held + second * last)))


def _cast(leaf: StoredLeaf) -> int:
    """The bytes of a leaf that is not used as it is stored."""
    return leaf.cost if leaf.cost != leaf.nbytes else 0
