"""From a function of matrices to a merge method of whole trees.

A method says what happens to one matrix: a list of float32 matrices (outputs, inputs),
the task matrices of the models. Which leaves are matrices, `jaxmerge.matrices` knows.
Matrices of one shape are stacked and go through `map_matrices`, so that on a mesh every
device works on its own layers; leaves that are no matrices follow a stated policy.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge import sharding
from jaxmerge.leafwise import Kernel, check_models, merge_leaves, wide
from jaxmerge.linalg import map_matrices
from jaxmerge.matrices import (
    MatrixAxes,
    from_matrix,
    leaf_axes,
    matrix_shape,
    to_matrix,
)
from jaxmerge.options import Leaf, PerLeaf, choice, per_leaf
from jaxmerge.tree import Params, is_float, named_leaves, rebuild

Others = Literal["average", "task_arithmetic", "base"]


def merge_matrices(
    kernel: Kernel,
    base: Params,
    models: Sequence[Params],
    *,
    method: str,
    scale: PerLeaf,
    others: Others,
    matrices: Mapping[str, str] | None,
    stack_axes: PerLeaf,
    numbers: Mapping[str, Any] | None = None,
    **choices: Any,
) -> tuple[Params, dict[str, Any]]:
    """Merges the matrices of trees with `kernel`, and all other leaves by a policy.

    Args:
        kernel: `kernel(deltas, **numbers, **choices)` maps task matrices (outputs,
            inputs), one per model in float32, to the merged task matrix and to what
            there is to report of it, scalars in any structure.
        base: the start that task matrices are measured from.
        models: one or more trees like `base`.
        method: the caller's name, for messages.
        scale: what merged task matrices and the changes of other leaves are
            multiplied by.
        others: what becomes of leaves that are no matrices: `"average"` adds the mean
            of their task vectors, `"task_arithmetic"` the sum; `"base"` leaves them.
        matrices: axis patterns of leaves by path, before the presets.
        stack_axes: how many leading axes of a leaf stack independent layers.
        numbers: arguments of `kernel` that may be traced.
        choices: hashable arguments of `kernel` that are compiled in.

    Returns:
        A tree like `base`, in its dtypes and shardings, and the reports by path, with
        a leading axis for stacked layers.

    Raises:
        ValueError: no models, trees that are not alike, an invalid option, or a leaf of
            which no rule says which axes are inputs and which are outputs.
    """
    choice(method, "others", others, ("average", "task_arithmetic", "base"))
    check_models(method, base, models)
    leaves = named_leaves(base)
    axes = {
        path: _axes_of(method, path, leaf, matrices, stack_axes)
        for path, leaf in leaves.items()
        if is_float(leaf)
    }
    scales = {
        path: per_leaf(
            Leaf(method, path, np.shape(leaves[path]), len(models)), "scale", scale
        )
        for path in axes
    }
    groups: dict[Any, list[str]] = {}
    for path, at in axes.items():
        if at.is_matrix and np.size(leaves[path]):
            shape = matrix_shape(np.shape(leaves[path]), at)
            groups.setdefault((shape[-2:], leaves[path].dtype), []).append(path)

    by_model = [named_leaves(model) for model in models]
    merged, reports = {}, {}
    for paths in groups.values():
        of_group = [leaves[path] for path in paths]
        results, told = _merge_group(
            of_group,
            [
                [sharding.join(model[path], leaves[path]) for path in paths]
                for model in by_model
            ],
            [scales[path] for path in paths],
            dict(numbers or {}),
            axes=tuple(axes[path] for path in paths),
            targets=tuple(sharding.of(leaf) for leaf in of_group),
            kernel=kernel,
            choices=tuple(sorted(choices.items())),
        )
        merged |= dict(zip(paths, results, strict=True))
        reports |= dict(zip(paths, told, strict=True))

    rest = [path for path, at in axes.items() if not at.is_matrix]
    if others != "base" and rest:
        merged |= merge_leaves(
            _add_up,
            [{path: model[path] for path in rest} for model in by_model],
            lambda leaf: {"scale": scales[leaf.path]},
            method=method,
            base={path: leaves[path] for path in rest},
            divide=others == "average",
        )
    return rebuild(base, leaves | merged), reports


def _axes_of(
    method: str,
    path: str,
    leaf: Any,
    matrices: Mapping[str, str] | None,
    stack_axes: PerLeaf,
) -> MatrixAxes:
    try:
        return leaf_axes(path, np.shape(leaf), matrices, stack_axes)  # type: ignore
    except ValueError as error:
        raise ValueError(
            f"{method}: {error} Such rules are the option `matrices`."
        ) from None


@functools.partial(jax.jit, static_argnames=("axes", "targets", "kernel", "choices"))
def _merge_group(bases, models, scales, numbers, *, axes, targets, kernel, choices):
    dtype = wide(bases[0].dtype)

    def merge(bases, models, scales, numbers):
        def stack(of_model: Sequence[Array]) -> Array:
            deltas = [
                to_matrix(m.astype(dtype) - b.astype(dtype), at)
                for m, b, at in zip(of_model, bases, axes, strict=True)
            ]
            layers = [d.reshape(-1, *d.shape[-2:]).mT for d in deltas]
            return jnp.concatenate(layers)

        def of_matrices(*deltas: Array) -> Any:
            return kernel(deltas, **numbers, **dict(choices))

        merged, reports = map_matrices(of_matrices, *(stack(m) for m in models))
        results, told, start = [], [], 0
        for base, at, scale in zip(bases, axes, scales, strict=True):
            stacked = tuple(base.shape[axis] for axis in at.stack)
            rows = slice(start, start := start + int(np.prod(stacked)))
            delta = merged[rows].mT.reshape(*stacked, *merged.mT.shape[1:])
            moved = base.astype(dtype) + scale * from_matrix(delta, base.shape, at)
            results.append(moved.astype(base.dtype))
            told.append(
                jax.tree.map(lambda x, r=rows, s=stacked: x[r].reshape(s), reports)
            )
        return results, told

    like = (bases, jnp.zeros(()))
    results, told = sharding.auto(merge, like=like)(bases, models, scales, numbers)
    return [sharding.keep(*pair) for pair in zip(results, targets, strict=True)], told


def _add_up(deltas: Sequence[Array], *, scale: Array, divide: bool) -> Array:
    total: Array = sum(deltas)  # type: ignore
    return scale * total / (len(deltas) if divide else 1)
