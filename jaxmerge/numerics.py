"""Exact order statistics without a sort, counts of any size, division with a zero case.

A sort of a sharded array gathers it, and a sort of a model concatenates it. Counting
does neither: each pass reduces every leaf, in its place, to a few numbers.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.random import threefry2x32_p

from jaxmerge import sharding

LOW_BITS = 8


class Count(NamedTuple):
    """The integer `high * 2**8 + low`, exact below 2**40 without 64-bit integers."""

    high: Any
    low: Any

    @classmethod
    def of(cls, number: int) -> "Count":
        """Splits a Python integer."""
        return cls(np.uint32(number >> LOW_BITS), np.uint32(number % (1 << LOW_BITS)))

    def __add__(self, other: "Count") -> "Count":  # type: ignore[override]
        return _carry(self.high + other.high, self.low + other.low)

    def as_float(self) -> Array:
        """The number in float32."""
        return self.high * float(1 << LOW_BITS) + self.low

    def share(self, density: Array | float, least: int = 0) -> "Count":
        """`density` times the number, rounded down; a share in [0, 1], in float32."""
        number = jnp.maximum(least, jnp.floor(density * self.as_float()))
        high = jnp.floor(number / (1 << LOW_BITS))
        low = number - high * (1 << LOW_BITS)
        return Count(high.astype(jnp.uint32), low.astype(jnp.uint32))

    def __ge__(self, other: "Count") -> Array:  # type: ignore[override]
        same = (self.high == other.high) & (self.low >= other.low)
        return (self.high > other.high) | same


def _carry(high: Array, low: Array) -> Count:
    return Count(high + (low >> LOW_BITS), low & ((1 << LOW_BITS) - 1))


Sums = Callable[[Sequence[Array], tuple[int, ...]], Sequence[Array]]
"""A function that sums each of several arrays over the same axes."""


def sums_apart(parts: Sequence[Array], axes: tuple[int, ...]) -> Sequence[Array]:
    """Sums several arrays one by one, which XLA fuses on TPUs and GPUs.

    On a mesh, it all-reduces what each device has summed.
    """
    return [jnp.sum(part, axis=axes, dtype=part.dtype) for part in parts]


def sums_together(parts: Sequence[Array], axes: tuple[int, ...]) -> Sequence[Array]:
    """Sums several arrays in one reduction, which is made for CPUs.

    There, XLA writes what a lone sum of integers adds up to memory, which takes five
    times as long. On a mesh, what each device has summed is gathered, not all-reduced.
    """
    zeros = tuple(np.zeros((), part.dtype) for part in parts)
    return jax.lax.reduce(tuple(parts), zeros, _add, axes)


def _add(x: Sequence[Array], y: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(a + b for a, b in zip(x, y, strict=True))


def count(mask: Array) -> Count:
    """How many entries of a boolean array are true; exact below 2**40.

    Raises:
        ValueError: an axis longer than 2**24 in an array of 2**32 entries or more.
    """
    return _counts([mask], sums_apart)[0]


def _counts(masks: Sequence[Array], sums: Sums) -> list[Count]:
    """How many entries are true in each of several masks of one shape."""
    if masks[0].size >= 2**32:
        return _counts_by_axes(masks, sums)
    numbers = [mask.astype(jnp.uint32) for mask in masks]
    totals = sums(numbers, tuple(range(masks[0].ndim)))
    return [_carry(jnp.zeros_like(total), total) for total in totals]


def _counts_by_axes(masks: Sequence[Array], sums: Sums) -> list[Count]:
    # A sum of 2**24 numbers below 2**8 fits into 32 bits, so no axis overflows.
    shape = masks[0].shape
    if max(shape) > 1 << (32 - LOW_BITS):
        raise ValueError(
            f"cannot count in shape {shape}: an axis is longer than 2**24; "
            "reshape the leaf to shorter axes."
        )
    lows = [mask.astype(jnp.uint32) for mask in masks]
    totals = [Count(jnp.zeros_like(low), low) for low in lows]
    for axis in reversed(range(len(shape))):
        highs = sums([total.high for total in totals], (axis,))
        lows = sums([total.low for total in totals], (axis,))
        totals = [_carry(*pair) for pair in zip(highs, lows, strict=True)]
    return totals


def magnitude_bits(x: Array) -> Array:
    """The bits of `|x|` as unsigned integers, which sort as the magnitudes do.

    NaN comes out above infinity.
    """
    unsigned = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(jnp.abs(x), unsigned)


def kth_magnitude(tree: Any, k: int | Count) -> Array:
    """The k-th largest magnitude among all entries of all leaves of `tree`, exactly.

    Settles the bit pattern of the answer from its highest bit down. Each pass over the
    entries counts those at or above every possible next digit: of 2 bits on CPUs, which
    makes 16 passes for float32, and of 3 bits elsewhere, 11 passes. On a mesh, a pass
    communicates 3 or 7 counts. Entries that tie count one by one, as in a sort.

    Args:
        tree: a pytree of floating-point arrays (an array is one); leaves of several
            dtypes are compared in the dtype that holds them all.
        k: from 1 (the largest) to the number of entries; a `Count` may be traced.

    Returns:
        A scalar of the common dtype. NaN counts as larger than infinity.

    Raises:
        ValueError: `k` is an integer out of range.

    Example:
        >>> kth_magnitude(jnp.array([1.0, -4.0, 2.0]), 2).item()
        2.0
    """
    leaves = _in_one_dtype(tree)
    bits = [magnitude_bits(leaf) for leaf in leaves]
    found = _kth_bits("kth_magnitude", bits, k, bits[0].dtype.itemsize * 8 - 1)
    return jax.lax.bitcast_convert_type(found, leaves[0].dtype)


def kth_largest(tree: Any, k: int | Count) -> Array:
    """The k-th largest entry among all leaves of `tree`, signs counted; exactly.

    The bit pattern has one bit more than in `kth_magnitude`; all else is as there.

    Example:
        >>> kth_largest(jnp.array([1.0, -4.0, 2.0]), 2).item()
        1.0
    """
    leaves = _in_one_dtype(tree)
    bits = [_ordered_bits(leaf) for leaf in leaves]
    width = bits[0].dtype.itemsize * 8
    found = _kth_bits("kth_largest", bits, k, width)
    sign = jnp.ones_like(found) << (width - 1)
    found = jnp.where(found >= sign, found ^ sign, ~found)
    return jax.lax.bitcast_convert_type(found, leaves[0].dtype)


def _in_one_dtype(tree: Any) -> list[Array]:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = jnp.result_type(*leaves)
    return [leaf.astype(dtype) for leaf in leaves]


def _ordered_bits(x: Array) -> Array:
    """Unsigned integers that sort as the numbers do, the negative ones below."""
    magnitudes = magnitude_bits(x)
    sign = jnp.ones((), magnitudes.dtype) << (magnitudes.dtype.itemsize * 8 - 1)
    return jnp.where(jnp.signbit(x), ~(magnitudes | sign), magnitudes | sign)


def _kth_bits(caller: str, bits: list[Array], k: int | Count, width: int) -> Array:
    """The k-th largest of all integers below `2**width`."""
    if not isinstance(k, Count):
        size = sum(b.size for b in bits)
        if not 1 <= k <= size:
            raise ValueError(f"{caller}: k is {k}, the tree has {size} entries.")
        k = Count.of(int(k))

    search = functools.partial(settle_digits, width=width)
    mesh = sharding.mesh_of(*bits)
    on_cpu = sums_together if mesh is None or mesh.size == 1 else sums_apart
    # Passes are bound by comparisons on CPUs, by reading from memory elsewhere.
    return jax.lax.platform_dependent(
        bits,
        k,
        cpu=functools.partial(search, digit_bits=2, sums=on_cpu),
        default=functools.partial(search, digit_bits=3, sums=sums_apart),
    )


def settle_digits(
    bits: Sequence[Array], k: Count, *, width: int, digit_bits: int, sums: Sums
) -> Array:
    """The k-th largest of all integers below `2**width`, digit by digit.

    Args:
        bits: arrays of unsigned integers of one dtype.
        k: from 1 to the number of integers.
        width: how many bits to settle.
        digit_bits: how many of them one pass settles, which counts 2**digit_bits - 1
            times.
        sums: how to count.
    """

    def settle_digit(i: Array, found: Array) -> Array:
        # The last digit overlaps the one before, if its bits are too few.
        shift = jnp.maximum(width - digit_bits * (i + 1), 0).astype(found.dtype)
        digits = [jnp.asarray(d, found.dtype) << shift for d in range(1, 2**digit_bits)]
        found &= ~digits[-1]
        seen = [_counts([b >= found | digit for digit in digits], sums) for b in bits]
        totals = [functools.reduce(operator.add, t) for t in zip(*seen, strict=True)]
        reached = sum((total >= k).astype(found.dtype) for total in totals)
        return found | (reached << shift)

    start = jnp.zeros((), bits[0].dtype)
    return jax.lax.fori_loop(0, -(-width // digit_bits), settle_digit, start)


def entries(density: float, size: int, *, rounding: str = "floor") -> int:
    """How many of `size` entries a share of `density` is: at least 1, at most all.

    Args:
        density: in (0, 1].
        rounding: `"floor"` (mergekit), or `"floor_plus_one"`: one more, as the k-th
            smallest value of the TIES authors' code comes out.
    """
    extra = {"floor": 0, "floor_plus_one": 1}[rounding]
    return min(size, max(1, math.floor(density * size) + extra))


def random_words(key: Array, shape: tuple[int, ...]) -> Array:
    """Independent uniform integers in [0, 2**16), a function of key and position.

    A block of Threefry has bits for four of them, which lie side by side; that is
    several times as fast as `jax.random.bits`. Other generators draw as they do.

    Args:
        key: a `jax.random.key`.
        shape: of the result.

    Returns:
        uint16, of the given shape.
    """
    if not shape or jax.random.key_impl(key) != jax.random.key_impl(jax.random.key(0)):
        return jax.random.bits(key, shape, jnp.uint16)
    blocks = (*shape[:-1], -(-shape[-1] // 4))
    row, stride = jnp.zeros(blocks, jnp.uint32), 1
    for axis in reversed(range(len(shape) - 1)):
        along = jax.lax.broadcasted_iota(jnp.uint32, blocks, axis)
        row, stride = row + np.uint32(stride % 2**32) * along, stride * shape[axis]
    block = jax.lax.broadcasted_iota(jnp.uint32, blocks, len(shape) - 1)
    first, second = jax.random.key_data(key)
    bits = threefry2x32_p.bind(first, second, row, block)
    words = [part.astype(jnp.uint16) for b in bits for part in (b, b >> 16)]
    lanes = jnp.stack(words, axis=-1).reshape(*shape[:-1], 4 * blocks[-1])
    return lanes[..., : shape[-1]]


def safe_divide(x: Array, y: Array, otherwise: float | Array = 0.0) -> Array:
    """`x / y`, and `otherwise` where `y` is zero; its gradient is finite there too."""
    zero = y == 0
    return jnp.where(zero, otherwise, x / jnp.where(zero, 1, y))


def norm(x: Array) -> Array:
    """Euclidean norm over all axes; scaled so that no square over- or underflows."""
    largest = jnp.max(jnp.abs(x), initial=0)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    total = jnp.sum(jnp.square(x / scale))
    # The slope of a square root at zero is infinite.
    return scale * jnp.where(total == 0, 0, jnp.sqrt(jnp.where(total == 0, 1, total)))
