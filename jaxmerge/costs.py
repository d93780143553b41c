"""What a computation costs, from shapes alone: operations, traffic and memory.

Operations are counted in the jaxpr, with textbook numbers for factorisations. Memory
and traffic are what XLA says of the program that it compiles for one device of the
kind that is here; nothing is allocated for that, however large the arrays.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmerge.jaxprs import body_of, branches_of, inside, scan_of, while_of

_USUAL_STEPS = {"_kth_of_bits": 6}
"""How many steps the loop of a compiled function takes, nearly always, by its name."""


class Operations(NamedTuple):
    """How much arithmetic a jaxpr is.

    Attributes:
        flops: operations on numbers, one for each entry of the result of a primitive
            that works entry by entry, two for each product in a matrix product.
        factorising: those of them in SVDs, QR and other factorisations.
        reductions: how many times an array of a given size, or a larger one, boils
            down to a smaller one; on a mesh, devices then tell each other their share.
        reduced: the bytes of what comes out of that.
        open_loops: loops whose number of steps depends on values; one step is counted.
    """

    flops: float = 0
    factorising: float = 0
    reductions: float = 0
    reduced: float = 0
    open_loops: float = 0

    def __add__(self, other: "Operations") -> "Operations":  # type: ignore[override]
        return Operations(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, number: int) -> "Operations":
        """The same, so many times; loops within loops are still the same loops."""
        scaled = Operations(*(number * count for count in self))
        return scaled._replace(open_loops=self.open_loops)


class Footprint(NamedTuple):
    """What a compiled program needs on one device, in bytes.

    Attributes:
        arguments: what it is called with.
        results: what comes out.
        temporary: what it has in memory in between, beside both.
        traffic: what it reads from memory and writes to it.
    """

    arguments: int
    results: int
    temporary: int
    traffic: float


def count_operations(closed: Any, large: int = 1) -> Operations:
    """Counts the arithmetic of a jaxpr.

    Args:
        closed: from `jax.make_jaxpr`.
        large: the entries of a leaf: a reduction counts as one if what it takes has at
            least so many and what comes out fewer.

    Example:
        >>> import jax.numpy as jnp
        >>> matrix = jnp.ones((4, 8))
        >>> count_operations(jax.make_jaxpr(lambda x: jnp.sum(x @ x.T))(matrix)).flops
        272
    """
    total = Operations()
    for eqn in body_of(closed).jaxpr.eqns:
        total += _count(eqn, large)
    return total


def footprint(run: Callable[..., Any], *arguments: Any) -> Footprint:
    """Compiles a function for one device, to know what it needs.

    Args:
        run: a function of pytrees.
        arguments: what it is called with, or the shapes of that.
    """
    traced = jax.jit(run).trace(*arguments)
    return _footprint(_Program(str(traced.jaxpr), traced))


@dataclasses.dataclass(frozen=True)
class _Program:
    """A traced function; those of one text are the same, such as of many layers."""

    text: str
    traced: Any = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=512)
def _footprint(program: _Program) -> Footprint:
    compiled = program.traced.lower().compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Footprint(
        int(memory.argument_size_in_bytes),
        int(memory.output_size_in_bytes),
        int(memory.temp_size_in_bytes)
        + _lapack_workspace(program.traced.jaxpr)
        + _ynnpack_workspace(compiled.as_text()),
        float(costs.get("bytes accessed", 0)),
    )


def _count(eqn: Any, large: int) -> Operations:
    name = eqn.primitive.name
    if name == "scan":
        body = count_operations(scan_of(eqn).body, large)
        return body.times(eqn.params["length"])
    if name == "while":
        body = count_operations(while_of(eqn).body, large)
        return body._replace(open_loops=body.open_loops + 1)
    if name == "cond":
        branches = [count_operations(branch, large) for branch in branches_of(eqn)]
        return max(branches, key=lambda branch: branch.flops)
    if name not in _WITH_COMBINERS:
        bodies = [x for x in jax.tree.leaves(eqn.params) if hasattr(x, "eqns")]
        if bodies:
            found = sum((count_operations(x, large) for x in bodies), Operations())
            steps = _USUAL_STEPS.get(eqn.params.get("name", ""))
            if found.open_loops and steps:
                return found.times(steps)._replace(open_loops=0)
            return found
    shapes: list[Any] = [getattr(x.aval, "shape", ()) for x in eqn.invars]
    sizes = [math.prod(shape) for shape in shapes]
    made = sum(math.prod(getattr(x.aval, "shape", ())) for x in eqn.outvars)
    if name in _FACTORISATIONS:
        *stack, m, n = shapes[0]
        flops = math.prod(stack) * _FACTORISATIONS[name](m, n, eqn)
        return Operations(flops, factorising=flops)
    if name == "dot_general":
        contracted, _ = eqn.params["dimension_numbers"][0]
        flops = 2 * made * math.prod(shapes[0][axis] for axis in contracted)
        return _reducing(flops, sizes, made, large)
    if name in _WITH_COMBINERS or name.startswith(_REDUCTIONS):
        return _reducing(sum(sizes), sizes, made, large)
    if name == "sort":
        length = shapes[0][eqn.params["dimension"]]
        return Operations(sizes[0] * math.ceil(math.log2(max(length, 2))))
    if name == "random_bits":
        return Operations(_THREEFRY * made)
    return Operations(0 if name in _MOVES else made)


def _reducing(flops: float, sizes: list[int], made: int, large: int) -> Operations:
    # A sum over models has the shape of a leaf, and devices make their part of it.
    if max(sizes, default=0) < large or made >= large:
        return Operations(flops)
    return Operations(flops, reductions=1, reduced=4 * made)


def _svd(m: int, n: int, eqn: Any) -> float:
    # R-SVD, figure 8.6.1 there.
    m, n = max(m, n), min(m, n)
    if not eqn.params.get("compute_uv", True):
        return 2 * m * n**2 + 2 * n**3
    return 6 * m * n**2 + 20 * n**3


def _qr(m: int, n: int, eqn: Any) -> float:
    return 2 * n**2 * (m - n / 3) if m > n else 2 * m**2 * (n - m / 3)


_FACTORISATIONS: dict[str, Callable[[int, int, Any], float]] = {
    "svd": _svd,
    "eigh": lambda m, n, eqn: 9 * n**3,
    "qr": _qr,
    "geqrf": _qr,
    "householder_product": _qr,
    "cholesky": lambda m, n, eqn: n**3 / 3,
    "lu": lambda m, n, eqn: m * n**2 - n**3 / 3,
    "triangular_solve": lambda m, n, eqn: n**2 * _columns(eqn),
}
"""Operations for the first operand (m, n); Golub and Van Loan, Matrix Computations."""

_WITH_COMBINERS = frozenset({"reduce", "reduce_window", "scatter-add", "scatter"})
"""Primitives that hold a jaxpr of how two numbers become one."""

_REDUCTIONS = ("argm", "reduce_and", "reduce_m", "reduce_or", "reduce_sum", "reduce_x")
_THREEFRY = 60  # 20 rounds of five operations and six injected keys, for two words.

_MOVES = frozenset(
    {
        *("bitcast_convert_type", "broadcast_in_dim", "concatenate", "copy", "copy_p"),
        *("dynamic_slice", "dynamic_update_slice", "gather", "iota", "pad"),
        *("random_fold_in", "random_seed", "random_unwrap", "random_wrap", "reshape"),
        *("rev", "slice", "split", "squeeze", "stop_gradient", "transpose"),
        *("sharding_constraint", "mesh_cast", "reshard", "platform_index"),
    }
)
"""Primitives that only move entries."""


def _columns(eqn: Any) -> int:
    """How many right sides a triangular system has, per matrix."""
    m, n = eqn.invars[1].aval.shape[-2:]
    return m * n // eqn.invars[0].aval.shape[-1]


def _lapack_workspace(closed: Any) -> int:
    """What LAPACK takes beside what XLA gives it: for one matrix at a time."""
    largest = 0
    for eqn in _all_equations(closed):
        name = eqn.primitive.name
        if name in ("svd", "eigh"):
            n = min(eqn.invars[0].aval.shape[-2:])
            # The least workspace of gesdd with both factors, and of syevd.
            numbers = 4 * n**2 + 7 * n if name == "svd" else 3 * n**2 + 6 * n
            itemsize = np.dtype(eqn.invars[0].aval.dtype).itemsize
            largest = max(largest, numbers * itemsize)
    return largest


def _ynnpack_workspace(compiled: str) -> int:
    """What YNNPACK takes, which computes reductions on CPUs with what leads to them.

    It materialises the arrays in between, the largest of them at a time, unless they
    are summed up to a single number. With a matrix product among them it has all at
    once, and the right factor in the order in which it is read.
    """
    largest = 0
    for name in re.findall(r"%ynn_fusion\S* = \w+\[\d.* calls=%([\w.-]+)", compiled):
        body = compiled.partition(f"\n%{name} (")[2].partition("\n}")[0]
        sizes, made, packed, views = {}, 0, 0, set()
        for root, array, bits, shape, kind, operands in _ARRAY.findall(body):
            entries = math.prod(map(int, filter(None, shape.split(","))))
            sizes[array] = int(bits) * entries // 8
            given = re.findall(r"%([\w.-]+)", operands)
            if kind == "parameter" or (kind == "bitcast" and given[0] in views):
                views.add(array)
            elif not root:
                made += sizes[array]
            if kind == "dot":
                packed += sizes[given[1]]
        at_once = made + packed if packed else max(sizes.values(), default=0)
        largest = max(largest, at_once)
    return largest


_ARRAY = re.compile(
    r"^ *(ROOT )?%(\S+) = [a-z]+(\d+)\S*?\[([\d,]*)\]\S* ([\w-]+)\((.*?)\)", re.M
)


def _all_equations(closed: Any) -> Any:
    for eqn in body_of(closed).jaxpr.eqns:
        yield eqn
        yield from inside(eqn)
