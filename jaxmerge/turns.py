"""Factorisations of one program that wait for each other.

On CPUs, a factorisation of a batch waits, in a pool of as many threads as there are
cores, for tasks that it hands to that pool. As many of them as there are threads, at
the same time, wait for ever: on two cores, `jax.jit` of a merge by singular vectors
never returned (jaxlib 0.10.2). Nothing is lost by turns, as each keeps all cores busy.

Barriers do not order them, as the compiler for CPUs removes barriers. A choice does
that it cannot foresee: each of them factorises what it is given, unless a number that
the one before has found is infinite and, at the same time, not a number.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.jaxprs import (
    LAPACK,
    OPEN_CALLS,
    Body,
    Equation,
    bind,
    body_of,
    called,
    inside,
    is_literal,
)

Number = Array | None
"""A number that is there when a computation is done, if there was one."""


def in_turn(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does what `fn` does, one factorisation after the other.

    Args:
        fn: of arrays, to a pytree of arrays, which JAX can trace.

    Example:
        >>> def ranks(x, y):
        ...     return [jnp.linalg.matrix_rank(matrix) for matrix in (x, y)]
        >>> [int(rank) for rank in in_turn(ranks)(jnp.eye(2), jnp.zeros((2, 2)))]
        [2, 0]
    """

    def run(*arrays: Array) -> Any:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*arrays)
        results, _ = _walk(body_of(closed), arrays, None)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return run


def _walk(
    body: Body, operands: Sequence[Any], done: Number
) -> tuple[list[Any], Number]:
    """Runs a jaxpr by equations, with `done` of the last factorisation."""
    known = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
    known |= dict(zip(body.jaxpr.invars, operands, strict=True))

    def value(atom: Any) -> Any:
        return atom.val if is_literal(atom) else known[atom]

    for eqn in body.jaxpr.eqns:
        given = [value(atom) for atom in eqn.invars]
        if not _factorises(eqn):
            results = bind(body.jaxpr, eqn, given)
        elif eqn.primitive.name in OPEN_CALLS:
            results, done = _walk(called(eqn), given, done)
        else:
            results = bind(body.jaxpr, eqn, [wait(x, done) for x in given])
            done = done_with(results)
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [value(atom) for atom in body.jaxpr.outvars], done


def _factorises(eqn: Equation) -> bool:
    return any(each.primitive.name in LAPACK for each in (eqn, *inside(eqn)))


def wait(x: Any, done: Number) -> Any:
    """`x`, if it is made of floating-point numbers not before `done` is there."""
    if done is None or not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return x
    never = jnp.isnan(done) & jnp.isinf(done)
    return jnp.where(never, jnp.zeros_like(x), x)


def done_with(results: Any) -> Number:
    """A number that depends on all floating-point results, None if there are none."""
    numbers = [
        x.ravel()[0].real.astype(jnp.float32)
        for x in jax.tree.leaves(results)
        if x.size and jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return jnp.sum(jnp.stack(numbers)) if numbers else None
