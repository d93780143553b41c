"""How a program falls apart into steps by rows, and barriers that need whole arrays."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmerge.jaxprs import CALLS, PLAIN_CALLS, Equation, called, is_literal
from jaxmerge.rowwise import Rule, Step, rule_of

# A barrier stands behind draws: see `random_words`.
_SLOW = frozenset({"optimization_barrier", "random_bits", "sort"})

IN_NUMPY: dict[str, Callable[..., Any]] = {}
"""By the name of a compiled function, what NumPy does instead, which is faster on CPUs.

It is called with the operands of the function, whole arrays, and returns a scalar.
"""


class OfRows(NamedTuple):
    """A function of one array, whose last axis alone matters, to an array of its shape.

    Attributes:
        run: called with an array and what to write the result into.
        compiled: the same for XLA: it tells the costs.
    """

    run: Callable[[np.ndarray, np.ndarray], None]
    compiled: Any


ROWS_IN_NUMPY: dict[str, OfRows] = {}
"""The same as `IN_NUMPY`, for what can be done with some rows at a time."""

_MOST_CHOICES = 16 << 20
"""Bytes of choices that may stay, so that they are not made for every pass again; they
come on top of the memory for rows."""


class Program:
    """A jaxpr as one list of steps, without calls.

    Attributes:
        steps: in order; without those that no result depends on.
        avals: the type of each value.
        inputs: the numbers of the inputs.
        literals: values that are written out: they are compiled in.
        constants: values that are closed over.
        outs: the numbers of the results.
    """

    def __init__(self, closed: Any):
        self.avals: list[Any] = []
        self.literals: dict[int, Any] = {}
        self.constants: dict[int, Any] = {}
        self.steps: list[Step] = []
        self._results: dict[Any, tuple[int, ...]] = {}
        self.inputs = [self._new(v.aval) for v in closed.jaxpr.invars]
        self.outs = self._walk(closed.jaxpr, closed.consts, self.inputs)
        used, steps = set(self.outs), []
        for step in reversed(self.steps):
            if used.intersection(step.results):
                used.update(step.operands)
                steps.append(step)
        self.steps = steps[::-1]

    def _new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _walk(self, jaxpr: Any, consts: Any, inputs: Sequence[int]) -> list[int]:
        numbers = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            numbers[var] = self._new(var.aval)
            self.constants[numbers[var]] = value

        def number(atom: Any) -> int:
            if not is_literal(atom):
                return numbers[atom]
            written = self._new(atom.aval)
            self.literals[written] = atom.val
            return written

        for eqn in jaxpr.eqns:
            operands = tuple(map(number, eqn.invars))
            if eqn.primitive.name in CALLS and not _stays_whole(eqn):
                results = self._walk(*called(eqn), operands)
            else:
                results = self._step(eqn, operands)
            numbers |= dict(zip(eqn.outvars, results, strict=True))
        return list(map(number, jaxpr.outvars))

    def _step(self, eqn: Any, operands: tuple[int, ...]) -> tuple[int, ...]:
        """Adds a step, unless there is one that does the same."""
        same = eqn.primitive, operands, tuple(sorted(eqn.params.items()))
        try:
            found = self._results.get(same)
        except TypeError:  # Some parameters have no hash.
            same, found = object(), None
        if found is None:
            found = tuple(self._new(var.aval) for var in eqn.outvars)
            self.steps.append(Step(eqn.primitive, eqn.params, operands, found))
            self._results[same] = found
        return found


class Stage(NamedTuple):
    """Steps on whole arrays.

    Attributes:
        kept: choices that are made before all else.
        gathered: values by rows that must be put together before.
        steps: what runs then.
        operands: the values that it takes, but for literals.
        results: those of its values that are of use later.
        in_numpy: whether NumPy does what the steps do.
    """

    kept: list[int]
    gathered: list[int]
    steps: list[Step]
    operands: list[int]
    results: list[int]
    in_numpy: bool


class Division(NamedTuple):
    """Which steps run by rows, and what they need to know of whole arrays.

    Attributes:
        stages: in the order in which whole arrays become known.
        rules: the steps by rows.
        makers: the step that each value by rows comes from; None for inputs.
        choices: values by rows that are made by themselves: a bit for each entry, in
            much time.
        kept: those of them that stay when they are made.
        by_numpy: the steps that values by rows come from which NumPy makes.
        literals: values that are written out.
    """

    stages: list[Stage]
    rules: dict[Step, Rule]
    makers: dict[int, Step | None]
    choices: frozenset[int]
    kept: frozenset[int]
    by_numpy: dict[int, Step]
    literals: Collection[int]

    @property
    def made(self) -> Collection[int]:
        """What is made for each part that asks for it, before what asks."""
        return self.by_numpy.keys() | (self.choices - self.kept)

    def computed_for(self, value: int) -> int:
        """What XLA has to compute for a value: what NumPy makes it from, or itself."""
        step = self.by_numpy.get(value)
        return value if step is None else step.operands[0]

    def way_to(self, value: int) -> tuple[list[int], list[int], list[Step]]:
        """What is cut, the whole values and the steps up to a value.

        Inputs are cut, and so is what is made before: choices, and what NumPy makes.
        """
        cut: dict[int, None] = {}
        whole: dict[int, None] = {}
        steps: dict[Step, None] = {}

        def visit(i: int) -> None:
            if i not in self.makers:
                whole[i] = None
            elif (step := self.makers[i]) is None or is_apart(i):
                cut[i] = None
            elif step not in steps:
                for operand in step.operands:
                    visit(operand)
                steps[step] = None

        def is_apart(i: int) -> bool:
            return i in self.by_numpy or (i in self.choices and i != value)

        visit(value)
        return list(cut), [i for i in whole if i not in self.literals], list(steps)


def divide(program: Program, inputs: Sequence[int]) -> Division:
    """Divides a program some of whose inputs, by number, come by rows."""
    division = _division(program, inputs, frozenset(), frozenset())
    choices = frozenset(_choices(program, division))
    # What comes before a step of NumPy's is as slow as what comes after.
    all_of_it = division._replace(by_numpy={})
    kept = frozenset(_worth_keeping(program, all_of_it, choices))
    return _division(program, inputs, choices, kept) if choices else division


def _choices(program: Program, division: Division) -> Iterator[int]:
    """What is chosen by ranks or at random.

    It is made by itself: the program for that is the same for each model, where one
    that has it among other steps has it as many times as there are models.
    """
    slow: set[int] = set()
    for step in program.steps:
        (result, *more) = step.results
        if division.makers.get(result) is None:
            continue
        starts = result in division.by_numpy or step.primitive.name in _SLOW
        if not starts and slow.isdisjoint(step.operands):
            continue
        aval = program.avals[result]
        if more or aval.dtype != np.bool or result in program.outs:
            slow.update(step.results)
        else:
            yield result


def _worth_keeping(
    program: Program, division: Division, choices: Collection[int]
) -> Iterator[int]:
    """The choices that would be made for several passes, as far as there is memory."""
    asked = [i for stage in division.stages for i in stage.gathered] + program.outs
    ways = [set(division.way_to(i)[2]) for i in asked if i in division.makers]
    budget = _MOST_CHOICES
    for choice in choices:
        size = nbytes_kept(program.avals[choice])
        passes = sum(division.makers[choice] in way for way in ways)
        if passes > 1 and budget >= size:
            budget -= size
            yield choice


def _division(
    program: Program,
    inputs: Sequence[int],
    choices: frozenset[int],
    kept_choices: frozenset[int],
) -> Division:
    rows = program.avals[inputs[0]].shape[0]
    makers: dict[int, Step | None] = dict.fromkeys(inputs)
    rules: dict[Step, Rule] = {}
    by_numpy: dict[int, Step] = {}
    groups = [_Group([], [], [], False)]
    born: dict[int, int] = {}  # By whole value, its group.
    for step in program.steps:
        if _is_of_rows(step, program.avals, makers):
            by_numpy[step.results[0]] = step
            makers[step.results[0]] = step
            continue
        if rule := rule_of(step, program.avals, makers.keys(), rows):
            rules[step] = rule
            makers |= dict.fromkeys(step.results, step)
            if kept := [i for i in step.results if i in kept_choices]:
                groups.append(_Group(kept, [], [], False))
            continue
        operands = dict.fromkeys(step.operands)
        barred = [i for i in operands if i in makers]
        in_numpy = _name_for_numpy(step) in IN_NUMPY
        small = all(program.avals[i].shape == () for i in step.results)
        # What is small is made as soon as it can be: it may be what a search needs that
        # asks for the same values as an earlier one.
        first = max((born.get(i, 0) for i in operands if i not in barred), default=0)
        first = first if small else len(groups) - 1
        fitting = (
            i
            for i in range(first, len(groups))
            if groups[i].in_numpy == in_numpy
            and set(barred).issubset(groups[i].gathered)
        )
        at = next(fitting, len(groups))
        if at == len(groups):
            groups.append(_Group([], barred, [], in_numpy))
        groups[at].steps.append(step)
        born |= dict.fromkeys(step.results, at)
    stages = [_stage(program, group) for group in groups]
    literals = program.literals.keys()
    return Division(stages, rules, makers, choices, kept_choices, by_numpy, literals)


class _Group(NamedTuple):
    kept: list[int]
    gathered: list[int]
    steps: list[Step]
    in_numpy: bool


def _stage(program: Program, group: _Group) -> Stage:
    made = [i for step in group.steps for i in step.results]
    within = set(group.steps)
    later = set(program.outs).union(
        *(step.operands for step in program.steps if step not in within)
    )
    taken = dict.fromkeys(i for step in group.steps for i in step.operands)
    within_reach = {*made, *program.literals}
    return Stage(
        group.kept,
        group.gathered,
        group.steps,
        [i for i in taken if i not in within_reach],
        [i for i in made if i in later],
        group.in_numpy,
    )


def _name_for_numpy(call: Equation | Step) -> str | None:
    """The name of a compiled function that is called, on a CPU."""
    if call.primitive.name not in PLAIN_CALLS or jax.default_backend() != "cpu":
        return None
    return call.params.get("name")


def _stays_whole(eqn: Equation) -> bool:
    """Whether a call is not to be replaced by what the function does."""
    name = _name_for_numpy(eqn)
    # Under `vmap` the function is one of several arrays at once.
    is_alone = [var.aval.shape for var in eqn.outvars] == [()]
    return name in ROWS_IN_NUMPY or (is_alone and name in IN_NUMPY)


def _is_of_rows(step: Step, avals: Sequence[Any], by_rows: Collection[int]) -> bool:
    """Whether `ROWS_IN_NUMPY` has what a step does with each row."""
    if _name_for_numpy(step) not in ROWS_IN_NUMPY or len(step.operands) != 1:
        return False
    (operand,) = step.operands
    return operand in by_rows and len(avals[operand].shape) > 1


def nbytes(aval: Any) -> int:
    """The bytes of an array of a type."""
    itemsize = np.dtype(aval.dtype).itemsize if hasattr(aval.dtype, "kind") else 8
    return math.prod(aval.shape) * itemsize


def nbytes_kept(aval: Any) -> int:
    """The bytes of a choice, with a bit for each entry and whole bytes for each row."""
    return aval.shape[0] * -(-math.prod(aval.shape[1:]) // 8)
