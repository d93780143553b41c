"""The k-th magnitude of a whole model, in memory or read from files in passes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.lazy import LazyLeaf, any_lazy, load, slices
from jaxmerge.numerics import Count, kth_magnitude, magnitude_bits
from jaxmerge.sharding import of

_DIGIT = 16  # Bits that are settled by one pass over the model.


def kth_magnitude_of(tree: Any, k: Count) -> Array:
    """The k-th largest magnitude among all entries of all leaves of `tree`, exactly.

    Lazy leaves are read in passes, each of which counts entries by 16 more bits of
    their magnitudes: two passes for float32, whatever the size of the model.

    Args:
        tree: a pytree of floating-point arrays or lazy leaves; several dtypes are
            compared in the widest. Those on a mesh are in memory together.
        k: from 1 (the largest) to the number of entries.

    Returns:
        A scalar, as `kth_magnitude` gives it.
    """
    if not any_lazy(tree) or any(of(leaf) for leaf in jax.tree.leaves(tree)):
        return _kth_magnitude(load(tree), k)
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
    width = 8 * dtype.itemsize
    rank, found = int(k), 0
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, np.int64)
        for leaf in leaves:
            counts += _digits(leaf, dtype, shift, found)
        from_top = np.cumsum(counts[::-1])
        digit = counts.size - 1 - int(np.searchsorted(from_top, rank))
        rank -= int(from_top[-digit - 2]) if digit < counts.size - 1 else 0
        found = (found << _DIGIT) | digit
    bits = np.asarray(found, f"uint{width}")
    return jnp.asarray(bits.view(dtype))


_kth_magnitude = jax.jit(kth_magnitude)


def _digits(leaf: LazyLeaf, dtype: Any, shift: int, above: int) -> np.ndarray:
    """How many entries whose higher bits are `above` have each digit at `shift`."""
    counts = np.zeros(1 << _DIGIT, np.int64)
    for _, rows in slices(leaf):
        bits = np.asarray(_bits(rows.astype(dtype))).reshape(-1)
        matching = (
            bits
            if shift + _DIGIT >= 8 * bits.itemsize
            else bits[bits >> (shift + _DIGIT) == above]
        )
        digits = (matching >> shift) & ((1 << _DIGIT) - 1)
        counts += np.bincount(digits, minlength=counts.size)
    return counts


_bits = jax.jit(magnitude_bits)
