"""The heads of submodules: the slices of their leaves that belong to one head."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.submodules.calls import Call, Submodule
from jaxmerge.tree import first_match

HeadRules = Mapping[str, int | tuple[int, int]]
"""From leaf paths to the axis that counts heads, or to an axis and how many heads lie
along it side by side."""


class Heads(NamedTuple):
    """Where the heads of a submodule are.

    Attributes:
        number: how many there are.
        axes: along which axis they lie, by leaf path; leaves without heads are absent.
    """

    number: int
    axes: dict[str, int]


def find_heads(
    method: str, submodules: Mapping[str, Submodule], rules: HeadRules | None
) -> dict[str, Heads]:
    """The heads of the submodules that have some, by path.

    Raises:
        ValueError: rules that match no leaf or do not fit one, or that give the leaves
            of a submodule different numbers of heads.
    """
    found = {}
    for path, submodule in submodules.items():
        axes, counts = {}, set()
        for leaf, shape in submodule.shapes.items():
            try:
                rule = first_match(rules or {}, leaf)
            except KeyError:
                continue
            axes[leaf], count = rule if isinstance(rule, tuple) else (rule, None)
            inside = len(submodule.loops) <= axes[leaf] < len(shape)
            if not inside or shape[axes[leaf]] % (count or 1):
                raise ValueError(
                    f"{method}: heads is {rule!r} for leaf {leaf!r} of shape {shape}; "
                    "give an axis behind those of layers, or (axis, heads) with a "
                    "number of heads that divides it."
                )
            counts.add(count or shape[axes[leaf]])
        if len(counts) > 1:
            raise ValueError(
                f"{method}: leaves of submodule {path!r} have {sorted(counts)} heads; "
                "where several queries share a key, give (axis, keys)."
            )
        if counts:
            found[path] = Heads(counts.pop(), axes)
    if rules and not found:
        leaves = [repr(leaf) for each in submodules.values() for leaf in each.shapes]
        raise ValueError(
            f"{method}: no rule of heads matches a leaf of the submodules, which are "
            + ", ".join(leaves)
        )
    return found


def with_head(
    head: Array, call: Call, models: dict[str, Array], heads: Heads
) -> dict[str, Array]:
    """The parameters of a call in the base, but for one head, as it is in models.

    Args:
        head: the number of the head.
        call: a call of a submodule.
        models: its parameters in models, stacked along a new leading axis.
        heads: the heads of the submodule.
    """
    mixed = {}
    for path, versions in models.items():
        mixed[path] = jnp.broadcast_to(call.base[path][None], versions.shape)
        if path in heads.axes:
            axis = 1 + heads.axes[path] - len(call.loops)
            size = versions.shape[axis] // heads.number
            index = jax.lax.broadcasted_iota(jnp.int32, versions.shape, axis)
            mixed[path] = jnp.where(index // size == head, versions, mixed[path])
    return mixed
