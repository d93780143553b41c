"""How single steps of a program run on some of the rows of their operands."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Step:
    """What an equation does; values are known by number.

    The equation itself would keep a trace of the stack and more in memory.
    """

    primitive: Any
    params: Mapping[str, Any]
    operands: tuple[int, ...]
    results: tuple[int, ...]

    def run(self, values: dict[int, Any], operands: Sequence[Any], **changed: Any):
        """Adds its results to `values`."""
        results = self.primitive.bind(*operands, **{**self.params, **changed})
        if not self.primitive.multiple_results:
            results = [results]
        values |= dict(zip(self.results, results, strict=True))


class Rule(NamedTuple):
    """How a step runs on some rows.

    Attributes:
        run: `run(step, values, operands, start, count)`.
        aligned: those of its operands that are whole, of which it takes the same rows.
    """

    run: Callable[..., None]
    aligned: frozenset[int]


def rule_of(
    step: Step, avals: Sequence[Any], by_rows: Collection[int], rows: int
) -> Rule | None:
    """How a step runs by rows; None if it needs whole arrays, or no rows."""
    name, params = step.primitive.name, step.params
    if any(avals[i].shape[:1] != (rows,) for i in step.results):
        return None
    shapes = [avals[i].shape for i in step.operands]
    whole = [i for i in step.operands if i not in by_rows]
    aligned = frozenset(i for i in whole if avals[i].shape[:1] == (rows,))
    if name == "random_bits":
        # Where every row has a key, draws of rows are rows of all draws.
        return Rule(_same, aligned) if aligned else None
    if name == "iota":
        return Rule(_iota, frozenset())
    if len(whole) == len(step.operands):
        created = name == "broadcast_in_dim" and 0 not in params["broadcast_dimensions"]
        return Rule(_to_shape("shape"), frozenset()) if created else None
    if name in _ENTRYWISE:
        return Rule(_same, aligned)
    if name == "broadcast_in_dim" and params["broadcast_dimensions"][:1] == (0,):
        return Rule(_to_shape("shape"), frozenset())
    if name == "reshape" and shapes[0][0] == rows and params["dimensions"] is None:
        return Rule(_to_shape("new_sizes"), frozenset())
    if name in _AXES_OF and 0 not in _AXES_OF[name](params):
        return Rule(_same, aligned)
    if name in _LOOKUPS and _looks_up_rows(params["dimension_numbers"]):
        return Rule(_same, aligned)
    if name == "slice" and not params["start_indices"][0] and not params["strides"]:
        return Rule(_cut, frozenset())
    if name == "transpose" and params["permutation"][0] == 0:
        return Rule(_same, frozenset())
    return None


# fmt: off
_ENTRYWISE = frozenset({
    "abs", "acos", "add", "add_any", "and", "asin", "atan", "atan2",
    "bitcast_convert_type", "cbrt", "ceil", "clamp", "convert_element_type", "copy",
    "copy_p", "cos", "cosh", "div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge",
    "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max",
    "min", "mul", "ne", "neg", "nextafter", "not", "optimization_barrier", "or",
    "population_count", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin",
    "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "threefry2x32",
    "xor",
})
_REDUCTIONS = (
    "argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or",
    "reduce_prod", "reduce_sum", "reduce_xor",
)
_CUMULATIVE = ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum")
# fmt: on

_AXES_OF: Mapping[str, Callable[[Mapping[str, Any]], Sequence[int]]] = {
    **dict.fromkeys(_REDUCTIONS, lambda params: params["axes"]),
    **dict.fromkeys(_CUMULATIVE, lambda params: (params["axis"],)),
    "concatenate": lambda params: (params["dimension"],),
    "sort": lambda params: (params["dimension"],),
    "stack": lambda params: (params["axis"],),
    "squeeze": lambda params: params["dimensions"],
}
"""Along which axes a primitive does something; it leaves the others alone."""


_LOOKUPS = ("gather", "scatter")


def _looks_up_rows(numbers: Any) -> bool:
    """Whether each row has indices of its own, of places in that row."""
    indices = getattr(numbers, "start_indices_batching_dims", None)
    if indices is None:
        indices = numbers.scatter_indices_batching_dims
    return numbers.operand_batching_dims[:1] == indices[:1] == (0,)


def _same(
    step: Step, values: dict[int, Any], operands: Sequence[Any], start: Any, count: int
) -> None:
    step.run(values, operands)


def _to_shape(name: str) -> Callable[..., None]:
    """Runs a step that says in its parameter `name` what shape its result has."""

    def run(step, values, operands, start, count):
        shape = (count, *step.params[name][1:])
        step.run(values, operands, **{name: shape})

    return run


def _cut(
    step: Step, values: dict[int, Any], operands: Sequence[Any], start: Any, count: int
) -> None:
    ends = (count, *step.params["limit_indices"][1:])
    step.run(values, operands, limit_indices=ends)


def _iota(
    step: Step, values: dict[int, Any], operands: Sequence[Any], start: Any, count: int
) -> None:
    _to_shape("shape")(step, values, operands, start, count)
    if step.params["dimension"] == 0:
        values[step.results[0]] += start.astype(step.params["dtype"])
