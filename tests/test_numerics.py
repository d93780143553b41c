import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.extend.random import threefry2x32_p
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmerge import numerics
from jaxmerge.numerics import (
    Count,
    count,
    entries,
    kth_largest,
    kth_magnitude,
    norm,
    random_words,
    safe_divide,
)

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
properties = settings(deadline=None, max_examples=50)

_kth = jax.jit(kth_magnitude)
_kth_largest = jax.jit(kth_largest)


def sorted_magnitudes(*arrays):
    flat = np.concatenate([np.abs(np.asarray(a, np.float64)).ravel() for a in arrays])
    return np.sort(flat)[::-1]


@properties
@given(st.data(), st.sampled_from(DTYPES))
def test_kth_magnitude_is_that_of_a_sort(data, dtype):
    values = data.draw(
        st.lists(st.floats(-6e4, 6e4, width=16), min_size=1, max_size=40)
    )
    x = jnp.asarray(values, dtype)
    k = data.draw(st.integers(1, x.size))
    got = _kth(x, Count.of(k))
    assert got.dtype == dtype
    assert float(got) == sorted_magnitudes(x)[k - 1]


@properties
@given(hnp.arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False)))
def test_kth_magnitude_of_any_float32(x):
    # Subnormals included: XLA may flush them in arithmetic, but not in bit patterns.
    for k in (1, 7, 20):
        assert float(_kth(x, Count.of(k))) == sorted_magnitudes(x)[k - 1]


@properties
@given(hnp.arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False)))
def test_kth_largest_of_any_float32(x):
    for k in (1, 7, 20):
        assert float(_kth_largest(x, Count.of(k))) == np.sort(x)[::-1][k - 1]


def test_kth_largest_of_a_tree_ranks_all_leaves_together():
    tree = {"a": jnp.array([-4.0, 3], jnp.bfloat16), "b": jnp.array([[-0.0, -jnp.inf]])}
    ranked = [float(kth_largest(tree, k)) for k in range(1, 5)]
    assert ranked == [3, 0, -4, -np.inf]
    with pytest.raises(ValueError, match="kth_largest: k is 5, the tree has 4 entries"):
        kth_largest(tree, 5)


def test_kth_magnitude_counts_ties_one_by_one():
    x = jnp.array([2.0, -2.0, 1.0, 1.0, -1.0, 0.0])
    assert [float(kth_magnitude(x, k)) for k in range(1, 7)] == [2, 2, 1, 1, 1, 0]


def test_kth_magnitude_of_a_tree_ranks_all_leaves_together():
    tree = {"a": jnp.array([[4.0, 3], [2, 1]]), "b": jnp.array([0.4, -30.0])}
    ranked = sorted_magnitudes(tree["a"], tree["b"])
    assert [float(kth_magnitude(tree, k)) for k in range(1, 7)] == ranked.astype(
        np.float32
    ).tolist()


@properties
@given(st.data(), st.sampled_from(DTYPES), st.integers(1, 4), st.integers(1, 4))
def test_kth_magnitude_of_any_layer_and_of_any_tree(data, dtype, layers, size):
    values = st.lists(
        st.floats(-100, 100, width=16), min_size=layers * size, max_size=layers * size
    )
    a, b = (jnp.asarray(data.draw(values), dtype).reshape(layers, size) for _ in "ab")
    k = data.draw(st.integers(1, size))
    by_layer = jax.vmap(lambda x: kth_magnitude(x, k))(a)
    assert by_layer.tolist() == [sorted_magnitudes(layer)[k - 1] for layer in a]
    k = data.draw(st.integers(1, 2 * layers * size))
    assert float(kth_magnitude([a, {"b": b}], k)) == sorted_magnitudes(a, b)[k - 1]


def test_kth_magnitude_of_several_dtypes_compares_in_the_widest():
    tree = [jnp.array([1.0], jnp.bfloat16), jnp.array([1.0009765625, 0.5], jnp.float16)]
    got = kth_magnitude(tree, 1)
    assert got.dtype == jnp.float32
    assert float(got) == 1.0009765625


def test_kth_magnitude_per_stacked_layer():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 6, 4)), jnp.float32)
    got = jax.vmap(functools.partial(kth_magnitude, k=7))(x)
    assert got.tolist() == [sorted_magnitudes(layer)[6] for layer in x]


def test_nan_counts_as_larger_than_infinity():
    x = jnp.array([jnp.inf, jnp.nan, 1.0])
    assert np.isnan(kth_magnitude(x, 1))
    assert float(kth_magnitude(x, 2)) == np.inf


def test_kth_magnitude_of_float64():
    with jax.enable_x64(True):
        x = jnp.asarray([1.0, 1.0 + 1e-15, -0.5])
        assert float(kth_magnitude(x, 2)) == 1.0


def test_kth_magnitude_refuses_a_rank_out_of_range():
    with pytest.raises(ValueError, match="k is 4, the tree has 3 entries"):
        kth_magnitude(jnp.ones(3), 4)


def awkward(dtype, size=300):
    """Entries that a search may trip over: by name, arrays of one size."""
    info, rng = jnp.finfo(dtype), np.random.default_rng(0)
    normal = rng.standard_normal(size)
    mixed = rng.choice([0.0, -0.0, np.inf, -np.inf, float(info.max)], size)
    cases = {
        "equal": np.full(size, 3.0),
        "zeros": np.zeros(size),
        "tied": np.round(normal * 2) / 8,
        "sparse": np.where(rng.random(size) < 0.9, 0, normal),
        "subnormal": np.round(normal * 8) * float(info.smallest_subnormal),
        "of all sizes": rng.choice([-1, 1], size) * 2.0 ** rng.uniform(-20, 15, size),
        "infinite": mixed,
        "not a number": np.where(np.arange(size) % 3, normal, np.nan),
    }
    return {name: values.astype(dtype) for name, values in cases.items()}


@pytest.mark.parametrize("dtype", [*DTYPES, np.float64])
def test_kth_magnitude_and_kth_largest_of_awkward_entries(dtype):
    with jax.enable_x64(dtype == np.float64):
        for name, x in awkward(dtype).items():
            for search, ranked in ((_kth, np.abs(x)), (_kth_largest, x)):
                # NumPy sorts NaN to the end, above infinity.
                ranked = np.sort(ranked.astype(np.float64))[::-1]
                for k in (1, 2, 60, 150, 270, 299, 300):
                    got = np.asarray(search(x, Count.of(k)), np.float64)
                    np.testing.assert_array_equal(got, ranked[k - 1], err_msg=name)


@pytest.mark.parametrize("digit_bits", [1, 2, 3])
@pytest.mark.parametrize("sums", [numerics.sums_apart, numerics.sums_together])
@pytest.mark.parametrize(("width", "dtype"), [(15, np.uint16), (32, np.uint32)])
def test_every_search_settles_all_bits(digit_bits, sums, width, dtype):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << width, 40).astype(dtype)
    bits[:4] = 0, 1, (1 << width) - 1, (1 << width) - 1
    search = jax.jit(
        functools.partial(
            numerics.settle_digits, width=width, digit_bits=digit_bits, sums=sums
        )
    )
    halves = [jnp.asarray(bits[:25]), jnp.asarray(bits[25:])]
    got = [int(search(halves, Count.of(k))) for k in range(1, 41)]
    assert got == np.sort(bits)[::-1].tolist()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sums", [numerics.sums_apart, numerics.sums_together])
def test_guesses_change_no_result(dtype, sums, monkeypatch):
    monkeypatch.setattr(numerics, "_SAMPLED", 16)
    width, size = 8 * jnp.dtype(dtype).itemsize - 1, 300
    search = jax.jit(
        functools.partial(numerics.settle_by_guesses, width=width, size=size, sums=sums)
    )
    cases = awkward(dtype, size)
    # What the sample sees of this is larger than all else.
    misleading = np.where(np.arange(size) % (size // 16 | 1), 1.0, 9.0)
    for name, x in {**cases, "misleading": misleading.astype(dtype)}.items():
        bits = numerics.magnitude_bits(jnp.asarray(x))
        ranked = np.sort(np.asarray(bits))[::-1]
        for k in (1, 2, 60, 150, 270, 299, 300):
            got = search([bits[:200], bits[200:]], Count.of(k))
            assert got == ranked[k - 1], (name, k)


def test_guesses_reach_the_largest_integer():
    bits = np.arange(1 << 16, dtype=np.uint16)
    search = jax.jit(
        functools.partial(
            numerics.settle_by_guesses, width=16, size=1 << 16, sums=numerics.sums_apart
        )
    )
    for k in (1, 2, 1 << 15, (1 << 16) - 1, 1 << 16):
        assert search([jnp.asarray(bits)], Count.of(k)) == (1 << 16) - k


def test_kth_magnitude_of_many_entries():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1024, 257)), jnp.float32)
    assert x.size >= numerics._WORTH_A_SAMPLE
    ranked = sorted_magnitudes(x)
    for k in (1, 1000, x.size // 2, x.size):
        assert float(_kth(x, Count.of(k))) == ranked[k - 1]


def test_kth_magnitude_of_the_largest_leaves_can_be_traced():
    leaf = jax.ShapeDtypeStruct((1 << 16, (1 << 16) - 1), jnp.bfloat16)
    assert jax.eval_shape(kth_magnitude, leaf, Count.of(9)).dtype == jnp.bfloat16


def test_guesses_by_layer_and_under_a_gradient(monkeypatch):
    monkeypatch.setattr(numerics, "_WORTH_A_SAMPLE", 1)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 60)), jnp.float32)
    got = jax.jit(jax.vmap(lambda layer: kth_magnitude(layer, 7)))(x)
    assert got.tolist() == [sorted_magnitudes(layer)[6] for layer in x]

    def above(x):
        return jnp.sum(jnp.where(jnp.abs(x) >= kth_magnitude(x, 7), x, 0))

    slope = jax.jit(jax.grad(above))(x[0])
    assert slope.tolist() == (np.abs(x[0]) >= got[0]).tolist()


def test_kth_magnitude_stores_no_masks(optimised):
    x = jnp.zeros((256, 1024))
    compiled = jax.jit(lambda x, k: kth_magnitude(x, k)).lower(x, Count.of(9)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * x.nbytes


def test_kth_magnitude_on_a_mesh_communicates_counts_alone(mesh):
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    placed = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
    compiled = _kth.lower(placed, Count.of(100)).compile()
    assert "all-gather" not in compiled.as_text()
    assert "sort(" not in compiled.as_text()
    assert float(compiled(placed, Count.of(100))) == sorted_magnitudes(x)[99]


@properties
@given(st.integers(0, 2**39 - 1), st.integers(0, 2**39 - 1))
def test_counts_add_and_compare_as_integers(a, b):
    total = Count.of(a) + Count.of(b)
    assert int(total.high) * 256 + int(total.low) == a + b
    assert bool(Count.of(a) >= Count.of(b)) == (a >= b)


@pytest.mark.parametrize("number", [0, 1, 255, 256, 1000, 2**24 + 3, 2**33])
@pytest.mark.parametrize("density", [0.125, 0.2, 0.75, 1.0])
def test_a_share_of_a_count_is_rounded_down(number, density):
    high, low = Count.of(number).share(density)
    assert int(low) < 2**8
    got, want = int(high) * 2**8 + int(low), int(density * number)
    assert abs(got - want) <= 2e-7 * want


@properties
@given(hnp.arrays(bool, hnp.array_shapes(max_dims=4, max_side=9)))
def test_counting_axis_by_axis_equals_a_sum(mask):
    got = numerics._counts_by_axes([jnp.asarray(mask)], numerics.sums_apart)[0]
    assert int(got.high) * 256 + int(got.low) == mask.sum()


def test_counts_beyond_32_bits():
    # The mask is never stored: the comparison fuses into the sums.
    @jax.jit
    def count_large(x):
        return count(jnp.broadcast_to(x, (2**13, 2**10, 2**10)) > 0)

    got = count_large(jnp.ones((2**10,)))
    assert int(got.high) * 256 + int(got.low) == 2**33


def test_an_axis_too_long_to_count_is_refused():
    shape = jax.ShapeDtypeStruct((2**33,), bool)
    with pytest.raises(ValueError, match=r"longer than 2\*\*24"):
        jax.eval_shape(count, shape)


@pytest.mark.parametrize(
    ("density", "size", "floor"),
    [(0.2, 10, 2), (1.0, 7, 7), (0.01, 50, 1), (0.29, 100, 28)],
)
def test_entries_kept(density, size, floor):
    assert entries(density, size) == floor
    assert entries(density, size, rounding="floor_plus_one") == min(
        size, int(density * size) + 1
    )


def test_safe_divide_has_a_value_and_a_gradient_at_zero():
    y = jnp.array([2.0, 0.0])
    assert safe_divide(jnp.ones(2), y, 5.0).tolist() == [0.5, 5.0]
    gradient = jax.grad(lambda y: safe_divide(jnp.ones(2), y).sum())(y)
    assert gradient.tolist() == [-0.25, 0.0]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norm_neither_overflows_nor_vanishes(scale):
    x = np.array([3.0, -4.0], np.float32) * np.float32(scale)
    np.testing.assert_allclose(norm(jnp.asarray(x)), 5 * scale, rtol=1e-6)


def test_norm_of_nothing_and_of_zeros_is_zero():
    assert float(norm(jnp.zeros(3))) == 0
    assert float(norm(jnp.zeros((0,)))) == 0


@pytest.mark.parametrize("shape", [(), (5,), (300, 7), (40, 8, 9)])
def test_random_words_are_uniform_and_independent(key, shape):
    words = np.asarray(random_words(key, jnp.zeros(shape)))
    assert words.shape == shape
    assert words.dtype == np.uint16
    np.testing.assert_array_equal(words, random_words(key, jnp.zeros(shape)))
    if words.size < 1000:
        return
    # Five standard errors of a mean, and of a correlation, of that many.
    error = 5 / np.sqrt(words.size)
    centred = words / 2.0**16 - 0.5
    assert abs(centred.mean()) < error / np.sqrt(12)
    for axis in range(words.ndim):
        pairs = np.delete(centred, 0, axis) * np.delete(centred, -1, axis)
        assert abs(12 * pairs.mean()) < 1.2 * error
    bits = np.unpackbits(words.reshape(-1, 1).view(np.uint8), axis=1)
    assert np.all(np.abs(bits.mean(axis=0) - 0.5) < error / 2)


def test_random_words_are_the_blocks_of_threefry():
    key = jax.random.key(3)
    first, second = jax.random.key_data(key)
    row, block = jnp.mgrid[:5, :6].astype(jnp.uint32)
    x, y = threefry2x32_p.bind(first, second, row, block)
    quarters = [part.astype(jnp.uint16) for z in (x, y) for part in (z, z >> 16)]
    np.testing.assert_array_equal(
        random_words(key, jnp.zeros((5, 22))), jnp.concatenate(quarters, axis=1)[:, :22]
    )


def test_random_words_of_other_generators():
    key = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(
        random_words(key, jnp.zeros((3, 5))), jax.random.bits(key, (3, 5), jnp.uint16)
    )
