"""Merges that ask where each task has moved: RAM, Localize-and-Stitch, trust regions.

Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", arXiv:2601.13572.
He et al., "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic",
arXiv:2408.13656.
Sun et al., "Task Arithmetic in Trust Region", ICLR 2025, arXiv:2501.15065.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.leafwise import (
    check_models,
    check_trees,
    map_leaves,
    measure_leaves,
    merge_leaves,
)
from jaxmerge.methods.trimming import cutoffs, trim_all
from jaxmerge.numerics import Count, count, kth_magnitude, safe_divide
from jaxmerge.options import (
    Leaf,
    PerLeaf,
    PerModel,
    choice,
    number,
    per_leaf,
    without_effect,
)
from jaxmerge.registry import register
from jaxmerge.tree import Params, named_leaves, rebuild


@register(
    paper="Yuan et al., Reinforced Agentic Models, 2026",
    link="https://arxiv.org/abs/2601.13572",
    identity={"epsilon": 0.0},
)
def ram(
    base: Params,
    models: Sequence[Params],
    *,
    epsilon: PerLeaf = 1e-5,
    boost: PerLeaf = 0.0,
    limit: PerLeaf = 0.2,
    scope: Literal["leaf", "model"] = "leaf",
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Averages what several models have changed, keeps what one alone has (RAM, RAM+).

    A task vector has changed the entries with $|\tau_t| > \epsilon$. Each merged entry
    is the mean over the task vectors that have changed it. RAM+ first multiplies what
    one task vector alone has changed by $1 + r \min(\rho_t, \alpha)$, to make up for
    what averaging takes from it: $\rho_t$ is the number of entries that it has changed
    together with others, divided by that which it has changed alone; $\alpha$ is the
    `limit`.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        epsilon: $\epsilon$, in units of the parameters, at least 0; changes up to there
            are rounding. May be traced.
        boost: $r$, dimensionless, at least 0: 0 is RAM, the authors take 0.1 for RAM+.
            May be traced.
        limit: the largest ratio that counts, at least 0. May be traced.
        scope: with a boost, counts entries by `"leaf"` (mergekit), or in the whole
            `"model"` (the paper).
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer is counted alone, so it needs `scope="leaf"`.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(3)}
        >>> models = [{"w": jnp.array([1.0, 0, 3])}, {"w": jnp.array([0.0, 0, 1])}]
        >>> ram(base, models)["w"].tolist()
        [1.0, 0.0, 2.0]
    """
    choice("ram", "scope", scope, ("leaf", "model"))
    check_models("ram", base, models)

    def changes(leaf: Leaf) -> dict[str, Any]:
        return {"epsilon": per_leaf(leaf, "epsilon", epsilon, "[0, inf)")}

    shares = None
    if scope == "model":
        without_effect("ram", "stack_axes", stack_axes, 0, "scope='leaf'")
        counts = measure_leaves(_overlaps, models, changes, method="ram", base=base)
        shares = [_ratio(parts) for parts in zip(*counts.values(), strict=True)]

    def options(leaf: Leaf) -> dict[str, Any]:
        return changes(leaf) | {
            "boost": per_leaf(leaf, "boost", boost, "[0, inf)"),
            "limit": per_leaf(leaf, "limit", limit, "[0, inf)"),
            "shares": shares,
        }

    return merge_leaves(
        _average_overlaps,
        models,
        options,
        method="ram",
        base=base,
        stack_axes=stack_axes,
    )


def _average_overlaps(
    deltas: Sequence[Array],
    *,
    epsilon: Array,
    boost: Array,
    limit: Array,
    shares: Sequence[Array] | None,
) -> Array:
    if shares is None:
        shares = [_ratio([counts]) for counts in _overlaps(deltas, epsilon=epsilon)]
    changed = [jnp.abs(delta) > epsilon for delta in deltas]
    several = sum(changed) > 1
    gains = [1 + boost * jnp.minimum(share, limit) for share in shares]
    boosted = [
        jnp.where(several, delta, gain * delta)
        for delta, gain in zip(deltas, gains, strict=True)
    ]
    return mean_where(boosted, changed)


def _overlaps(deltas: Sequence[Array], *, epsilon: Array) -> list[tuple[Count, Count]]:
    """How many entries each has changed together with others, and how many alone."""
    changed = [jnp.abs(delta) > epsilon for delta in deltas]
    several = sum(changed) > 1
    return [(count(own & several), count(own & ~several)) for own in changed]


def _ratio(counts: Sequence[tuple[Count, Count]]) -> Array:
    together, alone = (
        functools.reduce(operator.add, parts).as_float()
        for parts in zip(*counts, strict=True)
    )
    return safe_divide(together, alone)


def mean_where(arrays: Sequence[Array], masks: Sequence[Array]) -> Array:
    """Of every entry, the mean over the arrays whose mask holds there; else 0."""
    kept = [jnp.where(m, x, 0) for x, m in zip(arrays, masks, strict=True)]
    return safe_divide(sum(kept), sum(masks))  # type: ignore


@register(
    paper="He et al., Localize-and-Stitch, 2024",
    link="https://arxiv.org/abs/2408.13656",
    identity={"density": 1.0},
)
def localize_and_stitch(
    base: Params,
    models: Sequence[Params],
    *,
    density: PerModel = 0.1,
    scope: Literal["model", "leaf"] = "model",
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Averages, in each entry, the task vectors among whose largest entries it is.

    The variant without data: the mask $m_t$ marks the `density` largest magnitudes of
    $\tau_t$ that are not zero, and the result is $\theta_0 + \sum_t m_t \tau_t / \sum_t
    m_t$, entry by entry, and $\theta_0$ where no mask holds.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        density: the share of entries that a mask marks, in (0, 1], rounded down to a
            number of at least one; the authors take 0.05 for language and 0.1 for
            vision. It sets a count and cannot be traced. Entries that tie with the
            smallest one are marked too (the authors' code leaves these out).
        scope: ranks the entries of the whole `"model"` (the authors), with one density
            per model, or those of each `"leaf"`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer is ranked alone, so it needs `scope="leaf"`.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(4)}
        >>> a, b = jnp.array([4.0, -1, 0, 2]), jnp.array([-1.0, 0, 0, 4])
        >>> localize_and_stitch(base, [{"w": a}, {"w": b}], density=0.5)["w"].tolist()
        [1.5, 0.0, 0.0, 3.0]
    """
    method = "localize_and_stitch"
    choice(method, "scope", scope, ("model", "leaf"))
    options = cutoffs(
        method,
        base,
        models,
        density=density,
        scope=scope,
        rounding="floor",
        stack_axes=stack_axes,
    )
    return merge_leaves(
        _stitch, models, options, method=method, base=base, stack_axes=stack_axes
    )


def _stitch(deltas: Sequence[Array], **cuts: Any) -> Array:
    kept = trim_all(deltas, **cuts)
    return mean_where(kept, [delta != 0 for delta in kept])


@register(
    paper="Sun et al., Task Arithmetic in Trust Region, ICLR 2025",
    link="https://arxiv.org/abs/2501.15065",
    two_phases=False,
)
def tatr(
    base: Params,
    models: Sequence[Params],
    *,
    sensitivity: Sequence[Params] | None = None,
    quantile: PerLeaf = 0.99,
    scale: PerLeaf = 1.0,
    scope: Literal["model", "leaf"] = "model",
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Adds task vectors where they do not move what other tasks are sensitive to.

    With $g_t$ the sensitivity of a task at $\theta_0$, $\Omega = \sum_{t \neq u} g_t
    |\tau_u|$ tells how much the tasks disturb each other. The result is $\theta_0 +
    \lambda \sum_t \tau_t$ in the entries where $\Omega$ is below its `quantile`, or
    zero, and $\theta_0$ elsewhere.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        sensitivity: $g_t$, one pytree like `base` per model: the mean over examples of
            the magnitudes of gradients of its loss at the base (the authors take 128).
            Signs are ignored. None takes $|\tau_t|$ instead, which needs no data.
        quantile: the share of entries below the threshold, in [0, 1]; of n entries, the
            threshold is the one that floor(quantile * n) others are below. It sets a
            count and cannot be traced.
        scale: $\lambda$, dimensionless; the authors take 0.3 for eight tasks. May be
            traced.
        scope: ranks the entries of the whole `"model"` (the authors), with one quantile
            for all leaves, or those of each `"leaf"`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer is ranked alone, so it needs `scope="leaf"`.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.
        A single model disturbs nothing and comes back as it is.

    Raises:
        ValueError: no models, trees that are not alike, not one tree of sensitivities
            per model, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(3)}
        >>> models = [{"w": jnp.array([3.0, 1, 2])}, {"w": jnp.array([-2.0, 1, 0])}]
        >>> tatr(base, models, quantile=0.8)["w"].tolist()
        [0.0, 2.0, 2.0]
    """
    choice("tatr", "scope", scope, ("model", "leaf"))
    check_models("tatr", base, models)
    known = _checked(base, models, sensitivity)
    conflicts = map_leaves(
        _conflict,
        [base, *models, *known],
        lambda leaf: {},
        method="tatr",
        tasks=len(models),
    )
    threshold = None
    if scope == "model":
        without_effect("tatr", "stack_axes", stack_axes, 0, "scope='leaf'")
        share = number("tatr", "quantile", quantile, "[0, 1]", static=True)
        size = sum(conflict.size for conflict in conflicts.values())
        threshold = _kth_magnitude(conflicts, _rank(share, size)) if size else 0.0

    def options(leaf: Leaf) -> dict[str, Any]:
        scaled = {"scale": per_leaf(leaf, "scale", scale)}
        if threshold is not None:
            return scaled | {"threshold": threshold}
        share = per_leaf(leaf, "quantile", quantile, "[0, 1]", static=True)
        return scaled | {"rank": _rank(share, leaf.size)}

    beside = rebuild(base, named_leaves(base) | conflicts)
    return merge_leaves(
        _add_within,
        [base, *models, beside],
        options,
        method="tatr",
        stack_axes=stack_axes,
    )


def _checked(
    base: Params, models: Sequence[Params], sensitivity: Any
) -> Sequence[Params]:
    if sensitivity is None:
        return []
    if not isinstance(sensitivity, Sequence) or len(sensitivity) != len(models):
        raise ValueError(
            f"tatr: sensitivity must be a list of {len(models)} trees, one per model."
        )
    known = {f"sensitivity[{i}]": tree for i, tree in enumerate(sensitivity)}
    check_trees("tatr", {"base": base, **known})
    return sensitivity


def _rank(quantile: float, size: int) -> Count:
    """The rank of the threshold, from 1 for the largest entry."""
    return Count.of(size - min(int(quantile * size), size - 1))


_kth_magnitude = jax.jit(kth_magnitude)


def _conflict(leaves: Sequence[Array], *, tasks: int) -> Array:
    base, *others = leaves
    moves = [jnp.abs(model - base) for model in others[:tasks]]
    slopes = [jnp.abs(x) for x in others[tasks:]] or moves
    conflict = moved = felt = jnp.zeros_like(base)
    # Pair by pair: from a difference of two sums, zeros would not come out as zeros.
    for move, slope in zip(moves, slopes, strict=True):
        conflict = conflict + slope * moved + felt * move
        moved, felt = moved + move, felt + slope
    return conflict


def _add_within(
    leaves: Sequence[Array],
    *,
    scale: Array,
    threshold: Any = None,
    rank: Count | None = None,
) -> Array:
    base, *models, conflict = leaves
    if rank is not None:
        threshold = kth_magnitude(conflict, rank)
    trusted = (conflict < threshold) | (conflict == 0)
    deltas = [model - base for model in models]
    return base + jnp.where(trusted, scale * sum(deltas), 0)  # type: ignore
