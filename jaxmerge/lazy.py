"""Leaves that are read or computed when they are asked for, whole or by rows.

A merge method that gets a tree of them returns a tree of them: nothing is read before
someone wants the result, leaf by leaf and, where a leaf is large, some rows at a time.
"""

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding

from jaxmerge.slicing import Reader, Sliced, evenly


class LazyLeaf(ABC):
    """Stands for an array in a tree of parameters.

    Attributes:
        shape: of the array.
        dtype: of the array.
        sharding: how it lies on a mesh when it is read.
        whole: whether it is read and computed whole, as it is on a mesh.
        memory: how many bytes may be in use at a time, about, to read or compute it if
            it is not.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding | None
    whole: bool
    memory: int

    @property
    @abstractmethod
    def cost(self) -> int:
        """How many bytes are in use when the whole array is read, about."""

    @abstractmethod
    def read(self) -> Any:
        """The whole array."""

    @abstractmethod
    def reader(self) -> Reader:
        """What reads some rows of the array."""


def is_lazy(leaf: Any) -> TypeGuard[LazyLeaf]:
    """Whether a leaf of a tree stands for an array that is not there yet."""
    return isinstance(leaf, LazyLeaf)


def any_lazy(tree: Any) -> bool:
    """Whether there is a lazy leaf in a tree."""
    return any(map(is_lazy, jax.tree.leaves(tree)))


def load(tree: Any) -> Any:
    """The tree with all its lazy leaves read."""
    return jax.tree.map(lambda leaf: leaf.read() if is_lazy(leaf) else leaf, tree)


def as_shapes(tree: Any) -> Any:
    """The tree with the shapes of its lazy leaves in their place."""

    def shape_of(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_lazy(leaf) else leaf

    return jax.tree.map(shape_of, tree)


def slices(leaf: Any) -> Iterator[tuple[int, Any]]:
    """All rows of a leaf, as many at a time as its memory allows.

    A lazy leaf that `comes_whole`, or that is an array already, is one such part.

    Yields:
        The number of the first row, and the rows.
    """
    if not is_lazy(leaf):
        yield 0, leaf
        return
    if comes_whole(leaf, leaf.shape):
        yield 0, leaf.read()
        return
    read, step = leaf.reader(), max(1, leaf.memory * leaf.shape[0] // leaf.cost)
    for start, stop in evenly(leaf.shape[0], step):
        yield start, read(start, stop)


def comes_whole(leaf: LazyLeaf, shape: tuple[int, ...]) -> bool:
    """Whether what a leaf is computed from, of this shape, is best read at once.

    Not a vector: many methods do all with it that they do with a matrix, and a program
    for that has every step of every model, where steps by rows are compiled once for
    all models. With twelve, the compiler takes 270 MB for the one, 80 for the others.
    """
    if leaf.whole or not shape or shape[0] == 1:
        return True
    return leaf.cost <= leaf.memory and len(shape) > 1


class Deferred(LazyLeaf):
    """One leaf of the result of a function some of whose arguments are lazy.

    Args:
        run: the function, compiled for whole arrays.
        function: the same, to be traced: it is computed by rows.
        arguments: pytrees, what both are called with. Lazy leaves in them all have
            equally many rows.
        key: tells functions apart that are called with the same types of arguments.
        like: the shape and dtype of the result.
        index: which leaf of the result it is.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        key: Hashable,
        like: Any,
        index: int = 0,
    ):
        self.shape, self.dtype = tuple(like.shape), like.dtype
        self.run, self._function, self.arguments = run, function, arguments
        self._key, self._index = key, index
        self._lazy = [x for x in jax.tree.leaves(arguments) if is_lazy(x)]
        self.memory = min(leaf.memory for leaf in self._lazy)
        self.sharding, self.whole = self._lazy[0].sharding, self._lazy[0].whole

    @property
    def cost(self) -> int:
        return self._cost(self._lazy)

    def _cost(self, of: Sequence[LazyLeaf]) -> int:
        """That of some arguments, and three arrays in float32 on the way from each."""
        entries = max(math.prod(leaf.shape) for leaf in of)
        return sum(x.cost for x in of) + 12 * entries * (len(of) + 1)

    def read(self) -> Any:
        return self._at_once()[self._index]

    def reader(self) -> Reader:
        """What reads some rows, after it measured what they depend on."""
        result = self._by_rows()[self._index]
        return result if callable(result) else lambda start, stop: result[start:stop]

    def all(self) -> list[Any]:
        """The values of all leaves of the result, which have no rows."""
        if comes_whole(self, self._lazy[0].shape):
            return self._at_once()
        return self._by_rows()

    def _at_once(self) -> list[Any]:
        return jax.tree.leaves(self.run(*load(self.arguments)))

    def _by_rows(self) -> list[Any]:
        leaves = jax.tree.leaves(self.arguments)
        given = [leaf.reader() if is_lazy(leaf) else leaf for leaf in leaves]
        return self.sliced()(given, self.fit)

    def sliced(self) -> Sliced:
        """The function as it is computed by rows."""
        leaves, structure = jax.tree.flatten(self.arguments)
        examples = as_shapes(leaves)
        task = _Task(
            self._key,
            structure,
            types=tuple(map(jax.typeof, examples)),
            sliced=tuple(map(is_lazy, leaves)),
            mesh=jax.sharding.get_abstract_mesh(),
            function=self._function,
            examples=examples,
        )
        return _sliced(task)

    def is_alone(self) -> bool:
        """Whether it is not to be computed beside others, for time or memory's sake.

        LAPACK can wait for others for ever, and what cannot be computed by rows may
        take more memory than it should.
        """
        if not self._lazy[0].shape or self.sliced().uses_lapack:
            return True
        whole = comes_whole(self, self._lazy[0].shape)
        return not whole and self.sliced().held > self.memory

    def fit(self, numbers: Sequence[int]) -> int:
        """How many rows of some leaves of the arguments may be in memory at a time."""
        leaves = jax.tree.leaves(self.arguments)
        cost = self._cost([leaves[i] for i in numbers])
        return max(1, self.memory * self._lazy[0].shape[0] // cost)


class Together:
    """Arrays that are computed at once, from lazy leaves, and taken one by one.

    Those that were not taken yet are kept, unless they are given up.

    Args:
        run: the function that computes them all.
        arguments: pytrees, what it is called with.
        number: how many arrays there are.
    """

    def __init__(
        self, run: Callable[..., Any], arguments: tuple[Any, ...], number: int
    ):
        self.run, self.arguments, self.number = run, arguments, number
        self._wanted, self._kept = set(range(number)), {}

    def take(self, index: int) -> Any:
        """One of the arrays, from now on no longer kept: it can be computed again."""
        if index not in self._kept:
            results = self.run(*load(self.arguments))
            self._kept = {i: results[i] for i in self._wanted | {index}}
        array = self._kept[index]
        self.give_up(index)
        return array

    def give_up(self, index: int) -> None:
        """Keeps an array no longer, since nobody is going to take it."""
        self._wanted.discard(index)
        self._kept.pop(index, None)


class Whole(LazyLeaf):
    """An array that can only be computed whole, from lazy leaves.

    Args:
        together: it, and the arrays that are computed with it.
        index: which of them it is.
        like: the shape and dtype of the result.
    """

    def __init__(self, together: Together, index: int, like: Any):
        self.shape, self.dtype = tuple(like.shape), like.dtype
        self.together, self._index = together, index
        leaves = jax.tree.leaves(together.arguments)
        self._lazy = [leaf for leaf in leaves if is_lazy(leaf)]
        self.memory = min(leaf.memory for leaf in self._lazy)
        self.sharding, self.whole = self._lazy[0].sharding, self._lazy[0].whole

    @property
    def cost(self) -> int:
        return sum(leaf.cost for leaf in self._lazy)

    def read(self) -> Any:
        return self.together.take(self._index)

    def give_up(self) -> None:
        """Says that nobody is going to read it."""
        self.together.give_up(self._index)

    def reader(self) -> Reader:
        whole = self.read()
        return lambda start, stop: whole[start:stop]


@dataclasses.dataclass(frozen=True)
class _Task:
    """A function to slice, the same for all leaves that are alike.

    What is traced where a mesh is set has types that say so.
    """

    key: Hashable
    structure: Any
    types: tuple[Any, ...]
    sliced: tuple[bool, ...]
    mesh: AbstractMesh
    function: Callable[..., Any] = dataclasses.field(compare=False)
    examples: list[Any] = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=64)
def _sliced(task: _Task) -> Sliced:
    arguments = jax.tree.unflatten(task.structure, task.examples)
    return Sliced(task.function, arguments, task.sliced)
