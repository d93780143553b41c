"""A merge whose features drift least from those of the models, from a common start.

Sun et al., "Towards Minimizing Feature Drift in Model Merging: Layer-wise Task Vector
Fusion for Adaptive Knowledge Integration" (LOT Merging), NeurIPS 2025,
arXiv:2505.23859.
"""

from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.leafwise import check_models
from jaxmerge.linalg import matmul
from jaxmerge.matrixwise import merge_matrices
from jaxmerge.methods.curvature import (
    Normalize,
    curvatures,
    normalized,
    total,
    weighted_mean,
)
from jaxmerge.methods.evidence import Evidence, movable, pose
from jaxmerge.methods.fisher import layers, merge_known
from jaxmerge.numerics import safe_divide
from jaxmerge.options import Leaf, PerModel, choice, number, per_model
from jaxmerge.registry import register
from jaxmerge.statistics.types import Statistics
from jaxmerge.tree import Params, named_leaves, rebuild


@register(
    paper="Sun et al., LOT Merging, NeurIPS 2025",
    link="https://arxiv.org/abs/2505.23859",
    gathers=True,
)
def lot_merge(
    base: Params,
    models: Sequence[Params],
    statistics: Sequence[Statistics],
    *,
    weights: PerModel = 1.0,
    rtol: float = 1e-5,
    normalize: Normalize = "count",
) -> Params:
    r"""Fuses task vectors so that features drift least from the models' (LOT Merging).

    For weights, with $\tau_t = \theta_t - \theta_0$ and $A_t$ the mean of $x x^\top$
    over the inputs $x$ that model $t$ gives the weight on its data, $\tau = \left(
    \sum_t w_t \tau_t A_t \right) \left(\sum_t w_t A_t\right)^+$ (equation 9): the
    objective of RegMean, but directions in which no task has data stay as in `base`.
    For scales, as of norms, the mean of task vectors, each entry weighted by the
    squares of what it multiplies (equation 12). For biases and all else, the mean.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        statistics: of each model, with `gram`.
        weights: $w_t$, dimensionless. May be traced. Not in the paper.
        rtol: eigenvalues of $\sum_t w_t A_t$ of at most this share of the largest count
            as zero. In float32, rounding leaves up to about $10^{-6}$ where there
            should be none; with statistics stored in bfloat16, $10^{-2}$. Inputs with a
            few huge features lose directions by it; a ridge would not keep to `base`.
        normalize: how tasks compare: `"count"` takes means over tokens (for scales,
            over examples), `"trace"` statistics of mean one, and `"none"` sums, which
            is as in the paper, where tasks have equally many examples.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.
        Scales are told from biases and embeddings by their `diagonal`, which is not a
        mere count; those of a single entry are not. Entries without data get the mean.

    Raises:
        ValueError: no models, trees that are not alike, statistics that do not belong
            to them or have no `gram`, or an invalid option.

    Example:
        >>> from jaxmerge.statistics import collect
        >>> def apply(params, x):
        ...     return x @ params["kernel"]
        >>> base = {"kernel": jnp.zeros((3, 3))}
        >>> models = [{"kernel": jnp.eye(3)}, {"kernel": 3 * jnp.eye(3)}]
        >>> data = [[jnp.diag(jnp.array(x))] for x in ([2.0, 1, 0], [1.0, 1, 0])]
        >>> known = [collect(apply, *both) for both in zip(models, data)]
        >>> print(lot_merge(base, models, known)["kernel"].round(4))
        [[1.4 0.  0. ]
         [0.  2.  0. ]
         [0.  0.  0. ]]
    """
    method = "lot_merge"
    check_models(method, base, models)
    choice(method, "normalize", normalize, get_args(Normalize))
    rtol = number(method, "rtol", rtol, "[0, 1)")
    problem = pose(method, models, statistics, "gram", weights)
    leaves = named_leaves(base)
    merged, _ = merge_matrices(
        _fuse,
        {path: leaves[path] for path in problem.axes},
        problem.models,
        method=method,
        axes=problem.axes,
        beside=problem.evidence,
        numbers={"rtol": rtol},
        normalize=normalize,
    )
    counts = [movable(known.examples) for known in statistics]

    def options(leaf: Leaf) -> dict[str, Any]:
        leaf = leaf._replace(models=len(models))
        return {"weights": per_model(leaf, "weights", weights), "counts": counts}

    rest = merge_known(
        _average,
        [
            {path: leaf for path, leaf in tree.items() if path not in merged}
            for tree in (leaves, *map(named_leaves, models))
        ],
        [known.diagonal for known in statistics],
        options,
        method=method,
        rows=layers(statistics),
        tasks=len(models),
        normalize=normalize,
    )
    return rebuild(base, {**merged, **rest})


def _fuse(
    deltas: Sequence[Array],
    *,
    beside: Sequence[Evidence],
    rtol: Array | float,
    normalize: Normalize,
) -> tuple[Array, tuple[()]]:
    beside = jax.tree.map(lambda x: x.astype(deltas[0].dtype), beside)
    grams = curvatures(beside, (), normalize)
    (whole,) = total(grams)
    values, vectors = jnp.linalg.eigh(whole.inputs)
    size = jnp.abs(values)
    present = size > rtol * jnp.max(size, initial=0)

    def along(x: Array, factors: Array) -> Array:
        return matmul(matmul(x, vectors) * factors[None], vectors.T)

    inverse = safe_divide(jnp.ones(()), jnp.where(present, values, 0))
    # From the average on, equal models come back as they are; the second round makes up
    # for what float32 loses in the first.
    fused = along(sum(deltas) / len(deltas), present.astype(values.dtype))  # type: ignore
    for _ in range(2):
        pulls = [gram(d - fused) for gram, d in zip(grams, deltas, strict=True)]
        fused += along(sum(pulls), inverse)  # type: ignore
    # Inputs that are always zero are so without any rounding.
    return jnp.where(whole.diagonal() != 0, fused, 0), ()


def _average(
    leaves: Sequence[Array],
    *,
    weights: Sequence[Array],
    counts: Sequence[Array],
    tasks: int,
    normalize: Normalize,
) -> Array:
    base, *others = leaves
    deltas, diagonals = [x - base for x in others[:tasks]], others[tasks:]
    plain: Array = sum(deltas) / tasks  # type: ignore
    mean = weighted_mean(deltas, weights, plain)
    if diagonals and base.ndim:
        squares = [
            weight * normalized(x, x, count, normalize)
            for weight, x, count in zip(weights, diagonals, counts, strict=True)
        ]
        # Entries of a bias, or of a row of an embedding, are all used equally often.
        are_squares = jnp.any(jnp.stack([x != x[..., :1] for x in diagonals]))
        by_squares = weighted_mean(deltas, squares, mean)
        mean = jnp.where(are_squares, by_squares, mean)
    return base + mean
