r"""Minima of quadratic forms: of the distances of one matrix to the models' matrices.

With a curvature $C_t$ of each task, the minimum of
$\sum_t (\theta - \theta_t)^\top C_t (\theta - \theta_t)$ solves a linear system. It is
solved for the way from a start,
$\sum_t C_t (\theta - \theta_0) = \sum_t C_t (\theta_t - \theta_0)$: in float32 that is
far more accurate than to solve for $\theta$, and equal models come back as they are.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.linalg import SolveInfo, conjugate_gradient, matmul
from jaxmerge.methods.election import weighted_sum
from jaxmerge.methods.evidence import Evidence
from jaxmerge.numerics import norm, safe_divide

Normalize = Literal["count", "trace", "none"]
Precondition = Literal["none", "jacobi", "kronecker"]
Stop = Literal["relative", "steps", "published"]


class Curvature(NamedTuple):
    """The map of matrices x (outputs, inputs) to outputs @ (entries * x) @ inputs.

    What is None does nothing.
    """

    entries: Array | None = None
    inputs: Array | None = None
    outputs: Array | None = None

    def __call__(self, x: Array) -> Array:
        """What the map makes of `x`."""
        if self.entries is not None:
            x = self.entries * x
        if self.inputs is not None:
            x = matmul(x, self.inputs)
        return x if self.outputs is None else matmul(self.outputs, x)

    def diagonal(self) -> Array:
        """The diagonal of the map, in a shape that broadcasts to matrices."""
        diagonal = jnp.ones((1, 1)) if self.entries is None else self.entries
        if self.inputs is not None:
            diagonal = diagonal * jnp.diagonal(self.inputs)[None, :]
        if self.outputs is not None:
            diagonal = diagonal * jnp.diagonal(self.outputs)[:, None]
        return diagonal


def curvatures(
    evidence: Sequence[Evidence],
    fishers: Sequence[Array],
    normalize: Normalize,
    shrinkage: Array | float = 1.0,
) -> list[Curvature]:
    """The curvature of each task.

    Args:
        evidence: of each task, as matrices (m, n).
        fishers: the curvatures of entries, for the metric that takes these; or none.
        normalize: what makes tasks comparable, as for `normalized`.
        shrinkage: what off-diagonal entries of second moments are multiplied by.
    """
    return [
        _curvature(task, fisher, normalize, shrinkage)
        for task, fisher in zip(
            evidence, fishers or [None] * len(evidence), strict=True
        )
    ]


def _curvature(
    evidence: Evidence,
    fisher: Array | None,
    normalize: Normalize,
    shrinkage: Array | float,
) -> Curvature:
    inputs, outputs, samples, weight = evidence
    if fisher is not None:
        return Curvature(
            entries=weight * normalized(fisher, fisher, samples, normalize)
        )
    if inputs is None:
        return Curvature(entries=weight)
    inputs = weight * _moments(inputs, samples, normalize, shrinkage)
    if outputs is None:
        return Curvature(inputs=inputs)
    # How much data a task has counts once, not in both factors.
    once = "count" if normalize == "none" else normalize
    return Curvature(None, inputs, _moments(outputs, samples, once, shrinkage))


def normalized(x: Array, diagonal: Array, count: Array, normalize: Normalize) -> Array:
    """A sum over samples made comparable between tasks.

    Args:
        x: the sum.
        diagonal: those of its entries that are curvatures.
        count: the number of samples.
        normalize: `"count"` gives the mean over samples, `"trace"` a mean curvature of
            one, `"none"` the sum.
    """
    by = {"count": count, "trace": jnp.mean(diagonal), "none": jnp.ones(())}
    return safe_divide(x, by[normalize])


def _moments(
    x: Array, count: Array, normalize: Normalize, shrinkage: Array | float
) -> Array:
    x = normalized(x, jnp.diagonal(x), count, normalize)
    return jnp.where(jnp.eye(len(x), dtype=bool), x, shrinkage * x)


def in_units(of_tasks: Sequence[Curvature]) -> tuple[list[Curvature], Array]:
    """The curvatures divided by a number that makes them of order one, and it.

    Gradients are small: their second moments, and products with them, would leave the
    range of float32.
    """
    units = {}
    for name, first in of_tasks[0]._asdict().items():
        if first is not None:
            values = [getattr(one, name) for one in of_tasks]
            diagonals = values if name == "entries" else map(jnp.diagonal, values)
            size = sum(jnp.mean(jnp.abs(diagonal)) for diagonal in diagonals)
            units[name] = jnp.where(size > 0, size, 1)
    scaled = [
        one._replace(
            **{name: getattr(one, name) / unit for name, unit in units.items()}
        )
        for one in of_tasks
    ]
    return scaled, jnp.asarray(math.prod(units.values()))


def total(of_tasks: Sequence[Curvature]) -> list[Curvature]:
    """Curvatures with the sum of the given ones: a single one, if that is possible."""
    if of_tasks[0].outputs is not None:
        return list(of_tasks)
    return [jax.tree.map(lambda *x: sum(x), *of_tasks)]


def inverse(
    parts: Sequence[Curvature], kind: Precondition, ridge: Array | float
) -> Callable[[Array], Array] | None:
    """A map of matrices that is near to the inverse of the sum of curvatures.

    Args:
        parts: one or more.
        kind: `"none"`; `"jacobi"`, the diagonal; or `"kronecker"`, for curvatures of
            second moments alone, the sums of the factors.
        ridge: how much of its own diagonal is added to the sum.
    """
    if kind == "none":
        return None
    if kind == "jacobi":
        diagonal = (1 + ridge) * sum(one.diagonal() for one in parts)
        return lambda x: safe_divide(x, diagonal)  # type: ignore
    by_inputs = _inverse_of_sum([one.inputs for one in parts], ridge)
    if parts[0].outputs is None:
        return lambda x: by_inputs(x.T).T
    by_outputs = _inverse_of_sum([one.outputs for one in parts], ridge)
    return lambda x: by_outputs(by_inputs(x.T).T)


def _inverse_of_sum(
    moments: Sequence[Any], ridge: Array | float
) -> Callable[[Array], Array]:
    """Solves with the sum, scaled to a diagonal of ones as far as that is not zero."""
    matrix: Array = sum(moments)  # type: ignore
    diagonal = jnp.diagonal(matrix)[:, None]
    scale = safe_divide(jnp.ones(()), jnp.sqrt(diagonal))
    # Less would not keep a factorisation of dependent inputs from failing.
    ridge = jnp.maximum(ridge, len(matrix) * jnp.finfo(matrix.dtype).eps)
    scaled = scale * matrix * scale.T + ridge * jnp.eye(len(matrix), dtype=matrix.dtype)
    factor = jax.scipy.linalg.cho_factor(scaled, lower=True)
    return lambda x: scale * jax.scipy.linalg.cho_solve(factor, scale * x)


def weighted_mean(
    values: Sequence[Array], weights: Sequence[Array], otherwise: Array
) -> Array:
    """The mean of `values`, and `otherwise` where weights have no positive sum."""
    whole = jnp.asarray(sum(weights))
    mean = weighted_sum(values, weights) / jnp.where(whole > 0, whole, 1)
    return jnp.where(whole > 0, mean, otherwise)


def solve(
    matrices: Sequence[Array],
    *,
    beside: Sequence[Evidence],
    shrinkage: Array | float,
    ridge: Array | float,
    rtol: Array | float,
    steps: Array | int,
    started: bool,
    stop: Stop,
    precondition: Precondition,
    normalize: Normalize,
) -> tuple[Array, SolveInfo]:
    """Steps towards the matrix that is nearest to those of all tasks.

    Args:
        matrices: (outputs, inputs), of each task; then, if `started`, where to start,
            by default at the average; then curvatures of entries, if there are any.
        beside: the evidence of each task.
        shrinkage: as for `curvatures`.
        ridge: how much of its own diagonal is added to the sum of curvatures.
        rtol: when to stop, see `jaxmerge.mats`.
        steps: the most steps.
        started: whether there is a start.
        stop: what `rtol` is a share of.
        precondition: as for `inverse`.
        normalize: as for `normalized`.

    Returns:
        The last iterate, and how it went; `residual` is over the sum of norms that
        each task pulls with at the start.
    """
    values, further = matrices[: len(beside)], matrices[len(beside) :]
    beside = jax.tree.map(lambda x: x.astype(values[0].dtype), beside)
    if started:
        start, *further = further
    else:
        deltas = [value - values[0] for value in values]
        plain: Array = sum(deltas) / len(deltas)  # type: ignore
        weights = [task.weight for task in beside]
        start = values[0] + weighted_mean(deltas, weights, plain)
    of_tasks, unit = in_units(curvatures(beside, further, normalize, shrinkage))
    pulls = [c(value - start) for c, value in zip(of_tasks, values, strict=True)]
    right: Array = sum(pulls)  # type: ignore
    force = sum(norm(pull) for pull in pulls)
    parts = total(of_tasks)
    damping = ridge * sum(part.diagonal() for part in parts)
    enough = rtol * force if stop == "relative" else 0.0
    if stop == "published":
        whole: Any = sum(c(x) for c, x in zip(of_tasks, values, strict=True))
        enough = jnp.where(unit * norm(right) <= rtol, jnp.inf, rtol * norm(whole))
    way, told = conjugate_gradient(
        lambda x: damping * x + sum(part(x) for part in parts),
        right,
        jnp.zeros_like(right),
        precondition=inverse(parts, precondition, ridge),
        rtol=0.0,
        atol=enough,
        max_steps=steps,
    )
    left = safe_divide(told.residual * norm(right), force)  # type: ignore
    return start + way, told._replace(residual=left)


solve_fully = functools.partial(
    solve,
    rtol=1e-6,
    started=False,
    stop="relative",
    steps=50,
    precondition="kronecker",
)
"""`solve` up to float32: a few steps make up for what a factorisation loses."""
