"""Options of merge methods: one number, one per model, or rules from leaf paths.

Options are checked from metadata alone, before any arithmetic.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxmerge.tree import first_match

PerLeaf = float | Array | Mapping[str, Any]
"""A number, or rules from leaf paths to numbers: `{".*mlp.*": 0.3, ".*": 0.5}`."""

PerModel = PerLeaf | Sequence[PerLeaf]
"""As `PerLeaf`, or one such value per model; the values of rules may be per model."""


class Leaf(NamedTuple):
    """What is known of a leaf before any arithmetic: all that an option may depend on.

    Attributes:
        method: the merge method, for messages.
        path: where the leaf is.
        shape: its shape, stacked layers included.
        models: how many models are merged.
        units: the axes along which independent parts lie (layers, rows); the kernel
            sees one part at a time.
    """

    method: str
    path: str
    shape: tuple[int, ...]
    models: int
    units: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """The number of entries that the kernel sees at a time."""
        return int(
            np.prod([n for i, n in enumerate(self.shape) if i not in self.units])
        )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A hashable option of one leaf that is compiled in, among numbers that are not."""

    value: Any


def per_leaf(
    leaf: Leaf, name: str, option: PerLeaf, within: str = "", static: bool = False
) -> Any:
    """The value of an option for one leaf.

    Args:
        leaf: the leaf.
        name: the option, for messages.
        option: a number or rules.
        within: the interval that numbers must lie in, such as `"(0, 1]"`.
        static: whether the number sets a count or a shape and so cannot be traced.

    Returns:
        A Python float, or the array that was given.

    Raises:
        ValueError: no rule matches, not one number, or a number outside `within`.
    """
    if isinstance(option, Mapping):
        return per_leaf(leaf, name, _rule(leaf, name, option), within, static)
    if not _is_number(option):
        raise ValueError(
            f"{_option_of(leaf, name)} is {option!r}; it must be one number, "
            "or rules from leaf paths to numbers."
        )
    return _checked(_option_of(leaf, name), option, within, static)


def per_model(
    leaf: Leaf, name: str, option: PerModel, within: str = "", static: bool = False
) -> list[Any]:
    """The values of an option for one leaf, one per model; else as `per_leaf`."""
    if isinstance(option, Mapping):
        return per_model(leaf, name, _rule(leaf, name, option), within, static)
    if _is_number(option) or isinstance(option, str):
        value = per_leaf(leaf, name, option, within, static)  # type: ignore[arg-type]
        return [value] * leaf.models
    if not isinstance(option, Sequence | np.ndarray | jax.Array):
        raise ValueError(
            f"{_option_of(leaf, name)} is {option!r}; it must be a number, one per "
            "model, or rules from leaf paths."
        )
    values = list(option)
    if len(values) != leaf.models:
        raise ValueError(
            f"{_option_of(leaf, name)} has {len(values)} values "
            f"for {leaf.models} models; give one number or one per model."
        )
    return [
        per_leaf(leaf, f"{name}[{i}]", value, within, static)
        for i, value in enumerate(values)
    ]


def number(
    method: str, name: str, option: Any, within: str = "", static: bool = False
) -> Any:
    """The value of an option that is one number for all leaves; else as `per_leaf`."""
    if not _is_number(option):
        raise ValueError(f"{method}: {name} is {option!r}; it must be one number.")
    return _checked(f"{method}: {name}", option, within, static)


def choice(method: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """Checks that `value` is one of `choices`.

    Raises:
        ValueError: it is not.
    """
    if not any(value is known or value == known for known in choices):
        raise ValueError(
            f"{method}: {name} is {value!r}; it must be one of "
            + ", ".join(repr(c) for c in choices)
            + "."
        )


def whole_number(method: str, name: str, value: Any, *, least: int) -> int:
    """Checks that `value` is a whole number of at least `least`.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{method}: {name} is {value!r}; it must be a whole number of at least "
            f"{least}."
        )
    return value


def without_effect(
    method: str, name: str, value: Any, default: Any, needs: str
) -> None:
    """Checks that an option that has no effect was left alone.

    Raises:
        ValueError: it was not; the message says what it `needs` to have an effect.
    """
    if isinstance(value, Tracer) or np.any(value != default):
        raise ValueError(
            f"{method}: {name} has no effect without {needs}; leave {name} out, or "
            f"set {needs}."
        )


def _checked(label: str, option: Any, within: str, static: bool) -> Any:
    if isinstance(option, Tracer):
        if static:
            raise ValueError(
                f"{label} is traced, but it sets a count; "
                "pass a Python number (under jit: a static argument)."
            )
        return option
    if not math.isfinite(option):
        raise ValueError(f"{label} is {float(option)}, not finite.")
    if within and not _inside(float(option), within):
        raise ValueError(f"{label} is {float(option):g}; it must be in {within}.")
    return option if isinstance(option, jax.Array) and not static else float(option)


def _is_number(option: Any) -> bool:
    kinds = (int, float, np.number, np.ndarray, jax.Array)
    return (
        isinstance(option, kinds)
        and np.ndim(option) == 0
        and not isinstance(option, bool)
    )


def _rule(leaf: Leaf, name: str, rules: Mapping[str, Any]) -> Any:
    try:
        return first_match(rules, leaf.path)
    except KeyError:
        raise ValueError(
            f"{_option_of(leaf, name)}: no rule matches the whole path; "
            "end the rules with '.*' for all other leaves."
        ) from None


def _option_of(leaf: Leaf, name: str) -> str:
    return f"{leaf.method}: {name} of leaf {leaf.path!r}"


def _inside(x: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low < x if interval[0] == "(" else low <= x
    return above and (x < high if interval[-1] == ")" else x <= high)
