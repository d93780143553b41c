"""Task vectors of low rank: what a LoRA adapter adds to the leaves of a base.

An adapter is a dict from leaf paths of the base to what is added there: a `LowRank`, or
an array that is a task vector in the leaf's own layout. Other leaves stay as they are.

Factors mean nothing apart: the mean of products is not the product of the means. So an
adapter is merged as the model that it makes of its base.
"""

import difflib
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge import sharding
from jaxmerge.leafwise import wide
from jaxmerge.matrices import (
    MatrixAxes,
    MatrixRules,
    from_matrix,
    leaf_axes,
    matrix_shape,
)
from jaxmerge.options import Leaf, PerLeaf, per_leaf
from jaxmerge.tree import Params, is_float, named_leaves, rebuild


class LowRank(NamedTuple):
    """A task matrix `left @ right` of shape (*stack, outputs, inputs).

    Of a LoRA update these are `scaling * B` and `A`.

    Attributes:
        left: shape (*stack, outputs, rank).
        right: shape (*stack, rank, inputs).
    """

    left: Array
    right: Array


# In pytrees, factors have the names that they have in files. By these, merge methods
# recognise them and refuse to merge them one by one.
jax.tree_util.register_pytree_with_keys(
    LowRank,
    lambda factors: (
        [
            (jax.tree_util.DictKey("lora_B"), factors.left),
            (jax.tree_util.DictKey("lora_A"), factors.right),
        ],
        None,
    ),
    lambda _, factors: LowRank(*factors),
)


def apply_adapter(
    base: Params,
    adapter: Mapping[str, LowRank | Array | np.ndarray],
    *,
    scale: PerLeaf = 1.0,
    matrices: MatrixRules | None = None,
    stack_axes: int | Mapping[str, int] = 0,
) -> Params:
    r"""The model that an adapter makes of its base: $\theta_0 + \lambda\,\Delta$.

    Args:
        base: a pytree of arrays of any shape.
        adapter: from leaf paths of `base` to a `LowRank` or a task vector in the
            layout of the leaf. Ranks may differ from leaf to leaf.
        scale: $\lambda$, dimensionless; may be traced.
        matrices: axis patterns of leaves by path, or axes, before the presets, see
            `matrix_axes`: which axes are inputs and outputs of the `LowRank`. Tables
            that are looked up, such as embeddings, have their rows as inputs.
        stack_axes: how many leading axes of a leaf stack independent layers.

    Returns:
        A pytree like `base`. Leaves that the adapter changes are in float32, or wider
        if they were: rounding to bfloat16 would lose most of a small update. They keep
        their shardings. All other leaves are passed on as they are.

    Raises:
        ValueError: a path that `base` has not got, a leaf that is no matrix, shapes
            that do not fit, or an invalid scale; before any arithmetic.

    Example:
        >>> base = {"dense": {"kernel": jnp.zeros((3, 2)), "bias": jnp.ones(2)}}
        >>> update = LowRank(left=jnp.ones((2, 1)), right=jnp.array([[1.0, 2.0, 3.0]]))
        >>> model = apply_adapter(base, {"dense/kernel": update}, scale=0.5)
        >>> model["dense"]["kernel"].tolist()
        [[0.5, 0.5], [1.0, 1.0], [1.5, 1.5]]
    """
    axes = check_adapter("apply_adapter", base, adapter, matrices, stack_axes)
    leaves = named_leaves(base)
    scales = {}
    for path in adapter:
        leaf = Leaf("apply_adapter", path, np.shape(leaves[path]), 1)
        scales[path] = per_leaf(leaf, "scale", scale)
    changed = {
        path: _add(
            leaves[path],
            join_update(update, leaves[path]),
            scales[path],
            axes=axes[path],
            target=sharding.of(leaves[path]),
        )
        for path, update in adapter.items()
    }
    return rebuild(base, leaves | changed)


def check_adapter(
    caller: str,
    base: Params,
    adapter: Mapping[str, LowRank | Array | np.ndarray],
    matrices: MatrixRules | None,
    stack_axes: int | Mapping[str, int],
) -> dict[str, MatrixAxes | None]:
    """The axes of each leaf that a `LowRank` speaks of; None for a dense update.

    Raises:
        ValueError: the adapter does not fit the base; the message starts with `caller`.
    """
    if not isinstance(adapter, Mapping):
        raise ValueError(
            f"{caller}: adapter is a {type(adapter).__name__}; it must map leaf "
            "paths to updates, as jaxmerge.load_adapter(path) does."
        )
    leaves = named_leaves(base)
    return {
        path: _checked_axes(
            caller, path, _leaf_at(caller, path, leaves), update, matrices, stack_axes
        )
        for path, update in adapter.items()
    }


def _leaf_at(caller: str, path: str, leaves: Mapping[str, Any]) -> Any:
    if path not in leaves:
        close = difflib.get_close_matches(path, leaves, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Rename it, or leave it out."
        raise ValueError(f"{caller}: base has no leaf {path!r}. {hint}")
    leaf = leaves[path]
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not is_float(leaf) or dtype.itemsize < 2:
        raise ValueError(
            f"{caller}: base leaf {path!r} is {dtype or type(leaf).__name__}, to "
            "which no update can be added; take an array in bfloat16, float16 or "
            "float32."
        )
    return leaf


def _checked_axes(
    caller: str,
    path: str,
    leaf: Any,
    update: Any,
    matrices: MatrixRules | None,
    stack_axes: int | Mapping[str, int],
) -> MatrixAxes | None:
    where, shape = f"{caller}: leaf {path!r}", np.shape(leaf)
    if not isinstance(update, LowRank):
        if np.shape(update) != shape:
            raise ValueError(
                f"{where} has shape {shape} in base, but the adapter has "
                f"{np.shape(update)}; a dense update has the shape of its leaf."
            )
        return None
    try:
        axes = leaf_axes(path, shape, matrices, stack_axes)
    except ValueError as error:
        raise ValueError(
            f"{caller}: {error} Such rules are the option `matrices`."
        ) from None
    if not axes.inputs:
        used = (*axes.stack, *axes.outputs)
        axes = axes._replace(
            inputs=tuple(i for i in range(len(shape)) if i not in used)
        )
    if not axes.is_matrix:
        raise ValueError(
            f"{where} of shape {shape} is no matrix, so no product of two factors can "
            "be added to it; give its update as an array of that shape."
        )
    *stack, inputs, outputs = matrix_shape(shape, axes)
    left, right = np.shape(update.left), np.shape(update.right)
    rank = right[-2] if len(right) > 1 else 0
    if left != (*stack, outputs, rank) or right != (*stack, rank, inputs):
        raise ValueError(
            f"{where} of shape {shape} is a map from {inputs} inputs to {outputs} "
            f"outputs, with {stack} stacked, but the adapter has factors {left} and "
            f"{right}; they must be (*stack, outputs, rank) and (*stack, rank, inputs)."
            " If the leaf has its axes in another order, say so in `matrices`; if it "
            "stacks layers, in `stack_axes`."
        )
    return axes


def join_update(update: Any, leaf: Any) -> Any:
    """Brings an update to the devices of its leaf, where thin factors are copied."""
    return jax.tree.map(functools.partial(_join, leaf=leaf), update)


def _join(factor: Any, leaf: Any) -> Any:
    target = sharding.of(leaf)
    if target is None or np.shape(factor) == np.shape(leaf):
        return sharding.join(factor, leaf)
    if isinstance(factor, Tracer):
        return factor
    return jax.device_put(factor, NamedSharding(target.mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnames=("axes", "target"))
def _add(leaf, update, scale, *, axes, target):
    dtype = wide(leaf.dtype)

    def add(leaf, update, scale):
        if axes is None:
            delta = update.astype(dtype)
        else:
            left, right = (factor.astype(dtype) for factor in update)
            product = jnp.matmul(left, right, precision="highest")
            delta = from_matrix(product.mT, leaf.shape, axes)
        return leaf.astype(dtype) + jnp.asarray(scale, dtype) * delta

    moved = sharding.auto(add, like=leaf)(leaf, update, scale)
    return sharding.keep(moved, target)
