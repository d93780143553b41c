"""Merging the entries of task vectors that matter by magnitude: TIES and breadcrumbs.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
arXiv:2306.01708.
Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024, arXiv:2312.06795.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.leafwise import check_models, measure_leaves, merge_leaves, task_vector
from jaxmerge.matrices import MatrixRules, rows_by_scope
from jaxmerge.methods.election import (
    Aggregate,
    Divisor,
    Election,
    Tie,
    Vote,
    majority_sign,
    match_l1,
    merge_elected,
    merge_thinned,
    sign_counts,
    votes,
)
from jaxmerge.numerics import Count, entries, kth_magnitude
from jaxmerge.options import (
    Leaf,
    PerLeaf,
    PerModel,
    choice,
    per_leaf,
    per_model,
    without_effect,
)
from jaxmerge.ranking import kth_magnitude_of
from jaxmerge.registry import register
from jaxmerge.tree import Params


@register(
    paper="Yadav et al., TIES-Merging, NeurIPS 2023",
    link="https://arxiv.org/abs/2306.01708",
    identity={"density": 1.0},
)
def ties(
    base: Params,
    models: Sequence[Params],
    *,
    density: PerModel = 0.2,
    weights: PerModel = 1.0,
    scale: PerLeaf = 1.0,
    scope: Literal["leaf", "model"] = "leaf",
    rounding: Literal["floor", "floor_plus_one"] | None = None,
    vote: Vote = "weighted",
    tie: Tie = "drop",
    aggregate: Aggregate = "mean",
    divisor: Divisor = "weights",
    rescale: Literal["l1"] | None = None,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Trims each task vector, elects one sign per entry, averages those that agree.

    With $\tau_t = \theta_t - \theta_0$, let $\hat\tau_t$ keep the `density` largest
    entries of $|\tau_t|$. The elected sign is $\gamma = \mathrm{sign}\sum_t w_t
    \hat\tau_t$, and the result is $\theta_0 + \lambda\,\mathrm{mean}\{\hat\tau_t :
    \mathrm{sign}\,\hat\tau_t = \gamma\}$, entry by entry (section 4).

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        density: the share of entries kept, in (0, 1]; at least one entry is. It sets a
            count and cannot be traced. Entries that tie with the smallest one kept are
            kept too.
        weights: $w_t$, dimensionless. May be traced.
        scale: $\lambda$, dimensionless; 1 in the paper. May be traced.
        scope: `"leaf"` ranks the entries of each leaf (as mergekit does); `"model"`
            those of all leaves together (as the authors' code does), with one density
            per model.
        rounding: how many of n entries are kept: `"floor"`, floor(density * n), or
            `"floor_plus_one"`, one more. By default what belongs to the scope:
            `"floor"` by leaf, `"floor_plus_one"` by model.
        vote: what is summed to elect a sign: `"weighted"` sums $w_t\hat\tau_t$
            (mergekit), `"mass"` $\hat\tau_t$ (the paper), `"count"` signs.
        tie: the sign where that sum is exactly zero: `"drop"` none, the entry stays at
            the base; `"positive"` (mergekit), `"negative"`, or `"majority"`, the sign
            that most entries in the scope elected, negative if equally many elected
            either (the authors' code).
        aggregate: `"mean"`, `"sum"` or `"max"` (by magnitude) of the agreeing
            $w_t\hat\tau_t$.
        divisor: what a mean divides by: `"weights"`, the agreeing $|w_t|$;
            `"signed_weights"`, the agreeing $w_t$ (mergekit; negative ones then flip
            the merged sign); `"count"`, how many agree (the paper).
        rescale: `"l1"` scales each trimmed leaf back to its L1 norm before trimming.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer is trimmed alone, so it needs `scope="leaf"`.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(4)}
        >>> a, b = jnp.array([4.0, -1, 0, 2]), jnp.array([-1.0, 0, 0, 4])
        >>> ties(base, [{"w": a}, {"w": b}], density=0.5)["w"].tolist()
        [4.0, 0.0, 0.0, 3.0]
    """
    choice("ties", "scope", scope, ("leaf", "model"))
    choice("ties", "rounding", rounding, (None, "floor", "floor_plus_one"))
    choice("ties", "rescale", rescale, (None, "l1"))
    election = Election(vote, tie, aggregate, divisor).checked("ties")
    trimming = trimmed_election(
        "ties",
        base,
        models,
        election,
        density=density,
        weights=weights,
        scope=scope,
        rounding=rounding,
        rescale=rescale,
        stack_axes=stack_axes,
    )

    def options(leaf: Leaf) -> dict:
        return trimming(leaf) | {"scale": per_leaf(leaf, "scale", scale)}

    return merge_leaves(
        _ties,
        models,
        options,
        method="ties",
        base=base,
        stack_axes=stack_axes,
        election=election,
        rescale=rescale,
    )


def trimmed_election(
    method: str,
    base: Params,
    models: Sequence[Params],
    election: Election,
    *,
    density: PerModel,
    weights: PerModel = 1.0,
    scope: Literal["leaf", "model"] = "leaf",
    rounding: Literal["floor", "floor_plus_one"] | None = None,
    rescale: Literal["l1"] | None = None,
    stack_axes: PerLeaf = 0,
) -> Callable[[Leaf], dict[str, Any]]:
    """What `merge_trimmed` takes for a leaf; with `scope="model"`, it is measured here.

    Args:
        method: the caller's name, for messages; the rest is as in `ties`.
    """
    cut = cutoffs(
        method,
        base,
        models,
        density=density,
        scope=scope,
        rounding=rounding,
        stack_axes=stack_axes,
    )

    def options(leaf: Leaf) -> dict[str, Any]:
        return cut(leaf) | {"weights": per_model(leaf, "weights", weights)}

    if scope == "leaf" or election.tie != "majority":
        return options
    counts = measure_leaves(
        _trimmed_sign_counts,
        models,
        options,
        method=method,
        base=base,
        election=election,
        rescale=rescale,
    )
    majority = majority_sign(counts.values())
    return lambda leaf: options(leaf) | {"majority": majority}


def cutoffs(
    method: str,
    base: Params,
    models: Sequence[Params],
    *,
    density: PerModel,
    scope: Literal["leaf", "model"] = "leaf",
    rounding: Literal["floor", "floor_plus_one"] | None = None,
    stack_axes: PerLeaf = 0,
) -> Callable[[Leaf], dict[str, Any]]:
    """What `trim_all` takes for a leaf; with `scope="model"`, it is measured here."""
    check_models(method, base, models)
    if scope == "model":
        without_effect(method, "stack_axes", stack_axes, 0, "scope='leaf'")
        thresholds = _model_thresholds(
            method, base, models, density, rounding or "floor_plus_one"
        )
        return lambda leaf: {"thresholds": thresholds}

    def options(leaf: Leaf) -> dict[str, Any]:
        shares = per_model(leaf, "density", density, "(0, 1]", static=True)
        keep = [_kept(share, leaf.size, rounding or "floor") for share in shares]
        return {"keep": keep}

    return options


def trim(delta: Array, keep: Count | None, threshold: Array | None = None) -> Array:
    """Zeroes all but the `keep` largest magnitudes (None: keeps all); ties stay.

    With a `threshold`, that decides instead: magnitudes below it are zeroed.
    """
    if threshold is None:
        if keep is None:
            return delta
        threshold = kth_magnitude(delta, keep)
    return jnp.where(jnp.abs(delta) >= threshold, delta, 0)


def _kept(density: float, size: int, rounding: str) -> Count | None:
    return None if density == 1 else Count.of(entries(density, size, rounding=rounding))


def _model_thresholds(
    method: str,
    base: Params,
    models: Sequence[Params],
    density: PerModel,
    rounding: str,
) -> list[Array]:
    if isinstance(density, Mapping):
        raise ValueError(
            f"{method}: density has rules by leaf, but scope='model' ranks all leaves "
            "together; give one number, or one per model."
        )
    whole = Leaf(method, "(all)", (), len(models))
    shares = per_model(whole, "density", density, "(0, 1]", static=True)
    thresholds = []
    for share, model in zip(shares, models, strict=True):
        delta = task_vector(base, model)
        size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(delta))
        keep = Count.of(entries(share, size, rounding=rounding))
        thresholds.append(kth_magnitude_of(delta, keep) if size else jnp.zeros(()))
    return thresholds


def trim_all(
    deltas: Sequence[Array],
    keep: Sequence | None = None,
    thresholds: Sequence | None = None,
    rescale: Any = None,
) -> list[Array]:
    """Trims each task vector of a leaf, and scales it back if told so."""
    nothing = [None] * len(deltas)
    cuts = zip(deltas, keep or nothing, thresholds or nothing, strict=True)
    trimmed = [trim(delta, count, threshold) for delta, count, threshold in cuts]
    if rescale == "l1":
        return [match_l1(t, d) for t, d in zip(trimmed, deltas, strict=True)]
    return trimmed


def _trimmed_sign_counts(
    deltas: Sequence[Array],
    *,
    weights: Sequence,
    thresholds: Sequence,
    rescale: Any,
    election: Election,
) -> tuple[Count, Count]:
    trimmed = trim_all(deltas, None, thresholds, rescale)
    return sign_counts(votes(trimmed, weights, election))


def merge_trimmed(
    deltas: Sequence[Array],
    *,
    weights: Sequence,
    election: Election,
    rescale: Any = None,
    keep: Sequence | None = None,
    thresholds: Sequence | None = None,
    majority: Array | None = None,
) -> Array:
    """Trims the task vectors of one leaf and combines the entries that agree."""
    trimmed = trim_all(deltas, keep, thresholds, rescale)
    return merge_elected(trimmed, weights, election, majority)


def _ties(deltas: Sequence[Array], *, scale: Array, **trimming: Any) -> Array:
    return scale * merge_trimmed(deltas, **trimming)


@register(
    paper="Davari and Belilovsky, Model Breadcrumbs, ECCV 2024",
    link="https://arxiv.org/abs/2312.06795",
    identity={"density": 1.0, "gamma": 0.0},
)
def breadcrumbs(
    base: Params,
    models: Sequence[Params],
    *,
    density: PerModel = 0.2,
    gamma: PerModel = 0.01,
    weights: PerModel = 1.0,
    scale: PerLeaf = 1.0,
    scope: Literal["leaf", "row"] = "leaf",
    elect: bool = False,
    vote: Vote = "weighted",
    tie: Tie = "drop",
    aggregate: Aggregate = "sum",
    divisor: Divisor = "weights",
    rescale: Literal["l1"] | None = None,
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Drops the largest and the smallest entries of each task vector, adds the rest.

    Of n entries, the floor(gamma * n) largest magnitudes are outliers and dropped; the
    floor(density * n) next ones are kept, all below dropped (section 3).

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        density: the share of entries kept, in (0, 1]; at least one entry is. It sets a
            count and cannot be traced. (The paper's beta is the share dropped below.)
        gamma: the share of entries dropped as outliers, in [0, 1); cut to 1 - density
            where both do not fit. Entries that tie with the smallest one dropped are
            dropped too, those that tie with the smallest one kept are kept.
        weights: $w_t$, dimensionless. May be traced.
        scale: $\lambda$, dimensionless; applied to the sum. May be traced.
        scope: counts entries by `"leaf"` (mergekit), or by `"row"` (the authors): per
            output of a linear map, per row of an embedding, per leaf for all others.
        elect: whether to elect signs as `ties` does, instead of adding everything.
        vote: with `elect`, as in `ties`.
        tie: with `elect`, as in `ties`.
        aggregate: as in `ties`; without `elect` of all entries. The default adds up, as
            mergekit does.
        divisor: what a mean divides by, as in `ties`.
        rescale: `"l1"` scales what is kept back to the L1 norm before dropping.
        matrices: with `scope="row"`, axis patterns of leaves by path, or
            `trace(...).axes`, before the presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.
        Unlike mergekit's, leaves too small for one outlier keep their entries.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(4)}
        >>> models = [{"w": jnp.array([9.0, 3.0, -2.0, 1.0])}]
        >>> breadcrumbs(base, models, density=0.5, gamma=0.25)["w"].tolist()
        [0.0, 3.0, -2.0, 0.0]
    """
    choice("breadcrumbs", "rescale", rescale, (None, "l1"))
    election = Election(vote, tie, aggregate, divisor).checked("breadcrumbs", elect)

    def options(leaf: Leaf) -> dict:
        keeps = per_model(leaf, "density", density, "(0, 1]", static=True)
        drops = per_model(leaf, "gamma", gamma, "[0, 1)", static=True)
        return {
            "weights": per_model(leaf, "weights", weights),
            "scale": per_leaf(leaf, "scale", scale),
            "bands": [
                _band(keep, drop, leaf.size)
                for keep, drop in zip(keeps, drops, strict=True)
            ],
        }

    return merge_leaves(
        _crumbs,
        models,
        options,
        method="breadcrumbs",
        base=base,
        stack_axes=stack_axes,
        rows=rows_by_scope("breadcrumbs", scope, matrices),
        election=election,
        elect=elect,
        rescale=rescale,
    )


def _band(density: float, gamma: float, size: int) -> tuple[Count | None, Count | None]:
    """How many of the largest entries to drop, and how many to drop or keep."""
    keep = entries(density, size)
    drop = min(math.floor(gamma * size), size - keep)
    return Count.of(drop) if drop else None, Count.of(drop + keep)


def _crumbs(
    deltas: Sequence[Array],
    *,
    weights: Sequence,
    scale: Array,
    bands: Sequence,
    election: Election,
    elect: bool,
    rescale: Any,
) -> Array:
    kept = []
    for delta, (drop, seen) in zip(deltas, bands, strict=True):
        crumbs = trim(delta, seen)
        if drop is not None:
            outlier = jnp.abs(delta) >= kth_magnitude(delta, drop)
            crumbs = jnp.where(outlier, 0, crumbs)
        kept.append(match_l1(crumbs, delta) if rescale == "l1" else crumbs)
    return scale * merge_thinned(kept, weights, election, elect)
