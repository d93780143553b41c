"""Task vectors in a few bits: golden vectors, bounds on errors, tensors of no range."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxmerge.compression import binarise, debinarise, dequantise, quantise

TAU = np.array([1, -2, 0.5, 0, 3, -0.1, 0.2, -4], np.float32)

deltas = arrays(np.float32, (3, 7), elements=st.floats(-8, 8, width=16))


def test_tvq_with_three_bits():
    codes = quantise(jnp.asarray(TAU), bits=3)
    assert (codes.step.item(), codes.zero.item()) == (1.0, 4.0)
    assert codes.bits.shape == (3, 1)
    np.testing.assert_array_equal(dequantise(codes, (8,)), [1, -2, 0, 0, 3, 0, 0, -4])


@settings(deadline=None, max_examples=20)
@given(deltas, st.integers(2, 8))
def test_no_entry_is_off_by_more_than_half_a_step(delta, bits):
    codes = quantise(delta, bits=bits)
    error = np.abs(dequantise(codes, delta.shape) - delta)
    assert error.max() <= codes.step.item() / 2 * (1 + 1e-4) + 1e-6
    assert codes.step.item() <= 16 / (2**bits - 1) + 1e-6


@settings(deadline=None, max_examples=20)
@given(deltas)
def test_entries_that_were_not_updated_stay_exact(delta):
    quantised = dequantise(quantise(delta, bits=2), delta.shape)
    np.testing.assert_array_equal(quantised[delta == 0], 0)


@pytest.mark.parametrize("value", [0.0, 3.0, -0.7])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_constant_task_vectors(value, bits):
    delta = jnp.full((4,), value)
    np.testing.assert_allclose(
        dequantise(quantise(delta, bits), (4,)), delta, rtol=1e-6
    )


def test_layers_have_ranges_of_their_own():
    delta = np.stack([TAU, 100 * TAU])
    together = quantise(delta, bits=3, stack=(0,))
    assert together.step.shape == (2, 1)
    for layer, alone in enumerate(delta):
        np.testing.assert_array_equal(
            dequantise(together, delta.shape)[layer],
            dequantise(quantise(alone, bits=3), (8,)),
        )


def test_bitdelta():
    assert binarise(jnp.asarray(TAU)).scale.item() == pytest.approx(1.35)


@settings(deadline=None, max_examples=20)
@given(deltas, st.floats(-1, 1, width=16))
def test_no_other_scale_of_signs_is_nearer(delta, change):
    signs = binarise(delta)
    best = np.sum(np.square(debinarise(signs, delta.shape) - delta))
    other = signs._replace(scale=signs.scale + change)
    assert best <= np.sum(np.square(debinarise(other, delta.shape) - delta)) * 1.0001


def test_signs_of_constant_magnitude_are_exact():
    delta = 0.25 * np.sign(TAU + 1e-9)
    np.testing.assert_array_equal(debinarise(binarise(delta), (8,)), delta)


def test_signs_of_gaussian_task_vectors_lose_what_theory_says(key):
    delta = np.random.default_rng(0).normal(size=(100, 1000)).astype(np.float32)
    lost = np.linalg.norm(debinarise(binarise(delta), delta.shape) - delta)
    assert lost / np.linalg.norm(delta) == pytest.approx(np.sqrt(1 - 2 / np.pi), 1e-2)


def test_correcting_the_errors_of_the_offset_beats_not_to(key):
    rng = np.random.default_rng(0)
    shape = (64, 512)
    common = rng.normal(size=shape)
    deltas = [np.float32(common + rng.normal(size=shape)) for _ in range(8)]
    mean = np.mean(deltas, axis=0)
    offset = dequantise(quantise(mean, bits=3), shape)

    def error(start, bits=2):
        """What is left of the task vectors, measured from `start`, on the offset."""
        read = [dequantise(quantise(d - start, bits=bits), shape) for d in deltas]
        lost = [offset + r - d for r, d in zip(read, deltas, strict=True)]
        return np.linalg.norm(lost) / np.linalg.norm(deltas)

    alone = [dequantise(quantise(d, bits=2), shape) - d for d in deltas]
    corrected, not_corrected = error(offset), error(mean)
    assert corrected < 0.99 * not_corrected
    assert corrected < 0.9 * np.linalg.norm(alone) / np.linalg.norm(deltas)


def test_of_identical_tasks_only_the_error_of_the_offset_is_left():
    offset = dequantise(quantise(jnp.asarray(TAU), bits=3), TAU.shape)
    rest = quantise(TAU - offset, bits=2)
    # The offset is off by at most half a step of 1: [0, 0, 0.5, 0, 0, -0.1, 0.2, 0].
    assert rest.step.item() == pytest.approx(0.6 / 3)
    left = offset + dequantise(rest, TAU.shape) - TAU
    assert np.abs(left).max() <= 0.1 + 1e-6
