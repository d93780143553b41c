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
    Body,
    bind,
    body_of,
    called,
    factorises,
    is_literal,
    opens,
)

Done = Array | None
"""A number that the last factorisation has found, if there was one."""


def in_turn(
    fn: Callable[..., Any], after: Done = None
) -> Callable[..., tuple[Any, Done]]:
    """A function that does what `fn` does, one factorisation after the other.

    Those in a loop, or in a call with a derivative of its own, count as one.

    Args:
        fn: of arrays, to a pytree of arrays, which JAX can trace.
        after: of the factorisation that the first one is to wait for.

    Returns:
        A function of the same arrays: to the results, and what others wait for.

    Example:
        >>> def ranks(x, y):
        ...     return [jnp.linalg.matrix_rank(matrix) for matrix in (x, y)]
        >>> found, done = in_turn(ranks)(jnp.eye(2), jnp.zeros((2, 2)))
        >>> [int(rank) for rank in found], done.shape
        ([2, 0], ())
    """

    def run(*arrays: Array) -> tuple[Any, Done]:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*arrays)
        results, done = _walk(body_of(closed), arrays, after)
        return jax.tree.unflatten(jax.tree.structure(shapes), results), done

    return run


def _walk(body: Body, operands: Sequence[Any], done: Done) -> tuple[list[Any], Done]:
    known = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
    known |= dict(zip(body.jaxpr.invars, operands, strict=True))

    def value(atom: Any) -> Any:
        return jnp.asarray(atom.val) if is_literal(atom) else known[atom]

    for eqn in body.jaxpr.eqns:
        given = [value(atom) for atom in eqn.invars]
        if not factorises(eqn):
            results = bind(body.jaxpr, eqn, given)
        elif opens(eqn):
            results, done = _walk(called(eqn), given, done)
        else:
            results = bind(body.jaxpr, eqn, [_wait(x, done) for x in given])
            done = _first_number(results, done)
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [value(atom) for atom in body.jaxpr.outvars], done


def _wait(x: Array, done: Done) -> Array:
    """`x`; if it is made of floating-point numbers, not before `done` is there."""
    if done is None or not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    never = jnp.isnan(done) & jnp.isinf(done)
    return jnp.where(never, jnp.zeros_like(x), x)


def _first_number(results: Sequence[Array], default: Done) -> Done:
    for x in results:
        if x.size and jnp.issubdtype(x.dtype, jnp.inexact):
            return x.ravel()[0].real
    return default
