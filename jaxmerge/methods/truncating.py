"""Merging what truncation leaves of task matrices: STAR, CART and DC-Merge.

Lee et al., "STAR: Spectral Truncation and Rescale for Model Merging", NAACL 2025,
arXiv:2502.10339.
Choi et al., "Revisiting Weight Averaging for Model Merging" (CART), arXiv:2412.12153.
Zhang et al., "DC-Merge: Improving Model Merging with Directional Consistency", CVPR
2026, arXiv:2603.06242.

Embeddings are looked up, not multiplied: here they count as other leaves, unless a rule
in `matrices` says otherwise, such as `{".*embedding": "io"}`.

Merged leaves can be differentiated by all numbers that may be traced. By the models
they can where the singular values of the truncated matrices differ.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.linalg import joint_bases, leading_svd, matmul, nonzero
from jaxmerge.matrices import MatrixRules
from jaxmerge.matrixwise import Fused, Others, merge_matrices
from jaxmerge.methods.election import Election, merge_elected
from jaxmerge.methods.trimming import trim
from jaxmerge.numerics import Count, entries, kth_magnitude, safe_divide
from jaxmerge.options import PerLeaf, number, whole_number
from jaxmerge.registry import register
from jaxmerge.tree import Params


@register(
    paper="Lee et al., STAR: Spectral Truncation and Rescale, NAACL 2025",
    link="https://arxiv.org/abs/2502.10339",
    identity={"share": 1.0},
    gathers=True,
)
def star(
    base: Params,
    models: Sequence[Params],
    *,
    share: float = 0.4,
    scale: PerLeaf = 1.0,
    others: Others = "average",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
) -> Params:
    r"""Truncates the spectrum of each task matrix, rescales the rest and averages.

    Of each task matrix, the fewest leading singular triplets are kept whose singular
    values add up to `share` of the sum of all. They are scaled to that sum, the nuclear
    norm before truncation, and $M$ is the mean over tasks.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        share: the share of the nuclear norm that is kept before rescaling, in (0, 1]; 1
            is plain averaging. May be traced.
        scale: multiplies the merged matrices and the changes of other leaves. May
            be traced.
        others: what becomes of leaves that are no matrices: `"average"` (the authors)
            or `"task_arithmetic"` of their task vectors, or `"base"`.
        matrices: axis patterns of leaves by path, or `trace(...).axes`, before the
            presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules.
        fused: leaves that hold several matrices side by side, such as queries, keys
            and values: `{".*in_proj_weight": 3}` for three of equal size, or a list
            of the numbers of their outputs. Each is merged on its own.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: no models, trees that are not alike, an invalid option, or a leaf of
            which no rule says which axes are inputs and which are outputs.

    Example:
        >>> base = {"kernel": jnp.zeros((2, 2))}
        >>> spectra = [3.0, 1.0], [0.0, 4.0]
        >>> models = [{"kernel": jnp.diag(jnp.array(s))} for s in spectra]
        >>> print(star(base, models)["kernel"])
        [[2. 0.]
         [0. 2.]]
    """
    return merge_matrices(
        _truncate_and_rescale,
        base,
        models,
        method="star",
        scale=scale,
        others=others,
        matrices=matrices,
        stack_axes=stack_axes,
        fused=fused,
        numbers={"share": number("star", "share", share, "(0, 1]")},
    )[0]


def _truncate_and_rescale(
    deltas: Sequence[Array], *, share: Array
) -> tuple[Array, tuple[()]]:
    u, s, vt = leading_svd(jnp.stack(deltas))
    total = jnp.sum(s, axis=1, keepdims=True)
    larger_ones = jnp.cumsum(s, axis=1) - s
    kept = jnp.where(larger_ones < share * total, s, 0)
    rescaled = kept * safe_divide(total, jnp.sum(kept, axis=1, keepdims=True))
    return jnp.mean(matmul(u * rescaled[:, None], vt), axis=0), ()


@register(
    paper="Choi et al., Revisiting Weight Averaging for Model Merging (CART), 2024",
    link="https://arxiv.org/abs/2412.12153",
    gathers=True,
)
def cart(
    base: Params,
    models: Sequence[Params],
    *,
    rank_share: float = 0.16,
    strength: float = 2.3,
    scale: PerLeaf = 1.0,
    others: Others = "average",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
) -> Params:
    r"""Adds to the average what is strongest in each task's deviation from it (CART).

    With $\bar\Delta$ the mean of the task matrices, $M = \bar\Delta + \lambda \sum_t
    \mathrm{trunc}(\Delta_t - \bar\Delta)$, where trunc keeps the leading singular
    triplets. Without truncation the deviations cancel, and so they do for two models.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        rank_share: the share of the full rank that is kept of each deviation, in
            (0, 1]; at least one triplet is. It sets a count and cannot be traced. The
            authors' configurations have 0.12 or 0.16 for 8 tasks, and 0.32 for 20.
        strength: $\lambda$, dimensionless. May be traced. The authors' configurations
            have 1.5 to 2.4.
        scale: multiplies the merged matrices and the changes of other leaves. May
            be traced.
        others: what becomes of leaves that are no matrices: `"average"` (the authors)
            or `"task_arithmetic"` of their task vectors, or `"base"`.
        matrices: axis patterns of leaves by path, or `trace(...).axes`, before the
            presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules.
        fused: leaves that hold several matrices side by side, such as queries, keys
            and values: `{".*in_proj_weight": 3}` for three of equal size, or a list
            of the numbers of their outputs. Each is merged on its own.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: no models, trees that are not alike, an invalid option, or a leaf of
            which no rule says which axes are inputs and which are outputs.

    Example:
        >>> base = {"kernel": jnp.zeros((2, 2))}
        >>> spectra = [9.0, 0.0], [0.0, 6.0], [0.0, 0.0]
        >>> models = [{"kernel": jnp.diag(jnp.array(s))} for s in spectra]
        >>> print(cart(base, models, strength=1.0)["kernel"])
        [[6. 0.]
         [0. 6.]]
    """
    return merge_matrices(
        _add_deviations,
        base,
        models,
        method="cart",
        scale=scale,
        others=others,
        matrices=matrices,
        stack_axes=stack_axes,
        fused=fused,
        numbers={"strength": number("cart", "strength", strength)},
        rank_share=number("cart", "rank_share", rank_share, "(0, 1]", static=True),
    )[0]


def _add_deviations(
    deltas: Sequence[Array], *, strength: Array, rank_share: float
) -> tuple[Array, tuple[()]]:
    every = jnp.stack(deltas)
    mean = jnp.mean(every, axis=0)
    rank = entries(rank_share, min(mean.shape))
    u, s, vt = leading_svd(every - mean[None], rank)
    return mean + strength * jnp.sum(matmul(u * s[:, None], vt), axis=0), ()


@register(
    paper="Zhang et al., DC-Merge, CVPR 2026",
    link="https://arxiv.org/abs/2603.06242",
    identity={"density": 1.0},
    gathers=True,
)
def dc_merge(
    base: Params,
    models: Sequence[Params],
    *,
    rank: int | None = None,
    smoothing: float | None = None,
    density: float = 1e-3,
    scale: PerLeaf = 1.0,
    others: Others = "average",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
) -> Params:
    r"""Merges the entries of truncated task matrices in a basis common to all tasks.

    Each task matrix is truncated to its leading singular triplets $(U_t, S_t, V_t)$.
    With $U$ and $V$ the polar factors of all $U_t$ and of all $V_t$ side by side, $X_t
    = U^\top U_t S_t V_t^\top V$ is trimmed, signs are elected and agreeing entries
    averaged as in `ties`. Of the result $X$, the blocks of each task with itself are
    kept, and $M = U X V^\top$.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        rank: how many singular triplets of each task matrix count. None: as many as
            give every task an equal share of the full rank, and at least one. The
            authors take the rank of LoRA updates. Ranks of at
            most a sixteenth of the full one are found by random projection, with a
            remainder of at most 1.005 times the least.
        smoothing: $\rho$, at least 1: the kept singular values of a task are replaced
            by ones on a straight line with the same sum, where the ratio of the largest
            to the smallest is what it was, but at most $\rho$. 1 makes them equal. May
            be traced. The authors use 1 or 5 for LoRA updates, and none (None) for full
            fine-tuning.
        density: the share of the entries of each $X_t$ that is kept, in (0, 1]; at
            least one is. May be traced. Entries that tie with the smallest one kept are
            kept too. Without a `rank`, the share is of the squared full rank.
        scale: multiplies the merged matrices and the changes of other leaves. May
            be traced. The authors choose it on validation data.
        others: what becomes of leaves that are no matrices: `"average"` (the authors)
            or `"task_arithmetic"` of their task vectors, or `"base"`.
        matrices: axis patterns of leaves by path, or `trace(...).axes`, before the
            presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules.
        fused: leaves that hold several matrices side by side, such as queries, keys
            and values: `{".*in_proj_weight": 3}` for three of equal size, or a list
            of the numbers of their outputs. Each is merged on its own.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: no models, trees that are not alike, an invalid option, or a leaf of
            which no rule says which axes are inputs and which are outputs.

    Example:
        >>> base = {"kernel": jnp.zeros((2, 2))}
        >>> spectra = [2.0, 1.0], [0.5, 3.0]
        >>> models = [{"kernel": jnp.diag(jnp.array(s))} for s in spectra]
        >>> print(dc_merge(base, models)["kernel"])
        [[2. 0.]
         [0. 3.]]
    """
    numbers = {"density": number("dc_merge", "density", density, "(0, 1]")}
    if smoothing is not None:
        numbers["ratio"] = number("dc_merge", "smoothing", smoothing, "[1, inf)")
    return merge_matrices(
        _merge_in_joint_bases,
        base,
        models,
        method="dc_merge",
        scale=scale,
        others=others,
        matrices=matrices,
        stack_axes=stack_axes,
        fused=fused,
        numbers=numbers,
        rank=None if rank is None else whole_number("dc_merge", "rank", rank, least=1),
    )[0]


def _merge_in_joint_bases(
    deltas: Sequence[Array],
    *,
    noise: Array,
    density: Array,
    ratio: Array | None = None,
    rank: int | None,
) -> tuple[Array, tuple[()]]:
    tasks, full = len(deltas), min(deltas[0].shape)
    u, s, vt = leading_svd(jnp.stack(deltas), rank or max(1, full // tasks))
    left, right = joint_bases(u, s, vt, noise)
    if ratio is not None:
        s = _smooth(s, ratio, noise)
    seen = matmul(matmul(left.T[None], u * s[:, None]), matmul(vt, right.T[None]))
    # The authors fill bases of equal shares up to the full rank, with directions that
    # no task has: the zeros there count, and decide how many entries are kept.
    size = seen[0].size if rank else max(full**2, seen[0].size)
    keep = Count.of(size).share(jnp.maximum(density, 1.5 / size))  # At least one.
    trimmed = jax.vmap(functools.partial(_trim, keep=keep))(seen)
    merged = merge_elected(list(trimmed), [jnp.ones(())] * tasks, Election())
    owner = jnp.repeat(jnp.arange(tasks), s.shape[1])
    own = owner[:, None] == owner[None]
    return matmul(matmul(left, jnp.where(own, merged, 0)), right), ()


def _trim(x: Array, keep: Count) -> Array:
    # What rounding leaves of zeros must not vote: means are over all that agree.
    rounding = 1e-6 * jnp.max(jnp.abs(x))
    return trim(x, keep=None, threshold=jnp.maximum(kth_magnitude(x, keep), rounding))


def _smooth(s: Array, ratio: Array, noise: Array) -> Array:
    """Singular values (T, r) on straight lines with their sums; zeros stay zero."""
    present = nonzero(s, noise=noise)
    smallest = jnp.min(jnp.where(present, s, s[:, :1]), axis=1, keepdims=True)
    start = jnp.minimum(ratio, safe_divide(s[:, :1], smallest, 1.0))
    last = jnp.sum(present, axis=1, keepdims=True) - 1
    way = jnp.arange(s.shape[1])[None] / jnp.maximum(last, 1)
    line = jnp.where(present, start + (1 - start) * way, 0)
    total = jnp.sum(s, axis=1, keepdims=True)
    return line * safe_divide(total, jnp.sum(line, axis=1, keepdims=True))
