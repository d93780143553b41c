"""What does not depend on coefficients, computed once for all of them.

TIES trims task vectors, TSV-Merge factorises them, and only then do coefficients come
in. Tried one after the other, two hundred coefficients would trim and factorise two
hundred times. Here the jaxpr of a function is cut in two: what its argument has no part
in runs once, the rest as often as there are arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array

from jaxmerge.jaxprs import (
    Body,
    Equation,
    bind,
    body_of,
    called,
    is_literal,
    opens,
)


class Hoisted(NamedTuple):
    """A function of one argument in two parts.

    Attributes:
        values: what does not depend on the argument, computed.
        run: `run(values, argument)`, which closes over no array.
    """

    values: list[Array]
    run: Callable[[list[Array], Any], Any]


def hoist(function: Callable[[Any], Any], example: Any) -> Hoisted:
    """Computes once what a function does not need its argument for.

    Args:
        function: of one pytree of arrays, which JAX can trace. Arrays that it closes
            over become arguments of the compiled program, not part of it. On `Explicit`
            axes of a mesh that may be all, as calls are not looked into there.
        example: an argument, or the shapes of one; all others must be like it.

    Example:
        >>> import jax.numpy as jnp
        >>> table = jnp.arange(4.0)
        >>> values, run = hoist(lambda x: x * jnp.sum(table), 1.0)
        >>> float(values[0]), float(run(values, 0.5))
        (6.0, 3.0)
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(example)
    body = body_of(closed)
    varying = [_ABSENT] * len(body.jaxpr.invars)
    reads: list[int] = []
    consts = list(_consts(body))

    @jax.jit
    def prepare(given: dict[int, Array]) -> list[Array]:
        once = _Once(iter([given[id(x)] for x in consts]), [], {}, reads)
        results = _walk(body, varying, once)
        for result in results:
            once.record(result)
        return once.values

    def run(values: list[Array], argument: Any) -> Any:
        rest = _Rest(iter([values[i] for i in reads]))
        results = _walk(body, jax.tree.leaves(argument), rest)
        leaves = [rest.operand(result) for result in results]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return Hoisted(prepare({id(x): x for x in consts}), run)


_ABSENT: Any = object()
"""Stands, in either part, for what the other part computes."""


class _Free(NamedTuple):
    """A value that costs nothing, and so is made anew in both parts."""

    value: Any


_FREE = frozenset({"broadcast_in_dim", "iota"})


class _Once(NamedTuple):
    """The part that runs once; it writes down what the other one will read.

    Attributes:
        given: the arrays that the function and its calls close over, in order.
        values: what is read, each once.
        places: of values, by identity.
        reads: the places of what is read, in the order of reading.
    """

    given: Iterator[Array]
    values: list[Any]
    places: dict[int, int]
    reads: list[int]

    def const(self) -> Any:
        return next(self.given)

    def record(self, value: Any) -> None:
        if value is _ABSENT or isinstance(value, _Free):
            return
        if id(value) not in self.places:
            self.places[id(value)] = len(self.values)
            self.values.append(value)
        self.reads.append(self.places[id(value)])

    def step(self, jaxpr: Any, eqn: Equation, given: list[Any]) -> list[Any]:
        if not any(x is _ABSENT for x in given):
            return bind(jaxpr, eqn, [_value(x) for x in given])
        for x in given:
            self.record(x)
        return [_ABSENT] * len(eqn.outvars)


class _Rest(NamedTuple):
    """The part that runs for every argument; it reads values in the same order."""

    values: Iterator[Array]

    def const(self) -> Any:
        return _ABSENT

    def operand(self, value: Any) -> Any:
        return next(self.values) if value is _ABSENT else _value(value)

    def step(self, jaxpr: Any, eqn: Equation, given: list[Any]) -> list[Any]:
        if all(x is _ABSENT or isinstance(x, _Free) for x in given):
            return [_ABSENT] * len(eqn.outvars)
        return bind(jaxpr, eqn, [self.operand(x) for x in given])


def _walk(body: Body, operands: Sequence[Any], part: _Once | _Rest) -> list[Any]:
    """Goes through a jaxpr, and the calls in it, in an order that both parts share."""
    jaxpr = body.jaxpr
    known = {variable: part.const() for variable in jaxpr.constvars}
    known |= dict(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Any:
        return _Free(atom.val) if is_literal(atom) else known[atom]

    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if opens(eqn):
            results = _walk(called(eqn), given, part)
        elif name in _FREE and all(isinstance(x, _Free) for x in given):
            results = [_Free(x) for x in bind(jaxpr, eqn, [x.value for x in given])]
        else:
            results = part.step(jaxpr, eqn, given)
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _consts(body: Body) -> Iterator[Array]:
    """What a jaxpr and the calls in it close over, in the order of `_walk`."""
    yield from body.consts
    for eqn in body.jaxpr.eqns:
        if opens(eqn):
            yield from _consts(called(eqn))


def _value(x: Any) -> Any:
    return x.value if isinstance(x, _Free) else x
