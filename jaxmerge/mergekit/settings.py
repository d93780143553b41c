"""Values of mergekit's parameters: plain ones, by filter, and along the layers.

A setting is what YAML gives: a value; a gradient, which is a list of values spread
evenly over the layers; or a list of `{filter, value}`, of which the first whose filter
is part of the leaf's name counts.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Level = Mapping[str, Any]
"""The settings of one level of a recipe (source, slice, module, whole) by parameter."""


def setting_problem(setting: Any, kind: type) -> str:
    """What is wrong with the setting of a parameter of type `kind`; empty if nothing.

    Example:
        >>> setting_problem([{"filter": "mlp", "value": [0, "x"]}], float)
        "must be a number, found 'x'"
    """
    return next(_setting_problems(setting, kind), "")


def _setting_problems(setting: Any, kind: type) -> Iterator[str]:
    words = {float: "a number", int: "a whole number", bool: "true or false"}
    if isinstance(setting, list) and not setting:
        yield "is an empty list"
    elif _is_filtered(setting):
        for case in _cases(setting):
            if not isinstance(case, dict) or not case.keys() <= {"filter", "value"}:
                yield f"must be a list of {{filter, value}}, found {case!r}"
            elif not isinstance(case.get("filter", "*"), str | None):
                yield f"has the filter {case['filter']!r}, which must be text"
            elif "value" not in case or _is_filtered(case["value"]):
                yield f"has no plain value for the filter {case.get('filter', '*')!r}"
            else:
                yield from _setting_problems(case["value"], kind)
    elif isinstance(setting, list):
        if kind is int:
            yield "must be a whole number, which has no gradient over the layers"
        for value in setting:
            yield from _setting_problems(value, kind)
    elif kind is float and type(setting) not in (int, float):
        yield f"must be a number, found {setting!r}"
    elif kind is not float and type(setting) is not kind:
        yield f"must be {words[kind]}, found {setting!r}"


def has_gradient(setting: Any) -> bool:
    """Whether a setting depends on the layer."""
    if _is_filtered(setting):
        return any(has_gradient(case["value"]) for case in _cases(setting))
    return isinstance(setting, list) and len(setting) > 1


def value_of(
    parameter: str, levels: Iterable[Level], name: str, position: float
) -> Any | None:
    """The value of a parameter for one leaf, by the first level that has one.

    Args:
        parameter: its name.
        levels: from the narrowest to the widest.
        name: of the leaf, which filters look at.
        position: where among the layers it is, from 0 to 1; 0 outside of them.

    Returns:
        The value, or None if no level has one.

    Example:
        >>> source = {"weight": [{"filter": "mlp", "value": [0, 1]}]}
        >>> value_of("weight", [source, {"weight": 0.3}], "layers.1.mlp.up", 0.25)
        0.25
        >>> value_of("weight", [source, {"weight": 0.3}], "layers.1.norm", 0.25)
        0.3
    """
    for level in levels:
        if parameter in level:
            value = _value_at(level[parameter], name, position)
            if value is not None:
                return value
    return None


def _value_at(setting: Any, name: str, position: float) -> Any | None:
    if _is_filtered(setting):
        for case in _cases(setting):
            text = case.get("filter")
            if text is None or text == "*" or text in name:
                return _value_at(case["value"], name, position)
        return None
    return _along(setting, position) if isinstance(setting, list) else setting


def _along(points: list[Any], position: float) -> Any:
    place = position * (len(points) - 1)
    before = int(place)
    if isinstance(points[0], bool):
        return points[before]
    after = min(before + 1, len(points) - 1)
    share = place - before
    return (1 - share) * points[before] + share * points[after]


def _is_filtered(setting: Any) -> bool:
    return isinstance(setting, dict) or (
        isinstance(setting, list) and any(isinstance(each, dict) for each in setting)
    )


def _cases(setting: Any) -> list[Any]:
    return [setting] if isinstance(setting, dict) else setting


def as_rules(values: Mapping[str, float]) -> float | dict[str, float]:
    """Values by leaf as one number, or as rules from leaf paths to numbers.

    Leaves that differ in numbers of their paths alone (experts, layers) share a rule
    where they share the value.

    Example:
        >>> as_rules({"a.0.up": 1.0, "a.1.up": 1.0, "a.0.down": 0.5})
        {'a\\\\.\\\\d+\\\\.down': 0.5, '.*': 1.0}
    """
    by_value: dict[float, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(value, []).append(name)
    if len(by_value) == 1:
        return next(iter(by_value))
    found: dict[str, set[float]] = {}
    for name, value in values.items():
        for pattern in _patterns(name):
            found.setdefault(pattern, set()).add(value)
    *few, (most, _) = sorted(by_value.items(), key=lambda item: len(item[1]))
    rules: dict[str, float] = {}
    for value, names in few:
        patterns = (
            next(p for p in _patterns(name) if len(found[p]) == 1) for name in names
        )
        rules["|".join(dict.fromkeys(patterns))] = value
    return rules | {".*": most}


def _patterns(name: str) -> Iterator[str]:
    """Patterns that match a path, with fewer and fewer of its numbers left open."""
    pieces = [re.escape(piece) for piece in re.split(r"(\d+)", name)]
    numbers = len(pieces) // 2
    for fixed in range(numbers + 1):
        open_from = 2 * fixed + 1
        yield "".join(
            r"\d+" if i % 2 and i >= open_from else piece
            for i, piece in enumerate(pieces)
        )
