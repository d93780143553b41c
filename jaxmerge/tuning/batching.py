"""One compiled program for a function of many arguments, in bounded memory."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.costs import footprint
from jaxmerge.tuning.hoisting import hoist


class Batched(NamedTuple):
    """A function of one row, for many rows at a time.

    Attributes:
        run: from rows (n, k) to results (n, ...); compiled once for each n.
        together: how many rows are computed at a time.
    """

    run: Callable[[Array], Any]
    together: int


def batch(function: Callable[[Array], Any], width: int, memory: int) -> Batched:
    """Maps a function over rows: vmapped as far as memory goes, then one by one.

    Args:
        function: of a row (width,), which JAX can trace.
        width: the numbers in a row.
        memory: bytes, on each device, for what is computed from the rows. Where one
            row takes more, rows are computed alone. What does not depend on a row is
            computed once, and comes on top.
    """
    row = jax.ShapeDtypeStruct((width,), jnp.result_type(float))
    values, run_one = hoist(function, row)

    def run_all(values: list[Array], rows: Array) -> Any:
        return jax.vmap(functools.partial(run_one, values))(rows)

    # Of a row alone, the compiler may keep nothing where it keeps arrays of several.
    needed = footprint(run_all, values, jax.ShapeDtypeStruct((2, width), row.dtype))
    together = max(1, 2 * memory // max(1, needed.temporary + needed.results))

    @jax.jit
    def run(values: list[Array], rows: Array) -> Any:
        # Chunks of one size are compiled once; even ones waste least on padding.
        chunks = max(1, -(-len(rows) // together))
        size = -(-len(rows) // chunks)
        padding = ((0, chunks * size - len(rows)), (0, 0))
        padded = jnp.pad(rows, padding, mode="edge").reshape(chunks, size, width)
        results = jax.lax.map(functools.partial(run_all, values), padded)
        flat = lambda x: x.reshape(chunks * size, *x.shape[2:])[: len(rows)]  # noqa: E731
        return jax.tree.map(flat, results)

    return Batched(functools.partial(run, values), together)
