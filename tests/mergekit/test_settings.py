"""Values of parameters: filters, gradients over layers, levels; and rules from them."""

import pytest

from jaxmerge.mergekit.settings import (
    as_rules,
    has_gradient,
    setting_problem,
    value_of,
)
from jaxmerge.tree import first_match

FILTERS = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.5}]


@pytest.mark.parametrize(
    ("setting", "position", "want"),
    [
        (0.3, 0.9, 0.3),
        ([0, 1], 0.25, 0.25),
        ([0, 1, 0], 0.75, 0.5),
        ([0, 1, 0], 1.0, 0),
        ([5], 0.5, 5),
        ([True, False], 0.9, True),
        ([True, False], 1.0, False),
    ],
)
def test_gradients_run_evenly_over_the_layers(setting, position, want):
    assert value_of("p", [{"p": setting}], "any", position) == want
    assert has_gradient([{"value": setting}]) == has_gradient(setting)


def test_the_first_filter_that_is_part_of_the_name_counts():
    def value(name, *levels):
        return value_of("t", [{"t": FILTERS}, *levels], name, 0.5)

    assert value("layers.0.self_attn.mlp") == 0.5
    assert value("layers.0.mlp.up") == 0.5
    assert value("norm") is None
    assert value("norm", {"weight": 3}, {"t": {"filter": "*", "value": 2}}) == 2


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ("x", float, "must be a number, found 'x'"),
        (True, float, "must be a number, found True"),
        (None, float, "must be a number, found None"),
        (1.5, int, "must be a whole number, found 1.5"),
        ([1, 2], int, "must be a whole number, which has no gradient"),
        (1, bool, "must be true or false, found 1"),
        ([], float, "is an empty list"),
        ([0, {"value": 1}], float, "must be a list of {filter, value}, found 0"),
        ([{"filtr": "mlp", "value": 1}], float, "must be a list of {filter, value}"),
        ([{"filter": 1, "value": 1}], float, "has the filter 1, which must be text"),
        ([{"filter": "a", "value": {}}], float, "no plain value for the filter 'a'"),
        ([{"filter": "a"}], float, "no plain value for the filter 'a'"),
        ([{"value": [0, "a"]}], float, "must be a number, found 'a'"),
    ],
)
def test_what_is_no_setting(setting, kind, message):
    assert message in setting_problem(setting, kind)


@pytest.mark.parametrize("setting", [1, 0.5, [0, 1.0], FILTERS, FILTERS[0]])
def test_what_is_one(setting):
    assert setting_problem(setting, float) == ""


def test_rules_give_each_leaf_its_value_and_are_few():
    values = {"embed.weight": 0.0}
    for layer in range(12):
        for expert in range(8):
            values[f"h.{layer}.experts.{expert}.up"] = layer / 11
        values[f"h.{layer}.attn.q"] = 0.5
    values["h.3.experts.5.up"] = 9.0
    rules = as_rules(values)
    assert isinstance(rules, dict)
    assert {name: first_match(rules, name) for name in values} == values
    assert len(rules) == 14
    assert sum(map(len, rules)) < 800


def test_rules_of_one_value_are_that_value():
    assert as_rules({"a": 0.5, "b": 0.5}) == 0.5
