"""Scores: what counts as one, and in which order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.tuning.scoring import checked_score, mean_score, table_of


def test_numbers_rows_and_dicts_have_a_mean_in_float64():
    fine = 1 + 1e-12
    for score in (fine, np.float64(fine), [fine, fine], {"a": fine, "b": fine}):
        assert mean_score("test", score) == fine
    assert mean_score("test", jnp.bfloat16([1.0, 2.0])) == 1.5
    assert mean_score("test", {"a": jnp.ones(()), "b": 2}) == 1.5
    assert np.isnan(mean_score("test", [1.0, np.nan]))


def test_dicts_keep_their_order_through_a_program():
    def score(x):
        return checked_score("test", {"b": x, "a": 2 * x, "c": 0.0})

    found = jax.vmap(score)(jnp.arange(2.0))
    assert list(found) == ["b", "a", "c"]
    assert table_of(found).tolist() == [[0, 0, 0], [1, 2, 0]]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (None, "score returns None; let it return one number, a row of them, or"),
        ("good", "score returns 'good'"),
        ([], r"score returns \[\]"),
        ([[1.0], [1.0, 2.0]], "score returns"),
        (jnp.ones((2, 3)), r"score returns an array of shape \(2, 3\)"),
        ({}, "score returns an empty dict"),
        ({"a": jnp.ones(2)}, r"a dict with an array of shape \(2,\) for 'a'"),
        ({"a": {"accuracy": 1.0, "cross_entropy": 1.0}}, "a dict with .* for 'a'"),
        (
            {"accuracy": 1.0, "cross_entropy": 1.0},
            "returns accuracy and cross_entropy, of which a mean says nothing",
        ),
    ],
)
def test_errors(score, message):
    with pytest.raises(ValueError, match=f"^test: .*{message}"):
        mean_score("test", score)
