"""Multi-task vectors: what the task vectors of all models add up to."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from jax import Array

from jaxmerge.leafwise import (
    check_models,
    check_trees,
    over_units,
    task_vector,
    units_of,
)
from jaxmerge.methods.election import Election
from jaxmerge.methods.trimming import merge_trimmed, trimmed_election
from jaxmerge.options import Leaf, PerLeaf, Static, choice
from jaxmerge.tree import Params, named_leaves

MultiTask = Literal["task_arithmetic", "ties"] | Params
"""How task vectors are added up, or a tree of parameters that are already merged."""


class MultiTaskVector(NamedTuple):
    """How it is made, leaf by leaf: `kernel(deltas, **numbers(leaf))`."""

    kernel: Callable[..., Array]
    numbers: Callable[[Leaf], dict[str, Any]]


def multi_task_vector(
    method: str,
    base: Params,
    models: Sequence[Params],
    multi_task: MultiTask,
    scope: Literal["leaf", "model"],
    stack_axes: PerLeaf,
) -> MultiTaskVector:
    """The multi-task vector of a method's options; with `scope="model"`, measures it.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option; the
            message starts with `method`.
    """
    choice(method, "scope", scope, ("leaf", "model"))
    check_models(method, base, models)
    if not isinstance(multi_task, str):
        check_trees(method, {"base": base, "multi_task": multi_task})
        merged = named_leaves(task_vector(base, multi_task))
        return MultiTaskVector(_given, lambda leaf: {"merged": merged[leaf.path]})
    choice(method, "multi_task", multi_task, ("task_arithmetic", "ties"))
    if multi_task == "task_arithmetic":
        return MultiTaskVector(_added, lambda leaf: {})
    trimming = trimmed_election(
        method, base, models, _TIES, density=0.2, scope=scope, stack_axes=stack_axes
    )

    def numbers(leaf: Leaf) -> dict[str, Any]:
        leaf = leaf._replace(units=units_of(leaf, stack_axes))
        return {"units": Static(leaf.units), "trimming": trimming(leaf)}

    return MultiTaskVector(_trimmed, numbers)


_TIES = Election(vote="mass", tie="majority", aggregate="sum")


def _given(deltas: Sequence[Array], *, merged: Array) -> Array:
    return merged


def _added(deltas: Sequence[Array]) -> Array:
    return sum(deltas)  # type: ignore


def _trimmed(
    deltas: Sequence[Array], *, units: Static, trimming: dict[str, Any]
) -> Array:
    kernel = functools.partial(merge_trimmed, election=_TIES, **trimming)
    return over_units(kernel, units.value)(deltas, None)
