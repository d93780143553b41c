"""Functions of whole leaves, computed by rows, against the same functions at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import dividing
from jaxmerge.methods.dropping import keep_probabilities
from jaxmerge.numerics import Count, kth_magnitude, norms, random_words, totals
from jaxmerge.slicing import Sliced, evenly

ROWS = 12


def leaf(seed=0, shape=(ROWS, 3)):
    return jax.random.normal(jax.random.key(seed), shape)


def by_rows(function, *arguments, sliced, rows=5):
    """The results of `function`, and how many rows at most were asked of its inputs."""
    leaves = jax.tree.leaves(arguments)
    asked = []

    def reader(array):
        def read(start, stop):
            asked.append(stop - start)
            return array[start:stop]

        return read

    given = [reader(x) if cut else x for x, cut in zip(leaves, sliced, strict=True)]
    results = Sliced(function, arguments, sliced)(given, lambda _: rows)
    whole = [
        np.concatenate([r(i, min(i + rows, ROWS)) for i in range(0, ROWS, rows)])
        if callable(r)
        else r
        for r in results
    ]
    return whole, max(asked, default=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 2 * x + 1,
        lambda x: x / jnp.sum(jnp.abs(x)),
        lambda x: x - x.mean(axis=1, keepdims=True),
        lambda x: jnp.where(jnp.abs(x) >= kth_magnitude(x, 7), x, 0),
        lambda x: x - kth_magnitude(x - x.max(), Count.of(3)),
        lambda x: jnp.sort(x, axis=1),
        lambda x: jnp.sort(x, axis=0),
        lambda x: jnp.sort((100 * x).astype(jnp.int32), axis=1),
        lambda x: x - jnp.sort((100 * x).astype(jnp.int32), axis=1).max(),
        lambda x: x[::-1],
        lambda x: x @ (x.T @ x),
        lambda x: jnp.cumsum(x, axis=1) + jnp.cumsum(x, axis=0),
        lambda x: x + jnp.arange(ROWS, dtype=x.dtype)[:, None],
        lambda x: x * jnp.arange(3, dtype=x.dtype)[None, :],
        lambda x: jnp.linalg.svd(x, full_matrices=False)[0] * x.min(),
        lambda x: jax.vmap(lambda row: row / (1 + row.max()))(x),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * 0.5 + x, x),
        lambda x: jax.vmap(lambda row: row[jnp.argsort(row)])(x),
        lambda x: jax.vmap(lambda row: row.at[jnp.argmax(row)].set(0.0))(x),
        lambda x: x[jnp.array([*range(6, ROWS), *range(6)])],
        lambda x: jnp.concatenate([x[:, :1], 2 * x[:, 1:]], axis=1),
    ],
)
def test_equals_the_function_at_once(function):
    x = leaf()
    (result,), most = by_rows(function, x, sliced=[True])
    np.testing.assert_allclose(result, function(x), rtol=1e-5, atol=1e-6)
    assert most in (4, 5)


def test_what_depends_on_no_input_reads_none():
    (result,), most = by_rows(jnp.ones_like, leaf(), sliced=[True])
    np.testing.assert_array_equal(result, np.ones((ROWS, 3)))
    assert most == 0


def test_several_leaves_and_what_is_not_sliced():
    def function(leaves, weight, offset):
        total = leaves[0] + weight * leaves[1]
        return total + offset, total.sum()

    arguments = ([leaf(1), leaf(2)], 0.25, leaf(3))
    sliced = [True, True, False, False]
    (merged, total), _ = by_rows(function, *arguments, sliced=sliced)
    expected, expected_total = function(*arguments)
    np.testing.assert_array_equal(merged, expected)
    np.testing.assert_allclose(total, expected_total, rtol=1e-6)


def test_draws_of_rows_are_rows_of_all_draws():
    def by_leaf(x, key):
        return x * random_words(key, x)

    def by_row(x, key):
        keys = jax.random.split(key, ROWS)
        return jax.vmap(lambda key, row: row * random_words(key, row))(keys, x)

    def at_once(x, key):
        return x * jax.random.bits(key, x.shape, jnp.uint16)

    arguments = leaf(), jax.random.key(3)
    for function in (by_leaf, by_row, at_once):
        (result,), most = by_rows(function, *arguments, sliced=[True, False])
        np.testing.assert_array_equal(result, function(*arguments))
        assert most in (4, 5)


def test_vectors():
    x = leaf(shape=(ROWS,))
    (result,), _ = by_rows(lambda x: x / jnp.max(jnp.abs(x)), x, sliced=[True])
    np.testing.assert_array_equal(result, x / jnp.max(jnp.abs(x)))


def test_equal_leaves_are_compiled_once(compilations):
    sliced = Sliced(lambda x: x / jnp.abs(x).max(), (leaf(),), [True])
    arrays = [np.asarray(leaf(seed)) for seed in range(3)]
    counts = []
    for array in arrays:
        (read,) = sliced([lambda start, stop, x=array: x[start:stop]], lambda _: 6)
        read(0, 6), read(6, 12)
        counts.append(len(compilations))
    assert counts[0] == counts[1] == counts[2]


def test_sums_have_the_same_bits_by_rows():
    def normalised(x):
        return x * (totals([jnp.abs(x)])[0] / norms([x, x + 1])[1])

    x = leaf(shape=(4 * ROWS, 2, 300))
    (read,) = Sliced(normalised, (x,), [True])([lambda a, b: x[a:b]], lambda _: 16)
    np.testing.assert_array_equal(read(0, len(x)), jax.jit(normalised)(x))


def test_sums_put_no_array_together():
    x = leaf(shape=(ROWS, 5))

    def held(function):
        return Sliced(function, (x,), [True]).held

    assert held(lambda x: x / norms([x])[0]) == 3 * 4 * ROWS
    assert held(lambda x: x / totals([x, x + 1])[0]) == 2 * 4 * ROWS
    assert held(lambda x: x - kth_magnitude(x, 7)) == x.nbytes


def test_what_is_asked_for_twice_is_put_together_once():
    x = leaf()

    def between(x):
        most, least = kth_magnitude(x, 3), kth_magnitude(x, 30)
        return jnp.where((jnp.abs(x) <= most) & (jnp.abs(x) >= least), x, 0)

    pieces = Sliced(between, (x,), [True]).pieces([x], lambda _: 4)
    assert sum(bool(piece.cut) for piece in pieces) == 2  # Magnitudes, and the result.
    (result,), _ = by_rows(between, x, sliced=[True])
    np.testing.assert_array_equal(result, between(x))


@pytest.mark.parametrize(
    ("function", "uses_lapack"),
    [
        (lambda x: x - kth_magnitude(x, 7), False),
        (lambda x: jnp.linalg.svd(x, full_matrices=False)[0], True),
        (lambda x: jax.lax.map(lambda y: jnp.linalg.inv(y.T @ y), x[None])[0], True),
        (lambda x: jax.scipy.linalg.cho_solve((x.T @ x, True), x.T).T, True),
    ],
)
def test_knows_what_lapack_computes(function, uses_lapack):
    assert Sliced(function, (leaf(),), [True]).uses_lapack == uses_lapack


def ranked(x):
    ranks = jax.vmap(lambda row: jnp.argsort(jnp.argsort(row)))(x)
    return ranks > 0


def drawn(x):
    return random_words(jax.random.key(0), x) < 2**15


@pytest.mark.parametrize(
    ("choose", "primitive"), [(ranked, "sort["), (drawn, "optimization_barrier")]
)
def test_choices_are_made_once_for_all_passes(choose, primitive, monkeypatch):
    x = leaf()

    def l1_kept(x):
        kept = jnp.where(choose(x), x, 0)
        return kept * (jnp.sum(jnp.abs(x)) / jnp.sum(jnp.abs(kept)))

    def passes():
        sliced = Sliced(l1_kept, (x,), [True])
        pieces = list(sliced.pieces([x], lambda _: 5))
        texts = [str(jax.make_jaxpr(p.run)(*p.arguments)) for p in pieces]
        return sum(primitive in text for text in texts), sliced.held

    def check():
        (result,), _ = by_rows(l1_kept, x, sliced=[True])
        np.testing.assert_allclose(result, l1_kept(x), rtol=1e-6)

    check()
    times, held = passes()
    monkeypatch.setattr(dividing, "_MOST_CHOICES", ROWS - 1)
    check()
    again, less = passes()
    assert (times, again) == (1, 2)
    assert held == less + ROWS  # Bytes: a bit for each of three entries of a row.


def test_what_is_chosen_for_each_model_is_made_by_one_program():
    x, keys = leaf(shape=(ROWS, 40)), jax.random.split(jax.random.key(0), 5)

    def thinned(x, keys):
        return sum(jnp.where(random_words(key, x) < 2**15, x, 0) for key in keys)

    sliced = Sliced(thinned, (x, keys), [True, False])
    pieces = list(sliced.pieces([x, keys], lambda _: 4))
    draws = [p for p in pieces if "barrier" in str(jax.make_jaxpr(p.run)(*p.arguments))]
    assert len(draws) == 5
    assert len({id(piece.run) for piece in draws}) == 1
    (rows,) = sliced([lambda a, b: x[a:b], keys], lambda _: 4)
    result = np.concatenate([rows(0, 4), rows(4, 8), rows(8, 12)])
    np.testing.assert_array_equal(result, jax.jit(thinned)(x, keys))


def test_a_choice_that_is_a_result_comes_out():
    x = leaf()
    (chosen, kept), _ = by_rows(
        lambda x: (ranked(x), jnp.where(ranked(x), x, x.sum())), x, sliced=[True]
    )
    np.testing.assert_array_equal(chosen, ranked(x))
    np.testing.assert_allclose(kept, jnp.where(ranked(x), x, x.sum()), rtol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere XLA ranks")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_numpy_ranks_rows_and_each_part_is_read_once(dtype):
    x = jnp.round(3 * leaf(shape=(ROWS, 40))).astype(dtype)  # With many ties.

    def kept(x):
        likely = keep_probabilities(x.astype(jnp.float32), 0.0, 1.0, (0,))
        return jnp.where(likely > 0.5, x, likely)

    sliced = Sliced(kept, (x,), [True])
    pieces = list(sliced.pieces([x], lambda _: 4))
    compiled = dividing.ROWS_IN_NUMPY["_ranks"].compiled
    ranks = [piece for piece in pieces if piece.run is compiled]
    others = [piece for piece in pieces if piece.run is not compiled]
    assert [(p.calls, p.arguments[0].shape) for p in ranks] == [(3, (4, 1, 40))]
    assert [piece.cut for piece in others if piece.cut] == [[0]]
    for piece in others:
        assert "sort[" not in str(jax.make_jaxpr(piece.run)(*piece.arguments))
    starts = []

    def read(start, stop):
        starts.append(start)
        return x[start:stop]

    (rows,) = sliced([read], lambda _: 4)
    result = np.concatenate([rows(0, 4), rows(4, 8), rows(8, 12)])
    assert starts == [0, 4, 8]
    np.testing.assert_array_equal(result, jax.jit(kept)(x))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere XLA searches")
def test_numpy_searches_for_the_kth_magnitude(monkeypatch):
    (name,) = dividing.IN_NUMPY
    search, calls = dividing.IN_NUMPY[name], []

    def counted(*operands):
        calls.append(operands)
        return search(*operands)

    monkeypatch.setitem(dividing.IN_NUMPY, name, counted)

    def twice(x):
        middle = jnp.where(jnp.abs(x) <= kth_magnitude(x, 3), x, 0)
        return jnp.where(jnp.abs(x) >= kth_magnitude(middle, Count.of(20)), middle, 0)

    x = leaf()
    (result,), _ = by_rows(twice, x, sliced=[True])
    assert len(calls) == 2
    np.testing.assert_array_equal(result, twice(x))

    def of_each_layer(x):
        return jax.vmap(
            lambda layer: jnp.where(layer >= kth_magnitude(layer, 2), 1, 0)
        )(x)

    (result,), _ = by_rows(of_each_layer, x, sliced=[True])
    assert len(calls) == 2  # XLA searches in all layers at once.
    np.testing.assert_array_equal(result, of_each_layer(x))


@pytest.mark.parametrize(
    ("number", "most", "sizes"),
    [
        (12, 5, {4}),  # Not 5, 5 and 2.
        (12, 100, {12}),
        (12, 1, {1}),
        (7, 3, {3, 1}),  # No parts of one size, but seven of one row.
    ],
)
def test_parts_are_of_one_size_where_that_is_cheap(number, most, sizes):
    parts = list(evenly(number, most))
    assert {stop - start for start, stop in parts} == sizes
    assert [i for part in parts for i in range(*part)] == list(range(number))
