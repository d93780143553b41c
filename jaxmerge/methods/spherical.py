"""Interpolation and means on spheres: directions are merged apart from lengths.

Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985.
Karcher, "Riemannian Center of Mass and Mollifier Smoothing", Communications on Pure and
Applied Mathematics 30, 1977.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.leafwise import ABSENT, merge_leaves
from jaxmerge.matrices import MatrixRules, rows_by_scope
from jaxmerge.methods.election import weighted_sum
from jaxmerge.numerics import norm, norms, root, safe_divide, totals
from jaxmerge.options import (
    Leaf,
    PerLeaf,
    PerModel,
    choice,
    per_leaf,
    per_model,
    whole_number,
)
from jaxmerge.registry import register
from jaxmerge.tree import Params

# Of a sine or of a mean of unit vectors: below it, float32 knows no direction.
_ROUNDING = 1e-6
# Of a cosine: as far as SLERP goes by default.
_OPPOSITE = -0.9995


@register(
    paper="Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985",
    link="https://doi.org/10.1145/325165.325242",
    symmetric=False,
    max_models=2,
)
def slerp(
    models: Sequence[Params],
    *,
    t: PerLeaf = 0.5,
    threshold: float = 0.9995,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Interpolates spherically between two models, leaf by leaf.

    With $\Omega$ the angle between the leaves $u$ and $v$ as flat vectors,
    $\theta = [\sin((1-t)\Omega)\,u + \sin(t\Omega)\,v] / \sin\Omega$. The vectors are
    mixed as they are, not normalised, as in mergekit: for unequal norms the result is
    shorter than the mean norm.

    Args:
        models: one or two pytrees of one structure; one comes back as it is.
        t: where between the first model (0) and the second (1). May be traced.
        threshold: vectors whose cosine exceeds it in magnitude, parallel or opposite,
            are interpolated linearly, as are zero vectors.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer is interpolated alone.

    Returns:
        A pytree like the first model, in its dtypes and shardings; arithmetic is in
        float32.

    Raises:
        ValueError: not one or two models, trees that are not alike, or an invalid
            option.

    Example:
        >>> models = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}]
        >>> print(slerp(models)["w"])
        [0.70710677 0.70710677]
    """
    _at_most_two("slerp", models)

    def options(leaf: Leaf) -> dict:
        return {
            "t": per_leaf(leaf, "t", t),
            "threshold": per_leaf(leaf, "threshold", threshold, "[0, 1]"),
        }

    return merge_leaves(
        _interpolate, models, options, method="slerp", stack_axes=stack_axes
    )


def _interpolate(leaves: Sequence[Array], *, t: Array, threshold: Array) -> Array:
    if len(leaves) == 1:
        return leaves[0]
    u, v = leaves
    return _along_arc(u, v, t, farthest=-threshold, nearest=threshold)


@register(
    paper="Goddard et al., Arcee's MergeKit, EMNLP 2024",
    link="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    max_models=2,
)
def nuslerp(
    models: Sequence[Params],
    *,
    weights: PerModel = 1.0,
    origin: Params | None = None,
    scope: Literal["leaf", "row"] = "leaf",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Interpolates spherically between two models or task vectors, by weights.

    `slerp` at $t = w_2 / (w_1 + w_2)$, along the arc however small its angle: only
    vectors of one direction are interpolated linearly.

    Args:
        models: one or two pytrees of one structure; one comes back as it is.
        weights: $w_1$ and $w_2$, dimensionless; $t$ is 1/2 where they cancel. May be
            traced.
        origin: the centre of the sphere, a pytree like the models: with the base that
            they were fine-tuned from, task vectors are interpolated and added to it.
            None is zero. In a recipe it is `base`.
        scope: one arc per `"leaf"`, or one per `"row"`: per output of a linear map, per
            row of an embedding, and per leaf for all others. In mergekit,
            `nuslerp_flatten: false` means rows of PyTorch's layout and
            `nuslerp_row_wise` its columns, which are rows by a rule such as
            `{".*proj.*": "io"}`.
        matrices: with `scope="row"`, axis patterns of leaves by path, or
            `trace(...).axes`, before the presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer is interpolated alone.

    Returns:
        A pytree like `origin`, without one like the first model, in its dtypes and
        shardings; arithmetic is in float32. Unlike in mergekit, vectors that point
        apart (a cosine below -0.9995), where its result grows without bound, and zero
        vectors, which it takes to be orthogonal to all others, are interpolated
        linearly.

    Raises:
        ValueError: not one or two models, trees that are not alike, or an invalid
            option.

    Example:
        >>> models = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
        >>> print(nuslerp(models, weights=[2.0, 1.0])["w"])
        [1.7320508 1.       ]
    """
    _at_most_two("nuslerp", models)
    return merge_leaves(
        _interpolate_by_weight,
        models,
        lambda leaf: {"weights": per_model(leaf, "weights", weights)},
        method="nuslerp",
        base=ABSENT if origin is None else origin,
        stack_axes=stack_axes,
        rows=rows_by_scope("nuslerp", scope, matrices),
    )


def _interpolate_by_weight(leaves: Sequence[Array], *, weights: Sequence) -> Array:
    if len(leaves) == 1:
        return leaves[0]
    total = jnp.asarray(sum(weights))
    cancelled = jnp.where(jnp.abs(total) < _ROUNDING, 0, total)
    t = safe_divide(weights[1], cancelled, 0.5)
    u, v = leaves
    return _along_arc(u, v, t, farthest=_OPPOSITE)


def _at_most_two(method: str, models: Sequence[Params]) -> None:
    if len(models) > 2:
        raise ValueError(
            f"{method}: interpolates between two models, got {len(models)}; "
            "merge more than two with another method, or in pairs."
        )


def _along_arc(
    u: Array, v: Array, t: Array, *, farthest: float | Array, nearest: float | Array = 1
) -> Array:
    """The great circle from `u` to `v`; a line for cosines outside the two."""
    lengths = norms([u, v])
    angle = _angle(safe_divide(u, lengths[0]), safe_divide(v, lengths[1]))
    cosine = jnp.cos(angle)
    flat = (cosine < farthest) | (cosine > nearest) | (jnp.sin(angle) < _ROUNDING)
    flat |= jnp.any(lengths == 0)
    angle = jnp.where(flat, jnp.pi / 2, angle)
    u_share = jnp.where(flat, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    v_share = jnp.where(flat, t, jnp.sin(t * angle) / jnp.sin(angle))
    return u_share * u + v_share * v


def _angle(u: Array, v: Array) -> Array:
    """The angle between two vectors of norm 1.

    By their sum and difference: arccos of a cosine near 1 has lost half its digits.
    """
    apart, along = totals([jnp.square(u - v), jnp.square(u + v)])
    return 2 * jnp.arctan2(root(apart), root(along))


@register(
    paper="Goddard, Multi-SLERP, 2025",
    link="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
)
def multislerp(
    models: Sequence[Params],
    *,
    weights: PerModel = 1.0,
    normalize: bool = True,
    origin: Params | None = None,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Averages the directions of models or task vectors, apart from their lengths.

    With $\hat x_t = x_t / \|x_t\|$ and $\bar x = \sum_t w_t \hat x_t$, the result is
    $(\sum_t w_t \|x_t\|)\,\bar x / \|\bar x\|$, leaf by leaf. That is all of the
    published method: the mean that it takes in the tangent space at $\bar x$ is zero,
    as $\bar x$ is where its terms cancel. `karcher` goes on from there to the mean on
    the sphere.

    Args:
        models: pytrees of one structure, of arrays of any shape.
        weights: $w_t$, dimensionless. May be traced.
        normalize: divides the weights by their sum (by 1 where that is zero).
        origin: the centre of the sphere, a pytree like the models: with the base that
            they were fine-tuned from, $x_t$ are task vectors, and the result is added
            to it. None is zero. In a recipe it is `base`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer is merged alone.

    Returns:
        A pytree like `origin`, without one like the first model, in its dtypes and
        shardings; arithmetic is in float32. Where the directions cancel, which mergekit
        refuses for more than two models, it is $\sum_t w_t x_t$.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> models = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 3.0])}]
        >>> print(multislerp(models)["w"])
        [1.4142135 1.4142135]
    """
    choice("multislerp", "normalize", normalize, (False, True))
    return merge_leaves(
        _mean_on_sphere,
        models,
        lambda leaf: {"weights": per_model(leaf, "weights", weights)},
        method="multislerp",
        base=ABSENT if origin is None else origin,
        stack_axes=stack_axes,
        normalize=normalize,
    )


@register(
    paper="Karcher, Riemannian Center of Mass and Mollifier Smoothing, 1977",
    link="https://doi.org/10.1002/cpa.3160300502",
)
def karcher(
    models: Sequence[Params],
    *,
    weights: PerModel = 1.0,
    max_steps: int = 10,
    tolerance: PerLeaf = 1e-5,
    origin: Params | None = None,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Takes the mean direction on the sphere of models or task vectors.

    With $\hat x_t = x_t / \|x_t\|$, it is the point $u$ of the sphere with the least
    $\sum_t w_t \angle(u, \hat x_t)^2$, leaf by leaf, times the mean length $\sum_t w_t
    \|x_t\|$. Starting at the direction that `multislerp` takes, each step goes along
    $\sum_t w_t \log_u \hat x_t$. Of two vectors it is the middle of the arc.

    Args:
        models: pytrees of one structure, of arrays of any shape.
        weights: $w_t$, dimensionless, at least 0; divided by their sum. May be traced.
        max_steps: the most steps. It cannot be traced.
        tolerance: a step below this angle, in radians, is the last one. May be traced.
        origin: the centre of the sphere, a pytree like the models: with the base that
            they were fine-tuned from, $x_t$ are task vectors, and the result is added
            to it. None is zero. In a recipe it is `base`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer is merged alone.

    Returns:
        A pytree like `origin`, without one like the first model, in its dtypes and
        shardings; arithmetic is in float32. Where the directions cancel, so that no
        mean is distinguished, it is $\sum_t w_t x_t$ (mergekit: the first direction).
        Zero vectors count in the mean length alone.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> models = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 3.0])}]
        >>> print(jnp.round(karcher(models)["w"], 4))
        [1.4142 1.4142]
    """

    def options(leaf: Leaf) -> dict:
        return {
            "weights": per_model(leaf, "weights", weights, "[0, inf)"),
            "tolerance": per_leaf(leaf, "tolerance", tolerance, "[0, inf)"),
        }

    return merge_leaves(
        _mean_on_sphere,
        models,
        options,
        method="karcher",
        base=ABSENT if origin is None else origin,
        stack_axes=stack_axes,
        max_steps=whole_number("karcher", "max_steps", max_steps, least=0),
    )


def _mean_on_sphere(
    leaves: Sequence[Array],
    *,
    weights: Sequence,
    normalize: bool = True,
    max_steps: int = 0,
    tolerance: float | Array = 0.0,
) -> Array:
    weights = _shares(weights) if normalize else weights
    lengths = [norm(leaf) for leaf in leaves]
    units = [safe_divide(x, length) for x, length in zip(leaves, lengths, strict=True)]
    length = norm(weighted_sum(units, weights))
    present = jnp.where(jnp.stack(lengths) == 0, 0, jnp.stack(weights))
    start = safe_divide(present, length)
    if max_steps:
        pulls = safe_divide(present, jnp.sum(present), present)
        start = _walk(start, _chords(units), pulls, max_steps, tolerance)
    scale = weighted_sum(lengths, weights)
    mean = weighted_sum(units, list(scale * start))
    cancelled = length <= _ROUNDING * sum(jnp.abs(w) for w in weights)
    return jnp.where(cancelled, weighted_sum(leaves, weights), mean)


# Every step of a mean stays in the span of the vectors. So it is enough to know how far
# apart these are: squares of chords tell it, without loss of digits where all are near.


def _chords(units: Sequence[Array]) -> Array:
    """The squared distances between vectors of norm 1, (n, n)."""
    squares = [jnp.square(u - v) for u, v in itertools.combinations(units, 2)]
    above = jnp.zeros((len(units), len(units)), units[0].dtype)
    if squares:
        above = above.at[np.triu_indices(len(units), 1)].set(totals(squares))
    return above + above.T


def _walk(
    start: Array,
    chords: Array,
    pulls: Array,
    max_steps: int,
    tolerance: float | Array,
) -> Array:
    """Steps on the sphere to where the tangents to all vectors cancel.

    Args:
        start: how much of each vector is in that of norm 1 to start from, (n,).
        chords: as `_chords` returns them.
        pulls: the weight of each vector, (n,), of sum 1.
        max_steps: how many there are at most.
        tolerance: no further step is taken after one of this length, in radians.

    Returns:
        How much there is of each vector in the mean.
    """

    def inner(a: Array, b: Array) -> Array:
        """$a^T D b / 2$ with squared chords $D$, in full precision on any device."""
        return jnp.sum(a[:, None] * chords * b[None]) / 2

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        here, _ = state
        excess = inner(here, here)  # Of the square of the sum of coefficients over 1.
        total = jnp.sqrt(1 + excess)
        lack = jnp.where(jnp.sum(here) > 0, -excess / (1 + total), 1 + total)
        # Of the angles to all vectors, 1 - cos.
        versed = jnp.clip(jnp.sum(chords * here[None], axis=1) / 2 + lack, 0, 2)
        angles = 2 * jnp.arctan2(root(versed), root(2 - versed))
        sines = root(versed * (2 - versed))
        # Vectors that are opposite, as far as can be told, pull nowhere.
        opposite = 2 - versed < 8 * jnp.finfo(here.dtype).eps
        forces = pulls * jnp.where(opposite, 0, safe_divide(angles, sines, 1.0))
        tangent = forces - here * jnp.sum(forces * (1 - versed))
        angle = root(jnp.square(jnp.sum(tangent)) - inner(tangent, tangent))
        # jnp.sinc(x) is sin(pi x) / (pi x).
        there = jnp.cos(angle) * here + jnp.sinc(angle / jnp.pi) * tangent
        length = root(jnp.square(jnp.sum(there)) - inner(there, there))
        return safe_divide(there, length), angle

    def step_unless_done(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.lax.cond(state[1] > tolerance, step, lambda done: done, state)

    # A loop of fixed length, unlike one that stops, has a gradient.
    state = (start, jnp.full((), jnp.inf, start.dtype))
    return jax.lax.fori_loop(0, max_steps, step_unless_done, state)[0]


def _shares(weights: Sequence) -> list[Array]:
    total = jnp.asarray(sum(weights))
    return [safe_divide(weight, total, weight) for weight in weights]
