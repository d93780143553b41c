"""A step after any merge: more of what it has added, the deeper the layer (LiNeS).

Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model
Merging", ICLR 2025, arXiv:2410.17146.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.leafwise import (
    check_models,
    check_trees,
    measure_leaves,
    merge_leaves,
    units_of,
)
from jaxmerge.numerics import safe_divide
from jaxmerge.options import Leaf, PerLeaf, number, per_leaf, without_effect
from jaxmerge.tree import Params, is_float, named_leaves


def lines(
    base: Params,
    merged: Params,
    *,
    beta: float,
    alpha: float | None = None,
    models: Sequence[Params] | None = None,
    depth: PerLeaf | None = None,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Scales what a merge has added, the more the deeper the layer (LiNeS).

    In block $l$ of $L$, counted from 0, the merged task vector is multiplied by
    $\alpha + \beta\, l / (L - 1)$, outside of blocks (embeddings, final norm, head) by
    $\alpha$. Early layers hold what all tasks share, which is so kept from drifting.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        merged: the result of a merge, or one fine-tuned model, a pytree like `base`.
        beta: $\beta$, dimensionless; after a merge chosen on validation data, 0.1 to 1
            in the paper; $1 - \alpha$ for a single model that is to forget less. May be
            traced.
        alpha: $\alpha$, dimensionless. May be traced. None takes, from `models`,
            $\lVert \sum_t \tau_t \rVert_1 / (T \lVert \delta \rVert_1)$ with $\tau_t$
            the task vectors and $\delta$ the merged one, as the authors do: 1/T after
            an unscaled `task_arithmetic`, and more after methods that drop entries.
        models: the models that were merged, pytrees with the structure and shapes of
            `base`; for `alpha=None`.
        depth: $l / (L - 1)$ of leaves that are not stacked, in [0, 1]; rules such as
            `{r".*layers\.0\..*": 0.0, ..., ".*": 0.0}`. None reads it off the paths:
            the first number, at the end of a part, in which several paths differ tells
            the block, as in `layers/3/mlp/fc1`; every tower counts its own.
        stack_axes: how many leading axes of a leaf stack blocks; a number or rules. The
            first of them tells the block.

    Returns:
        A pytree like `merged`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: trees that are not alike, neither `alpha` nor `models`, an invalid
            option, or no blocks among the paths.

    Example:
        >>> base = {f"layers_{i}": jnp.zeros(1) for i in range(3)}
        >>> merged = {name: jnp.ones(1) for name in base}
        >>> scaled = lines(base, merged, alpha=0.2, beta=0.8)
        >>> [round(x.item(), 2) for x in scaled.values()]
        [0.2, 0.6, 1.0]
    """
    check_trees("lines", {"base": base, "merged": merged})
    depths = _depths(merged, depth, stack_axes)
    scales = {"beta": number("lines", "beta", beta)}
    if alpha is None:
        scales["alpha"] = _balanced_alpha(base, merged, models)
    else:
        without_effect("lines", "models", models, None, "alpha=None")
        scales["alpha"] = number("lines", "alpha", alpha)
    # Seen from the merged model, so that a scale of 1 does not even round.
    return merge_leaves(
        _take_back,
        [base],
        lambda leaf: scales | {"depth": depths[leaf.path]},
        method="lines",
        base=merged,
    )


def _take_back(
    deltas: Sequence[Array], *, alpha: Array, beta: Array, depth: Array
) -> Array:
    return (1 - (alpha + beta * depth)) * deltas[0]


def _depths(
    merged: Params, depth: PerLeaf | None, stack_axes: PerLeaf
) -> dict[str, Any]:
    """By path, a depth in [0, 1], or one for every block along the first axis."""
    leaves = {
        path: Leaf("lines", path, np.shape(leaf), 1)
        for path, leaf in named_leaves(merged).items()
        if is_float(leaf)
    }
    stacked = [path for path, leaf in leaves.items() if units_of(leaf, stack_axes)]
    known = block_depths(leaves.keys() - stacked)
    if depth is None and not known and not stacked:
        raise ValueError(
            "lines: no blocks found, as no two paths differ in a number; say where "
            "leaves are by depth, or which of them stack blocks by stack_axes."
        )

    def of(leaf: Leaf) -> Any:
        if leaf.path in stacked:
            blocks = np.linspace(0, 1, leaf.shape[0], dtype=np.float32)
            return blocks.reshape(-1, *[1] * (len(leaf.shape) - 1))
        if depth is None:
            return known.get(leaf.path, 0.0)
        return per_leaf(leaf, "depth", depth, "[0, 1]")

    return {path: of(leaf) for path, leaf in leaves.items()}


def block_depths(paths: Iterable[str]) -> dict[str, float]:
    """How deep the leaves of numbered blocks are, from 0 in the first to 1 in the last.

    Example:
        >>> block_depths(["embed", "h.0.fc1", "h.0.fc2", "h.1.fc1", "h.2.fc1"])
        {'h.0.fc1': 0.0, 'h.0.fc2': 0.0, 'h.1.fc1': 0.5, 'h.2.fc1': 1.0}
    """
    # Paths that are alike up to a number belong to one tower of blocks.
    numbers = {
        path: [(path[: m.start()], int(m[0])) for m in re.finditer(_BLOCK, path)]
        for path in sorted(paths)
    }
    towers: dict[str, set[int]] = defaultdict(set)
    for tower, block in itertools.chain(*numbers.values()):
        towers[tower].add(block)
    depths = {}
    for path, candidates in numbers.items():
        for tower, block in candidates:
            blocks = sorted(towers[tower])
            if len(blocks) > 1:
                depths[path] = blocks.index(block) / (len(blocks) - 1)
                break
    return depths


_BLOCK = r"\d+(?=[/.]|$)"
"""A number at the end of a part of a path."""


def _balanced_alpha(base: Params, merged: Params, models: Any) -> Array:
    """What makes the merged task vector as long, in L1, as the mean of all."""
    if models is None:
        raise ValueError("lines: give alpha, or the models that were merged.")
    check_models("lines", base, models)
    lengths = measure_leaves(
        _l1_norms, [merged, *models], lambda leaf: {}, method="lines", base=base
    )
    of_tasks, of_merge = (
        jnp.asarray(sum(norms)) for norms in zip(*lengths.values(), strict=True)
    )
    return safe_divide(of_tasks, len(models) * of_merge)


def _l1_norms(deltas: Sequence[Array]) -> tuple[Array, Array]:
    merged, *tasks = deltas
    total: Array = sum(tasks)  # type: ignore
    return jnp.sum(jnp.abs(total)), jnp.sum(jnp.abs(merged))
