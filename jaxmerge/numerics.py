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

from jaxmerge import sharding
from jaxmerge.dividing import IN_NUMPY
from jaxmerge.selecting import kth_largest_integer

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

    def __int__(self) -> int:
        return (int(self.high) << LOW_BITS) + int(self.low)

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

    Each pass over the entries counts those at or above a few bounds. With a quarter of
    a million entries or more, on one device, a sample tells where to begin, and it
    takes one to seven passes as a rule. Else the bit pattern is settled from its
    highest bit down: 2 bits in a pass on CPUs, 3 elsewhere, which makes 16 or 11 passes
    for float32. On a mesh, a pass communicates 3 or 7 counts. Entries that tie count
    one by one, as in a sort.

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

    mesh = sharding.mesh_of(*bits)
    return _kth_of_bits(bits, k, width=width, alone=mesh is None or mesh.size == 1)


# Compiled by itself so that it is traced once, however many models ask for it, and so
# that NumPy can take its place.
@functools.partial(jax.jit, static_argnames=("width", "alone"))
def _kth_of_bits(bits: list[Array], k: Count, *, width: int, alone: bool) -> Array:
    size = sum(b.size for b in bits)
    if alone and width < 32 and _WORTH_A_SAMPLE <= size < 2**32:
        on_cpu = elsewhere = functools.partial(
            settle_by_guesses, width=width, size=size
        )
    else:
        # Passes are bound by comparisons on CPUs, by reading from memory elsewhere.
        search = functools.partial(settle_digits, width=width)
        on_cpu = functools.partial(search, digit_bits=2)
        elsewhere = functools.partial(search, digit_bits=3)
    return jax.lax.platform_dependent(
        bits,
        k,
        cpu=functools.partial(on_cpu, sums=sums_together if alone else sums_apart),
        default=functools.partial(elsewhere, sums=sums_apart),
    )


def _kth_of_bits_with_numpy(*operands: Any) -> np.integer:
    *bits, high, low = map(np.asarray, operands)
    flat = [b.reshape(-1) for b in bits]
    integers = flat[0] if len(flat) == 1 else np.concatenate(flat)
    return kth_largest_integer(integers, int(Count(high, low)))


IN_NUMPY["_kth_of_bits"] = _kth_of_bits_with_numpy

_WORTH_A_SAMPLE = 1 << 18
_SAMPLED = 1 << 14  # About how many integers are in a sample.


class _Bracket(NamedTuple):
    """What is known of a k-th largest integer: `least` <= it < `end`.

    Attributes:
        least: `reached` integers, k or more, are at or above it.
        end: `beyond` integers, fewer than k, are at or above it.
    """

    least: Array
    end: Array
    reached: Array
    beyond: Array


def settle_by_guesses(
    bits: Sequence[Array], k: Count, *, width: int, size: int, sums: Sums
) -> Array:
    """The k-th largest of all integers, in passes that count at seven bounds.

    The first pass has its bounds from a sample. Later ones have three around where
    interpolation puts the answer, three that quarter the bracket, so that there are
    hardly ever more than `width / 2` passes, and one just above its lower end, which
    ends the search where many integers are equal.

    Args:
        bits: arrays of unsigned integers of one dtype.
        k: from 1 to the number of integers.
        width: all integers are below `2**width`, and `width` below 32.
        size: the number of integers, below 2**32.
        sums: how to count.
    """
    rank = _as_integer(k)
    bracket = _Bracket(*(jnp.full((), x, jnp.uint32) for x in (0, 1 << width, size, 0)))

    def is_open(state: tuple[_Bracket, Array]) -> Array:
        bracket, _ = state
        return bracket.end - bracket.least > 1

    def narrow(state: tuple[_Bracket, Array]) -> tuple[_Bracket, Array]:
        bracket, bounds = state
        totals = _counts_from(bits, list(bounds.astype(bits[0].dtype)), sums)
        counts = jnp.stack([_as_integer(total) for total in totals])
        within = counts >= rank
        bracket = _Bracket(
            least=jnp.max(jnp.where(within, bounds, bracket.least)),
            end=jnp.min(jnp.where(within, bracket.end, bounds)),
            reached=jnp.min(jnp.where(within, counts, bracket.reached)),
            beyond=jnp.max(jnp.where(within, bracket.beyond, counts)),
        )
        return bracket, _guesses(bracket, rank)

    start = bracket, jnp.minimum(_sampled_bounds(bits, k, size), (1 << width) - 1)
    bracket, _ = jax.lax.while_loop(is_open, narrow, start)
    return bracket.least.astype(bits[0].dtype)


def _as_integer(number: Count) -> Array:
    return (number.high << LOW_BITS) + number.low


def _sampled_bounds(bits: Sequence[Array], k: Count, size: int) -> Array:
    """Seven bounds that are about where the k-th largest integer is."""
    # An odd step goes through all columns of a matrix.
    step = (size // _SAMPLED) | 1
    sample = jnp.sort(jnp.concatenate([b.reshape(-1)[::step] for b in bits]))
    below = 1 - k.as_float() / np.float32(size)
    # Ranks in a sample are off by one deviation or less in two of three cases.
    deviation = root(below * (1 - below) * sample.size) + 1
    off = deviation * np.array([-4, -1.5, -0.5, 0.5, 1.5, 4], np.float32)
    ranks = jnp.clip(below * sample.size + off, 0, sample.size - 1)
    bounds = sample[ranks.astype(jnp.int32)].astype(jnp.uint32)
    return jnp.append(bounds, bounds[-1] + 1)


def _guesses(bracket: _Bracket, rank: Array) -> Array:
    """Seven bounds within a bracket."""
    length = (bracket.end - bracket.least).astype(jnp.float32)
    between = (bracket.reached - bracket.beyond).astype(jnp.float32)
    share = (bracket.reached - rank).astype(jnp.float32) / between
    off = jnp.maximum(1 / length, jax.lax.rsqrt(between))
    shares = jnp.stack([0.0, 0.25, 0.5, 0.75, share - off, share, share + off])
    bounds = bracket.least + (jnp.clip(shares, 0, 1) * length).astype(jnp.uint32)
    return jnp.clip(bounds, bracket.least + 1, bracket.end - 1)


def settle_digits(
    bits: Sequence[Array],
    k: Count,
    *,
    width: int,
    digit_bits: int,
    sums: Sums,
) -> Array:
    """The k-th largest of all integers, digit by digit.

    Args:
        bits: arrays of unsigned integers of one dtype.
        k: from 1 to the number of integers.
        width: all integers are below `2**width`.
        digit_bits: how many of them one pass settles, which counts 2**digit_bits - 1
            times.
        sums: how to count.
    """
    dtype = bits[0].dtype

    def settle_digit(i: Array, found: Array) -> Array:
        # The last digit overlaps the one before, if its bits are too few.
        shift = jnp.maximum(width - digit_bits * (i + 1), 0).astype(dtype)
        digits = [jnp.asarray(d, dtype) << shift for d in range(1, 2**digit_bits)]
        found &= ~digits[-1]
        bounds = [found | digit for digit in digits]
        totals = _counts_from(bits, bounds, sums)
        reached = sum((total >= k).astype(dtype) for total in totals)
        return found | (reached << shift)

    digits = -(-width // digit_bits)
    return jax.lax.fori_loop(0, digits, settle_digit, jnp.zeros((), dtype))


def _counts_from(
    bits: Sequence[Array], bounds: Sequence[Array], sums: Sums
) -> list[Count]:
    """How many entries of all arrays are at or above each bound."""
    seen = [_counts([b >= bound for bound in bounds], sums) for b in bits]
    return [
        functools.reduce(operator.add, totals) for totals in zip(*seen, strict=True)
    ]


def entries(density: float, size: int, *, rounding: str = "floor") -> int:
    """How many of `size` entries a share of `density` is: at least 1, at most all.

    Args:
        density: in (0, 1].
        rounding: `"floor"` (mergekit), or `"floor_plus_one"`: one more, as the k-th
            smallest value of the TIES authors' code comes out.
    """
    extra = {"floor": 0, "floor_plus_one": 1}[rounding]
    return min(size, max(1, math.floor(density * size) + extra))


def random_words(key: Array, like: Array) -> Array:
    """Independent uniform integers in [0, 2**16), a function of key and position.

    A block of Threefry has bits for four of them, one in each quarter of a row; that is
    many times as fast as `jax.random.bits`. Other generators draw as they do.

    Args:
        key: a `jax.random.key`.
        like: an array. On a mesh each word is drawn where it is to be: nothing is sent.

    Returns:
        uint16, in the shape of `like`.
    """
    shape = like.shape
    if not shape or jax.random.key_impl(key) != jax.random.key_impl(jax.random.key(0)):
        return jax.random.bits(key, shape, jnp.uint16)
    quarter = -(-shape[-1] // 4)
    mesh = sharding.mesh_of(like)
    if mesh is not None and mesh.size > 1:
        # Quarters are on other devices than their blocks: all draw every block.
        column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
        x, y = _blocks(key, shape, column % quarter)
        word = column // quarter
        return (jnp.where(word < 2, x, y) >> (word % 2 * 16)).astype(jnp.uint16)
    blocks = (*shape[:-1], quarter)
    column = jax.lax.broadcasted_iota(jnp.uint32, blocks, len(shape) - 1)
    # Once for all quarters, not once in each.
    bits = jax.lax.optimization_barrier(_blocks(key, blocks, column))
    words = [part.astype(jnp.uint16) for b in bits for part in (b, b >> 16)]
    return jnp.concatenate(words, axis=-1)[..., : shape[-1]]


def _blocks(key: Array, shape: tuple[int, ...], column: Array) -> tuple[Array, Array]:
    """The block of Threefry for each row and column, of two words of 32 bits."""
    row, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape) - 1)):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        row, stride = row + np.uint32(stride % 2**32) * along, stride * shape[axis]
    first, second = jax.random.key_data(key)
    return _threefry(first, second, row, column)


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


# Compiled by itself so that it is traced once, however many models draw.
@jax.jit
def _threefry(first: Array, second: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Threefry-2x32 in 20 rounds (Salmon et al., Parallel random numbers, SC 2011).

    The primitive of JAX writes every few rounds to memory on CPUs, this none.
    """
    keys = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    x, y = x + first, y + second
    for i in range(5):
        for bits in _ROTATIONS[i % 2]:
            x += y
            y = (y << np.uint32(bits) | y >> np.uint32(32 - bits)) ^ x
        x += keys[(i + 1) % 3]
        y += keys[(i + 2) % 3] + np.uint32(i + 1)
    return x, y


def safe_divide(x: Array, y: Array, otherwise: float | Array = 0.0) -> Array:
    """`x / y`, and `otherwise` where `y` is zero; its gradient is finite there too."""
    zero = y == 0
    return jnp.where(zero, otherwise, x / jnp.where(zero, 1, y))


def norm(x: Array) -> Array:
    """Euclidean norm over all axes; scaled so that no square over- or underflows."""
    return norms([x])[0]


def norms(arrays: Sequence[Array]) -> Array:
    """The norms of arrays of one shape, in one pass over them; (arrays,)."""
    rows = [_as_rows(x) for x in arrays]
    # The norm does not depend on how it is scaled, so neither does its slope.
    largest = [jax.lax.stop_gradient(_by_row(jnp.max, jnp.abs(x))) for x in rows]
    scales = [jnp.where((m > 0) & jnp.isfinite(m), m, 1) for m in largest]
    squares = [
        _by_row(jnp.sum, jnp.square(x / scale.reshape(-1, *[1] * (x.ndim - 1))))
        for x, scale in zip(rows, scales, strict=True)
    ]
    measured = _at_once([*largest, *scales, *squares])
    largest, scales, squares = jnp.split(measured, 3, axis=1)
    most = jnp.max(largest, axis=0, keepdims=True, initial=0)
    scale = jnp.where((most > 0) & jnp.isfinite(most), most, 1)
    shares = jnp.where(largest == 0, 0, scales / scale)
    total = jnp.sum(squares * jnp.square(shares), axis=0)
    return scale[0] * root(total)


def root(x: Array) -> Array:
    """A square root, of what may be negative by rounding, with a slope at zero."""
    return jnp.where(x <= 0, 0, jnp.sqrt(jnp.where(x <= 0, 1, x)))


def totals(arrays: Sequence[Array]) -> Array:
    """The sums over all entries of arrays of one shape, in one pass; (arrays,)."""
    rows = [_by_row(jnp.sum, _as_rows(x)) for x in arrays]
    return jnp.sum(_at_once(rows), axis=0)


# Each row is reduced alone, then what comes of that: rows that are on disk are reduced
# as they come, and the result has the same bits.


def _as_rows(x: Array) -> Array:
    """An array of two axes or more; one that is spread over a mesh as a single row."""
    mesh = sharding.mesh_of(x)
    return x[None] if x.ndim < 2 or (mesh is not None and mesh.size > 1) else x


def _by_row(reduce: Callable[..., Array], x: Array) -> Array:
    return reduce(x, axis=tuple(range(1, x.ndim)), initial=0)


def _at_once(columns: Sequence[Array]) -> Array:
    """Numbers of all rows, (rows, columns), which XLA does not reduce further."""
    return jax.lax.optimization_barrier(jnp.stack(columns, axis=1))
