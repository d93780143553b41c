"""Merging the singular vectors of task matrices: SFTM, TSV-M, Iso-C and Iso-CTS.

"Superpose Singular Features for Model Merging" (SFTM), EMNLP 2025, arXiv:2502.10698.
Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv:2412.00081.
Marczak et al., "No Task Left Behind: Isotropic Model Merging", ICML 2025,
arXiv:2502.04959.

Embeddings are looked up, not multiplied: here they count as other leaves, unless a rule
in `matrices` says otherwise, such as `{".*embedding": "io"}`.

Merged leaves can be differentiated by `scale`. By the models, those of `tsv_merge` and
`iso_c` can, where the singular values of task matrices differ; at equal ones, zero
among them, the slope of an SVD is infinite. `iso_cts` always meets such values, and the
number of steps of `sftm` depends on the values.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxmerge.linalg import (
    SolveInfo,
    joint_bases,
    leading_svd,
    least_squares,
    matmul,
    nonzero,
    polar,
    svd,
)
from jaxmerge.matrices import MatrixRules
from jaxmerge.matrixwise import Fused, Others, merge_matrices
from jaxmerge.numerics import norm, safe_divide
from jaxmerge.options import PerLeaf, number, whole_number
from jaxmerge.registry import register
from jaxmerge.tree import Params


@register(
    paper="Superpose Singular Features for Model Merging (SFTM), EMNLP 2025",
    link="https://arxiv.org/abs/2502.10698",
    identity={"ridge": 0.0},
    gathers=True,
)
def sftm(
    base: Params,
    models: Sequence[Params],
    *,
    rank: int | None = None,
    ridge: float = 1e-3,
    scale: PerLeaf = 1.0,
    others: Others = "average",
    rtol: float = 1e-6,
    max_steps: int = 200,
    info: bool = False,
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
) -> Any:
    r"""Superposes the singular features of all tasks so that each keeps its strength.

    With the singular triplets $(u_a, \sigma_a, v_a)$ of all task matrices together, the
    merged matrix $M = \sum_a c_a u_a v_a^\top$ is the one of least norm with
    $u_a^\top M v_a = \sigma_a$ for all $a$; where these equations contradict each
    other, as between scaled copies of a task, they are solved as least squares. The
    paper's abstract says that singular features are combined by a linear system that
    preserves each task's map from input to output features; the equations are derived
    from that. Its rank, scale and treatment of other leaves are not known to us. The
    defaults take the statement at its word: all features, at their own strength, and
    other leaves, which have no features, at their mean, where no task's is exceeded.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        rank: how many singular triplets of each task matrix count, the largest first.
            None: all that are not zero. Ranks of at
            most a sixteenth of the full one are found by random projection, with a
            remainder of at most 1.005 times the least.
        ridge: weight of the squared norm of $M$ beside that of the equations, whose
            left sides have unit length. It keeps noise between near-equal features
            from growing; 0 solves the equations as they are.
        scale: multiplies $M$ and the changes of other leaves. May be traced. For
            nearly orthogonal tasks $M$ is nearly their sum, and a value well below 1,
            chosen on validation data, works best with many of them.
        others: what becomes of leaves that are no matrices: `"average"` or
            `"task_arithmetic"` of their task vectors, or `"base"`.
        rtol: singular values of at most this share of a matrix's largest count as
            zero; and the solver stops when the gradient has shrunk to that share.
        max_steps: the most steps of the solver.
        info: whether to return, besides the merged tree, a `SolveInfo` per matrix.
        matrices: axis patterns of leaves by path, or `trace(...).axes`, before the
            presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules.
        fused: leaves that hold several matrices side by side, such as queries, keys
            and values: `{".*in_proj_weight": 3}` for three of equal size, or a list
            of the numbers of their outputs. Each is merged on its own.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.
        With `info`, also a dict from paths to `SolveInfo`, with leading axes for
        stacked layers and a last one for fused parts.

    Raises:
        ValueError: no models, trees that are not alike, an invalid option, or a leaf of
            which no rule says which axes are inputs and which are outputs.

    Example:
        >>> base = {"kernel": jnp.zeros((2, 2))}
        >>> spectra = [2.0, 0], [4.0, 3.0]
        >>> models = [{"kernel": jnp.diag(jnp.array(s))} for s in spectra]
        >>> print(sftm(base, models, ridge=0.0)["kernel"])
        [[3. 0.]
         [0. 3.]]
    """
    merged, told = merge_matrices(
        _superpose,
        base,
        models,
        method="sftm",
        scale=scale,
        others=others,
        matrices=matrices,
        stack_axes=stack_axes,
        fused=fused,
        numbers={
            "ridge": number("sftm", "ridge", ridge, "[0, inf)"),
            "rtol": number("sftm", "rtol", rtol, "(0, 1)"),
        },
        rank=None if rank is None else whole_number("sftm", "rank", rank, least=1),
        max_steps=whole_number("sftm", "max_steps", max_steps, least=1),
    )
    return (merged, told) if info else merged


def _superpose(
    deltas: Sequence[Array],
    *,
    noise: Array,
    ridge: Array,
    rtol: Array,
    rank: int | None,
    max_steps: int,
) -> tuple[Array, SolveInfo]:
    u, sigma, vt = _features(deltas, rank)
    weight = nonzero(sigma, rtol, noise).ravel().astype(u.dtype)
    left = jnp.concatenate(list(u), axis=1) * weight[None]
    right = jnp.concatenate(list(vt), axis=0)
    strengths = sigma.ravel() * weight
    return least_squares(
        lambda m: jnp.sum(matmul(left.T, m) * right, axis=1),
        lambda y: matmul(left * y[None], right),
        strengths,
        ridge=ridge,
        rtol=rtol,
        # Opposite tasks: nothing but rounding is left of the first gradient.
        atol=rtol * norm(strengths),
        max_steps=max_steps,
    )


@register(
    paper="Gargiulo et al., Task Singular Vectors, CVPR 2025",
    link="https://arxiv.org/abs/2412.00081",
    gathers=True,
)
def tsv_merge(
    base: Params,
    models: Sequence[Params],
    *,
    rank: int | None = None,
    scale: PerLeaf = 1.0,
    others: Others = "average",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
) -> Params:
    r"""Adds up the leading singular features of all tasks, made orthogonal first.

    With $U$, $S$, $V$ the leading singular triplets of all task matrices side by side,
    $M = \mathrm{polar}(U)\, S\, \mathrm{polar}(V)^\top$, where the polar factor is the
    nearest matrix with orthonormal columns (TSV-Merge, algorithm 1). Directions in
    which several tasks agree to six digits are counted once.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        rank: how many singular triplets of each task matrix count. None: as many as
            give every task an equal share of the full rank, and at least one. Ranks of
            at most a sixteenth of the full one are found by random projection, with a
            remainder of at most 1.005 times the least.
        scale: multiplies the merged matrices and the changes of other leaves. May
            be traced. The authors recommend 1.
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
        >>> spectra = [2.0, 1], [0.5, 3.0]
        >>> models = [{"kernel": jnp.diag(jnp.array(s))} for s in spectra]
        >>> print(tsv_merge(base, models)["kernel"])
        [[2. 0.]
         [0. 3.]]
    """
    return merge_matrices(
        _orthogonalise,
        base,
        models,
        method="tsv_merge",
        scale=scale,
        others=others,
        matrices=matrices,
        stack_axes=stack_axes,
        fused=fused,
        rank=None if rank is None else whole_number("tsv_merge", "rank", rank, least=1),
    )[0]


def _orthogonalise(
    deltas: Sequence[Array], *, noise: Array, rank: int | None
) -> tuple[Array, tuple[()]]:
    rank = rank or max(1, min(deltas[0].shape) // len(deltas))
    u, s, vt = _features(deltas, rank)
    left, right = joint_bases(u, s, vt, noise)
    return matmul(left * s.ravel()[None], right), ()


@register(
    paper="Marczak et al., No Task Left Behind: Isotropic Model Merging, ICML 2025",
    link="https://arxiv.org/abs/2502.04959",
    identity=None,
    gathers=True,
)
def iso_c(
    base: Params,
    models: Sequence[Params],
    *,
    scale: PerLeaf = 1.0,
    others: Others = "average",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
) -> Params:
    r"""Gives all singular values of the summed task matrix their mean (Iso-C).

    With $\sum_t \Delta_t = U S V^\top$, $M = \bar s\, U V^\top$ (section 4.1), where
    the mean is over singular values that are not zero: others have no direction of
    their own. A single model does not come back as it is: its spectrum is flattened
    too.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        scale: multiplies the merged matrices and the changes of other leaves. May
            be traced. The authors choose it on validation data; 0.8 to 1.5 was best.
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
        >>> spectra = [2.0, 0], [1.0, 1.0]
        >>> models = [{"kernel": jnp.diag(jnp.array(s))} for s in spectra]
        >>> print(iso_c(base, models)["kernel"])
        [[2. 0.]
         [0. 2.]]
    """
    return merge_matrices(
        _flatten_spectrum,
        base,
        models,
        method="iso_c",
        scale=scale,
        others=others,
        matrices=matrices,
        stack_axes=stack_axes,
        fused=fused,
    )[0]


def _flatten_spectrum(
    deltas: Sequence[Array], *, noise: Array
) -> tuple[Array, tuple[()]]:
    u, s, vt = svd(sum(deltas))  # type: ignore
    present = nonzero(s, noise=len(deltas) * noise)
    mean = safe_divide(jnp.sum(s * present), jnp.sum(present))
    return mean * matmul(u * present.astype(u.dtype)[None], vt), ()


@register(
    paper="Marczak et al., No Task Left Behind: Isotropic Model Merging, ICML 2025",
    link="https://arxiv.org/abs/2502.04959",
    identity=None,
    gathers=True,
)
def iso_cts(
    base: Params,
    models: Sequence[Params],
    *,
    common: float = 0.8,
    scale: PerLeaf = 1.0,
    others: Others = "average",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
) -> Params:
    r"""Flattens the spectra of a common subspace and of one per task (Iso-CTS).

    Of the summed task matrix the leading singular directions are kept; the rest of the
    rank goes in equal shares to what each task matrix has outside their output space.
    The joint bases are made orthogonal, and all directions get the mean singular value
    (section 4.2, algorithm 2). A single model does not come back as it is.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        common: the share of the full rank that is common, in [0, 1]. It sets counts and
            cannot be traced; 1 is `iso_c`, and so is a rest too small to share. What
            equal shares leave over is common too.
        scale: multiplies the merged matrices and the changes of other leaves. May
            be traced. The authors choose it on validation data; 0.9 to 1.9 was best.
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
        >>> spectra = [2.0, 0], [1.0, 1.0]
        >>> models = [{"kernel": jnp.diag(jnp.array(s))} for s in spectra]
        >>> print(iso_cts(base, models, common=1.0)["kernel"])
        [[2. 0.]
         [0. 2.]]
    """
    return merge_matrices(
        _flatten_subspaces,
        base,
        models,
        method="iso_cts",
        scale=scale,
        others=others,
        matrices=matrices,
        stack_axes=stack_axes,
        fused=fused,
        common=number("iso_cts", "common", common, "[0, 1]", static=True),
    )[0]


def _flatten_subspaces(
    deltas: Sequence[Array], *, noise: Array, common: float
) -> tuple[Array, tuple[()]]:
    tasks, full = len(deltas), min(deltas[0].shape)
    # As in the authors' code, Python rounds half to even here.
    own = min(round((full - int(full * common)) / tasks), full // tasks)
    if own == 0:
        return _flatten_spectrum(deltas, noise=noise)
    shared = full - tasks * own
    u, s, vt = svd(sum(deltas))  # type: ignore
    # What projections leave of nothing is small beside the sum, not beside itself.
    noise = jnp.maximum(tasks * noise, 1e-6 * jnp.max(s, initial=0))
    u, s, vt = u[:, :shared], s[:shared], vt[:shared]
    outside = [delta - matmul(u, matmul(u.T, delta)) for delta in deltas]
    own_u, own_s, own_vt = _features(outside, own)
    strengths = jnp.concatenate([*own_s, s])
    present = nonzero(strengths, noise=noise).astype(s.dtype)
    left = polar(jnp.concatenate([*own_u, u], axis=1) * present[None])
    right = polar(jnp.concatenate([*own_vt, vt], axis=0) * present[:, None])
    mean = safe_divide(jnp.sum(strengths * present), jnp.sum(present))
    return mean * matmul(left, right), ()


def _features(deltas: Sequence[Array], rank: int | None) -> tuple[Array, Array, Array]:
    """The leading triplets of T task matrices: (T, m, r), (T, r) and (T, r, n)."""
    return leading_svd(jnp.stack(deltas), rank)
