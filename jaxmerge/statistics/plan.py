"""What is to be measured in a model, equation by equation: known before any value is.

Equations are named by their place: the index of an equation in the model's jaxpr, then
in the jaxpr inside of it, and so on.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxmerge.jaxprs import Body
from jaxmerge.matrices import MatrixAxes
from jaxmerge.statistics import views
from jaxmerge.statistics.types import Site, Unknown
from jaxmerge.statistics.views import Layout, Level, Matrices, View

Place = tuple[int, ...]

Key = int
"""Numbers the sums that are taken, one for each equation that takes one."""

Shapes = tuple[tuple[int, ...], ...]


class Contract(NamedTuple):
    """A dot product of data with a weight.

    Attributes:
        data: which operand is the data.
        stack: the axes of the data along which weights differ,
        contracted: and those of the inputs.
        inputs: the layout of the inputs.
        result_stack: the axes of the result along which weights differ,
        features: and those that come from the weight.
        outputs: the layout of those.
        gram: the key of the sum over tokens of the data; None where another equation,
            with the same input, takes it.
        gradient: the key of the sum over tokens of the gradient by the result.
    """

    data: int
    stack: tuple[int, ...]
    contracted: tuple[int, ...]
    inputs: Layout
    result_stack: tuple[int, ...]
    features: tuple[int, ...]
    outputs: Layout
    gram: Key | None = None
    gradient: Key | None = None


class Convolve(NamedTuple):
    """A convolution of data with a weight; attributes as of `Contract`."""

    inputs: Layout
    outputs: Layout
    data: int = 0
    gram: Key | None = None
    gradient: Key | None = None


class Scale(NamedTuple):
    """An elementwise use of a leaf.

    Attributes:
        key: of the sum of squared derivatives.
        chain: the equations beside this one, each with the operand that holds the leaf,
            that the leaf goes through until it has met all its factors.
        shape: the shape of the derivatives.
        kept: the axes of it that the leaf has; sums are taken over the others.
        tokens: the leading axes of it, which are not of features.
    """

    key: Key
    chain: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    kept: tuple[int, ...]
    tokens: tuple[int, ...]


class LookUp(NamedTuple):
    """Rows of a leaf that are looked up.

    Attributes:
        key: of the sum of counts.
        kept: the axes of the operand that the leaf has.
    """

    key: Key
    kept: tuple[int, ...]


Action = Contract | Convolve | Scale | LookUp


class Term(NamedTuple):
    """A sum, and how it fits the leaf.

    Attributes:
        key: the key of the sum.
        layout: of its leading axes, those of layers and experts, flattened; of all its
            axes for an elementwise use.
        shape: what becomes of these axes.
        scale: what the sum is multiplied with.
    """

    key: Key
    layout: Layout
    shape: tuple[int, ...]
    scale: float = 1.0


class Plan(NamedTuple):
    """All that is to be measured in a model.

    Attributes:
        body: the model's jaxpr.
        results: the structure of what it returns.
        actions: what to measure at which equation.
        levels: the scans that each sum is stacked along; other loops add up.
        grams: the terms of each Gram matrix, by name.
        gradients: the terms of each output-gradient factor, by path.
        diagonals: the terms of each diagonal, by path.
        shapes: the shapes of the arrays of each sum, without its levels. Those of
            inputs have two: the Gram matrices, and the numbers of tokens.
        sites: the leaves.
        unknown: what is not understood.
    """

    body: Body
    results: Any
    actions: dict[Place, list[Action]]
    levels: dict[Key, tuple[Level, ...]]
    grams: dict[str, tuple[Term, ...]]
    gradients: dict[str, tuple[Term, ...]]
    diagonals: dict[str, tuple[Term, ...]]
    shapes: dict[Key, Shapes]
    sites: tuple[Site, ...]
    unknown: tuple[Unknown, ...]

    @property
    def uses(self) -> tuple[tuple[Site, bool, bool], ...]:
        """The leaves, and whether they have diagonals and uses that are unknown."""
        lost = {use.path for use in self.unknown}
        return tuple((s, s.path in self.diagonals, s.path in lost) for s in self.sites)

    def is_stacked(self, key: Key, loop: Place) -> bool:
        """Whether a sum is kept apart for each step of a scan."""
        return any(level.loop == loop for level in self.levels[key])

    def shapes_inside(self, key: Key, place: Place) -> Shapes:
        """The shapes of a sum inside a loop or branch; () is outside of all."""
        levels = [x.size for x in self.levels[key] if len(x.loop) > len(place)]
        return tuple((*levels, *shape) for shape in self.shapes[key])


def keys_of(action: Action) -> tuple[Key, ...]:
    """The sums that an action takes."""
    if isinstance(action, Contract | Convolve):
        keys: tuple[Any, ...] = (action.gram, action.gradient)
        return tuple(key for key in keys if key is not None)
    return (action.key,)


def fits(mask: Sequence[int], tokens: Sequence[int], region: Place = ()) -> bool:
    """Whether a mask says which tokens count.

    It does where their axes begin with those of the mask, or with the two in one. Where
    each example has one token, that counts if any does; but not in loops, whose steps
    may be tokens themselves.

    Args:
        mask: its shape, (examples, tokens).
        tokens: the sizes of their axes.
        region: the innermost loop or branch around them.
    """
    mask, tokens = tuple(mask), tuple(tokens)
    one_each = tokens[:1] == mask[:1] == (math.prod(tokens),) and not region
    return one_each or tokens[:2] == mask or tokens[:1] == (math.prod(mask),)


class Record:
    """Collects what is found in a model's jaxpr, for a `Plan`.

    What records a use of a leaf returns the reason why it could not, if so.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], mask: tuple[int, ...] | None
    ):
        self.shapes = shapes
        self.mask = mask
        self._actions: dict[Place, list[Action]] = {}
        self._levels: dict[Key, tuple[Level, ...]] = {}
        self._shapes: dict[Key, Shapes] = {}
        self._inputs: dict[Any, Key] = {}
        self._axes: dict[str, MatrixAxes] = {}
        self._stacks: dict[str, tuple[int, ...]] = {}
        self._grams: dict[str, list[Term]] = {}
        self._gradients: dict[str, list[Term]] = {}
        self._diagonals: dict[str, list[Term]] = {}
        self._unknown: dict[Unknown, None] = {}

    def give_up(self, *blame: Unknown) -> None:
        """Lists uses of leaves that are not understood."""
        self._unknown.update(dict.fromkeys(blame))

    def contract(
        self,
        place: Place,
        region: Place,
        view: View,
        matrices: Matrices,
        tokens: Sequence[Sequence[int]],
        sizes: Sequence[int],
        same: Any,
        action: Contract | Convolve,
    ) -> str | None:
        """Records that data is contracted with a leaf.

        Args:
            place: the equation.
            region: the innermost loop or branch around it.
            view: the leaf as it comes in.
            matrices: which of its axes are which.
            tokens: the sizes of the axes that are summed over, in data and result.
            sizes: of the axes along which the equation has a weight for each.
            same: equal for equations of the region with the same input.
            action: what to do there, without keys.
        """
        if not all(self._counts(each, region) for each in tokens):
            return _NOT_MASKED
        leaf, axes = view.leaf, matrices.axes
        known = self._axes.setdefault(leaf, axes)
        if known != axes:
            return f"here {axes}, but elsewhere {known}"
        same = (region, same, tuple(level.loop for level in view.levels))
        first = same not in self._inputs
        if first:
            inputs = math.prod(matrices.inputs.sizes)
            self._inputs[same] = self._new_key(view, (*sizes, inputs, inputs), sizes)
        gram = self._inputs[same]
        outputs = math.prod(matrices.outputs.sizes)
        gradient = self._new_key(view, (*sizes, outputs, outputs))
        shape = tuple(self.shapes[leaf][axis] for axis in axes.stack)
        term = Term(gram, matrices.stack, shape, view.scale**2)
        self._grams.setdefault(leaf, []).append(term)
        term = Term(gradient, matrices.stack, shape)
        self._gradients.setdefault(leaf, []).append(term)
        self._stacks[leaf] = axes.stack
        keys = {"gram": gram if first else None, "gradient": gradient}
        self._act(place, action._replace(**keys))
        return None

    def scale(
        self,
        place: Place,
        region: Place,
        view: View,
        chain: tuple[tuple[int, int], ...],
    ) -> str | None:
        """Records an elementwise use of a leaf, in the shape of `view`."""
        shape, kept = view.shape, _kept(view)
        tokens = shape[:-1] if len(shape) - 1 in kept else shape
        if not self._counts(tokens, region):
            return _NOT_MASKED
        self._act(place, Scale(self._diagonal(view), chain, shape, kept, tokens))
        return None

    def look_up(
        self, place: Place, region: Place, view: View, tokens: Sequence[int]
    ) -> str | None:
        """Records that rows of a leaf are looked up, one for each token."""
        if not self._counts(tokens, region):
            return _NOT_MASKED
        self._act(place, LookUp(self._diagonal(view), _kept(view)))
        return None

    def plan(self, body: Body, results: Any, dtypes: dict[str, str]) -> Plan:
        """Gives equal inputs one name, and lists leaves that no data meets."""
        names: dict[tuple[Term, ...], str] = {}
        inputs = {
            path: names.setdefault(tuple(self._grams[path]), path)
            for path in self.shapes
            if path in self._grams
        }
        met = {*self._grams, *self._diagonals, *(u.path for u in self._unknown)}
        for path in self.shapes:
            if path not in met:
                self.give_up(Unknown(path, "none", "no data meets it"))
        sites = tuple(
            Site(
                path=path,
                shape=shape,
                dtype=dtypes[path],
                axes=self._axes[path] if path in inputs else None,
                input=inputs.get(path),
                stack=self._stacks.get(path, ()),
            )
            for path, shape in self.shapes.items()
        )
        return Plan(
            body=body,
            results=results,
            actions=self._actions,
            levels=self._levels,
            grams={name: terms for terms, name in names.items()},
            gradients={path: tuple(t) for path, t in self._gradients.items()},
            diagonals={path: tuple(t) for path, t in self._diagonals.items()},
            shapes=self._shapes,
            sites=sites,
            unknown=tuple(self._unknown),
        )

    def _counts(self, tokens: Sequence[int], region: Place) -> bool:
        """Whether it is known which tokens count."""
        return self.mask is None or fits(self.mask, tokens, region)

    def _diagonal(self, view: View) -> Key:
        key = self._new_key(view, tuple(view.shape[axis] for axis in _kept(view)))
        layout, shape = views.elementwise_layout(view), self.shapes[view.leaf]
        term = Term(key, layout, shape, view.scale**2)
        self._diagonals.setdefault(view.leaf, []).append(term)
        self._stacks.setdefault(view.leaf, views.stacked_axes(view))
        return key

    def _new_key(self, view: View, *shapes: Sequence[int]) -> Key:
        key = len(self._levels)
        self._levels[key] = view.levels
        self._shapes[key] = tuple(map(tuple, shapes))
        return key

    def _act(self, place: Place, action: Action) -> None:
        self._actions.setdefault(place, []).append(action)


_NOT_MASKED = "the mask fits none of its axes"


def _kept(view: View) -> tuple[int, ...]:
    return tuple(axis for axis, factors in enumerate(view.axes) if factors)
