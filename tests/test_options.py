import jax
import jax.numpy as jnp
import pytest

from jaxmerge.options import Leaf, choice, number, per_leaf, per_model

LEAF = Leaf("ties", "mlp/kernel", (4, 3), models=2)


def test_one_number_serves_all_models():
    assert per_model(LEAF, "weights", 0.5) == [0.5, 0.5]


def test_one_number_per_model():
    assert per_model(LEAF, "weights", (1, 2)) == [1.0, 2.0]
    assert [float(w) for w in per_model(LEAF, "weights", jnp.array([1.0, 2.0]))] == [
        1,
        2,
    ]


def test_rules_pick_by_path_and_may_give_one_number_per_model():
    rules = {".*/bias": 1.0, "mlp/.*": [0.1, 0.2]}
    assert per_model(LEAF, "density", rules) == [0.1, 0.2]


def test_each_model_may_have_its_own_rules():
    assert per_model(LEAF, "weights", [{".*": 1.0}, {"mlp/.*": 2.0}]) == [1.0, 2.0]


def test_traced_numbers_pass_unless_they_set_a_count():
    assert jax.jit(lambda x: per_leaf(LEAF, "scale", x) * 2)(1.5) == 3
    with pytest.raises(ValueError, match="density of leaf 'mlp/kernel' is traced"):
        jax.jit(lambda x: per_leaf(LEAF, "density", x, static=True))(0.5)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (1.5, r"density of leaf 'mlp/kernel' is 1.5; it must be in \(0, 1\]"),
        (0, r"is 0; it must be in \(0, 1\]"),
        (float("nan"), "is nan, not finite"),
        ([0.1, 2.0], r"density\[1\] of leaf 'mlp/kernel' is 2"),
        ([0.1], "has 1 values for 2 models"),
        ({"head/.*": 0.1}, "no rule matches the whole path; end the rules with"),
        ("high", "is 'high'; it must be one number"),
        ([[0.1, 0.2], 0.3], r"is \[0.1, 0.2\]; it must be one number"),
    ],
)
def test_invalid_options_are_named(option, message):
    with pytest.raises(ValueError, match=f"^ties: .*{message}"):
        per_model(LEAF, "density", option, "(0, 1]")


def test_one_number_for_all_leaves_is_checked_without_a_leaf():
    assert number("star", "share", 0.4, "(0, 1]") == 0.4
    assert jax.jit(lambda x: number("star", "share", x, "(0, 1]"))(2.0) == 2
    with pytest.raises(ValueError, match=r"^star: share is 0; it must be in \(0, 1\]"):
        number("star", "share", 0.0, "(0, 1]")
    with pytest.raises(ValueError, match=r"^star: share is {}; it must be one number."):
        number("star", "share", {})
    with pytest.raises(ValueError, match=r"^cart: rank_share is traced, but it sets"):
        jax.jit(lambda x: number("cart", "rank_share", x, static=True))(0.5)


def test_unknown_choices_list_the_known_ones():
    with pytest.raises(
        ValueError, match="ties: vote is 'most'; it must be one of 'a', 'b'"
    ):
        choice("ties", "vote", "most", ("a", "b"))


def test_size_counts_the_entries_of_one_unit():
    assert LEAF.size == 12
    assert LEAF._replace(units=(0,)).size == 3
