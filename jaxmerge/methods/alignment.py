"""Merging task matrices in a basis of outputs that all tasks share: KnOTS.

Stoica et al., "Model merging with SVD to tie the Knots", ICLR 2025, arXiv:2410.19735.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.linalg import matmul, nonzero, svd
from jaxmerge.matrices import MatrixRules
from jaxmerge.matrixwise import (
    Fused,
    Others,
    map_task_matrices,
    merge_matrices,
    place_matrices,
    plan_matrices,
)
from jaxmerge.methods.election import Election, merge_elected
from jaxmerge.methods.trimming import trim
from jaxmerge.numerics import Count, count, kth_magnitude
from jaxmerge.options import PerLeaf, choice, number
from jaxmerge.registry import register
from jaxmerge.tree import Params


@register(
    paper="Stoica et al., KnOTS, ICLR 2025",
    link="https://arxiv.org/abs/2410.19735",
    identity={"density": 1.0, "others": "average"},
    gathers=True,
    two_phases=False,
)
def knots(
    base: Params,
    models: Sequence[Params],
    *,
    density: float = 0.2,
    scale: PerLeaf = 1.0,
    scope: Literal["leaf", "model"] = "model",
    others: Others = "base",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
) -> Params:
    r"""Merges task matrices with TIES in a basis of outputs that they share.

    With $[\Delta_1, \dots, \Delta_T] = U S [V_1, \dots, V_T]^\top$, all task matrices
    of a leaf side by side, TIES merges the aligned $R_t = S V_t^\top$, and
    $M = U\,\mathrm{TIES}(R_1, \dots, R_T)$ (section 4). Rows of singular values of at
    most 1e-5 times the largest are left out. Only what is not linear in the tasks,
    trimming and electing signs, differs in another basis: with a plain sum or mean of
    the $R_t$ this would be task arithmetic.

    The elected mean is over the tasks whose entry is not zero. Where the sum of an
    entry is zero it is dropped, and not given the sign of the majority as in the
    authors' code: the signs of singular vectors are arbitrary.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        density: the share of the entries of each task's $R_t$ that TIES keeps, in
            (0, 1], of the rows that are not left out. May be traced. Of n entries,
            floor(density * n) + 1 are kept, as in the authors' code, and those that
            tie with the smallest of them. The authors' best for ViT-B/32 and ViT-L/14
            is 0.2, for Llama 3 8B it is 1.
        scale: multiplies the merged matrices and the changes of other leaves. May
            be traced. The authors choose it on validation data: 0.6 for ViT-B/32, 0.5
            for ViT-L/14 and Llama 3 8B.
        scope: `"model"` ranks the entries of all matrices together (the authors),
            `"leaf"` those of each matrix.
        others: what becomes of leaves that are no matrices: `"average"` or
            `"task_arithmetic"` of their task vectors, or `"base"` (the authors).
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
        >>> spectra = [2.0, 1], [4.0, -0.5]
        >>> models = [{"kernel": jnp.diag(jnp.array(s))} for s in spectra]
        >>> print(knots(base, models, density=1.0)["kernel"])
        [[3. 0.]
         [0. 1.]]
    """
    choice("knots", "scope", scope, ("leaf", "model"))
    density = number("knots", "density", density, "(0, 1]")
    layout: dict[str, Any] = {
        "method": "knots",
        "scale": scale,
        "others": others,
        "matrices": matrices,
        "stack_axes": stack_axes,
        "fused": fused,
    }
    if scope == "leaf":
        return merge_matrices(
            _merge_alone, base, models, numbers={"density": density}, **layout
        )[0]
    plan = plan_matrices(base, models, **layout)
    aligned = map_task_matrices(_align, plan)
    thresholds = _thresholds(aligned, density) if aligned else []
    return place_matrices(
        plan, {path: _merge_parts(a, thresholds) for path, a in aligned.items()}
    )


class _Aligned(NamedTuple):
    """Task matrices in their common basis, with leading axes for stacked layers.

    Attributes:
        basis: U, shape (outputs, r); zero where no task has a direction.
        tasks: the R_t, shapes (r, inputs).
        kept: which of the r directions there are.
    """

    basis: Array
    tasks: list[Array]
    kept: Array


def _align(deltas: Sequence[Array], *, noise: Array) -> _Aligned:
    side_by_side = jnp.concatenate(deltas, axis=1)
    # With C^T = Q R, the triangle has the U and S of C, and V is not needed.
    triangle = jnp.linalg.qr(side_by_side.T, mode="r").T
    u, s, _ = svd(triangle)
    kept = nonzero(s, 1e-5, len(deltas) ** 0.5 * noise)
    u = jnp.where(kept[None], u, 0)
    # S V^T without its rounding: what is equal, opposite or zero stays so exactly.
    return _Aligned(u, [matmul(u.T, delta) for delta in deltas], kept)


def _merge_alone(
    deltas: Sequence[Array], *, noise: Array, density: Array
) -> tuple[Array, tuple[()]]:
    aligned = _align(deltas, noise=noise)
    return _merge(aligned, _thresholds(aligned, density)), ()


@jax.jit
def _merge_parts(parts: Sequence[_Aligned], thresholds: Sequence[Array]) -> Array:
    return jnp.concatenate([_merge(part, thresholds) for part in parts], axis=-2)


@jax.jit
def _thresholds(aligned: Any, density: Array) -> list[Array]:
    """For each task the smallest magnitude that is kept, in a whole tree."""
    of_matrices = jax.tree.leaves(aligned, is_leaf=lambda x: isinstance(x, _Aligned))
    total = Count.of(0)
    for matrix in of_matrices:
        rows = matrix.kept[..., None]
        total = total + count(jnp.broadcast_to(rows, matrix.tasks[0].shape))
    keep = total.share(density) + Count.of(1)
    tasks = zip(*(matrix.tasks for matrix in of_matrices), strict=True)
    return [kth_magnitude(task, keep) for task in tasks]


def _merge(aligned: _Aligned, thresholds: Sequence[Array]) -> Array:
    cuts = zip(aligned.tasks, thresholds, strict=True)
    trimmed = [trim(task, None, threshold) for task, threshold in cuts]
    election = Election(vote="mass", tie="drop", aggregate="mean", divisor="count")
    merged = merge_elected(trimmed, [jnp.ones(())] * len(trimmed), election)
    return matmul(aligned.basis, merged)
