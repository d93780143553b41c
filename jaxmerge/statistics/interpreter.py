"""Runs a model's jaxpr and takes the sums of a plan on the way.

Sums over inputs are taken as the model runs, and leave loops and branches as further
results. Sums over output gradients are taken on the way back: an identity, a tap, sits
behind each weight, and what it passes back to its second argument is not a gradient but
the sum that is wanted. JAX then carries these sums through loops by itself.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge import jaxprs, sharding
from jaxmerge.jaxprs import Body, Equation
from jaxmerge.statistics import moments
from jaxmerge.statistics.plan import (
    Action,
    Contract,
    Convolve,
    Key,
    LookUp,
    Place,
    Plan,
    Scale,
    keys_of,
)

Sums = dict[Key, tuple[Array, ...]]
"""The arrays of each sum, by key."""

Taps = Mapping[Key, Array]


class _Run(NamedTuple):
    """What stays the same throughout a run.

    Attributes:
        plan: what there is to measure.
        actions: the part of it that is wanted.
        frames: the places of all equations that hold some of it.
        wanted: the keys of sums to take on the way, not on the way back.
        mask: which tokens count.
    """

    plan: Plan
    actions: dict[Place, list[Action]]
    frames: set[Place]
    wanted: frozenset[Key]
    mask: Array | None


def run(
    plan: Plan,
    args: Sequence[Array],
    wanted: frozenset[Key],
    taps: Taps,
    mask: Array | None,
) -> tuple[list[Array], Sums]:
    """Runs a model.

    Args:
        plan: the plan of the model.
        args: its flat arguments.
        wanted: the keys of sums to take on the way.
        taps: zeros, by the keys of sums to take on the way back; what is the gradient
            by them elsewhere is the sum here.
        mask: which tokens count, (examples, tokens).

    Returns:
        The flat results, and the sums.
    """
    keys = wanted | taps.keys()
    actions = {
        place: chosen
        for place, every in plan.actions.items()
        if (chosen := [act for act in every if keys.intersection(keys_of(act))])
    }
    frames = {place[:n] for place in actions for n in range(len(place))}
    state = _Run(plan, actions, frames, wanted, mask)
    return _evaluate(state, plan.body, args, (), taps)


def _evaluate(
    run: _Run, body: Body, args: Sequence[Any], frame: Place, taps: Taps
) -> tuple[list[Any], Sums]:
    jaxpr = body.jaxpr
    known = dict(zip(jaxpr.constvars, body.consts, strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))
    sums: Sums = {}

    def read(eqn: Equation) -> list[Any]:
        return [a.val if jaxprs.is_literal(a) else known[a] for a in eqn.invars]

    def scaled_by(chain: Sequence[tuple[int, int]]) -> Array:
        """What a leaf is multiplied with in equations: what they make of ones."""
        factor = None
        for index, operand in chain:
            eqn = jaxpr.eqns[index]
            operands = read(eqn)
            operands[operand] = (
                jnp.ones_like(operands[operand]) if factor is None else factor
            )
            results = jaxprs.bind(jaxpr, eqn, operands)
            factor = results[operand if len(results) > 1 else 0]
        return jnp.ones(()) if factor is None else factor

    for index, eqn in enumerate(jaxpr.eqns):
        place, operands = (*frame, index), read(eqn)
        if place in run.frames:
            results, inner = _inside(run, eqn, operands, place, taps)
            sums |= inner
        else:
            results = jaxprs.bind(jaxpr, eqn, operands)
        for action in run.actions.get(place, ()):
            match action:
                case Contract() | Convolve():
                    if action.gram is not None and action.gram in run.wanted:
                        x = operands[action.data]
                        sums[action.gram] = moments.of_input(action, eqn, x, run.mask)
                    if action.gradient is not None and action.gradient in taps:
                        tap = _tap(action, eqn)
                        results = [tap(results[0], taps[action.gradient], run.mask)]
                case Scale():
                    factor = scaled_by(action.chain)
                    sums[action.key] = (moments.of_factor(action, factor, run.mask),)
                case LookUp(key, kept):
                    table, rows = operands
                    sums[key] = (moments.of_rows(eqn, table, rows, kept, run.mask),)
        known.update(zip(eqn.outvars, results, strict=True))
    return [a.val if jaxprs.is_literal(a) else known[a] for a in jaxpr.outvars], sums


def _tap(
    action: Contract | Convolve, eqn: Equation
) -> Callable[[Array, Array, Array | None], Array]:
    """An identity in its first argument; it hands back second moments to the second."""

    @jax.custom_vjp
    def tap(result: Array, sum: Array, mask: Array | None) -> Array:
        return result

    def forward(result: Array, sum: Array, mask: Array | None) -> tuple[Array, Any]:
        return result, mask

    def backward(mask: Array | None, gradient: Array) -> tuple[Array, Array, None]:
        return gradient, moments.of_result(action, eqn, gradient, mask), None

    tap.defvjp(forward, backward)
    return tap


def _inside(
    run: _Run, eqn: Equation, operands: list[Any], place: Place, taps: Taps
) -> tuple[list[Any], Sums]:
    """Runs an equation that holds a jaxpr in which there is something to measure."""
    primitive = eqn.primitive.name
    if primitive in jaxprs.CHECKPOINTS:
        again = jax.checkpoint(
            lambda operands, taps: _evaluate(
                run, jaxprs.called(eqn), operands, place, taps
            ),
            policy=eqn.params["policy"],
            prevent_cse=eqn.params["prevent_cse"],
        )
        return again(operands, taps)
    if primitive in jaxprs.CALLS:
        return _evaluate(run, jaxprs.called(eqn), operands, place, taps)
    return {"scan": _scan, "while": _while, "cond": _cond}[primitive](
        run, eqn, operands, place, taps
    )


def _scan(
    run: _Run, eqn: Equation, operands: list[Any], place: Place, taps: Taps
) -> tuple[list[Any], Sums]:
    loop = jaxprs.scan_of(eqn)
    constants, carry = operands[loop.constants], operands[loop.carry]
    stacked = {key for key in run.plan.levels if run.plan.is_stacked(key, place)}
    along = {key: tap for key, tap in taps.items() if key in stacked}

    def step(state, xs):
        (carry, total), (xs, along) = state, xs
        args = [*constants, *carry, *xs]
        results, sums = _evaluate(run, loop.body, args, place, {**taps, **along})
        rows = {key: sums.pop(key) for key in stacked & sums.keys()}
        end = len(carry)
        return (results[:end], _add(total, sums)), (results[end:], rows)

    (carry, total), (outputs, rows) = jax.lax.scan(
        step,
        (carry, _zeros(run, place, operands, without=stacked)),
        (operands[loop.xs], along),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *outputs], total | rows


def _while(
    run: _Run, eqn: Equation, operands: list[Any], place: Place, taps: Taps
) -> tuple[list[Any], Sums]:
    loop = jaxprs.while_of(eqn)
    condition = jaxprs.body_of(eqn.params["cond_jaxpr"])
    known = operands[: eqn.params["cond_nconsts"]]

    def goes_on(state):
        results, _ = _evaluate(run, condition, [*known, *state[0]], (*place, -1), {})
        return results[0]

    def step(state):
        carry, total = state
        args = [*operands[loop.constants], *carry]
        carry, sums = _evaluate(run, loop.body, args, place, taps)
        return carry, _add(total, sums)

    start = (operands[loop.carry], _zeros(run, place, operands))
    return jax.lax.while_loop(goes_on, step, start)


def _cond(
    run: _Run, eqn: Equation, operands: list[Any], place: Place, taps: Taps
) -> tuple[list[Any], Sums]:
    which, *operands = operands
    nothing = _zeros(run, place, operands)

    def branch(number: int, body: Body) -> Callable[..., Any]:
        def run_and_fill(*args):
            results, sums = _evaluate(run, body, args, (*place, number), taps)
            return results, nothing | sums

        return run_and_fill

    branches = [branch(*pair) for pair in enumerate(jaxprs.branches_of(eqn))]
    return jax.lax.switch(which, branches, *operands)


def _add(total: Sums, sums: Sums) -> Sums:
    return jax.tree.map(jnp.add, total, sums)


def _zeros(
    run: _Run, place: Place, operands: list[Any], without: Collection[Key] = ()
) -> Sums:
    """Zeros for what is taken inside an equation, as it is seen from there."""
    keys = {
        key
        for at, actions in run.actions.items()
        if at[: len(place)] == place
        for action in actions
        for key in keys_of(action)
    }
    mesh = sharding.mesh_of(*operands)
    copies = mesh and NamedSharding(mesh, PartitionSpec())
    return {
        key: tuple(
            sharding.keep(jnp.zeros(shape, jnp.float32), copies)
            for shape in run.plan.shapes_inside(key, place)
        )
        for key in (keys & run.wanted) - set(without)
    }
