r"""Minima of quadratic forms: of the distances of one matrix to the models' matrices.

With a curvature $C_t$ of each task, the minimum of
$\sum_t (\theta - \theta_t)^\top C_t (\theta - \theta_t)$ solves a linear system. It is
solved for the way from a start,
$\sum_t C_t (\theta - \theta_0) = \sum_t C_t (\theta_t - \theta_0)$: in float32 that is
far more accurate than to solve for $\theta$, and equal models come back as they are.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jaxmerge.linalg import SolveInfo, conjugate_gradient, matmul
from jaxmerge.methods.election import weighted_sum
from jaxmerge.methods.evidence import Evidence, warn
from jaxmerge.numerics import norm, safe_divide

Normalize = Literal["count", "trace", "none"]
Precondition = Literal["none", "jacobi", "kronecker"]
Stop = Literal["relative", "steps", "published"]


class Curvature(NamedTuple):
    """The map of matrices x (outputs, inputs) to entries * x + outputs @ x @ inputs.

    Without `inputs`, there is no second term; without `outputs`, they are one.
    """

    entries: Array | None = None
    inputs: Array | None = None
    outputs: Array | None = None

    def __call__(self, x: Array) -> Array:
        """What the map makes of `x`."""
        by_entries = jnp.zeros(()) if self.entries is None else self.entries * x
        if self.inputs is None:
            return by_entries
        x = matmul(x, self.inputs)
        return by_entries + (x if self.outputs is None else matmul(self.outputs, x))

    def diagonal(self) -> Array:
        """The diagonal of the map, in a shape that broadcasts to matrices."""
        by_entries = jnp.zeros((1, 1)) if self.entries is None else self.entries
        if self.inputs is None:
            return by_entries
        diagonal = jnp.diagonal(self.inputs)[None, :]
        if self.outputs is not None:
            diagonal = diagonal * jnp.diagonal(self.outputs)[:, None]
        return by_entries + diagonal


def curvatures(
    evidence: Sequence[Evidence],
    entries: Sequence[Array],
    normalize: Normalize,
    shrinkage: Array | float = 1.0,
) -> list[Curvature]:
    """The curvature of each task.

    Args:
        evidence: of each task, as matrices (m, n).
        entries: the curvatures of entries, of each task, where there are any: all there
            is, or on top of the moments of inputs.
        normalize: what makes tasks comparable, as for `normalized`.
        shrinkage: what off-diagonal entries of second moments are multiplied by.
    """
    return [
        _curvature(task, own, normalize, shrinkage)
        for task, own in zip(evidence, entries or [None] * len(evidence), strict=True)
    ]


def _curvature(
    evidence: Evidence,
    entries: Array | None,
    normalize: Normalize,
    shrinkage: Array | float,
) -> Curvature:
    inputs, outputs, samples, weight = evidence
    if inputs is None and entries is None:
        return Curvature(entries=weight)
    diagonal = Curvature(entries, inputs).diagonal()
    if entries is not None:
        entries = weight * normalized(entries, diagonal, samples, normalize)
    if inputs is not None:
        inputs = normalized(inputs, diagonal, samples, normalize)
        inputs = weight * _shrunk(inputs, shrinkage)
    if outputs is not None:
        # How much data a task has counts once, not in both factors.
        once = "count" if normalize == "none" else normalize
        outputs = normalized(outputs, jnp.diagonal(outputs), samples, once)
        outputs = _shrunk(outputs, shrinkage)
    return Curvature(entries, inputs, outputs)


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


def _shrunk(x: Array, shrinkage: Array | float) -> Array:
    return jnp.where(jnp.eye(len(x), dtype=bool), x, shrinkage * x)


def in_units(of_tasks: Sequence[Curvature]) -> tuple[list[Curvature], Array]:
    """The curvatures divided by a number that makes them of order one, and it.

    Gradients are small: their second moments, and products with them, would leave the
    range of float32.
    """
    if of_tasks[0].outputs is None:
        unit = _unit([one.diagonal() for one in of_tasks])
        return jax.tree.map(lambda x: x / unit, list(of_tasks)), unit
    by_inputs = _unit([jnp.diagonal(one.inputs) for one in of_tasks])  # type: ignore
    by_outputs = _unit([jnp.diagonal(one.outputs) for one in of_tasks])  # type: ignore
    scaled = [
        Curvature(None, one.inputs / by_inputs, one.outputs / by_outputs)  # type: ignore
        for one in of_tasks
    ]
    return scaled, by_inputs * by_outputs


def _unit(diagonals: Sequence[Array]) -> Array:
    size = jnp.asarray(sum(jnp.mean(jnp.abs(diagonal)) for diagonal in diagonals))
    return jnp.where(size > 0, size, 1)


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
    if parts[0].entries is not None:
        return _inverse_by_rows(parts[0], ridge)
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
    inverse = _invert(scaled)
    return lambda x: scale * matmul(inverse, scale * x)


@jax.custom_batching.sequential_vmap
def _invert(matrix: Array) -> Array:
    """Inverts one matrix after the other.

    On CPUs with few threads, batched factorisations can wait for each other forever.
    """
    factor = jax.scipy.linalg.cho_factor(matrix, lower=True)
    return jax.scipy.linalg.cho_solve(factor, jnp.eye(len(matrix)))


def _inverse_by_rows(one: Curvature, ridge: Array | float) -> Callable[[Array], Array]:
    """Solves with inputs and entries, exactly if these are equal within each row."""
    inputs: Array = one.inputs  # type: ignore
    inputs = inputs + ridge * jnp.diag(jnp.diagonal(inputs))
    values, vectors = jnp.linalg.eigh(inputs)
    rows = jnp.mean((1 + ridge) * one.entries, axis=1, keepdims=True)  # type: ignore
    size = jnp.abs(values[None] + rows)
    least = len(values) * jnp.finfo(values.dtype).eps * jnp.max(size)
    size = jnp.maximum(size, least)
    return lambda x: matmul(safe_divide(matmul(x, vectors), size), vectors.T)


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
            by default at the average; then what curves each entry, if that is known.
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
        The last iterate, and how it went; `residual` is over the sum of the norms of
        the tasks' curvatures times their distances from the start. Where these are
        nothing but rounding errors, there is nothing to do.
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
    force = jnp.asarray(sum(norm(pull) for pull in pulls))
    force = jnp.where(force <= _rounding(of_tasks, values, start), 0, force)
    right: Array = jnp.where(force == 0, 0, sum(pulls))  # type: ignore
    parts = total(of_tasks)
    diagonal: Array = sum(part.diagonal() for part in parts)  # type: ignore
    # It proves what a few steps may not meet.
    negative = jnp.any(diagonal < 0)
    damping = ridge * diagonal
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
        max_steps=jnp.where(negative, 0, steps),
    )
    left = safe_divide(told.residual * norm(right), force)
    indefinite = told.indefinite | negative
    return start + way, told._replace(residual=left, indefinite=indefinite)


def _rounding(
    of_tasks: Sequence[Curvature], values: Sequence[Array], start: Array
) -> Array:
    """What rounding may make of curvatures times distances that is zero."""
    sizes = [
        norm(jax.tree.map(jnp.abs, c)(jnp.abs(value - start)))
        for c, value in zip(of_tasks, values, strict=True)
    ]
    return 8 * jnp.finfo(start.dtype).eps * sum(sizes)  # type: ignore


solve_fully = functools.partial(
    solve,
    rtol=1e-6,
    started=False,
    stop="relative",
    steps=50,
    precondition="kronecker",
)
"""`solve` up to float32: a few steps make up for what a factorisation loses."""


def warn_of_indefinite(method: str, told: Mapping[str, SolveInfo]) -> None:
    """Names the leaves whose systems have no minimum."""
    flags = {path: info.indefinite for path, info in told.items()}
    known = {p: flag for p, flag in flags.items() if not isinstance(flag, Tracer)}
    if bad := [path for path, flag in known.items() if jnp.any(flag)]:
        more = f" and {len(bad) - 5} more" if bad[5:] else ""
        warn(
            f"{method}: the systems of these leaves are not positive definite: "
            f"{', '.join(bad[:5])}{more}. The last step before that showed is kept. "
            "Take weights that are not negative; with few tokens, a ridge of 1e-4."
        )
