"""Merging one model into its base: nearby entries, or the most important ones.

Alchemonaut, "QuartetAnemoi-70B-t0.0001", 2024: NearSwap.
Goddard et al., "Arcee's MergeKit", EMNLP 2024, arXiv:2403.13257: Arcee Fusion.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.leafwise import check_models, merge_leaves
from jaxmerge.matrices import MatrixRules, rows_by_scope
from jaxmerge.numerics import Count, kth_magnitude
from jaxmerge.options import Leaf, PerLeaf, Static, per_leaf
from jaxmerge.registry import register
from jaxmerge.tree import Params


@register(
    paper="Alchemonaut, QuartetAnemoi-70B, 2024",
    link="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    identity=None,
    max_models=1,
)
def nearswap(base: Params, models: Sequence[Params], *, t: PerLeaf = 1e-4) -> Params:
    r"""Moves each entry of `base` to that of one other model, but at most by `t`.

    $\theta = \theta_0 + \mathrm{clip}(\theta_1 - \theta_0, -t, t)$: entries that are
    near each other are swapped, all others stay near the base. The published formula
    $\theta_0 + \min(1, t / |\Delta|)\,\Delta$ is the same.

    Args:
        base: $\theta_0$, a pytree of arrays of any shape.
        models: $\theta_1$ alone, a pytree with the structure and shapes of `base`.
        t: the largest change, at least 0, in the units of the parameters; the authors
            take 0.0001. May be traced.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: not one model, trees that are not alike, or an invalid option.

    Example:
        >>> base, model = {"w": jnp.zeros(3)}, {"w": jnp.array([0.25, -0.25, 4.0])}
        >>> nearswap(base, [model], t=0.5)["w"].tolist()
        [0.25, -0.25, 0.5]
    """
    _check_pair("nearswap", base, models)

    def options(leaf: Leaf) -> dict:
        return {"t": per_leaf(leaf, "t", t, "[0, inf)")}

    return merge_leaves(_clip, models, options, method="nearswap", base=base)


def _clip(deltas: Sequence[Array], *, t: Array) -> Array:
    return jnp.clip(deltas[0], -t, t)


@register(
    paper="Goddard et al., Arcee's MergeKit, EMNLP 2024",
    link="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    identity=None,
    max_models=1,
)
def arcee_fusion(
    base: Params,
    models: Sequence[Params],
    *,
    scope: Literal["row", "leaf"] = "row",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Takes over from one other model the entries that stand out by importance.

    The importance of an entry is $|\theta_1 - \theta_0|\,\mathrm{KL}(p \| q)$, where
    $p$ and $q$ are the softmax of its row in $\theta_1$ and in $\theta_0$. Taken over
    is what reaches the median of the leaf plus 1.5 times its interquartile range.

    Args:
        base: $\theta_0$, a pytree of arrays of any shape.
        models: $\theta_1$ alone, a pytree with the structure and shapes of `base`.
        scope: what a softmax runs over: a `"row"`, the inputs of one output of a linear
            map, one row of an embedding, and the leaf for all others (mergekit: the
            last axis of PyTorch's layout); or the `"leaf"`.
        matrices: with `scope="row"`, axis patterns of leaves by path, or
            `trace(...).axes`, before the presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer has its own quartiles.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.
        The quartiles of $n$ entries are those of ranks $\lfloor q (n - 1) \rfloor$,
        exact for leaves of any size, where mergekit draws samples. Leaves whose rows
        have one entry come from $\theta_1$, as their divergence is zero throughout.

    Raises:
        ValueError: not one model, trees that are not alike, or an invalid option.

    Example:
        >>> base = {"bias": jnp.zeros(5)}
        >>> model = {"bias": jnp.array([0.125, -0.125, 0.25, 0.0, 8.0])}
        >>> arcee_fusion(base, [model])["bias"].tolist()
        [0.0, 0.0, 0.0, 0.0, 8.0]
    """
    _check_pair("arcee_fusion", base, models)
    rows_of = rows_by_scope("arcee_fusion", scope, matrices)

    def options(leaf: Leaf) -> dict:
        rows = rows_of(leaf) if rows_of else ()
        within = set(range(len(leaf.shape))) - {*leaf.units, *rows}
        # Inside the kernel, stacked axes are gone.
        return {"row": Static(tuple(sorted(a - len(leaf.units) for a in within)))}

    return merge_leaves(
        _fuse,
        [base, *models],
        options,
        method="arcee_fusion",
        stack_axes=stack_axes,
    )


def _check_pair(method: str, base: Params, models: Sequence[Params]) -> None:
    check_models(method, base, models)
    if len(models) > 1:
        raise ValueError(
            f"{method}: merges one model into the base, got {len(models)}; merge the "
            "others into the result, one by one."
        )


def _fuse(leaves: Sequence[Array], *, row: Static) -> Array:
    base, model = leaves
    importance = jnp.abs(model - base) * _divergence(model, base, row.value)
    return jnp.where(importance >= _fence(importance), model, base)


def _divergence(model: Array, base: Array, axes: tuple[int, ...]) -> Array:
    """The divergence of the softmax of `model` from that of `base`, along `axes`."""
    totals = [jax.nn.logsumexp(x, axes, keepdims=True) for x in (model, base)]
    p, q = (jnp.exp(x - total) for x, total in zip((model, base), totals, strict=True))
    log_ratio = (model - base) - (totals[0] - totals[1])
    # Terms p log(p / q) of a small change cancel each other to less than they are
    # rounded by. Adding q - p, which sums to zero, leaves no term below zero.
    series = 1 / 2 - log_ratio * (1 / 6 - log_ratio * (1 / 24 - log_ratio / 120))
    small = p * jnp.square(log_ratio) * series
    terms = jnp.where(jnp.abs(log_ratio) < 0.1, small, p * log_ratio + (q - p))
    return jnp.sum(terms, axes, keepdims=True)


def _fence(scores: Array) -> Array:
    """The median plus 1.5 times the interquartile range of scores of at least 0."""
    size = scores.size
    quartiles = [
        kth_magnitude(scores, Count.of(size - (size - 1) * i // 4)) for i in (1, 2, 3)
    ]
    lower, median, upper = quartiles
    return median + 1.5 * (upper - lower)
