"""The singular values of task matrices: in how many directions a fine-tuning went."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.matrices import MatrixRules
from jaxmerge.matrixwise import map_task_matrices, plan_matrices
from jaxmerge.options import PerLeaf
from jaxmerge.tree import Params


def singular_values(
    base: Params,
    models: Sequence[Params],
    *,
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
) -> dict[str, np.ndarray]:
    """The singular values of what each model adds to each matrix of the base.

    Args:
        base: the shared starting point, a pytree of arrays of any shape.
        models: one or more pytrees with the structure and shapes of `base`: fine-tuned
            models, and merges of them to compare.
        matrices: axis patterns of leaves by path, or `trace(...).axes`, before the
            presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules.

    Returns:
        By path of the leaves that are matrices, float32 values of shape (*stack,
        models, min(m, n)), descending, as `jax.numpy.linalg.svd` has them.

    Raises:
        ValueError: no models, trees that are not alike, or a leaf of which no rule says
            which axes are inputs and which are outputs.

    Example:
        >>> base = {"kernel": jnp.zeros((2, 2))}
        >>> singular_values(base, [{"kernel": jnp.diag(jnp.array([1.0, 3.0]))}])
        {'kernel': array([[3., 1.]], dtype=float32)}
    """
    plan = plan_matrices(
        base,
        models,
        method="singular_values",
        matrices=matrices,
        stack_axes=stack_axes,
    )
    of_parts = map_task_matrices(_values, plan)
    return {path: np.asarray(values) for path, (values,) in of_parts.items()}


def _values(deltas: Sequence[Array]) -> Array:
    return jnp.stack([jnp.linalg.svd(delta, compute_uv=False) for delta in deltas])
