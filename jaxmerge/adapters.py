"""Adapters from models and models from adapters: TSV-Compress and Core Space.

Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv:2412.00081.
"Accurate and Efficient Low-Rank Model Merging in Core Space", NeurIPS 2025,
arXiv:2509.17786.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxmerge import sharding
from jaxmerge.leafwise import task_vector, wide
from jaxmerge.linalg import leading_svd, map_matrices, matmul, svd
from jaxmerge.lowrank import LowRank, apply_adapter, check_adapter, join_update
from jaxmerge.matrices import MatrixRules
from jaxmerge.matrixwise import Others, map_task_matrices, plan_matrices
from jaxmerge.methods.arithmetic import task_arithmetic
from jaxmerge.options import Leaf, PerLeaf, choice, per_leaf, whole_number
from jaxmerge.tree import Params, check_alike, named_leaves, rebuild
from jaxmerge.turns import in_turn

Adapter = Mapping[str, LowRank | Array | np.ndarray]


def tsv_compress(
    base: Params,
    models: Sequence[Params],
    *,
    rank: int | None = None,
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
) -> list[dict[str, LowRank | Array]]:
    """Stores each model as what the leading singular vectors of its tasks add to base.

    For models that stay apart and share a base: `apply_adapter(base, adapter)` makes
    each again. Of every task matrix the triplets of the largest singular values are
    kept, the nearest matrix of that rank (TSV-Compress).

    Args:
        base: the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        rank: how many singular triplets of each task matrix are kept. None: as many as
            give every model an equal share of the full rank, and at least one; all
            adapters together then take about as much as two models. Ranks of at
            most a sixteenth of the full one are found by random projection, with a
            remainder of at most 1.005 times the least.
        matrices: axis patterns of leaves by path, or `trace(...).axes`, before the
            presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules.

    Returns:
        One adapter per model: from leaf paths to a `LowRank` for matrices, and to the
        whole task vector for other leaves that hold floating-point numbers, in float32.
        Leaves in which a model is equal to the base are left out, except under
        `jax.jit`, where values are not known.

    Raises:
        ValueError: no models, trees that are not alike, an invalid option, or a leaf of
            which no rule says which axes are inputs and which are outputs.

    Example:
        >>> base = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
        >>> model = base | {"kernel": jnp.diag(jnp.array([3.0, 1.0]))}
        >>> (adapter,) = tsv_compress(base, [model], rank=1)
        >>> list(adapter), adapter["kernel"].left.shape
        (['kernel'], (2, 1))
        >>> print(apply_adapter(base, adapter)["kernel"])
        [[3. 0.]
         [0. 0.]]
    """
    if rank is not None:
        whole_number("tsv_compress", "rank", rank, least=1)
    plan = plan_matrices(
        base, models, method="tsv_compress", matrices=matrices, stack_axes=stack_axes
    )
    compressed = map_task_matrices(_compress, plan, rank=rank)
    whole = [
        task_vector(*({p: tree[p] for p in plan.rest} for tree in (plan.leaves, model)))
        for model in plan.models
    ]
    adapters = [
        {path: of_tasks[t] for path, (of_tasks,) in compressed.items()} | whole[t]
        for t in range(len(models))
    ]
    return [
        {p: adapter[p] for p in plan.leaves if p in adapter and _changes(adapter[p])}
        for adapter in adapters
    ]


def _compress(deltas: Sequence[Array], *, rank: int | None) -> list[LowRank]:
    rank = rank or max(1, min(deltas[0].shape) // len(deltas))
    u, s, vt = leading_svd(jnp.stack(deltas), rank)
    return [LowRank(u[t] * s[t][None], vt[t]) for t in range(len(deltas))]


def _changes(update: LowRank | Array) -> bool:
    of_size = update.left if isinstance(update, LowRank) else update
    return isinstance(of_size, Tracer) or bool(jnp.any(of_size))


def core_space(
    base: Params,
    adapters: Sequence[Adapter],
    *,
    merge: Callable[[Params, list[Params]], Params],
    scale: PerLeaf = 1.0,
    others: Others = "average",
    matrices: MatrixRules | None = None,
    stack_axes: int | Mapping[str, int] = 0,
) -> Params:
    r"""Merges adapters with any method in the small space that their factors span.

    With $\Delta_t = B_t A_t$, let $U$ be the left singular vectors of
    $[B_1, \dots, B_T]$ and $V$ the right ones of $[A_1; \dots; A_T]$. Nothing is lost
    in the cores $M_t = U^\top B_t A_t V$, whose sides are the sum of the ranks;
    `merge` merges them, and $U M V^\top$ is added to the leaf. What is linear in the
    tasks, and what does not depend on the choice of orthonormal bases, such as
    `tsv_merge` with a `rank`, gives the same as on whole models, at the cost of
    matrices of the size of the cores. Other methods merge in these bases.

    Args:
        base: $\theta_0$, a pytree of arrays of any shape.
        adapters: from leaf paths to a `LowRank` $(B_t, A_t)$ or a dense task vector, as
            `load_adapter` and `tsv_compress` give them. They may differ in their ranks,
            and in the leaves they change.
        merge: a function `(base, models) -> params` of trees that hold nothing but
            cores, with zeros as base: `jaxmerge.ties`, for example, or
            `functools.partial(jaxmerge.tsv_merge, rank=4)`. Paths of cores begin with
            those of their leaves, and stacked layers are leaves of their own.
        scale: multiplies the merged matrices and the changes of other leaves. May
            be traced.
        others: what becomes of dense task vectors: their `"average"` (over all
            adapters), their sum with `"task_arithmetic"`, or `"base"`.
        matrices: axis patterns of leaves by path, or `trace(...).axes`, before the
            presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: no adapters, an adapter that does not fit the base, a leaf that is a
            `LowRank` in one adapter and dense in another, an invalid option, or a
            `merge` that does not return a tree like its base.

    Example:
        >>> import jaxmerge
        >>> base = {"kernel": jnp.zeros((3, 2))}
        >>> update = LowRank(left=jnp.ones((2, 1)), right=jnp.array([[1.0, 2.0, 3.0]]))
        >>> twice = [{"kernel": update}, {"kernel": update}]
        >>> merged = core_space(base, twice, merge=jaxmerge.tsv_merge)
        >>> np.asarray(merged["kernel"]).round(3).T.tolist()
        [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    """
    choice("core_space", "others", others, ("average", "task_arithmetic", "base"))
    leaves = named_leaves(base)
    low, dense = _paths_by_kind(base, adapters, matrices, stack_axes)
    count = len(adapters)
    scales, updates = {}, {}
    for path in low + dense:
        leaf = Leaf("core_space", path, np.shape(leaves[path]), count)
        scales[re.escape(path)] = per_leaf(leaf, "scale", scale)
    for path in low + dense:
        updates[path] = [
            join_update(adapter[path], leaves[path]) if path in adapter else None
            for adapter in adapters
        ]
    merged: dict[str, Any] = {}
    if low:
        merged |= _merge_low({path: updates[path] for path in low}, count, merge)
    if dense and others != "base":
        start = {p: jnp.zeros_like(leaves[p], wide(leaves[p].dtype)) for p in dense}
        share = 1 / count if others == "average" else 1.0
        merged |= _add_up(start, updates, count, share)
    moved = named_leaves(
        apply_adapter(
            base, merged, scale=scales, matrices=matrices, stack_axes=stack_axes
        )
    )
    for path in merged:
        moved[path] = moved[path].astype(jnp.result_type(leaves[path]))
    return rebuild(base, moved)


def _paths_by_kind(
    base: Params,
    adapters: Sequence[Adapter],
    matrices: MatrixRules | None,
    stack_axes: int | Mapping[str, int],
) -> tuple[list[str], list[str]]:
    """The paths of updates of low rank and of dense ones, all checked."""
    if not isinstance(adapters, Sequence) or not adapters:
        raise ValueError("core_space: needs a list of at least one adapter.")
    kinds: dict[str, bool] = {}
    for i, adapter in enumerate(adapters):
        check_adapter(f"core_space: adapters[{i}]", base, adapter, matrices, stack_axes)
        for path, update in adapter.items():
            is_low = isinstance(update, LowRank)
            if kinds.setdefault(path, is_low) != is_low:
                raise ValueError(
                    f"core_space: leaf {path!r} is a LowRank in some adapters and an "
                    f"array in others, first in adapters[{i}]; give it as one kind in "
                    "all, or leave it out."
                )
    low = [path for path, is_low in kinds.items() if is_low]
    return low, [path for path in kinds if path not in low]


class _Space(NamedTuple):
    """The space that all updates of a leaf span, with leading axes for layers.

    Attributes:
        left: an orthonormal basis of outputs, (outputs, p).
        right: an orthonormal basis of inputs, (q, inputs).
        cores: the updates in these bases, (p, q).
    """

    left: Array
    right: Array
    cores: list[Array]


@jax.jit
def _project(updates: Sequence[LowRank | None]) -> _Space:
    def run(present: Sequence[LowRank]) -> _Space:
        factors = [jnp.asarray(f, wide(f.dtype)) for update in present for f in update]
        space, _ = map_matrices(in_turn(_project_matrices), *factors)
        return space

    present = [update for update in updates if update is not None]
    space = sharding.auto(run, like=jnp.zeros(()))(present)
    cores = iter(space.cores)
    return space._replace(
        cores=[
            jnp.zeros_like(space.cores[0]) if update is None else next(cores)
            for update in updates
        ]
    )


def _project_matrices(*factors: Array) -> _Space:
    lefts, rights = factors[::2], factors[1::2]
    u = svd(jnp.concatenate(lefts, axis=1))[0]
    vt = svd(jnp.concatenate(rights, axis=0))[2]
    cores = [
        matmul(matmul(u.T, left), matmul(right, vt.T))
        for left, right in zip(lefts, rights, strict=True)
    ]
    return _Space(u, vt, cores)


def _merge_low(
    updates: Mapping[str, Sequence[LowRank | None]],
    count: int,
    merge: Callable[[Params, list[Params]], Params],
) -> dict[str, LowRank]:
    """The merged updates of leaves, as factors."""
    spaces = {path: _project(of_leaf) for path, of_leaf in updates.items()}
    names = {
        path: [_core_path(path, layer) for layer in np.ndindex(space.left.shape[:-2])]
        for path, space in spaces.items()
    }
    models: list[dict[str, Array]] = [{} for _ in range(count)]
    for path, space in spaces.items():
        for model, cores in zip(models, space.cores, strict=True):
            layers = cores.reshape(len(names[path]), *cores.shape[-2:])
            model |= zip(names[path], layers, strict=True)
    start = jax.tree.map(jnp.zeros_like, models[0])
    merged = merge(start, models)
    try:
        check_alike(start, [merged], names=["its base", "the result"])
    except ValueError as error:
        raise ValueError(f"core_space: merge: {error}") from None
    merged = named_leaves(merged)
    factors = {}
    for path, space in spaces.items():
        core = jnp.stack([merged[name] for name in names[path]])
        left = matmul(space.left, core.reshape(space.cores[0].shape))
        factors[path] = LowRank(left, space.right)
    return factors


def _core_path(path: str, layer: tuple[int, ...]) -> str:
    """A name by which presets know a matrix (outputs, inputs), after any path."""
    index = f"[{','.join(map(str, layer))}]" if layer else ""
    return f"{path}{index}.core.weight"


def _add_up(
    start: dict[str, Array],
    updates: Mapping[str, Sequence[Any]],
    count: int,
    share: float,
) -> dict[str, Array]:
    """The sum of dense updates, times `share`; an adapter without one adds nothing."""
    changes = [
        {
            p: zero if updates[p][t] is None else updates[p][t]
            for p, zero in start.items()
        }
        for t in range(count)
    ]
    return task_arithmetic(start, changes, scale=share)
