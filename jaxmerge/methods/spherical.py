"""Interpolation along great circles.

Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jaxmerge.leafwise import merge_leaves
from jaxmerge.numerics import norm, safe_divide
from jaxmerge.options import Leaf, PerLeaf, per_leaf
from jaxmerge.registry import register
from jaxmerge.tree import Params


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
    if len(models) > 2:
        raise ValueError(
            f"slerp: interpolates between two models, got {len(models)}; "
            "merge more than two with another method, or in pairs."
        )

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
    u_norm, v_norm = norm(u), norm(v)
    u_unit, v_unit = safe_divide(u, u_norm), safe_divide(v, v_norm)
    cosine = jnp.sum(u_unit * v_unit)
    # arccos of a cosine near 1 has lost half its digits; the two chords have not.
    angle = 2 * jnp.arctan2(norm(u_unit - v_unit), norm(u_unit + v_unit))
    flat = (jnp.abs(cosine) > threshold) | (u_norm == 0) | (v_norm == 0)
    angle = jnp.where(flat, jnp.pi / 2, angle)
    u_share = jnp.where(flat, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    v_share = jnp.where(flat, t, jnp.sin(t * angle) / jnp.sin(angle))
    return u_share * u + v_share * v
