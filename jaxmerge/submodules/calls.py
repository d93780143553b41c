"""The calls of a model's submodules, each as a function of its parameters.

The model runs from its jaxpr, and leaves are followed from the tree to the calls that
take them. So a submodule is known by where its parameters are in the tree, and can run
with the same leaves of other models in their place, on the same inputs.
"""

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core

from jaxmerge import jaxprs
from jaxmerge.jaxprs import Body, Equation
from jaxmerge.leafwise import wide
from jaxmerge.submodules.interception import Mark, keys, listening, mark_of, submodule
from jaxmerge.tree import Params, is_float, named_leaves


class Call(NamedTuple):
    """A call of a submodule; inside of a scan, of one of its layers.

    Attributes:
        path: the path of the submodule.
        base: its parameters that are merged, by leaf path.
        models: the same parameters of other models.
        loops: the scans that slice its parameters, by how many scans are around each.
        problem: why it cannot run with other parameters, if so.
        run: from parameters by leaf path to the results of the call, on its inputs.
        outputs: how many of the results are outputs; those after them are state.
    """

    path: str
    base: dict[str, Array]
    models: list[dict[str, Array]]
    loops: tuple[int, ...]
    problem: str | None
    run: Callable[[dict[str, Array]], list[Array]]
    outputs: int

    def features(self, results: Sequence[Array]) -> list[Array]:
        """The floating-point outputs among results of `run`, in float32 or wider."""
        outputs = results[: self.outputs]
        return [out.astype(wide(out.dtype)) for out in outputs if is_float(out)]


Visit = Callable[[Call], tuple[Sequence[Array], Any] | None]
"""Answers a call with all its results, and with arrays in any structure that are summed
over the calls of a submodule; or with None, and the calls inside of it are visited."""

Sums = dict[tuple[str, tuple[int, ...]], Any]
"""What was answered, by path and loops, with a leading axis for each of the loops."""


def visit_calls(
    apply: Callable[..., Any],
    base: Params,
    models: Sequence[Params],
    batch: Any,
    visit: Visit,
) -> Sums:
    """Runs `apply(base, batch)`, and visits the calls of submodules on the way.

    Calls inside of branches, while loops and `jax.shard_map` cannot be answered; of
    those, the declared ones are visited all the same, for their `problem`.

    Args:
        apply: a function that JAX can trace.
        base: a pytree of arrays.
        models: pytrees like `base`.
        batch: a pytree of arrays.
        visit: what to do at a call. The first is that of `apply`, of empty path.
    """
    with listening():
        body = jaxprs.body_of(jax.make_jaxpr(submodule("", apply))(base, batch))
    of_models = [named_leaves(model) for model in models]
    values = []
    for path, leaf in named_leaves(base).items():
        same = [jnp.asarray(model[path], leaf.dtype) for model in of_models]
        own = _Parameter(path, same) if is_float(leaf) else None
        values.append(_Value(leaf, own, varies=own is not None))
    values += map(_Value, jax.tree.leaves(batch))
    return _walk(body, values, visit, level=0)[1]


class Submodule(NamedTuple):
    """What is known of a submodule before any arithmetic.

    Attributes:
        shapes: the shapes of its leaves as they are in the tree, by path.
        loops: the scans that slice its leaves, along their leading axes.
    """

    shapes: dict[str, tuple[int, ...]]
    loops: tuple[int, ...]


def find_submodules(
    method: str,
    apply: Callable[..., Any],
    base: Params,
    batch: Any,
    patterns: str | Sequence[str],
) -> dict[str, Submodule]:
    """Finds the submodules of a model by their paths, without running it.

    Args:
        method: the caller's name, for messages.
        apply: a function that JAX can trace.
        base: a pytree of arrays.
        batch: a pytree of arrays.
        patterns: regular expressions that match whole paths.

    Raises:
        ValueError: a pattern that no path matches, a submodule that cannot run with
            other parameters, or two that share leaves.
    """
    seen: dict[str, list[Call]] = {}

    def note(call: Call) -> None:
        if call.path:
            seen.setdefault(call.path, []).append(call)

    jax.eval_shape(lambda b, x: visit_calls(apply, b, [], x, note), base, batch)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    matched = {path for p in patterns for path in _matching(method, p, seen)}
    shapes = {path: np.shape(leaf) for path, leaf in named_leaves(base).items()}
    found: dict[str, Submodule] = {}
    owners: dict[str, str] = {}
    for path in filter(matched.__contains__, seen):
        call = _same(method, seen[path])
        for leaf in call.base:
            owner = owners.setdefault(leaf, path)
            if owner != path:
                raise ValueError(
                    f"{method}: submodules {owner!r} and {path!r} share leaf {leaf!r}, "
                    "which can only be merged once; select submodules of which none "
                    "is inside of another."
                )
        found[path] = Submodule({leaf: shapes[leaf] for leaf in call.base}, call.loops)
    return found


def _same(method: str, calls: Sequence[Call]) -> Call:
    """One of several calls of a submodule, checked to be alike."""
    problems = [call.problem for call in calls if call.problem]
    if len({(frozenset(call.base), call.loops) for call in calls}) > 1:
        problems.append("is the name of several, with different parameters")
    if problems:
        raise ValueError(f"{method}: submodule {calls[0].path!r} {problems[0]}.")
    return calls[0]


def _matching(method: str, pattern: str, paths: Iterable[str]) -> list[str]:
    try:
        found = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
        raise ValueError(
            f"{method}: {pattern!r} is no valid regular expression: {error}"
        ) from None
    if found:
        return found
    known = ", ".join(map(repr, paths)) or "none"
    raise ValueError(
        f"{method}: no submodule has a path that {pattern!r} matches. Those found are: "
        f"{known}. Parts of plain functions must be declared with jaxmerge.submodule, "
        "`apply` must give modules the leaves of the tree as they are, and must not "
        "call them inside of branches, while loops or jax.shard_map."
    )


class _Parameter(NamedTuple):
    """Which leaf an array is.

    Attributes:
        path: the path of the leaf.
        models: the same array of other models.
        loops: the scans that have sliced it.
    """

    path: str
    models: Sequence[Array]
    loops: tuple[int, ...] = ()


class _Value(NamedTuple):
    """An array, which leaf it is if it is one, and whether it may depend on leaves."""

    array: Any
    parameter: _Parameter | None = None
    varies: bool = True


def _walk(
    body: Body, values: Sequence[_Value], visit: Visit, level: int
) -> tuple[list[_Value], Sums]:
    """Runs a jaxpr that is inside of `level` scans."""
    known = {
        variable: _Value(const, varies=False)
        for variable, const in zip(body.jaxpr.constvars, body.consts, strict=True)
    }
    known.update(zip(body.jaxpr.invars, values, strict=True))
    sums: Sums = {}

    def read(atom: Any) -> _Value:
        if jaxprs.is_literal(atom):
            return _Value(atom.val, varies=False)
        return known[atom]

    for eqn in body.jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in jaxprs.CALLS:
            results, inner = _enter(eqn, operands, visit, level)
        elif eqn.primitive.name == "scan":
            results, inner = _scan(eqn, operands, visit, level)
        else:
            results, inner = _bind(body.jaxpr, eqn, operands), {}
            for mark in filter(None, map(mark_of, jaxprs.inside(eqn))):
                if mark.name:
                    visit(_impossible(mark.name, _HIDDEN))
        for key, answer in inner.items():
            earlier = sums.get(key)
            sums[key] = (
                answer if earlier is None else jax.tree.map(jnp.add, earlier, answer)
            )
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in body.jaxpr.outvars], sums


def _enter(
    eqn: Equation, operands: Sequence[_Value], visit: Visit, level: int
) -> tuple[list[_Value], Sums]:
    body, mark = jaxprs.called(eqn), mark_of(eqn)
    call = mark and _call(body, operands, mark)
    answer = call and visit(call)
    if call is None or answer is None:
        return _walk(body, operands, visit, level)
    results, told = answer
    return [_Value(result) for result in results], {(call.path, call.loops): told}


def _call(body: Body, operands: Sequence[_Value], mark: Mark) -> Call | None:
    start = len(operands) - len(mark.depths)
    own = {
        index: value.parameter
        for index, value in enumerate(operands)
        if index >= start and value.parameter is not None
    }
    if not own:
        return _impossible(mark.name, _COMPUTED) if mark.name else None
    path = mark.name
    if path is None:
        path = statistics.mode(
            "/".join(keys(leaf.path)[: -mark.depths[index - start]])
            for index, leaf in own.items()
        )
    problem = None
    if any(value.varies and value.parameter is None for value in operands[start:]):
        problem = _COMPUTED
    if len({leaf.loops for leaf in own.values()}) > 1:
        problem = (
            "is in a scan over some of its leaves, while others have no axis of layers"
        )

    def run(params: dict[str, Array]) -> list[Array]:
        arrays = [value.array for value in operands]
        for index, leaf in own.items():
            arrays[index] = params[leaf.path]
        return core.jaxpr_as_fun(core.ClosedJaxpr(body.jaxpr, body.consts))(*arrays)

    return Call(
        path=path,
        base={leaf.path: operands[index].array for index, leaf in own.items()},
        models=[
            {leaf.path: array for leaf, array in zip(own.values(), arrays, strict=True)}
            for arrays in zip(*(leaf.models for leaf in own.values()), strict=True)
        ],
        loops=max(leaf.loops for leaf in own.values()),
        problem=problem,
        run=run,
        outputs=mark.outputs,
    )


_COMPUTED = (
    "gets parameters that are computed from leaves of the tree, or are parts of them; "
    "it needs the leaves as they are, or cast to another dtype"
)
_HIDDEN = "is called inside of a branch, a while loop or jax.shard_map"


def _impossible(path: str, problem: str) -> Call:
    """A call of which nothing but a problem is known."""
    return Call(path, {}, [], (), problem, run=lambda _: [], outputs=0)


def _scan(
    eqn: Equation, operands: Sequence[_Value], visit: Visit, level: int
) -> tuple[list[_Value], Sums]:
    loop = jaxprs.scan_of(eqn)
    carried, sliced = operands[loop.carry], operands[loop.xs]

    def step(carry: list[Array], slices: Any) -> tuple[list[Array], Any]:
        values = [
            *operands[loop.constants],
            *map(_Value, carry),
            *(
                _slice(value, array, models, level)
                for value, (array, models) in zip(sliced, slices, strict=True)
            ),
        ]
        results, sums = _walk(loop.body, values, visit, level + 1)
        arrays = [result.array for result in results]
        return arrays[: len(carry)], (arrays[len(carry) :], sums)

    carry, (stacked, sums) = jax.lax.scan(
        step,
        [value.array for value in carried],
        [(v.array, v.parameter.models if v.parameter else ()) for v in sliced],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
    )
    summed = {
        key: answer
        if level in key[1]
        else jax.tree.map(lambda x: jnp.sum(x, axis=0), answer)
        for key, answer in sums.items()
    }
    return [_Value(array) for array in (*carry, *stacked)], summed


def _slice(value: _Value, array: Array, models: Sequence[Array], level: int) -> _Value:
    leaf = value.parameter
    if leaf is not None:
        leaf = _Parameter(leaf.path, models, (*leaf.loops, level))
    return _Value(array, leaf, value.varies)


def _bind(jaxpr: Any, eqn: Equation, operands: Sequence[_Value]) -> list[_Value]:
    arrays = [value.array for value in operands]
    results = jaxprs.bind(jaxpr, eqn, arrays)
    varies = any(value.varies for value in operands)
    if eqn.primitive.name not in jaxprs.SAME:
        return [_Value(result, varies=varies) for result in results]

    def same(n: int, version: Array) -> Array:
        return jaxprs.bind(jaxpr, eqn, [*arrays[:n], version, *arrays[n + 1 :]])[n]

    values = []
    for n, (value, result) in enumerate(zip(operands, results, strict=True)):
        leaf = value.parameter
        if leaf is not None:
            leaf = leaf._replace(models=[same(n, version) for version in leaf.models])
        values.append(_Value(result, leaf, value.varies))
    return values
