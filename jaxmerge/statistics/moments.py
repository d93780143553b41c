"""Sums over tokens, in float32 and full precision, on whatever mesh the data is on."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge import sharding
from jaxmerge.statistics.plan import Contract, Convolve, Scale
from jaxmerge.statistics.views import Layout, arrange


def of_input(
    action: Contract | Convolve, eqn: Any, x: Array, mask: Array | None
) -> tuple[Array, Array]:
    """The second moments of the inputs of a weight.

    Args:
        action: what the weight is contracted with.
        eqn: the equation that does it.
        x: the data.
        mask: which tokens count, (examples, tokens), which must fit them.

    Returns:
        The sum over tokens of x x^T, (*stack, features, features), and how many tokens
        there were, (*stack,).
    """

    def measure(x: Array, mask: Array | None) -> tuple[Array, Array]:
        if isinstance(action, Convolve):
            windows, stack, features = _windows(x, eqn)
            return _moment(windows, stack, features, action.inputs, mask)
        # Experts get their tokens in slots. Those that the router left empty are zero.
        return _moment(
            x, action.stack, action.contracted, action.inputs, mask, slots=True
        )

    return _everywhere(measure, x, mask)


def of_result(
    action: Contract | Convolve, eqn: Any, g: Array, mask: Array | None
) -> Array:
    """The second moments of what came out of a weight, or of the gradient by it."""

    def measure(g: Array, mask: Array | None) -> Array:
        if isinstance(action, Convolve):
            grouped, stack, features = _by_group(g, eqn)
            return _moment(grouped, stack, features, action.outputs, mask)[0]
        stack, features = action.result_stack, action.features
        return _moment(g, stack, features, action.outputs, mask)[0]

    return _everywhere(measure, g, mask)


def of_factor(action: Scale, x: Array, mask: Array | None) -> Array:
    """The sum of squares of `x`, repeated to a shape, over all axes but those kept."""
    shape, kept = action.shape, action.kept
    summed = [axis for axis in range(len(shape)) if axis not in kept]

    def measure(x: Array, mask: Array | None) -> Array:
        x = jnp.square(x.astype(jnp.float32)).reshape(x.shape or (1,) * len(shape))
        weights = token_weights(mask, action.tokens)
        x = x * jnp.expand_dims(weights, range(weights.ndim, len(shape)))
        repeats = math.prod(shape[axis] // x.shape[axis] for axis in summed)
        total = jnp.sum(x, axis=summed) * repeats
        return jnp.broadcast_to(total, [shape[axis] for axis in kept])

    return _everywhere(measure, x, mask)


def of_rows(
    eqn: Any, table: Array, rows: Array, kept: Sequence[int], mask: Array | None
) -> Array:
    """How often a gather takes each entry, summed over the axes that are not kept."""
    summed = [axis for axis in range(table.ndim) if axis not in kept]

    def measure(rows: Array, mask: Array | None) -> Array:
        entries, count = jax.vjp(
            lambda table: jax.lax.gather(
                table,
                rows,
                eqn.params["dimension_numbers"],
                eqn.params["slice_sizes"],
                mode=eqn.params["mode"],
            ),
            jnp.zeros(table.shape, jnp.float32),
        )
        features = eqn.params["dimension_numbers"].offset_dims
        tokens = [n for axis, n in enumerate(entries.shape) if axis not in features]
        weights = jnp.expand_dims(token_weights(mask, tokens), features)
        weights = jnp.broadcast_to(weights, entries.shape)
        return jnp.sum(count(weights)[0], axis=summed)

    return _everywhere(measure, rows, mask)


def token_weights(mask: Array | None, tokens: Sequence[int]) -> Array:
    """One for tokens that count, else zero, of a shape that broadcasts to `tokens`.

    Args:
        mask: which count, (examples, tokens), of a shape that `plan.fits` the tokens.
        tokens: the sizes of their axes.
    """
    if mask is None:
        return jnp.ones((1,) * len(tokens), jnp.float32)
    if tuple(tokens[:2]) != mask.shape:
        flat = tokens[0] == mask.size
        mask = mask.reshape(-1) if flat else jnp.any(mask != 0, axis=1)
    return mask.astype(jnp.float32).reshape(
        *mask.shape, *(1 for _ in tokens[mask.ndim :])
    )


def _everywhere(measure: Callable[..., Any], *args: Any) -> Any:
    """Lets the compiler share the work out; all devices get the whole result."""
    return sharding.auto(measure, like=jnp.zeros(()))(*args)


def _moment(
    x: Array,
    stack: Sequence[int],
    features: Sequence[int],
    layout: Layout,
    mask: Array | None,
    slots: bool = False,
) -> tuple[Array, Array]:
    rest = [axis for axis in range(x.ndim) if axis not in (*stack, *features)]
    leading, tokens = ([x.shape[axis] for axis in axes] for axes in (stack, rest))
    weights = jnp.broadcast_to(token_weights(mask, tokens), tokens).reshape(-1)
    x = jnp.transpose(x, (*stack, *rest, *features))
    x = arrange(_exact(x).reshape(*leading, weights.size, -1), -1, layout)
    x *= weights.astype(x.dtype).reshape(*(1 for _ in leading), -1, 1)
    counted = jnp.broadcast_to(weights, x.shape[:-1])
    if stack and slots:
        counted = counted * jnp.any(x != 0, axis=-1)
    gram = jnp.einsum(
        "...ti,...tj->...ij",
        x,
        x,
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return gram, jnp.sum(counted, axis=-1)


def _exact(x: Array) -> Array:
    """A dtype of which products are exact in float32, or float32 itself."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 2
    return x if narrow else x.astype(jnp.float32)


def _windows(x: Array, eqn: Any) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
    """What each output of a convolution sees; as `_by_group`."""
    numbers = eqn.params["dimension_numbers"]
    cut = jax.lax.conv_general_dilated_patches(
        x.astype(jnp.float32),
        [eqn.invars[1].aval.shape[axis] for axis in numbers.rhs_spec[2:]],
        eqn.params["window_strides"],
        eqn.params["padding"],
        eqn.params["lhs_dilation"],
        eqn.params["rhs_dilation"],
        dimension_numbers=numbers,
        precision=jax.lax.Precision.HIGHEST,
    )
    return _by_group(cut, eqn)


def _by_group(y: Array, eqn: Any) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
    """Splits the channels of a result into groups, and says which axes are which."""
    groups = eqn.params["feature_group_count"]
    channels = eqn.params["dimension_numbers"].out_spec[1]
    y = jnp.moveaxis(y, channels, -1)
    if groups == 1:
        return y, (), (y.ndim - 1,)
    y = y.reshape(*y.shape[:-1], groups, -1)
    return y, (y.ndim - 2,), (y.ndim - 1,)
