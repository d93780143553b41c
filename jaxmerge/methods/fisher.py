r"""Merges that weigh every entry by how much the data say about it.

Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022,
arXiv:2111.09832.
Daheim et al., "Model Merging by Uncertainty-Based Gradient Matching", ICLR 2024,
arXiv:2310.12808.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxmerge.leafwise import ABSENT, check_models, merge_leaves
from jaxmerge.methods.curvature import Normalize, normalized, weighted_mean
from jaxmerge.methods.election import weighted_sum
from jaxmerge.methods.evidence import check_known, check_statistics, movable
from jaxmerge.options import Leaf, PerLeaf, PerModel, per_leaf, per_model
from jaxmerge.registry import register
from jaxmerge.statistics.types import Statistics
from jaxmerge.tree import Params, named_leaves, rebuild


@register(
    paper="Matena and Raffel, Fisher-Weighted Averaging, NeurIPS 2022",
    link="https://arxiv.org/abs/2111.09832",
)
def fisher_average(
    models: Sequence[Params],
    statistics: Sequence[Statistics],
    *,
    weights: PerModel = 1.0,
    floor: PerLeaf = 1e-6,
) -> Params:
    r"""Averages entries, each weighted by its Fisher information in every model.

    $\theta = \sum_t w_t F_t \theta_t / \sum_t w_t F_t$, entry by entry, with $F_t$ the
    mean over examples of the squared gradient of their log-likelihood.

    Args:
        models: pytrees of one structure, of arrays of any shape.
        statistics: of each model, with `fisher`. Leaves that it has not got are
            averaged.
        weights: $w_t$, dimensionless. May be traced. The authors choose them on
            validation data, after dividing every $F_t$ by its norm over the model.
        floor: the least $F_t$ that counts, as a share of the mean over models and
            entries of a leaf. What no data speak of becomes a plain average. Authors
            take absolute values, $10^{-6}$ or $10^{-8}$, some for one model alone.

    Returns:
        A pytree like the first model, in its dtypes and shardings; arithmetic is in
        float32. Entries whose weights do not add up to a positive number are averaged.
        With negative $w_t$, sums that are positive but close to zero throw entries far
        beyond those of all models; nothing tells, so look at the largest.

    Raises:
        ValueError: no models, trees that are not alike, statistics that do not belong
            to them or have no `fisher`, or an invalid option.

    Example:
        >>> from jaxmerge.statistics import collect
        >>> def apply(params, x):  # logits of two classes
        ...     return x * params["w"][None]
        >>> models = [{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}]
        >>> data = [[jnp.array([[1.0, 3.0]])], [jnp.array([[1.0, 1.0]])]]
        >>> known = [
        ...     collect(apply, *both, what="fisher") for both in zip(models, data)
        ... ]
        >>> [round(w, 4) for w in fisher_average(models, known)["w"].tolist()]
        [0.5, 0.1]
    """
    check_models("fisher_average", ABSENT, models)
    check_statistics("fisher_average", models, statistics, ("fisher",))
    known = [of_model.fisher for of_model in statistics]
    return merge_weighted(
        "fisher_average", models, statistics, known, weights=weights, floor=floor
    )


def merge_weighted(
    method: str,
    models: Sequence[Params],
    statistics: Sequence[Statistics],
    curvatures: Sequence[Mapping[str, Array]],
    *,
    weights: PerModel,
    floor: PerLeaf = 0.0,
    normalize: Normalize = "count",
) -> Params:
    """Averages entries by their curvatures; leaves that have none, by the weights.

    Args:
        method: the caller's name, for messages.
        models: one or more trees.
        statistics: of each model.
        curvatures: by path, for each model, sums over its examples like the leaves.
        weights: by model, on top of curvatures.
        floor: the least curvature, as a share of the mean of a leaf.
        normalize: what makes models comparable, see `normalized`.

    Returns:
        A tree like the first model.
    """
    counts = [movable(known.examples) for known in statistics]

    def options(leaf: Leaf) -> dict[str, Any]:
        leaf = leaf._replace(models=len(models))
        return {
            "weights": per_model(leaf, "weights", weights),
            "floor": per_leaf(leaf, "floor", floor, "[0, inf)"),
            "counts": counts,
        }

    return merge_known(
        _weighted_mean,
        models,
        curvatures,
        options,
        method=method,
        rows=layers(statistics),
        tasks=len(models),
        normalize=normalize,
    )


def merge_known(
    kernel: Callable[..., Array],
    trees: Sequence[Params],
    known: Sequence[Mapping[str, Array]],
    options: Callable[[Leaf], dict[str, Any]],
    **further: Any,
) -> Params:
    """Merges leaves, those that are `known` together with what is.

    Args:
        kernel: as for `merge_leaves`; after the leaves of all trees, it gets what is
            known of each.
        trees: trees of one structure.
        known: arrays like leaves, by path. A leaf goes without those that are not in
            all of these.
        options: as for `merge_leaves`, and so are
        further: what remains.

    Returns:
        A tree like the first one.
    """
    leaves = [named_leaves(tree) for tree in trees]
    both = {path for path in leaves[0] if all(path in tree for tree in known)}
    merged = {}
    for paths, sources in (
        (both, [*leaves, *known]),
        (leaves[0].keys() - both, leaves),
    ):
        parts = [{path: tree[path] for path in sorted(paths)} for tree in sources]
        merged |= merge_leaves(kernel, parts, options, **further)
    return rebuild(trees[0], merged)


def layers(statistics: Sequence[Statistics]) -> Callable[[Leaf], tuple[int, ...]]:
    """Finds the axes of a leaf along which independent layers lie."""
    stacks = {site.path: site.stack for site in statistics[0].sites}
    return lambda leaf: stacks.get(leaf.path, ())


def _weighted_mean(
    leaves: Sequence[Array],
    *,
    weights: Sequence[Array],
    floor: Array,
    counts: Sequence[Array],
    tasks: int,
    normalize: Normalize,
) -> Array:
    values, sums = leaves[:tasks], leaves[tasks:]
    # From the first model on, so that equal entries come back as they are.
    deltas = [value - values[0] for value in values]
    plain: Array = sum(deltas) / tasks  # type: ignore
    mean = weighted_mean(deltas, weights, plain)
    if sums:
        curvatures = [
            normalized(x, x, count, normalize)
            for x, count in zip(sums, counts, strict=True)
        ]
        least = floor * sum(map(jnp.mean, curvatures)) / tasks
        shares = [
            weight * jnp.maximum(curvature, least)
            for weight, curvature in zip(weights, curvatures, strict=True)
        ]
        mean = weighted_mean(deltas, shares, mean)
    return values[0] + mean


@register(
    paper="Daheim et al., Uncertainty-Based Gradient Matching, ICLR 2024",
    link="https://arxiv.org/abs/2310.12808",
)
def gradient_matching(
    base: Params,
    models: Sequence[Params],
    statistics: Sequence[Statistics],
    *,
    weights: PerModel = 1.0,
    base_statistics: Statistics | None = None,
    prior: PerLeaf = 1e-12,
) -> Params:
    r"""Adds task vectors, each corrected for what the others do to its gradient.

    $\theta = \theta_0 + \sum_t w_t \bar{H}^{-1} (H_0 + H_t)(\theta_t - \theta_0)$ with
    $\bar{H} = H_0 + \sum_t w_t H_t$, entry by entry: the point at which the gradients
    of all losses cancel, to first order, and exactly where losses are quadratic with
    diagonal Hessians. Where all $H_t$ are zero that is task arithmetic; where $H_0$
    is, an average weighted by Fisher information.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        statistics: of each model, with `fisher`: $H_t$ is its sum over examples, so
            that statistics of a part of the data count as that much less. Leaves that
            it has not got are merged by task arithmetic.
        weights: $w_t$, dimensionless; negative ones remove a task. May be traced.
        base_statistics: of `base`, on the data that it was trained on, or a stand-in.
            None: $H_0$ is the prior alone.
        prior: what is added to $H_0$, the curvature of the regulariser that holds
            models at the base: the weight decay times the number of examples. May be
            traced. The authors' code takes $10^{-12}$.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.
        Entries where $\bar{H}$ is not positive are merged by task arithmetic.

    Raises:
        ValueError: no models, trees that are not alike, statistics that do not belong
            to them or have no `fisher`, or an invalid option.

    Example:
        >>> from jaxmerge.statistics import collect
        >>> def apply(params, x):  # logits of two classes
        ...     return x * params["w"][None]
        >>> base = {"w": jnp.zeros(2)}
        >>> models = [{"w": jnp.ones(2)}, {"w": -jnp.ones(2)}]
        >>> data = [[jnp.array([[1.0, 0.0]])], [jnp.array([[0.0, 1.0]])]]
        >>> known = [
        ...     collect(apply, *both, what="fisher") for both in zip(models, data)
        ... ]
        >>> print(gradient_matching(base, models, known)["w"].round(4))
        [ 1. -1.]
    """
    method, kinds = "gradient_matching", ("fisher",)
    check_models(method, base, models)
    check_statistics(method, models, statistics, kinds)
    known = [of_model.fisher for of_model in statistics]
    if base_statistics is not None:
        check_known(f"{method}: base_statistics", base_statistics, "base", base, kinds)
        known.append(base_statistics.fisher)

    def options(leaf: Leaf) -> dict[str, Any]:
        leaf = leaf._replace(models=len(models))
        return {
            "weights": per_model(leaf, "weights", weights),
            "prior": per_leaf(leaf, "prior", prior, "[0, inf)"),
        }

    return merge_known(
        _match_gradients,
        [base, *models],
        known,
        options,
        method=method,
        tasks=len(models),
    )


def _match_gradients(
    leaves: Sequence[Array], *, weights: Sequence[Array], prior: Array, tasks: int
) -> Array:
    base, *others = leaves
    deltas, hessians = [x - base for x in others[:tasks]], others[tasks:]
    added = weighted_sum(deltas, weights)
    if not hessians:
        return base + added
    start = sum(hessians[tasks:], start=prior)
    pulls = [
        (start + hessian) * delta
        for hessian, delta in zip(hessians, deltas, strict=False)
    ]
    total = start + weighted_sum(hessians[:tasks], weights)
    matched = weighted_sum(pulls, weights) / jnp.where(total > 0, total, 1)
    return base + jnp.where(total > 0, matched, added)
