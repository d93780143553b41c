"""Follows the leaves of a model through its jaxpr, into calls, loops and branches."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge import jaxprs
from jaxmerge.jaxprs import Body, Equation, Loop
from jaxmerge.statistics import views
from jaxmerge.statistics.plan import Place, Plan, Record
from jaxmerge.statistics.rules import (
    CONSTANT,
    FACTORS,
    TERMS,
    At,
    Data,
    Mixed,
    Scaled,
    Tag,
    meet,
    new_data,
    view_of,
    wait,
)
from jaxmerge.statistics.types import Unknown
from jaxmerge.statistics.views import View
from jaxmerge.tree import Params, is_float, named_leaves


def plan(
    apply: Callable[..., Any],
    params: Params,
    batch: Any,
    mask: tuple[int, ...] | None = None,
) -> Plan:
    """Plans what can be measured in `apply(params, batch)`.

    Args:
        apply: a function that JAX can trace.
        params: a pytree of arrays, tracers or `jax.ShapeDtypeStruct`s, and
        batch: another one.
        mask: the shape of the mask of tokens that count, (examples, tokens).
    """
    closed, results = jax.make_jaxpr(apply, return_shape=True)(params, batch)
    body = jaxprs.body_of(closed)
    leaves = named_leaves(params)
    shapes = {path: np.shape(leaf) for path, leaf in leaves.items() if is_float(leaf)}
    tags: list[Tag] = [
        views.whole(path, shapes[path]) if path in shapes else CONSTANT
        for path in leaves
    ]
    tags += [new_data(variable) for variable in body.jaxpr.invars[len(tags) :]]
    record = Record(shapes, mask)
    _walk(record, body, tags)
    dtypes = {path: str(leaves[path].dtype) for path in shapes}
    return record.plan(body, jax.tree.structure(results), dtypes)


def _walk(
    record: Record,
    body: Body,
    tags: Sequence[Tag],
    frame: Place = (),
    region: Place = (),
) -> list[Tag]:
    """Follows the leaves through a jaxpr.

    Args:
        record: for what is found.
        body: the jaxpr.
        tags: of its inputs.
        frame: where it is.
        region: the innermost loop or branch that it is in.

    Returns:
        The tags of its outputs.
    """
    users = _users(body.jaxpr)
    known: dict[Any, Tag] = dict.fromkeys(body.jaxpr.constvars, CONSTANT)
    known.update(zip(body.jaxpr.invars, tags, strict=True))

    def read(atom: Any) -> Tag:
        return CONSTANT if jaxprs.is_literal(atom) else known[atom]

    for index, eqn in enumerate(body.jaxpr.eqns):
        operands = [read(atom) for atom in eqn.invars]
        found = _equation(record, At(eqn, operands, frame, index, region, users))
        known.update(zip(eqn.outvars, found, strict=True))
    return [read(atom) for atom in body.jaxpr.outvars]


def _users(jaxpr: Any) -> dict[Any, list[Equation | None]]:
    users: dict[Any, list[Equation | None]] = {}
    uses = [(atom, eqn) for eqn in jaxpr.eqns for atom in eqn.invars]
    for atom, user in [*uses, *((atom, None) for atom in jaxpr.outvars)]:
        if not jaxprs.is_literal(atom):
            users.setdefault(atom, []).append(user)
    return users


def _equation(record: Record, at: At) -> list[Tag]:
    if at.primitive in jaxprs.CALLS:
        return _walk(record, jaxprs.called(at.eqn), at.tags, at.place, at.region)
    if at.primitive in _CONTROL:
        return _CONTROL[at.primitive](record, at)
    if at.primitive in views.REARRANGING:
        return [_rearrange(record, at, n) for n in range(len(at.tags))]
    if any(isinstance(tag, Data | Scaled) for tag in at.tags):
        return meet(record, at)
    return _combine(record, at)


def _rearrange(record: Record, at: At, operand: int) -> Tag:
    tag, out = at.tags[operand], at.eqn.outvars[operand]
    if isinstance(tag, Data):
        return tag._replace(name=(at.primitive, str(at.eqn.params), tag.name))
    if not isinstance(tag, View | Scaled):
        return tag
    view = view_of(tag)
    seen = views.rearrange(view, at.primitive, out.aval.shape, at.eqn.params)
    found = "it changes more than the order of values"
    if isinstance(tag, View):
        return seen or Mixed((Unknown(view.leaf, at.primitive, found),))
    if seen is not None:
        found = wait(record, at, operand, seen, tag.complete)
    if isinstance(found, str):
        record.give_up(Unknown(view.leaf, at.primitive, found))
    return found if isinstance(found, Scaled) else new_data(out)


def _combine(record: Record, at: At) -> list[Tag]:
    """An equation whose operands are leaves and constants alone."""
    if all(tag is CONSTANT for tag in at.tags):
        return [CONSTANT for _ in at.eqn.outvars]
    leaves = [n for n, tag in enumerate(at.tags) if isinstance(tag, View)]
    if len(leaves) == 1 and (scale := _number(at, *leaves)) is not None:
        view = view_of(at.tags[leaves[0]])
        return [view._replace(scale=scale * view.scale)]
    if len(at.tags) == 2 and len(leaves) == 1 and CONSTANT in at.tags:
        (operand,) = leaves
        view = views.broadcast(view_of(at.tags[operand]), at.shape)
        if at.primitive in TERMS:
            # The derivative of `1 + scale` is that of `scale`.
            return [view]
        if at.primitive in FACTORS and (at.primitive, operand) != ("div", 1):
            found = wait(record, at, operand, view, complete=False)
            if isinstance(found, Scaled):
                return [found]
    return [Mixed(_blame(at, at.tags))] * len(at.eqn.outvars)


def _number(at: At, leaf: int) -> float | None:
    """What an equation multiplies a leaf with, if that is written out in the jaxpr."""
    if at.primitive == "neg":
        return -1.0
    if at.primitive not in FACTORS or not jaxprs.is_literal(at.eqn.invars[1 - leaf]):
        return None
    number = float(at.eqn.invars[1 - leaf].val)
    if at.primitive == "mul":
        return number
    return 1 / number if leaf == 0 and number else None


def _scan(record: Record, at: At) -> list[Tag]:
    carried, outputs = _loop(record, at, jaxprs.scan_of(at.eqn))
    pairs = zip(outputs, at.eqn.outvars[len(carried) :], strict=True)
    return carried + [
        new_data(out) if isinstance(tag, Data) else _blend(at, [tag])
        for tag, out in pairs
    ]


def _while(record: Record, at: At) -> list[Tag]:
    condition = at.tags[: at.eqn.params["cond_nconsts"]]
    record.give_up(*_blame(at, condition, "it decides when the loop ends"))
    carried, _ = _loop(record, at, jaxprs.while_of(at.eqn))
    return carried


def _loop(record: Record, at: At, loop: Loop) -> tuple[list[Tag], list[Tag]]:
    """What the loop hands out of what it carries, and the other outputs of its body."""
    constants, carry = at.tags[loop.constants], at.tags[loop.carry]
    variables = loop.body.jaxpr.invars[len(constants) :]
    for n, tag in enumerate(carry):
        if not loop.invariant(n):
            record.give_up(*_blame(at, [tag], "it is where a loop starts"))
            carry[n] = new_data(variables[n])
    xs = []
    for tag, variable in zip(at.tags[loop.xs], variables[len(carry) :], strict=True):
        if isinstance(tag, View):
            tag = views.slice_of_scan(tag, at.place)
        xs.append(new_data(variable) if isinstance(tag, Data) else tag)
    inside = [*constants, *carry, *xs]
    found = _walk(record, loop.body, inside, at.place, at.place)
    outside = [
        new_data(out) if isinstance(tag, Data) else tag
        for tag, out in zip(carry, at.eqn.outvars, strict=False)
    ]
    return outside, found[len(carry) :]


def _cond(record: Record, at: At) -> list[Tag]:
    which, *operands = at.tags
    results = []
    for n, body in enumerate(jaxprs.branches_of(at.eqn)):
        place = (*at.place, n)
        results.append(_walk(record, body, operands, place, place))
    outputs = []
    for out, *tags in zip(at.eqn.outvars, *results, strict=True):
        blend = _blend(at, tags)
        if isinstance(which, Data) or any(isinstance(tag, Data) for tag in tags):
            if isinstance(blend, Mixed):
                record.give_up(*blend.blame)
            blend = new_data(out)
        outputs.append(blend)
    return outputs


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond}

_PARTS = frozenset({"slice", "split", "dynamic_slice", "gather"})


def _blend(at: At, tags: Sequence[Tag]) -> Tag:
    """What leaves and constants are after an equation that tells none of them apart."""
    blame = _blame(at, tags)
    return Mixed(blame) if blame else CONSTANT


def _blame(at: At, tags: Sequence[Tag], reason: str = "") -> tuple[Unknown, ...]:
    """Which leaves are lost in an equation."""
    part = at.primitive in _PARTS
    reason = reason or (
        "a part of it is taken" if part else "it is changed before it meets data"
    )
    blame: list[Unknown] = []
    for tag in tags:
        if isinstance(tag, View | Scaled):
            blame.append(Unknown(view_of(tag).leaf, at.primitive, reason))
        elif isinstance(tag, Mixed):
            blame += tag.blame
    return tuple(blame)
