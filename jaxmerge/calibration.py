"""Steps after any merge of matrices: a better spectrum for what it changed.

Li et al., "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging",
ICML 2026, arXiv:2602.05536.
Skorobogat et al., "Subspace-Boosted Model Merging", arXiv:2506.16506.

Both keep the singular vectors of what a merge has added to each matrix and change its
singular values. Embeddings are looked up, not multiplied: they count as matrices only
where a rule in `matrices` says so, such as `{".*embedding": "io"}`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jaxmerge.leafwise import check_models
from jaxmerge.linalg import leading_svd, matmul
from jaxmerge.matrices import MatrixRules
from jaxmerge.matrixwise import Fused, merge_matrices
from jaxmerge.numerics import norm, safe_divide
from jaxmerge.options import PerLeaf, number
from jaxmerge.tree import Params, check_alike


def calibrate(
    base: Params,
    models: Sequence[Params],
    merged: Params,
    *,
    floor: float | None = None,
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
) -> Params:
    r"""Scales down directions that several tasks share and a merge has added up (SVC).

    With $M = \sum_r \sigma_r u_r v_r^\top$ what the merge has added to a matrix
    (outputs, inputs), and $\Delta_t$ the task matrices, the merged rows
    $u_r^\top M$ contain those of a task
    $s_{rt} = \langle u_r^\top M, u_r^\top \Delta_t \rangle / \lVert u_r^\top \Delta_t
    \rVert^2$ times. Singular value calibration makes that once, on average over the T
    tasks: $\sigma_r$ becomes $\gamma_r \sigma_r$, with $\gamma_r = T / \sum_t
    \max(\alpha, s_{rt})$ and $\alpha$ the `floor`. A task that is absent from $u_r$, to
    five digits of its norm, counts with the floor. (An earlier revision of the authors'
    code puts the floor under the mean of $s_{rt}$ and keeps $\sigma_r$ where one of
    them is not positive.)

    Where all $s_{rt}$ are above the floor, the result is the same whatever the scale of
    the merge. A floor below 1 also hides a global scale: the sum of tasks that are
    orthogonal, which needs no calibration, is multiplied by $T / (1 + (T - 1)\alpha)$.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: the models that were merged, pytrees with the structure and shapes of
            `base`.
        merged: the result of a merge, a pytree like `base`.
        floor: $\alpha$, in (0, 1]; None for 1/T. 1 never scales up; the authors use it
            after TSV-M and WUDI. May be traced.
        matrices: axis patterns of leaves by path, or `trace(...).axes`, before the
            presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules.
        fused: leaves that hold several matrices side by side, such as queries, keys
            and values: `{".*in_proj_weight": 3}` for three of equal size, or a list
            of the numbers of their outputs. Each is calibrated on its own.

    Returns:
        A pytree like `merged`, in its dtypes and shardings; arithmetic is in float32.
        Leaves that are no matrices are those of `merged`.

    Raises:
        ValueError: no models, trees that are not alike, a floor outside (0, 1], or a
            leaf of which no rule says which axes are inputs and which are outputs.

    Example:
        >>> from jaxmerge import task_arithmetic
        >>> base = {"kernel": jnp.zeros((2, 2))}
        >>> models = [{"kernel": jnp.diag(jnp.array([2.0, 1.0]))}] * 2
        >>> merged = task_arithmetic(base, models)
        >>> print(merged["kernel"])
        [[4. 0.]
         [0. 2.]]
        >>> print(calibrate(base, models, merged)["kernel"])
        [[2. 0.]
         [0. 1.]]
    """
    check_models("calibrate", base, models)
    _check_merged("calibrate", base, merged)
    floor = 1 / len(models) if floor is None else floor
    return merge_matrices(
        _count_once,
        merged,
        [base, *models],
        method="calibrate",
        matrices=matrices,
        stack_axes=stack_axes,
        fused=fused,
        numbers={"floor": number("calibrate", "floor", floor, "(0, 1]")},
    )[0]


def _count_once(deltas: Sequence[Array], *, floor: Array) -> tuple[Array, tuple[()]]:
    # Seen from the merged model, so that what is left unchanged does not even round.
    start, *ends = deltas
    u, s, vt = leading_svd(-start)
    counts = sum(_times(u, s[:, None] * vt, end - start, floor) for end in ends)
    return matmul(u * (s * (len(ends) / counts - 1))[None], vt), ()


def _times(u: Array, rows: Array, task: Array, floor: Array) -> Array:
    """How many times a task is in each of the merged rows, at least `floor`."""
    own = matmul(u.T, task)
    square = jnp.sum(own * own, axis=1)
    present = jnp.sqrt(square) > 1e-5 * norm(task)
    times = safe_divide(jnp.sum(rows * own, axis=1), square)
    return jnp.maximum(floor, jnp.where(present, times, 0))


def subspace_boost(
    base: Params,
    merged: Params,
    *,
    share: float = 0.01,
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
    fused: Fused | None = None,
) -> Params:
    r"""Raises the small singular values of what a merge has added (Subspace Boosting).

    The leading singular values of each merged task matrix up to the first at which they
    add up to `share` of the sum of all are kept; all smaller ones become equal to the
    last of these. As they all grow, the norm of the change does too.

    Directions in which nothing was added are raised as well, and are arbitrary: a sum
    of few low-rank updates, which leaves many of them, is better not boosted.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        merged: the result of a merge, a pytree like `base`.
        share: the share of the nuclear norm that keeps its singular values, in [0, 1]:
            0 makes all equal to the largest, 1 leaves them as they are. May be traced.
        matrices: axis patterns of leaves by path, or `trace(...).axes`, before the
            presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules.
        fused: leaves that hold several matrices side by side, such as queries, keys
            and values: `{".*in_proj_weight": 3}` for three of equal size, or a list
            of the numbers of their outputs. Each is boosted on its own.

    Returns:
        A pytree like `merged`, in its dtypes and shardings; arithmetic is in float32.
        Leaves that are no matrices are those of `merged`, and so are matrices to which
        nothing was added.

    Raises:
        ValueError: trees that are not alike, a share outside [0, 1], or a leaf of which
            no rule says which axes are inputs and which are outputs.

    Example:
        >>> base = {"kernel": jnp.zeros((3, 3))}
        >>> merged = {"kernel": jnp.diag(jnp.array([5.0, 3.0, 1.0]))}
        >>> print(subspace_boost(base, merged, share=0.6)["kernel"])
        [[5. 0. 0.]
         [0. 3. 0.]
         [0. 0. 3.]]
    """
    _check_merged("subspace_boost", base, merged)
    return merge_matrices(
        _raise_spectrum,
        merged,
        [base],
        method="subspace_boost",
        matrices=matrices,
        stack_axes=stack_axes,
        fused=fused,
        numbers={"share": number("subspace_boost", "share", share, "[0, 1]")},
    )[0]


def _raise_spectrum(
    deltas: Sequence[Array], *, share: Array
) -> tuple[Array, tuple[()]]:
    u, s, vt = leading_svd(-deltas[0])
    sums = jnp.cumsum(s)
    least = s[jnp.sum(sums < share * sums[-1])]
    return matmul(u * (jnp.maximum(s, least) - s)[None], vt), ()


def _check_merged(method: str, base: Params, merged: Params) -> None:
    try:
        check_alike(base, [merged], names=["base", "merged"])
    except ValueError as error:
        raise ValueError(f"{method}: {error}") from None
