"""Averages of models, plain and pulled towards their common start.

Wortsman et al., "Model soups", ICML 2022, arXiv:2203.05482.
Jang et al., "Model Stock", ECCV 2024, arXiv:2403.19522.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax import Array

from jaxmerge.leafwise import merge_leaves
from jaxmerge.matrices import MatrixRules, rows_by_scope
from jaxmerge.methods.election import weighted_sum
from jaxmerge.numerics import norm, safe_divide, totals
from jaxmerge.options import (
    Leaf,
    PerLeaf,
    PerModel,
    choice,
    per_model,
)
from jaxmerge.registry import register
from jaxmerge.tree import Params


@register(
    paper="Wortsman et al., Model soups, ICML 2022",
    link="https://arxiv.org/abs/2203.05482",
)
def average(
    models: Sequence[Params], *, weights: PerModel = 1.0, normalize: bool = True
) -> Params:
    r"""Averages the parameters of `models`.

    $\theta = \sum_t w_t \theta_t / \sum_t w_t$.

    Args:
        models: pytrees of one structure, of arrays of any shape.
        weights: $w_t$, dimensionless. May be traced.
        normalize: divides by $\sum_t w_t$ (by 1 where that is zero).

    Returns:
        A pytree like the first model, in its dtypes and shardings; arithmetic is in
        float32.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> models = [{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}]
        >>> average(models, weights=[1, 3])["w"].tolist()
        [0.75, 0.75]
    """

    choice("average", "normalize", normalize, (False, True))

    def options(leaf: Leaf) -> dict:
        return {"weights": per_model(leaf, "weights", weights)}

    return merge_leaves(_mean, models, options, method="average", normalize=normalize)


def _mean(leaves: Sequence[Array], *, weights: Sequence, normalize: bool) -> Array:
    total = weighted_sum(leaves, weights)
    return safe_divide(total, jnp.asarray(sum(weights)), total) if normalize else total


@register(
    paper="Jang et al., Model Stock, ECCV 2024",
    link="https://arxiv.org/abs/2403.19522",
)
def model_stock(
    base: Params,
    models: Sequence[Params],
    *,
    angle: Literal["mean_cosine", "mean_angle"] = "mean_cosine",
    clip: bool = True,
    scope: Literal["leaf", "row"] = "leaf",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Interpolates between `base` and the average of `models` by their angle.

    $\theta = \theta_0 + t\,\bar\tau$ with $t = N c / (1 + (N - 1) c)$, where $c$ is the
    cosine between two of the $N$ task vectors (equation 6 for $N = 2$ and appendix),
    leaf by leaf. For more than two models implementations differ in what $c$ is.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        angle: `"mean_cosine"` averages the cosines of all pairs (mergekit);
            `"mean_angle"` takes the cosine of their average angle.
        clip: keeps $t$ in [0, 1], between base and average. The published formula
            (False) leaves that range where task vectors point apart ($c < 0$), and
            has a pole at $c = -1/(N-1)$, where $t$ is set to 0.
        scope: one $t$ per `"leaf"`, or one per `"row"`: per output of a linear map,
            per row of an embedding, and per leaf for all others.
        matrices: with `scope="row"`, axis patterns of leaves by path, or
            `trace(...).axes`, before the presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer has its own $t$.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.
        A task vector that is zero has cosine 0 with every other. One model comes back
        as it is.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(2)}
        >>> models = [{"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([5.0, 0.0])}]
        >>> print(*(f"{x:.2f}" for x in model_stock(base, models)["w"]))
        3.00 1.50
    """
    choice("model_stock", "angle", angle, ("mean_cosine", "mean_angle"))
    choice("model_stock", "clip", clip, (False, True))
    return merge_leaves(
        _stock,
        models,
        lambda leaf: {},
        method="model_stock",
        base=base,
        stack_axes=stack_axes,
        rows=rows_by_scope("model_stock", scope, matrices),
        angle=angle,
        clip=clip,
    )


def _stock(deltas: Sequence[Array], *, angle: str, clip: bool) -> Array:
    n = len(deltas)
    mean: Array = sum(deltas) / n  # type: ignore
    if n == 1:
        return mean
    # One by one: together, each model would add to the program that runs by rows.
    lengths = [norm(delta) for delta in deltas]
    units = [safe_divide(d, s) for d, s in zip(deltas, lengths, strict=True)]
    cosine = {"mean_cosine": _mean_cosine, "mean_angle": _cosine_of_mean}[angle](units)
    denominator = 1 + (n - 1) * cosine
    # Opposite task vectors: their mean vanishes and the formula is a plain 0 / 0.
    pole = denominator <= 4 * n * jnp.finfo(mean.dtype).eps
    ratio = safe_divide(n * cosine, jnp.where(pole, 0, denominator))
    return (jnp.clip(ratio, 0, 1) if clip else ratio) * mean


def _mean_cosine(units: Sequence[Array]) -> Array:
    """The mean inner product of all pairs of unit vectors, from one sum."""
    n = len(units)
    total: Array = sum(units)  # type: ignore
    # |sum u|^2 has each inner product twice, and the square of each vector once.
    return totals([jnp.square(total) - sum(map(jnp.square, units))])[0] / (n * (n - 1))


def _cosine_of_mean(units: Sequence[Array]) -> Array:
    """The cosine of the mean angle between two unit vectors."""
    cosines = totals([a * b for a, b in itertools.combinations(units, 2)])
    return jnp.cos(jnp.mean(jnp.arccos(jnp.clip(cosines, -1, 1))))
