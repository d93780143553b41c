"""From a function of matrices to a merge method of whole trees.

A method says what happens to one matrix: a list of float32 matrices (outputs, inputs),
the task matrices of the models. Which leaves are matrices, `jaxmerge.matrices` knows.
Matrices of one shape are stacked and go through `map_matrices`, so that on a mesh every
device works on its own layers; leaves that are no matrices follow a stated policy.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge import sharding
from jaxmerge.lazy import Together, Whole, any_lazy, is_lazy
from jaxmerge.leafwise import ABSENT, Kernel, check_models, merge_leaves, wide
from jaxmerge.linalg import map_matrices, rounding_noise
from jaxmerge.matrices import (
    MatrixAxes,
    MatrixRules,
    from_matrix,
    leaf_axes,
    matrix_shape,
    output_parts,
    to_matrix,
)
from jaxmerge.options import Leaf, PerLeaf, choice, per_leaf
from jaxmerge.tree import Params, is_float, named_leaves, rebuild
from jaxmerge.turns import Done, in_turn

Others = Literal["average", "task_arithmetic", "base"]

Fused = Mapping[str, int | Sequence[int]]
"""From paths to the number of equal matrices side by side in a leaf, or their sizes."""


class Layout(NamedTuple):
    """How a leaf is made of matrices.

    Attributes:
        axes: which axes are inputs and which are outputs.
        parts: the numbers of outputs of the matrices that are fused in it.
    """

    axes: MatrixAxes
    parts: tuple[int, ...]


class MatrixPlan(NamedTuple):
    """The trees of a merge, checked, and what is to become of each leaf.

    Attributes:
        method: the caller's name, for messages.
        base: the start of all models; without one, the first model.
        from_base: whether there is a base that task matrices are measured from.
        leaves: the leaves of the base by path.
        models: the leaves of each model by path.
        layouts: how leaves are made of matrices, for those that are.
        rest: the other leaves that hold floating-point numbers.
        scales: what the change of a leaf is multiplied by, for both kinds.
        others: what becomes of `rest`.
        beside: what the kernel is to know of leaves beside their values, by path.
    """

    method: str
    base: Params
    from_base: bool
    leaves: dict[str, Any]
    models: list[dict[str, Any]]
    layouts: dict[str, Layout]
    rest: list[str]
    scales: dict[str, Any]
    others: Others
    beside: Mapping[str, Any]

    def groups(self) -> list[list[str]]:
        """Paths of matrices of the same shapes and dtype: what is computed together.

        Leaves that are read when they are asked for come one by one. On a mesh a matrix
        keeps one device busy, and there come as many as there are devices, if the
        leaves fit into memory together.
        """
        lazy = any_lazy((self.leaves, self.models))
        groups: dict[Any, list[str]] = {}
        for path, layout in self.layouts.items():
            leaf = self.leaves[path]
            inputs = matrix_shape(np.shape(leaf), layout.axes)[-2]
            alike = (np.shape(leaf), layout, sharding.of(leaf)) if lazy else ()
            key = inputs, layout.parts, leaf.dtype, alike
            groups.setdefault(key, []).append(path)
        if not lazy:
            return list(groups.values())
        return [part for paths in groups.values() for part in self._cut(paths)]

    def _cut(self, paths: list[str]) -> list[list[str]]:
        """Cuts a group of lazy leaves that are alike into as few equal ones as can be.

        All of them are compiled once, if the number of leaves allows.
        """
        leaf, axes = self.leaves[paths[0]], self.layouts[paths[0]].axes
        placed = sharding.of(leaf)
        devices = 1 if placed is None else placed.mesh.size
        matrices = math.prod(leaf.shape[axis] for axis in axes.stack)
        read = [
            [x for x in jax.tree.leaves(self.arguments([n])) if is_lazy(x)]
            for n in paths
        ]
        cost = max(sum(x.cost for x in of_leaf) for of_leaf in read)
        memory = min((x.memory for of_leaf in read for x in of_leaf), default=0)
        most = max(1, min(devices // matrices, memory // max(cost, 1)))
        size = math.ceil(len(paths) / math.ceil(len(paths) / most))
        return [paths[i : i + size] for i in range(0, len(paths), size)]

    def arguments(self, paths: list[str]) -> tuple[Any, ...]:
        """The leaves of base and models and what is beside them, in one memory."""

        def joined(of_tree: Mapping[str, Any]) -> list[Any]:
            return [
                jax.tree.map(
                    lambda x, like=self.leaves[path]: sharding.join(x, like),
                    of_tree.get(path),
                )
                for path in paths
            ]

        bases = joined(self.leaves) if self.from_base else None
        return bases, [joined(model) for model in self.models], joined(self.beside)


def plan_matrices(
    base: Params,
    models: Sequence[Params],
    *,
    method: str,
    scale: PerLeaf = 1.0,
    others: Others = "base",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
    axes: Mapping[str, MatrixAxes] | None = None,
    beside: Mapping[str, Any] | None = None,
) -> MatrixPlan:
    """Checks trees and finds their matrices; arguments as in `merge_matrices`.

    Raises:
        ValueError: no models, trees that are not alike, an invalid option, or a leaf of
            which no rule says which axes are inputs and which are outputs.
    """
    choice(method, "others", others, ("average", "task_arithmetic", "base"))
    check_models(method, base, models)
    from_base = base is not ABSENT
    base = base if from_base else models[0]
    leaves = named_leaves(base)
    layouts, rest, scales = {}, [], {}
    for path, leaf in leaves.items():
        if not is_float(leaf):
            continue
        of_leaf = Leaf(method, path, np.shape(leaf), len(models))
        scales[path] = per_leaf(of_leaf, "scale", scale)
        at = _axes_of(of_leaf, matrices, stack_axes) if axes is None else axes[path]
        if axes is None and not at.is_matrix:
            rest.append(path)
        elif np.size(leaf):
            outputs = matrix_shape(np.shape(leaf), at)[-1]
            layouts[path] = Layout(at, output_parts(method, path, outputs, fused))
    by_model = [named_leaves(model) for model in models]
    return MatrixPlan(
        method,
        base,
        from_base,
        leaves,
        by_model,
        layouts,
        rest,
        scales,
        others,
        beside or {},
    )


def _axes_of(
    leaf: Leaf, matrices: MatrixRules | None, stack_axes: PerLeaf
) -> MatrixAxes:
    try:
        return leaf_axes(leaf.path, leaf.shape, matrices, stack_axes)  # type: ignore
    except ValueError as error:
        raise ValueError(
            f"{leaf.method}: {error} Such rules are the option `matrices`."
        ) from None


def merge_matrices(
    kernel: Kernel,
    base: Params,
    models: Sequence[Params],
    *,
    method: str,
    scale: PerLeaf = 1.0,
    others: Others = "base",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
    axes: Mapping[str, MatrixAxes] | None = None,
    beside: Mapping[str, Any] | None = None,
    numbers: Mapping[str, Any] | None = None,
    **choices: Any,
) -> tuple[Params, dict[str, Any]]:
    """Merges the matrices of trees with `kernel`, and all other leaves by a policy.

    Args:
        kernel: `kernel(deltas, **numbers, **choices)` maps task matrices (outputs,
            inputs), one per model in float32, to the merged task matrix and to what
            there is to report of it, scalars in any structure. Without a base it maps
            the matrices of the models to the merged matrix. If it has a parameter
            `noise`, it gets what `rounding_noise` says of the base's matrix.
        base: the start that task matrices are measured from; `ABSENT` without one.
        models: one or more trees like `base`.
        method: the caller's name, for messages.
        scale: what merged task matrices and the changes of other leaves are
            multiplied by.
        others: what becomes of leaves that are no matrices: `"average"` adds the mean
            of their task vectors, `"task_arithmetic"` the sum; `"base"` leaves them.
        matrices: axis patterns of leaves by path, or axes, before the presets.
        stack_axes: how many leading axes of a leaf stack independent layers.
        fused: leaves that are several matrices with the same inputs.
        axes: the axes of all leaves by path, in place of rules; a leaf without outputs
            counts as a matrix with one.
        beside: by path, further arrays (*stack, m, n) in any structure, whose matrices
            `kernel` gets as its argument `beside`.
        numbers: arguments of `kernel` that may be traced.
        choices: hashable arguments of `kernel` that are compiled in.

    Returns:
        A tree like `base`, in its dtypes and shardings, and the reports of all matrices
        by path, with a leading axis for stacked layers and one for fused parts. Lazy
        trees come out lazy, and without reports.

    Raises:
        ValueError: as `plan_matrices`.
    """
    plan = plan_matrices(
        base,
        models,
        method=method,
        scale=scale,
        others=others,
        matrices=matrices,
        stack_axes=stack_axes,
        fused=fused,
        axes=axes,
        beside=beside,
    )
    merged, reports, done = {}, {}, None
    for paths in plan.groups():
        run = functools.partial(
            _merge_group,
            scales=[plan.scales[path] for path in paths],
            numbers=dict(numbers or {}),
            layouts=tuple(plan.layouts[path] for path in paths),
            targets=tuple(sharding.of(plan.leaves[path]) for path in paths),
            kernel=kernel,
            choices=tuple(sorted(choices.items())),
        )
        arguments = plan.arguments(paths)
        if any_lazy(arguments):
            together = Together(_merged(run), arguments, len(paths))
            for i, path in enumerate(paths):
                merged[path] = Whole(together, i, plan.leaves[path])
            continue
        results, told, done = run(*arguments, done=_within(done))
        merged |= dict(zip(paths, results, strict=True))
        reports |= dict(zip(paths, told, strict=True))
    return rebuild(plan.base, plan.leaves | merged | merge_others(plan)), reports


def map_task_matrices(
    kernel: Kernel, plan: MatrixPlan, **choices: Any
) -> dict[str, list[Any]]:
    """What `kernel` makes of the task matrices of every leaf.

    For methods that must know all matrices before they merge the first.

    Args:
        kernel: `kernel(deltas, **choices)`, as for `merge_matrices`, to any pytree.
        plan: from `plan_matrices`.
        choices: hashable arguments of `kernel` that are compiled in.

    Returns:
        By path, the result for each fused part (one, for most leaves), with leading
        axes for stacked layers.
    """
    results, done = {}, None
    for paths in plan.groups():
        told, done = _map_group(
            *plan.arguments(paths),
            done=_within(done),
            layouts=tuple(plan.layouts[path] for path in paths),
            kernel=kernel,
            choices=tuple(sorted(choices.items())),
        )
        results |= dict(zip(paths, told, strict=True))
    return results


def place_matrices(plan: MatrixPlan, merged: Mapping[str, Array]) -> Params:
    """Adds task matrices (*stack, outputs, inputs) to the base, others by policy."""
    placed = {
        path: _place(
            plan.leaves[path],
            matrix,
            plan.scales[path],
            axes=plan.layouts[path].axes,
            target=sharding.of(plan.leaves[path]),
        )
        for path, matrix in merged.items()
    }
    return rebuild(plan.base, plan.leaves | placed | merge_others(plan))


def merge_others(plan: MatrixPlan) -> dict[str, Any]:
    """The leaves that are no matrices, merged by the policy of the plan."""
    if plan.others == "base" or not plan.rest:
        return {}
    return merge_leaves(
        _add_up,
        [{path: model[path] for path in plan.rest} for model in plan.models],
        lambda leaf: {"scale": plan.scales[leaf.path]},
        method=plan.method,
        base={path: plan.leaves[path] for path in plan.rest},
        divide=plan.others == "average",
    )


def _add_up(deltas: Sequence[Array], *, scale: Array, divide: bool) -> Array:
    total: Array = sum(deltas)  # type: ignore
    return scale * total / (len(deltas) if divide else 1)


@functools.partial(jax.jit, static_argnames=("layouts", "targets", "kernel", "choices"))
def _merge_group(
    bases,
    models,
    beside,
    *,
    done,
    scales,
    numbers,
    layouts,
    targets,
    kernel,
    choices,
):
    def merge(bases, models, beside, scales, numbers):
        bound = functools.partial(kernel, **numbers, **dict(choices))
        spec = _spec_of_stack(layouts, targets)
        results, last = _map_leaves(bound, bases, models, beside, layouts, done, spec)
        merged = []
        for i, (parts, at) in enumerate(zip(results, layouts, strict=True)):
            matrix = jnp.concatenate([m for m, _ in parts], axis=-2)
            if bases is None:
                like = models[0][i]
                leaf = from_matrix(matrix.mT, like.shape, at.axes).astype(like.dtype)
            else:
                leaf = _add(bases[i], matrix, scales[i], at.axes)
            merged.append(leaf)
        told = [_tell([told for _, told in parts]) for parts in results]
        return merged, told, last

    like = bases or models[0], jnp.zeros(()), jnp.zeros(())
    run = sharding.auto(merge, like=like)
    results, told, last = run(bases, models, beside, scales, numbers)
    kept = [sharding.keep(*pair) for pair in zip(results, targets, strict=True)]
    return kept, told, last


def _within(done: Done) -> Done:
    """What groups of a program wait for: of one that is traced, or each is its own."""
    return done if isinstance(done, Tracer) else None


def _merged(run: Callable[..., Any]) -> Callable[..., list[Array]]:
    """The merged leaves of a group, without the reports."""
    return lambda *arguments: run(*arguments, done=None)[0]


def _tell(of_parts: list[Any]) -> Any:
    if len(of_parts) == 1:
        return of_parts[0]
    return jax.tree.map(lambda *parts: jnp.stack(parts, axis=-1), *of_parts)


@functools.partial(jax.jit, static_argnames=("layouts", "kernel", "choices"))
def _map_group(bases, models, beside, *, done, layouts, kernel, choices):
    def run(bases, models, beside):
        bound = functools.partial(kernel, **dict(choices))
        return _map_leaves(bound, bases, models, beside, layouts, done)

    return sharding.auto(run, like=jnp.zeros(()))(bases, models, beside)


@functools.partial(jax.jit, static_argnames=("axes", "target"))
def _place(base, matrix, scale, *, axes, target):
    add = functools.partial(_add, axes=axes)
    return sharding.keep(sharding.auto(add, like=base)(base, matrix, scale), target)


def _map_leaves(
    kernel: Kernel,
    bases: Sequence[Array] | None,
    models: Sequence[Sequence[Array]],
    beside: Sequence[Any],
    layouts: Sequence[Layout],
    done: Done,
    spec: PartitionSpec | None = None,
) -> tuple[list[list[Any]], Done]:
    """The results of `kernel` for each leaf and part, with stacked axes in front.

    Their factorisations wait for `done`; with them comes what others wait for. On a
    mesh parts do not wait for each other, as that would be communication. The joined
    stack (layers, outputs, inputs) is sharded by `spec`, if that is known.
    """
    dtype = wide(models[0][0].dtype if bases is None else bases[0].dtype)

    def layers(of_model: Sequence[Array]) -> Array:
        leaves = [model.astype(dtype) for model in of_model]
        if bases is not None:
            pairs = zip(leaves, bases, strict=True)
            leaves = [leaf - base.astype(dtype) for leaf, base in pairs]
        pairs = zip(leaves, layouts, strict=True)
        return _join_stacks(*(to_matrix(leaf, at.axes) for leaf, at in pairs)).mT

    stacks = [layers(of_model) for of_model in models]
    further, structure = jax.tree.flatten(jax.tree.map(_join_stacks, *beside))
    asks_noise = "noise" in inspect.signature(kernel).parameters
    if asks_noise and bases is not None:
        pairs = zip(bases, layouts, strict=True)
        stacks.append(
            _join_stacks(*(to_matrix(b.astype(dtype), at.axes) for b, at in pairs)).mT
        )

    def call(*matrices: Array) -> Any:
        values, known = matrices[: len(stacks)], matrices[len(stacks) :]
        options = {"beside": structure.unflatten(known)} if known else {}
        if asks_noise:
            options["noise"] = rounding_noise(*values[len(models) :])
        return kernel(values[: len(models)], **options)

    cuts = itertools.pairwise(itertools.accumulate(layouts[0].parts, initial=0))
    of_parts, on_mesh = [], sharding.mesh_of(*stacks) is not None
    for cut in cuts:
        run = in_turn(call, None if on_mesh else done)
        own = [stack[:, slice(*cut)] for stack in stacks]
        part, by_layer = map_matrices(run, *own, *further, spec=spec)
        of_parts.append(part)
        done = None if on_mesh or by_layer is None else by_layer[0]
    results, start = [], 0
    for leaf, at in zip(models[0], layouts, strict=True):
        stacked = tuple(leaf.shape[axis] for axis in at.axes.stack)
        rows = slice(start, start := start + int(np.prod(stacked)))
        take = lambda x, r=rows, s=stacked: x[r].reshape(*s, *x.shape[1:])  # noqa: E731
        results.append([jax.tree.map(take, part) for part in of_parts])
    return results, done


def _spec_of_stack(
    layouts: Sequence[Layout], targets: Sequence[NamedSharding | None]
) -> PartitionSpec | None:
    """How the joined stack of leaves is sharded, if all of them are in one way.

    Where leaves themselves are stacks, and may be cut into layers, that is left open.
    """
    (target, axes), *others = zip(targets, (x.axes for x in layouts), strict=True)
    if target is None or axes.stack or any(x != (target, axes) for x in others):
        return None

    def names(of_matrix: tuple[int, ...]) -> tuple[str, ...] | None:
        entries = (target.spec[i] for i in of_matrix if i < len(target.spec))
        return tuple(name for x in entries for name in sharding.axes_in(x)) or None

    return PartitionSpec(None, names(axes.outputs), names(axes.inputs))


def _join_stacks(*stacks: Array) -> Array:
    """One stack (layers, m, n) of the matrices of several (*stack, m, n)."""
    return jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in stacks])


def _add(base: Array, delta: Array, scale: Array, axes: MatrixAxes) -> Array:
    """The leaf `base` plus a scaled task matrix (*stack, outputs, inputs)."""
    moved = base.astype(delta.dtype) + scale * from_matrix(delta.mT, base.shape, axes)
    return moved.astype(base.dtype)
