"""What a merge may know about data: sums of second moments, per weight.

All values are sums over tokens or examples, with the counts beside them, so that
statistics of two shards of data add up: `a + b`.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.matrices import MatrixAxes


class Site(NamedTuple):
    """A leaf of a model, and how the model uses it.

    Attributes:
        path: the leaf's path.
        shape: the leaf's shape.
        dtype: the name of its dtype.
        axes: which axes are contracted with the input; None where the leaf is used
            elementwise, is looked up, or is not understood.
        input: the name of its Gram matrix, which is the path of the first leaf with the
            same input; None where there is none.
        stack: the axes of independent layers or experts, of any leaf.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: MatrixAxes | None = None
    input: str | None = None
    stack: tuple[int, ...] = ()


class Unknown(NamedTuple):
    """A use of a leaf of which no statistics could be taken.

    Attributes:
        path: the leaf's path.
        primitive: the operation that it enters, by the name JAX gives it; or the kind
            of statistics, where these would be too large.
        reason: why its statistics are not known.
    """

    path: str
    primitive: str
    reason: str


class Trace(NamedTuple):
    """How a model uses its leaves.

    Attributes:
        sites: the leaves.
        unknown: uses of leaves that are not understood.
    """

    sites: tuple[Site, ...]
    unknown: tuple[Unknown, ...]

    @property
    def axes(self) -> dict[str, MatrixAxes]:
        """Which axes of each weight are inputs and which are outputs, by path."""
        return {site.path: site.axes for site in self.sites if site.axes is not None}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """Second moments of the inputs and gradients of one model on some data.

    A pytree of float32 arrays. `*stack` are the leading axes of layers or experts.

    Attributes:
        gram: by input name, the sum over tokens of x x^T, (*stack, inputs, inputs); the
            inputs are flattened as `jaxmerge.matrices.to_matrix` flattens the weight's.
        tokens: by input name, how many tokens were summed, (*stack,). Slots of experts
            that the router left empty, which are zero, do not count.
        output_gradient: by path, the sum over tokens of g g^T, with g the gradient of
            an example's log-likelihood by the outputs, (*stack, outputs, outputs).
        fisher: by path, the sum over examples of the squared gradient of an example's
            log-likelihood, of the leaf's shape.
        fisher_block: by path, for small vectors, the sum over examples of the outer
            product of that gradient, (*stack, size, size).
        diagonal: by path, for leaves that are no matrices, the sum over tokens of the
            squared derivative of the outputs they enter, of the leaf's shape: for an
            embedding how often each row was looked up, for a bias the number of
            tokens, for the scale of a norm the squares of what it multiplies.
        examples: how many examples were summed, ().
        sites: the leaves of the model (static).
        unknown: uses of leaves that are not in the statistics (static).
    """

    gram: dict[str, Array]
    tokens: dict[str, Array]
    output_gradient: dict[str, Array]
    fisher: dict[str, Array]
    fisher_block: dict[str, Array]
    diagonal: dict[str, Array]
    examples: Array
    sites: tuple[Site, ...] = field(metadata={"static": True})
    unknown: tuple[Unknown, ...] = field(default=(), metadata={"static": True})

    @property
    def axes(self) -> dict[str, MatrixAxes]:
        """Which axes of each weight are inputs and which are outputs, by path."""
        return Trace(self.sites, self.unknown).axes

    @property
    def inputs(self) -> dict[str, str]:
        """The name of the Gram matrix of each weight that has one, by path."""
        return {site.path: site.input for site in self.sites if site.input is not None}

    def __add__(self, other: "Statistics") -> "Statistics":
        """The statistics of both shards of data together, summed in float32.

        Raises:
            ValueError: statistics of different models, or of different kinds.
        """
        if (self.sites, self.unknown) != (other.sites, other.unknown):
            raise ValueError(
                "The statistics belong to different models: their leaves, shapes or "
                "dtypes are not the same. Add statistics of one model on several data."
            )
        if jax.tree.structure(self) != jax.tree.structure(other):
            raise ValueError(
                "The statistics are not of the same kinds; collect both with the same "
                "`what`."
            )
        # In bfloat16, a sum soon stands still.
        return jax.tree.map(lambda a, b: jnp.float32(0) + a + b, self, other)

    def __radd__(self, other: Any) -> "Statistics":
        """Itself, after the zero that `sum` starts from."""
        return self if isinstance(other, int) and other == 0 else NotImplemented
