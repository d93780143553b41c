"""Merging by adding task vectors: task arithmetic, and the largest entry of each.

Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089.
Marczak et al., "MagMax", ECCV 2024, arXiv:2407.06322.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jaxmerge.leafwise import merge_leaves
from jaxmerge.methods.election import larger, weighted_sum
from jaxmerge.numerics import safe_divide
from jaxmerge.options import Leaf, PerLeaf, PerModel, choice, per_leaf, per_model
from jaxmerge.registry import register
from jaxmerge.tree import Params


@register(
    paper="Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023",
    link="https://arxiv.org/abs/2212.04089",
)
def task_arithmetic(
    base: Params,
    models: Sequence[Params],
    *,
    weights: PerModel = 1.0,
    scale: PerLeaf = 1.0,
    normalize: bool = False,
) -> Params:
    r"""Adds up the task vectors of `models` and applies the sum to `base`.

    $\theta = \theta_0 + \lambda \sum_t w_t (\theta_t - \theta_0)$ (section 2).

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        weights: $w_t$, dimensionless; negative ones forget. May be traced.
        scale: $\lambda$, dimensionless, one for all models. May be traced. With many
            models a value well below 1, chosen on validation data, works best.
        normalize: divides the sum by $\sum_t w_t$ (by 1 where that is zero).

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(2)}
        >>> models = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.0, 4.0])}]
        >>> task_arithmetic(base, models, scale=0.5)["w"].tolist()
        [0.5, 3.0]
    """

    choice("task_arithmetic", "normalize", normalize, (False, True))

    def options(leaf: Leaf) -> dict:
        return {
            "weights": per_model(leaf, "weights", weights),
            "scale": per_leaf(leaf, "scale", scale),
        }

    return merge_leaves(
        _add,
        models,
        options,
        method="task_arithmetic",
        base=base,
        normalize=normalize,
    )


def _add(
    deltas: Sequence[Array], *, weights: Sequence, scale: Array, normalize: bool
) -> Array:
    total = weighted_sum(deltas, weights)
    if normalize:
        total = safe_divide(total, jnp.asarray(sum(weights)), total)
    return scale * total


@register(
    paper="Marczak et al., MagMax, ECCV 2024",
    link="https://arxiv.org/abs/2407.06322",
    symmetric=False,
)
def magmax(base: Params, models: Sequence[Params], *, scale: PerLeaf = 1.0) -> Params:
    r"""Takes each entry from the task vector in which it is largest.

    $\theta = \theta_0 + \lambda\, \tau_{t^*}$ with $t^* = \arg\max_t |\tau_t|$ entry by
    entry (equation 2); among equal magnitudes the later model wins, as in the authors'
    code, so the order of models has an effect on ties and nowhere else.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: pytrees with the structure and shapes of `base`.
        scale: $\lambda$, dimensionless; the authors use 0.5 for independent
            fine-tunings. May be traced.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(2)}
        >>> models = [{"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([-3.0, 2.0])}]
        >>> magmax(base, models)["w"].tolist()
        [-3.0, 2.0]
    """

    def options(leaf: Leaf) -> dict:
        return {"scale": per_leaf(leaf, "scale", scale)}

    return merge_leaves(_largest, models, options, method="magmax", base=base)


def _largest(deltas: Sequence[Array], *, scale: Array) -> Array:
    return scale * functools.reduce(larger, deltas)
