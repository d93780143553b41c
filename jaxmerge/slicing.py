"""A function of whole leaves, computed some rows at a time.

Leaves can be larger than the memory that a merge may take. But most of a merge treats
every row (every index of the first axis) alone; what does not, a threshold or a norm,
boils the leaf down to a few numbers. So its jaxpr falls apart into steps by rows, and
barriers, which need whole arrays. Rows come from the same rows of the inputs; what a
barrier needs is computed by rows and put together, one array at a time. A method does
not have to know of it.

On a CPU, NumPy does what it is faster at, see `IN_NUMPY`: ranks in rows of a thousand
take 10 ns an entry, where XLA takes 90; the k-th largest of all, 2, not 6.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import jax
import numpy as np
from jax import Array, lax

from jaxmerge.dividing import (
    IN_NUMPY,
    ROWS_IN_NUMPY,
    OfRows,
    Program,
    Stage,
    divide,
    nbytes,
    nbytes_kept,
)
from jaxmerge.jaxprs import factorises, text_of

Reader = Callable[[int, int], Any]
"""Reads the rows of an array from a start to a stop."""

Fit = Callable[[Sequence[int]], int]
"""How many rows of some of the leaves, by number, may be in memory at a time."""

_ALIKE: WeakValueDictionary[tuple[str, int | None], Any] = WeakValueDictionary()
"""What is compiled for some `Sliced`, by what it does."""


class Sliced:
    """A function of arrays with equally many rows whose results are computed by rows.

    Args:
        function: of pytrees of arrays.
        arguments: what it is called with, or the shapes of that.
        sliced: for each leaf of the arguments, in order, whether it is to be sliced;
            all these have equally many rows.

    Attributes:
        uses_lapack: whether a step decomposes matrices or solves systems.
        held: how many bytes of whole arrays are put together at a time, at most.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        sliced: Sequence[bool],
    ):
        self._program = Program(jax.make_jaxpr(function)(*arguments))
        numbers = zip(self._program.inputs, sliced, strict=True)
        self._division = divide(self._program, [i for i, cut in numbers if cut])
        self.uses_lapack = any(factorises(step) for step in self._program.steps)
        avals = self._program.avals
        self.held = max(
            sum(nbytes(avals[i]) for i in stage.gathered)
            for stage in self._division.stages
        )
        self.held += sum(nbytes_kept(avals[i]) for i in self._division.kept)
        self._made = self._division.made
        self._numbers = {value: i for i, value in enumerate(self._program.inputs)}
        self._compiled: dict[int, Any] = {}

    def __call__(self, leaves: Sequence[Any], fit: Fit) -> list[Any]:
        """Measures what rows depend on besides themselves.

        Args:
            leaves: the leaves of the arguments; of those to slice, a `Reader`.
            fit: how many rows may be in memory at a time.

        Returns:
            For each leaf of the result a `Reader`, or its value if it has no rows.
        """
        inputs = dict(zip(self._program.inputs, leaves, strict=True))
        known = self._program.literals | self._program.constants | inputs
        found = _Found(inputs, known, {})
        rows = functools.partial(self._rows, found)
        for stage in self._division.stages:
            for value in (*stage.kept, *stage.gathered):
                most = fit(self._read_for(value))
                put = _keep if value in stage.kept else _gather
                aval = self._program.avals[value]
                into = inputs if value in stage.kept else known
                into[value] = put(aval, functools.partial(rows, value), most)
                found.parts.clear()  # They would be held while the stage runs.
            if stage.in_numpy:
                for step in stage.steps:
                    run = IN_NUMPY[step.params["name"]]
                    known[step.results[0]] = run(*(known[i] for i in step.operands))
            elif stage.steps:
                results = self._settle(stage)([known[i] for i in stage.operands])
                # Or the arrays of all stages would be allocated ahead.
                jax.block_until_ready(results)
                known |= dict(zip(stage.results, results, strict=True))
            for value in stage.gathered:
                del known[value]
        return [
            functools.partial(rows, i) if i in self._division.makers else known[i]
            for i in self._program.outs
        ]

    def _rows(self, found: "_Found", value: int, start: int, stop: int) -> Any:
        """Computes some rows of a value."""
        run, cut, others = self._by_rows(value)
        parts = [self._part(found, i, start, stop) for i in cut]
        known = [found.known[i] for i in others]
        return run(parts, known, np.uint32(start), _counted(stop - start))

    def _part(self, found: "_Found", value: int, start: int, stop: int) -> Any:
        """Some rows of an input, a choice, or of what NumPy makes."""
        if not self._made:
            return found.inputs[value](start, stop)
        # Else the same rows are asked for several times.
        if (start, stop) not in found.parts:
            found.parts.clear()
            found.parts[start, stop] = {}
        parts = found.parts[start, stop]
        if value not in parts:
            read = (
                functools.partial(self._make, found, value)
                if value in self._made
                else found.inputs[value]
            )
            parts[value] = read(start, stop)
        return parts[value]

    def _make(self, found: "_Found", value: int, start: int, stop: int) -> Any:
        of = self._division.computed_for(value)
        rows = self._rows(found, of, start, stop)
        if of == value:
            return rows
        aval = self._program.avals[value]
        result = _empty((stop - start, *aval.shape[1:]), aval.dtype)
        self._of_rows(value).run(np.asarray(rows), result)
        return jax.device_put(result, may_alias=True)

    def _of_rows(self, value: int) -> OfRows:
        """How NumPy makes a value."""
        return ROWS_IN_NUMPY[self._division.by_numpy[value].params["name"]]

    def pieces(self, leaves: Sequence[Any], fit: Fit) -> Iterator["Piece"]:
        """What a call runs, from shapes alone: to know its costs before.

        Args:
            leaves: the shapes of the leaves of the arguments.
            fit: as in a call.
        """
        inputs = dict(zip(self._program.inputs, leaves, strict=True))
        whole = dict.fromkeys(self._program.constants)  # Those in memory.

        def shape_of(value: int) -> Any:
            if value in self._program.constants:
                return self._program.constants[value]
            return inputs.get(value, self._program.avals[value])

        def by_rows(value: int, of: Sequence[int]) -> Iterator[Piece]:
            number = self._program.avals[value].shape[0]
            rows = part_size(number, fit(of))
            calls = -(-number // rows)

            def part_of(i: int) -> jax.ShapeDtypeStruct:
                aval = self._program.avals[i]
                return jax.ShapeDtypeStruct((rows, *aval.shape[1:]), aval.dtype)

            made, there = 0, set()  # Bytes that are made; rows that are read.
            for asked in [*self._made_for(value), value]:
                computed = self._division.computed_for(asked)
                run, cut, others = self._by_rows(computed)
                parts, known = map(part_of, cut), map(shape_of, others)
                arguments = list(parts), list(known), np.uint32(0), _counted(rows)
                read = [i for i in cut if i in self._numbers and i not in there]
                there.update(read)
                of_rows = [self._numbers[i] for i in read]
                yield Piece(run, arguments, kept() + made, of_rows, calls)
                made += nbytes(part_of(asked))
                if computed != asked:
                    run, argument = self._of_rows(asked).compiled, part_of(computed)
                    yield Piece(run, (argument,), kept() + made, [], calls)

        def kept() -> int:
            return sum(nbytes(self._program.avals[i]) for i in whole) + bits

        bits = 0
        for stage in self._division.stages:
            for value in stage.kept:
                yield from by_rows(value, self._read_for(value))
                bits += nbytes_kept(self._program.avals[value])
            for value in stage.gathered:
                whole[value] = None
                yield from by_rows(value, self._read_for(value))
            if stage.steps:
                arguments = ([shape_of(i) for i in stage.operands],)
                yield Piece(self._settle(stage), arguments, kept(), [], 1)
            whole |= dict.fromkeys(stage.results)
            for value in stage.gathered:
                del whole[value]
        for value in self._program.outs:
            if value in self._division.makers:
                yield from by_rows(value, self._cut_leaves())

    def _settle(self, stage: Stage) -> Any:
        """The compiled steps of a stage."""
        if id(stage) not in self._compiled:

            def run(operands: list[Any]) -> list[Any]:
                values = dict(zip(stage.operands, operands, strict=True))
                values |= self._program.literals
                for step in stage.steps:
                    step.run(values, [values[i] for i in step.operands])
                return [values[i] for i in stage.results]

            self._compiled[id(stage)] = self._jit(run, self._shapes(stage.operands))
        return self._compiled[id(stage)]

    def _by_rows(self, value: int) -> tuple[Any, list[int], list[int]]:
        """What computes rows of a value, what is cut for it, and what else."""
        if value not in self._compiled:
            cut, others, steps = self._division.way_to(value)

            def run(
                parts: list[Any], known: list[Any], start: Array, rows: Array
            ) -> Array:
                count = len(rows)
                values = dict(zip(others, known, strict=True))
                values |= self._program.literals | dict(zip(cut, parts, strict=True))
                for step in steps:
                    rule = self._division.rules[step]
                    operands = [
                        lax.dynamic_slice_in_dim(values[i], start, count)
                        if i in rule.aligned
                        else values[i]
                        for i in step.operands
                    ]
                    rule.run(step, values, operands, start, count)
                return values[value]

            # Of leaves with more or fewer rows, the same is done with some of them.
            rows = [
                jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype)
                for leaf in self._shapes(cut)
            ]
            known = self._shapes(others)
            compiled = self._jit(run, rows, known, np.uint32(0), _counted(2))
            self._compiled[value] = compiled, cut, others
        return self._compiled[value]

    def _read_for(self, value: int) -> list[int]:
        """The leaves of the arguments that rows of a value come from, by number.

        Those that come from none take as much memory as those that come from one.
        """
        computed = map(self._division.computed_for, [*self._made_for(value), value])
        cut = dict.fromkeys(i for each in computed for i in self._by_rows(each)[1])
        read = [self._numbers[i] for i in cut if i in self._numbers]
        return read or self._cut_leaves()[:1]

    def _cut_leaves(self) -> list[int]:
        makers = self._division.makers
        return [self._numbers[i] for i, step in makers.items() if step is None]

    def _made_for(self, value: int) -> list[int]:
        """What has to be made for rows of a value, in order."""
        found: dict[int, None] = {}
        for i in self._by_rows(value)[1]:
            if i in self._made:
                before = self._made_for(self._division.computed_for(i))
                found |= dict.fromkeys([*before, i])
        return list(found)

    def _jit(self, run: Callable[..., Any], *shapes: Any) -> Any:
        """A function, compiled once for all that do the same: with each model, say."""
        compiled = jax.jit(run)
        text = text_of(compiled.trace(*shapes).jaxpr)
        if text is None:
            return compiled
        # The text has the shape of a mesh, but not its devices.
        only_here = "mesh" in text.lower()
        return _ALIKE.setdefault((text, id(self) if only_here else None), compiled)

    def _shapes(self, values: Sequence[int]) -> list[Any]:
        avals = (self._program.avals[i] for i in values)
        return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]


class _Found(NamedTuple):
    """What a call has found out so far, by value.

    Attributes:
        inputs: those of the call.
        known: whole values.
        parts: by start and stop, what was cut for the rows that are computed.
    """

    inputs: Mapping[int, Any]
    known: dict[int, Any]
    parts: dict[tuple[int, int], dict[int, Any]]


class Piece(NamedTuple):
    """A computation that a call falls into.

    Attributes:
        run: the compiled function.
        arguments: what it is called with, or the shapes of that.
        kept: how many bytes of whole arrays are in memory at that time, without inputs.
        cut: the leaves that rows are read of, each once; none if it runs on whole
            arrays, or on rows that are there.
        calls: how often it runs.
    """

    run: Any
    arguments: tuple[Any, ...]
    kept: int
    cut: list[int]
    calls: int


def _counted(rows: int) -> np.ndarray:
    """Tells a compiled function how many rows there are."""
    return np.empty((rows, 0), np.bool)


def _gather(aval: Any, read: Reader, rows: int) -> Array:
    if rows >= aval.shape[0]:
        return read(0, aval.shape[0])  # It is an array already: nothing to copy.
    whole = _empty(aval.shape, aval.dtype)
    for start, stop in evenly(len(whole), rows):
        whole[start:stop] = read(start, stop)
    return jax.device_put(whole, may_alias=True)


def _keep(aval: Any, read: Reader, rows: int) -> Reader:
    """Puts a choice together, with a bit for each entry; reads rows of that."""
    number, *row = aval.shape
    bits = np.empty((number, -(-math.prod(row) // 8)), np.uint8)
    for start, stop in evenly(number, rows):
        chosen = np.asarray(read(start, stop)).reshape(stop - start, -1)
        bits[start:stop] = np.packbits(chosen, axis=-1)

    def read_kept(start: int, stop: int) -> np.ndarray:
        chosen = np.unpackbits(bits[start:stop], axis=-1, count=math.prod(row))
        return chosen.view(np.bool).reshape(stop - start, *row)

    return read_kept


def evenly(number: int, most: int) -> Iterator[tuple[int, int]]:
    """Divides rows into parts of `most` or less, none of which is much the smallest.

    XLA adds up a few rows in another order than many.

    Yields:
        The start and the stop of each part.
    """
    size = part_size(number, most)
    for start in range(0, number, size):
        yield start, min(start + size, number)


def part_size(number: int, most: int) -> int:
    """How many rows are in each part, but for the last where they do not come out even.

    What is compiled for parts of one size would be compiled again for the last, and for
    other leaves. So they come out even if that takes about twice as many parts at most,
    with a power of two if possible.
    """
    least = -(-number // most)
    power = min(number & -number, 1 << most.bit_length() - 1)
    if 5 * power > 2 * most:
        return power
    even = (n for n in range(least, 2 * least + 1) if number % n == 0)
    return -(-number // next(even, least))


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array at an address at which JAX can take it over without a copy on a CPU."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
