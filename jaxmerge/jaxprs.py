"""What differs between versions of JAX in how jaxprs are made, in one place."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

Equation = Any
Atom = Any

LAPACK = frozenset(
    {
        "cholesky",
        "cholesky_update",
        "eig",
        "eigh",
        "geqp3",
        "geqrf",
        "hessenberg",
        "householder_product",
        "lu",
        "ormqr",
        "qr",
        "schur",
        "svd",
        "triangular_solve",
        "tridiagonal",
        "tridiagonal_solve",
    }
)
"""Primitives that LAPACK computes on CPUs."""

CHECKPOINTS = frozenset({"checkpoint", "remat", "remat2"})

PLAIN_CALLS = frozenset({"call", "closed_call", "core_call", "jit", "pjit"})
"""Primitives that do no more than to run one jaxpr once, on their operands."""

CALLS = PLAIN_CALLS | CHECKPOINTS | {"custom_jvp_call", "custom_vjp_call"}
"""The same, and those that have a derivative of their own, or are rematerialised."""

SAME = frozenset(
    {
        "convert_element_type",
        "copy",
        "copy_p",
        "layout_constraint",
        "mesh_cast",
        "name",
        "optimization_barrier",
        "pvary",
        "reduce_precision",
        "reshard",
        "sharding_constraint",
        "stop_gradient",
    }
)
"""Primitives that hand each of their operands on as it is, but for rounding."""


class Body(NamedTuple):
    """A jaxpr inside an equation.

    Attributes:
        jaxpr: its equations.
        consts: arrays that it closes over.
    """

    jaxpr: Any
    consts: Sequence[Any]


class Loop(NamedTuple):
    """A scan or a while loop; operands are constants, then what is carried, then xs."""

    body: Body
    constants: slice
    carry: slice
    xs: slice

    def invariant(self, index: int) -> bool:
        """Whether the loop hands on what it carries at `index` as it is."""
        constants = self.constants.stop - self.constants.start
        variable = self.body.jaxpr.invars[constants + index]
        return self.body.jaxpr.outvars[index] is variable


def body_of(jaxpr: Any) -> Body:
    """Takes apart what parameters of equations hold: jaxprs, closed or not."""
    return Body(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()))


def called(eqn: Equation) -> Body:
    """The body of one of `CALLS`."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return body_of(next(eqn.params[name] for name in names if name in eqn.params))


def scan_of(eqn: Equation) -> Loop:
    """How the operands of a scan are divided."""
    params = eqn.params
    if "num_consts" in params:
        constants, carry = params["num_consts"], params["num_carry"]
    else:
        constants, carry, _ = (len(part) for part in params["ft_in"].unpack())
    return Loop(
        body_of(params["jaxpr"]),
        slice(0, constants),
        slice(constants, constants + carry),
        slice(constants + carry, len(eqn.invars)),
    )


def while_of(eqn: Equation) -> Loop:
    """How the operands of a while loop are divided, without those of its condition."""
    start = eqn.params["cond_nconsts"]
    end = start + eqn.params["body_nconsts"]
    return Loop(
        body_of(eqn.params["body_jaxpr"]),
        slice(start, end),
        slice(end, len(eqn.invars)),
        slice(0),
    )


def branches_of(eqn: Equation) -> list[Body]:
    """The branches of a cond."""
    return [body_of(branch) for branch in eqn.params["branches"]]


def inside(eqn: Equation) -> Iterator[Equation]:
    """The equations of all jaxprs that an equation holds, and of those inside."""
    for held in jax.tree.leaves(eqn.params):
        for inner in getattr(body_of(held).jaxpr, "eqns", ()):
            yield inner
            yield from inside(inner)


def factorises(eqn: Equation) -> bool:
    """Whether LAPACK computes an equation on CPUs, or some of what it holds."""
    return any(each.primitive.name in LAPACK for each in (eqn, *inside(eqn)))


def opens(eqn: Equation) -> bool:
    """Whether the equations of a call may stand in its place.

    Not those of one that leaves `Explicit` axes of a mesh to the compiler: what is
    computed in it has another type outside.
    """
    if eqn.primitive.name not in PLAIN_CALLS:
        return False
    return not any(
        each.primitive.name in ("mesh_cast", "reshard") for each in inside(eqn)
    )


def text_of(closed: Any) -> str | None:
    """What a jaxpr computes, if its text says all: None if it closes over arrays."""
    eqns = [eqn for outer in closed.jaxpr.eqns for eqn in (outer, *inside(outer))]
    held = [body_of(x) for eqn in eqns for x in jax.tree.leaves(eqn.params)]
    closes_over = any(
        len(consts) for consts in (closed.consts, *(b.consts for b in held))
    )
    return None if closes_over else str(closed)


def is_literal(atom: Atom) -> bool:
    """Whether an operand is written out in the jaxpr."""
    return isinstance(atom, core.Literal)


def bind(jaxpr: Any, eqn: Equation, operands: Sequence[Any]) -> list[Any]:
    """Runs one equation of `jaxpr`."""
    given = {
        atom: operand
        for atom, operand in zip(eqn.invars, operands, strict=True)
        if not is_literal(atom)
    }
    alone = jaxpr.replace(
        constvars=[], invars=list(given), outvars=list(eqn.outvars), eqns=[eqn]
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())
