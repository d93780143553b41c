"""Task vectors in a few bits per entry: TVQ, RTVQ and BitDelta.

Kim et al., "Task Vector Quantization for Memory-Efficient Model Merging", ICCV 2025,
arXiv:2503.06921. Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit",
NeurIPS 2024, arXiv:2402.10193.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge import sharding
from jaxmerge.compression.packing import pack, unpack
from jaxmerge.leafwise import wide
from jaxmerge.numerics import safe_divide


class Codes(NamedTuple):
    """A task vector as `step * (code - zero)`, with codes of some bits.

    Attributes:
        bits: the codes as masks, one per bit, the lowest first, packed: uint8
            (b, *rows of the leaf).
        step: the distance of two neighbouring values, with a length of 1 along the
            axes that share one.
        zero: the code that stands for 0, a whole number; shape as `step`.
    """

    bits: Array
    step: Array
    zero: Array


@functools.partial(jax.jit, static_argnames=("bits", "stack"))
def quantise(delta: Array, bits: int, stack: tuple[int, ...] = ()) -> Codes:
    r"""Rounds a task vector to $2^b$ evenly spaced values, of which 0 is one (TVQ).

    With $\Delta = (\max \tau - \min \tau) / (2^b - 1)$ and the code of zero
    $z = \mathrm{round}(-\min\tau / \Delta)$, an entry has the code
    $\mathrm{round}(\tau / \Delta) + z$. The range always contains 0, also where the
    task vector does not, so that entries that were not updated stay exact; no entry
    is further than $\Delta / 2$ from its value.

    Args:
        delta: the task vector of one leaf, in float32, of any shape.
        bits: $b$, from 1 to 8.
        stack: axes of independent layers, each with a range of its own.

    Returns:
        The codes; `dequantise` reads them.

    Example:
        >>> tau = jnp.array([1.0, -2.0, 0.5, 0.0, 3.0, -0.1, 0.2, -4.0])
        >>> codes = quantise(tau, bits=3)
        >>> codes.step.item(), codes.zero.item()
        (1.0, 4.0)
        >>> dequantise(codes, (8,)).tolist()
        [1.0, -2.0, 0.0, 0.0, 3.0, 0.0, 0.0, -4.0]
    """
    shared = tuple(axis for axis in range(delta.ndim) if axis not in stack)
    high = jnp.max(delta, axis=shared, keepdims=True, initial=0)
    low = jnp.min(delta, axis=shared, keepdims=True, initial=0)
    most = 2**bits - 1
    step = (high - low) / most
    zero = jnp.round(safe_divide(-low, step))
    codes = jnp.round(safe_divide(delta, step)) + zero
    codes = jnp.clip(codes, 0, most).astype(jnp.uint8)
    planes = [pack((codes >> bit) & 1 == 1) for bit in range(bits)]
    return Codes(jnp.stack(planes), step, zero)


def dequantise(codes: Codes, shape: tuple[int, ...]) -> Array:
    """The task vector of `shape` that `codes` stand for."""
    planes = [unpack(plane, shape).astype(jnp.uint8) for plane in codes.bits]
    code = sum(plane << bit for bit, plane in enumerate(planes))
    return codes.step * (code - codes.zero)  # type: ignore[operator]


class Signs(NamedTuple):
    """A task vector as `scale` where a bit is set, else `-scale`.

    Attributes:
        bits: whether entries are positive or zero, packed along the last axis.
        scale: their magnitude, with a length of 1 along the axes that share one.
    """

    bits: Array
    scale: Array


@functools.partial(jax.jit, static_argnames="stack")
def binarise(delta: Array, stack: tuple[int, ...] = ()) -> Signs:
    r"""Keeps of a task vector its signs and the mean of its magnitudes (BitDelta).

    $\alpha = \mathrm{mean}|\tau|$ is the scale with the least squared error of
    $\alpha\,\mathrm{sign}(\tau)$. Zero counts as positive, as in the authors' code.

    Args:
        delta: the task vector of one leaf, in float32, of any shape.
        stack: axes of independent layers, each with a scale of its own.

    Returns:
        The signs; `debinarise` reads them.

    Example:
        >>> signs = binarise(jnp.array([1.0, -2.0, 0.0]))
        >>> debinarise(signs, (3,)).tolist()
        [1.0, -1.0, 1.0]
    """
    shared = tuple(axis for axis in range(delta.ndim) if axis not in stack)
    return Signs(pack(delta >= 0), jnp.mean(jnp.abs(delta), shared, keepdims=True))


def debinarise(signs: Signs, shape: tuple[int, ...]) -> Array:
    """The task vector of `shape` that `signs` stand for."""
    return jnp.where(unpack(signs.bits, shape), signs.scale, -signs.scale)


def apply_quantised(base: Array, *coded: Codes | Signs) -> Array:
    """The leaf that quantised task vectors, added up, make of `base`; like `base`."""
    return _apply(base, coded, target=sharding.of(base))


def _decode(coded: Codes | Signs, shape: tuple[int, ...]) -> Array:
    if isinstance(coded, Signs):
        return debinarise(coded, shape)
    return dequantise(coded, shape)


@functools.partial(jax.jit, static_argnames="target")
def _apply(base, coded, *, target):
    def apply(base, coded):
        delta = sum(_decode(each, base.shape) for each in coded)
        return (base.astype(wide(base.dtype)) + delta).astype(base.dtype)

    return sharding.keep(sharding.auto(apply, like=base)(base, coded), target)
