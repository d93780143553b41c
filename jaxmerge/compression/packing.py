"""Masks as bits: eight entries in a byte, also in device memory.

The first entry is the highest bit, as `numpy.packbits` has it. Bits lie in one of two
layouts:

- rows, in memory: each row along the last axis begins a byte, so that all other axes
  keep their sharding, and the last one too where every shard is whole bytes;
- flat, on disk: all entries in C order without a gap, as the TALL-masks authors store
  them. Where rows are whole bytes, both are the same bytes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge import sharding
from jaxmerge.leafwise import wide


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the bits, in rows, of a mask of `shape`.

    Example:
        >>> row_shape((4, 10)), row_shape(())
        ((4, 2), (1,))
    """
    *front, last = shape or (1,)
    return (*front, -(-last // 8))


@jax.jit
def pack(mask: Array) -> Array:
    """Packs a boolean array along its last axis, padded with zeros to whole bytes.

    Args:
        mask: bool, of any shape and sharding. A scalar is packed as shape (1,).

    Returns:
        uint8 of the shape `row_shape(mask.shape)`.

    Example:
        >>> pack(jnp.array([[True, False, True], [False, True, True]])).tolist()
        [[160], [96]]
    """
    mask = mask.reshape(mask.shape or (1,))
    return sharding.auto(lambda m: jnp.packbits(m, axis=-1), like=mask)(mask)


def unpack(bits: Array, shape: tuple[int, ...]) -> Array:
    """The boolean array of `shape` that `pack` made `bits` of.

    Example:
        >>> unpack(pack(jnp.array([True, False, True])), (3,)).tolist()
        [True, False, True]
    """
    if not math.prod(shape):
        return jnp.zeros(shape, bool)
    last = (shape or (1,))[-1]
    # Counted out by hand, XLA fuses this into whatever uses the mask.
    shifts = jnp.arange(7, -1, -1, dtype=jnp.uint8).reshape((1,) * bits.ndim + (8,))
    spread = (bits[..., None] >> shifts) & 1
    return spread.reshape(*bits.shape[:-1], -1)[..., :last].reshape(shape).astype(bool)


def add_masked(base: Array, vector: Array, bits: Array, scale: Any = 1.0) -> Array:
    r"""Adds a masked task vector to a leaf: $\theta_0 + \lambda\,m \odot \delta$.

    The mask is unpacked within the computation and takes no memory of its own.

    Args:
        base: $\theta_0$, floating point, of any shape and sharding.
        vector: $\delta$, of the shape of `base`.
        bits: $m$, from `pack`.
        scale: $\lambda$, a number; may be traced.

    Returns:
        An array like `base`, in its dtype and sharding; arithmetic is in float32.

    Example:
        >>> bits = pack(jnp.array([True, False]))
        >>> add_masked(jnp.ones(2), jnp.array([3.0, 4.0]), bits).tolist()
        [4.0, 1.0]
    """
    return _add_masked(base, vector, bits, scale, target=sharding.of(base))


@functools.partial(jax.jit, static_argnames="target")
def _add_masked(base, vector, bits, scale, *, target):
    def apply(base, vector, bits, scale):
        dtype = wide(base.dtype)
        kept = jnp.where(unpack(bits, base.shape), vector.astype(dtype), 0)
        moved = base.astype(dtype) + jnp.asarray(scale, dtype) * kept
        return moved.astype(base.dtype)

    moved = sharding.auto(apply, like=base)(base, vector, bits, scale)
    return sharding.keep(moved, target)


def bits_sharding(
    of_leaf: NamedSharding, leaf: tuple[int, ...], mask: tuple[int, ...]
) -> NamedSharding:
    """How the bits, in rows, of a mask are sharded like the leaf that they speak of.

    Args:
        of_leaf: the sharding of the leaf.
        leaf: its shape.
        mask: the shape of the mask: that of the leaf, maybe after further axes, which
            are not sharded.
    """
    if not leaf:
        return NamedSharding(of_leaf.mesh, PartitionSpec())
    spec = [*of_leaf.spec, *[None] * (len(leaf) - len(of_leaf.spec))]
    per_shard = of_leaf.shard_shape(leaf)[-1]
    if per_shard != leaf[-1] and per_shard % 8:
        spec[-1] = None
    front = [None] * (len(mask) - len(leaf))
    return NamedSharding(of_leaf.mesh, PartitionSpec(*front, *spec))


def flat_bits(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """From rows to flat: uint8 of shape (ceil(entries / 8),).

    Example:
        >>> rows = np.packbits(np.ones((2, 3), bool), axis=-1)
        >>> flat_bits(rows, (2, 3)).tolist()
        [252]
    """
    last = (shape or (1,))[-1]
    if last % 8 == 0:
        return rows.reshape(-1)
    return np.packbits(np.unpackbits(rows, axis=-1, count=last))


def row_bits(flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """From flat to rows; undoes `flat_bits`."""
    last = (shape or (1,))[-1]
    if last % 8 == 0:
        return flat.reshape(row_shape(shape))
    mask = np.unpackbits(flat, count=math.prod(shape))
    return np.packbits(mask.reshape(shape or (1,)), axis=-1)
