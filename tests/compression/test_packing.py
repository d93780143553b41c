"""Masks as bits: the same as NumPy packs them, on every sharding."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge.compression import add_masked, pack, unpack
from jaxmerge.compression.packing import bits_sharding, flat_bits, row_bits, row_shape

masks = arrays(bool, array_shapes(min_dims=0, max_dims=2, min_side=1, max_side=19))


@settings(deadline=None, max_examples=15)
@given(masks)
def test_bits_come_back(mask):
    rows = pack(mask)
    assert rows.shape == row_shape(mask.shape)
    np.testing.assert_array_equal(rows, np.packbits(np.atleast_1d(mask), axis=-1))
    np.testing.assert_array_equal(unpack(rows, mask.shape), mask)


@settings(deadline=None)
@given(masks)
def test_flat_bits_are_those_of_the_whole_array(mask):
    rows = np.packbits(np.atleast_1d(mask), axis=-1)
    flat = flat_bits(rows, mask.shape)
    np.testing.assert_array_equal(flat, np.packbits(mask))
    np.testing.assert_array_equal(row_bits(flat, mask.shape), rows)


def test_whole_bytes_are_reshaped_without_a_copy():
    rows = np.packbits(np.ones((3, 16), bool), axis=-1)
    assert np.shares_memory(flat_bits(rows, (3, 16)), rows)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_add_masked_rounds_once(key, dtype):
    base, vector = jax.random.normal(key, (2, 3, 10)).astype(dtype)
    mask = jax.random.bernoulli(key, 0.4, (3, 10))
    moved = add_masked(base, vector, pack(mask), 0.7)
    base, vector = (x.astype(jnp.float32) for x in (base, vector))
    expected = (base + 0.7 * jnp.where(mask, vector, 0)).astype(dtype)
    assert moved.dtype == dtype
    np.testing.assert_allclose(*(x.astype(np.float32) for x in (moved, expected)), 1e-6)


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((8, 32), ("data", "model"), ("data", "model")),
        ((8, 32), ("model", "data"), ("model", "data")),
        ((8, 24), (None, "data"), (None, None)),  # 6 entries on each device
        ((8, 30), ("data",), ("data", None)),
        ((128,), (("data", "model"),), (("data", "model"),)),
    ],
)
def test_sharded_masks(mesh, key, shape, spec, expected):
    target = NamedSharding(mesh, PartitionSpec(*spec))
    of_bits = bits_sharding(target, shape, shape)
    assert of_bits.spec == PartitionSpec(*expected)
    mask = np.asarray(jax.random.bernoulli(key, 0.5, shape))
    leaf = np.asarray(jax.random.normal(key, shape))
    base, vector = (jax.device_put(x, target) for x in (leaf, 2 * leaf))
    bits = jax.device_put(np.packbits(mask, axis=-1), of_bits)
    moved = add_masked(base, vector, bits, 3.0)
    assert moved.sharding.is_equivalent_to(target, len(shape))
    np.testing.assert_allclose(moved, leaf + 3 * np.where(mask, 2 * leaf, 0), rtol=1e-6)


def test_nothing_is_gathered(mesh):
    target = NamedSharding(mesh, PartitionSpec("data", "model"))
    leaf = jax.device_put(np.ones((8, 32), np.float32), target)
    bits = jax.device_put(
        np.zeros((8, 4), np.uint8), bits_sharding(target, (8, 32), (8, 32))
    )
    apply = jax.jit(lambda *x: add_masked(*x)).lower(leaf, leaf, bits)
    text = apply.compile().as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text


def test_leading_axes_of_masks_are_not_sharded(mesh):
    target = NamedSharding(mesh, PartitionSpec("data"))
    spec = bits_sharding(target, (8, 16), (3, 8, 16)).spec
    assert spec == PartitionSpec(None, "data", None)


def test_it_lowers_for_accelerators():
    leaf = jax.ShapeDtypeStruct((8, 30), jnp.bfloat16)
    bits = jax.ShapeDtypeStruct((8, 4), jnp.uint8)
    add = jax.jit(lambda *x: add_masked(*x))
    jax.export.export(add, platforms=["tpu", "cuda"])(leaf, leaf, bits)
