"""What an equation does with a leaf, and what there is to measure about it.

Every value of a jaxpr has a tag: a leaf, rearranged (`View`); a leaf that has met some
of the factors it is multiplied with (`Scaled`); a function of leaves from which no
single leaf can be told any more (`Mixed`); a constant; or data.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from jaxmerge.jaxprs import Equation
from jaxmerge.statistics import views
from jaxmerge.statistics.plan import Contract, Convolve, Place, Record
from jaxmerge.statistics.types import Unknown
from jaxmerge.statistics.views import View

Chain = tuple[tuple[int, int], ...]
"""Equations beside each other that a leaf goes through, each with the operand."""


class Data(NamedTuple):
    """A value that depends on the batch.

    Attributes:
        name: equal for equal values.
        distinct: how many of its entries may differ.
    """

    name: Any
    distinct: int


class Scaled(NamedTuple):
    """A leaf times what it has met so far, as in `rsqrt(variance) * scale`.

    Attributes:
        view: the leaf, in the shape of the value.
        chain: what it went through since it was a view.
        complete: whether it has met a factor with an entry for each of its own.
    """

    view: View
    chain: Chain
    complete: bool


class Mixed(NamedTuple):
    """A function of leaves and constants; `blame` says where each leaf was lost."""

    blame: tuple[Unknown, ...]


CONSTANT = "constant"

Tag = View | Scaled | Mixed | Data | str

FACTORS = frozenset({"mul", "div"})
TERMS = frozenset({"add", "add_any", "sub"})

_ENTRYWISE = FACTORS | TERMS | {"exp", "integer_pow", "neg", "rsqrt", "sqrt", "square"}
"""Between a repeated variance and its inverse root, what leaves repeated entries so."""

_FOLLOWED = FACTORS | TERMS | views.REARRANGING
"""Where it goes on with a leaf that has met a part of its factors."""


_FUNCTIONS = frozenset({"cos", "erf", "exp", "logistic", "sin", "tanh"})
"""What is no factor or term any more behind these."""


class At(NamedTuple):
    """An equation, where it is and what its operands are.

    Attributes:
        eqn: the equation.
        tags: of its operands.
        frame: where its jaxpr is.
        number: which equation of the jaxpr it is.
        region: the innermost loop or branch around it. What is in there happens another
            number of times than what is outside.
        users: the equations that use each variable of the jaxpr; None stands for the
            end of the jaxpr.
    """

    eqn: Equation
    tags: list[Tag]
    frame: Place
    number: int
    region: Place
    users: dict[Any, list[Equation | None]]

    @property
    def place(self) -> Place:
        return (*self.frame, self.number)

    @property
    def primitive(self) -> str:
        return self.eqn.primitive.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result, or the first of them."""
        return self.eqn.outvars[0].aval.shape

    @property
    def followers(self) -> list[str]:
        """The names of the operations that use the result, or the first of them."""
        users = self.users.get(self.eqn.outvars[0], [])
        return sorted(user.primitive.name if user else "return" for user in users)


def new_data(variable: Any) -> Data:
    """The tag of data that is like no other."""
    return Data(object(), math.prod(variable.aval.shape))


def view_of(tag: Any) -> View:
    """The leaf in a `View` or `Scaled`."""
    return tag if isinstance(tag, View) else tag.view


def meet(record: Record, at: At) -> list[Tag]:
    """An equation that data enters, and perhaps leaves: records what they do.

    Returns:
        The tags of the results.
    """
    rule = _RULES.get(at.primitive, _no_rule)
    for operand, tag in enumerate(at.tags):
        if isinstance(tag, Mixed):
            record.give_up(*tag.blame)
        elif isinstance(tag, View | Scaled):
            found = rule(record, at, operand)
            if isinstance(found, Scaled):
                return [found]
            if isinstance(found, str):
                record.give_up(Unknown(view_of(tag).leaf, at.primitive, found))
    data = [new_data(variable) for variable in at.eqn.outvars]
    match [tag for tag in at.tags if tag is not CONSTANT]:
        case [Data(_, distinct)] if at.primitive in _ENTRYWISE:
            return [data[0]._replace(distinct=min(distinct, data[0].distinct))]
    return [*data]


# A rule returns the tag of the result where that is not plain data, or the reason why
# it does not know what to measure.


def _no_rule(record: Record, at: At, operand: int) -> str:
    return "there is no rule for this operation"


def _dot(record: Record, at: At, weight: int) -> str | None:
    view, data = at.tags[weight], at.tags[1 - weight]
    if not isinstance(view, View) or not isinstance(data, Data):
        return _CHANGED
    contracted, batch = at.eqn.params["dimension_numbers"]
    stack = [n for n, axis in enumerate(batch[weight]) if not view.repeats(axis)]
    used = {*contracted[weight], *batch[weight]}
    free = [axis for axis in range(len(view.shape)) if axis not in used]
    # The result has the batch axes, then those of the left operand, then of the right.
    end = len(at.shape) if weight == 1 else len(batch[0]) + len(free)
    features = tuple(range(end - len(free), end))
    pairs = sorted(zip(contracted[1 - weight], contracted[weight], strict=True))
    if not any(view.axes[axis] for _, axis in pairs):
        axes = {n: view.axes[axis] for n, axis in enumerate(batch[weight])}
        axes |= {n: view.axes[axis] for n, axis in zip(features, free, strict=True)}
        every = tuple(axes.get(n, ()) for n in range(len(at.shape)))
        seen = view._replace(shape=at.shape, axes=every)
        return record.scale(at.place, at.region, seen, ((at.number, weight),))
    matrices = views.matrices_of(
        view,
        record.shapes[view.leaf],
        stack=[batch[weight][n] for n in stack],
        inputs=[axis for _, axis in pairs],
        outputs=free,
    )
    if isinstance(matrices, str):
        return matrices
    shape = at.eqn.invars[1 - weight].aval.shape
    kept = {*contracted[1 - weight], *(batch[1 - weight][n] for n in stack)}
    action = Contract(
        data=1 - weight,
        stack=tuple(batch[1 - weight][n] for n in stack),
        contracted=tuple(axis for axis, _ in pairs),
        inputs=matrices.inputs,
        result_stack=tuple(stack),
        features=features,
        outputs=matrices.outputs,
    )
    tokens = (_without(shape, kept), _without(at.shape, {*stack, *features}))
    sizes = [view.shape[batch[weight][n]] for n in stack]
    same = (data.name, action.stack, action.contracted, action.inputs)
    return record.contract(
        at.place, at.region, view, matrices, tokens, sizes, same, action
    )


def _without(shape: Sequence[int], axes: Collection[int]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _convolve(record: Record, at: At, weight: int) -> str | None:
    view, data = at.tags[weight], at.tags[0]
    if not isinstance(view, View) or not isinstance(data, Data):
        return _CHANGED
    params = at.eqn.params
    if params["batch_group_count"] != 1:
        return "it groups examples"
    order = params["dimension_numbers"].rhs_spec
    groups = params["feature_group_count"]
    shape = tuple(view.shape[axis] for axis in order)
    kernel = views.rearrange(view, "transpose", shape, {"permutation": order})
    shape = (groups, shape[0] // groups, *shape[1:])
    kernel = kernel and views.rearrange(kernel, "reshape", shape, {})
    if kernel is None:
        return "its groups cut through parts of an axis"
    matrices = views.matrices_of(
        kernel,
        record.shapes[view.leaf],
        stack=[0] if groups > 1 else [],
        inputs=range(2, len(shape)),
        outputs=[1],
    )
    if isinstance(matrices, str):
        return matrices
    action = Convolve(matrices.inputs, matrices.outputs)
    tokens = (_without(at.shape, {params["dimension_numbers"].out_spec[1]}),)
    sizes = [groups] if groups > 1 else []
    same = (data.name, shape[2:], str(params), action.inputs)
    return record.contract(
        at.place, at.region, view, matrices, tokens, sizes, same, action
    )


def _look_up(record: Record, at: At, operand: int) -> str | None:
    view = at.tags[operand]
    if operand != 0 or not isinstance(view, View):
        return _CHANGED
    if sum(size > 1 for size in at.eqn.params["slice_sizes"]) > 1:
        return "matrices of it are looked up, as those of experts"
    tokens = _without(at.shape, at.eqn.params["dimension_numbers"].offset_dims)
    return record.look_up(at.place, at.region, view, tokens)


def _add(record: Record, at: At, operand: int) -> str | None:
    tag = at.tags[operand]
    joined = at.primitive == "concatenate"
    shape = at.eqn.invars[operand].aval.shape if joined else at.shape
    chain = tag.chain if isinstance(tag, Scaled) else ()
    # The derivatives are taken where the last factor came in.
    place = (*at.frame, chain[-1][0]) if chain else at.place
    view = views.broadcast(view_of(tag), shape)
    return record.scale(place, at.region, view, chain)


def _multiply(record: Record, at: At, operand: int) -> Scaled | str | None:
    tag, other = at.tags[operand], at.tags[1 - operand]
    if at.primitive == "div" and operand == 1:
        return "it is divided by"
    if isinstance(other, View | Mixed):
        return "it is multiplied with another leaf"
    last = bool(at.followers) and _FUNCTIONS.issuperset(at.followers)
    complete = isinstance(other, Data) and (
        last or other.distinct == math.prod(at.shape)
    )
    if isinstance(tag, Scaled):
        complete |= tag.complete and tag.view.shape == at.shape
    return wait(record, at, operand, views.broadcast(view_of(tag), at.shape), complete)


def wait(
    record: Record, at: At, operand: int, view: View, complete: bool
) -> Scaled | str | None:
    """A leaf that has met a factor: is that all, or is there another to come?

    A norm may compute `(x - mean) * (rsqrt(variance) * scale)`. What the scale is
    multiplied with is only known after the second product.

    Args:
        operand: where the leaf comes in.
        view: the leaf, in the shape of the result.
        complete: whether a factor has an entry for each of the result.
    """
    tag, out = at.tags[operand], at.eqn.outvars[0]
    chain = (*(tag.chain if isinstance(tag, Scaled) else ()), (at.number, operand))
    if complete and not _grows(out, at.users, math.prod(view.shape)):
        return record.scale(at.place, at.region, view, chain)
    match at.users.get(out):
        case [user] if user is not None and user.primitive.name in _FOLLOWED:
            return Scaled(view, chain, complete)
    return f"it enters {', '.join(at.followers)} before it has met all its factors"


def _grows(value: Any, users: dict[Any, list[Equation | None]], size: int) -> bool:
    """Whether a value of some size is repeated to meet values with more entries."""
    for user in users.get(value, []):
        if user is None:
            continue
        out, name = user.outvars[0], user.primitive.name
        if name in FACTORS | TERMS and math.prod(out.aval.shape) > size:
            return True
        if name in views.REARRANGING and _grows(out, users, size):
            return True
    return False


_CHANGED = "it meets data in another way than as a plain weight"

_RULES: dict[str, Any] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolve,
    "gather": _look_up,
    "concatenate": _add,
    **dict.fromkeys(FACTORS, _multiply),
    **dict.fromkeys(TERMS, _add),
}
