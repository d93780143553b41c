"""Linear algebra on stacks of matrices, each matrix whole on one device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge import sharding
from jaxmerge.numerics import norm, safe_divide
from jaxmerge.sharding import Spread


def map_matrices(
    fn: Callable[..., Any], *stacks: Array, spec: PartitionSpec | None = None
) -> Any:
    """Applies `fn` to every matrix of a stack, on a mesh without any communication.

    A factorisation of a matrix that is cut across devices would be done in full by
    every device. Here the layers are spread over all devices instead, each device works
    on its own whole matrices, and the results go back. The mesh is that of the arrays,
    or the one set by `jax.set_mesh`; without one this is `jax.vmap`.

    Args:
        fn: a function of one matrix (m, n) from each stack, to an array or a pytree of
            arrays. Called eagerly, it is compiled once per function object: define it
            outside of loops. It may close over traced numbers, on an `Explicit` mesh
            inside `sharding.auto` alone.
        stacks: arrays (*stack, m, n) with the same leading axes, of which there may be
            none, of any sizes and shardings. The matrices of different stacks may
            differ in shape.
        spec: how the first stack is sharded, where a tracer does not tell. Without it
            that is guessed, and a wrong guess costs communication.

    Returns:
        The results of `fn` with the leading axes in front. Those of the shape of the
        first stack have its sharding. (Under an outer `jax.jit`, the compiler chooses
        shardings along `Auto` axes.)

    Raises:
        ValueError: no stacks, arrays with fewer than two axes, or leading axes that
            differ.

    Example:
        >>> stack = jax.numpy.stack([jax.numpy.eye(2), 3 * jax.numpy.eye(2)])
        >>> map_matrices(jax.numpy.linalg.det, stack).tolist()
        [1.0, 9.0]
    """
    shapes = [np.shape(stack) for stack in stacks]
    if (
        not stacks
        or min(len(s) for s in shapes) < 2
        or len({s[:-2] for s in shapes}) > 1
    ):
        raise ValueError(
            f"map_matrices: arrays have shapes {shapes}; give one or more arrays "
            "(*stack, m, n) with the same leading axes."
        )
    mesh = sharding.mesh_of(*stacks)
    if mesh is None or mesh.size == 1 or mesh.manual_axes or 0 in shapes[0][:-2]:
        for _ in shapes[0][:-2]:
            fn = jax.vmap(fn)
        return fn(*stacks)
    plan = sharding.plan_spread(stacks[0], mesh, spec)
    traced = any(isinstance(stack, Tracer) for stack in stacks)
    return (_map_spread if traced else _map_spread_eagerly)(fn, plan, *stacks)


def _map_spread(fn: Callable[..., Any], plan: Spread, *stacks: Array) -> Any:
    def map_layers(*stacks):
        context = jax.sharding.get_abstract_mesh()
        # Its check of device-varying types rejects the SVD of TPUs.
        local = jax.shard_map(
            jax.vmap(fn),
            mesh=plan.mesh if context.empty else context,
            in_specs=plan.whole,
            out_specs=plan.whole,
            check_vma=False,
        )
        results = local(*(sharding.spread(stack, plan) for stack in stacks))
        return jax.tree.map(lambda result: sharding.unspread(result, plan), results)

    def like(result: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (*plan.stack, *result.shape)
        placed = NamedSharding(plan.mesh, plan.spec_of_result(shape))
        return jax.ShapeDtypeStruct(shape, result.dtype, sharding=placed)

    matrices = [jax.ShapeDtypeStruct(s.shape[-2:], s.dtype) for s in stacks]
    results = jax.tree.map(like, jax.eval_shape(fn, *matrices))
    return sharding.auto(map_layers, like=results)(*stacks)


_map_spread_eagerly = functools.partial(jax.jit, static_argnums=(0, 1))(_map_spread)


def svd(x: Array) -> tuple[Array, Array, Array]:
    """The reduced singular value decomposition of `x` (*stack, m, n).

    On NVIDIA GPUs, the solvers behind `jax.numpy.linalg.svd` leave a residual of 3e-4
    (up to 1024 rows and columns) or take several times as long. There the factors come
    from a polar decomposition and the eigenvectors of its symmetric part (Higham and
    Papadimitriou, A parallel algorithm for computing the polar decomposition, 1994),
    which is mostly products of matrices. What is differentiated comes from the solvers.

    Returns:
        `u` (*stack, m, r), `s` (*stack, r), descending, and `vt` (*stack, r, n), with r
        the smaller of m and n.

    Example:
        >>> u, s, vt = svd(jax.numpy.array([[0.0, 2.0], [1.0, 0.0]]))
        >>> s.tolist()
        [2.0, 1.0]
    """
    # The other branch would be traced for nothing where no such device is.
    if jax.default_backend() != "gpu" or min(x.shape[-2:]) <= _FEW:
        return _svd_of_library(x)
    return _svd_on_gpus(x)


_FEW = 128  # Of 64 rows and columns, libraries are faster; of 256, slower.


def _svd_of_library(x: Array) -> tuple[Array, Array, Array]:
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return u, s, vt


@jax.custom_jvp
def _svd_on_gpus(x: Array) -> tuple[Array, Array, Array]:
    return jax.lax.platform_dependent(x, cuda=svd_by_polar, default=_svd_of_library)


@_svd_on_gpus.defjvp
def _differentiated_svd(primals: Any, tangents: Any) -> Any:
    # The number of steps that a polar decomposition takes depends on the values.
    return jax.jvp(_svd_of_library, primals, tangents)


@jax.custom_batching.custom_vmap
def svd_by_polar(x: Array) -> tuple[Array, Array, Array]:
    """`svd`, one matrix after the other, by a polar decomposition of each."""
    *stack, m, n = x.shape
    if m < n:
        u, s, vt = svd_by_polar(x.mT)
        return vt.mT, s, u.mT
    factors = jax.lax.map(_tall_svd, x.reshape(-1, m, n))
    u, s, vt = (factor.reshape(*stack, *factor.shape[1:]) for factor in factors)
    return u, s, vt


@svd_by_polar.def_vmap
def _(size: int, batched: Any, x: Array) -> Any:
    # Side by side, every loop would run until its slowest matrix is done.
    return svd_by_polar(x), (True, True, True)


def _tall_svd(x: Array) -> tuple[Array, Array, Array]:
    unitary, symmetric = jax.scipy.linalg.polar(x)
    s, v = jnp.linalg.eigh(symmetric)
    s, v = jnp.maximum(s[::-1], 0), v[:, ::-1]
    # Columns that belong to singular values of zero are not orthonormal before this.
    u, triangle = jnp.linalg.qr(matmul(unitary, v))
    return u * jnp.where(jnp.diagonal(triangle) < 0, -1, 1)[None], s, v.T


def polar(x: Array, rtol: float = 1e-6) -> Array:
    """The nearest matrix to `x` (m, n) whose singular values are all one.

    Directions in which `x` is zero, with singular values of at most `rtol` times the
    largest, stay zero: the factor is unique also where `x` has not got full rank, as
    with columns that repeat.

    Example:
        >>> print(polar(jax.numpy.array([[3.0, 0.0], [0.0, 0.0]])))
        [[1. 0.]
         [0. 0.]]
    """
    u, s, vt = svd(x)
    return matmul(u * nonzero(s, rtol).astype(x.dtype)[None], vt)


def nonzero(s: Array, rtol: Array | float = 1e-6, noise: Array | float = 0.0) -> Array:
    """Which singular values (*stack, r) are above `noise` and `rtol` of the largest."""
    largest = jnp.max(s, axis=-1, initial=0, keepdims=True)
    return s > jnp.maximum(rtol * largest, noise)


def rounding_noise(start: Array | None = None) -> Array:
    """The largest singular value that rounding leaves in a change of a matrix.

    A change that was added to `start` (m, n) and is found as a difference has lost
    what is below the precision of the entries: an error of full rank, which singular
    values of zero would be mistaken for. Its norm is at most about that of random
    errors of the entries, epsilon |start| (1 / sqrt(m) + 1 / sqrt(n)).
    """
    if start is None or not start.size:
        return jnp.zeros(())
    m, n = start.shape
    return jnp.finfo(start.dtype).eps * norm(start) * (m**-0.5 + n**-0.5)


def joint_bases(
    u: Array, s: Array, vt: Array, noise: Array | float = 0.0
) -> tuple[Array, Array]:
    """The orthonormal bases nearest to the singular vectors of all matrices together.

    Vectors whose singular value is zero become zero: what has no strength must not take
    a direction away from others.

    Args:
        u: (T, m, r), of T matrices (m, n), as from `leading_svd`.
        s: (T, r).
        vt: (T, r, n).
        noise: singular values up to this one count as zero.

    Returns:
        The polar factors of the left singular vectors side by side (m, T * r), and of
        the right ones one below the other (T * r, n).
    """
    present = nonzero(s, noise=noise).astype(s.dtype)
    left = polar(jnp.concatenate(list(u * present[:, None]), axis=1))
    right = polar(jnp.concatenate(list(vt * present[..., None]), axis=0))
    return left, right


def leading_svd(x: Array, rank: int | None = None) -> tuple[Array, Array, Array]:
    """The singular triplets of `x` (*stack, m, n), the `rank` largest ones.

    Up to a sixteenth of the full rank, where it pays, the subspace is found by random
    projection and four power iterations with half as many directions again (Halko,
    Martinsson and Tropp, 2011, algorithm 4.4). What remains of `x` then has a
    Frobenius norm of at most 1.005 times the least possible, on spectra from flat to
    steep, and far closer to it where singular values decay. Where they are all but
    equal, which of them are found is arbitrary. Otherwise all triplets are computed,
    and the first ones are exact.

    Args:
        x: matrices.
        rank: how many triplets; None for all min(m, n).

    Returns:
        `u` (*stack, m, r), `s` (*stack, r), descending, and `vt` (*stack, r, n).

    Example:
        >>> u, s, vt = leading_svd(jax.numpy.diag(jax.numpy.array([1.0, 3.0])), rank=1)
        >>> s.tolist()
        [3.0]
    """
    full = min(x.shape[-2:])
    rank = min(full, full if rank is None else rank)
    if 16 * rank > full:
        u, s, vt = svd(x)
        return u[..., :rank], s[..., :rank], vt[..., :rank, :]
    draws = (x.shape[-1], rank + rank // 2 + 8)
    basis = jnp.broadcast_to(
        jax.random.normal(jax.random.key(0), draws, x.dtype), (*x.shape[:-2], *draws)
    )
    basis = jnp.linalg.qr(matmul(x, basis)).Q
    for _ in range(4):
        basis = jnp.linalg.qr(matmul(x.mT, basis)).Q
        basis = jnp.linalg.qr(matmul(x, basis)).Q
    u, s, vt = svd(matmul(basis.mT, x))
    return matmul(basis, u)[..., :rank], s[..., :rank], vt[..., :rank, :]


def matmul(a: Array, b: Array) -> Array:
    """`a @ b` in full precision.

    Where matrix units round to fewer bits, the small entries of Grams would drown.
    """
    return jnp.matmul(a, b, precision="highest")


class SolveInfo(NamedTuple):
    """How the iterative solution of a linear system went.

    Attributes:
        steps: how many steps were taken.
        residual: norm of what is left of the equations, over that of their right side.
        indefinite: whether the operator turned out not to be positive semidefinite, so
            that there is nothing to minimise; the last iterate before is kept.
    """

    steps: Array
    residual: Array
    indefinite: Array


def least_squares(
    apply: Callable[[Array], Array],
    transpose: Callable[[Array], Array],
    right: Array,
    *,
    ridge: Array | float = 0.0,
    rtol: Array | float = 1e-6,
    atol: Array | float = 0.0,
    max_steps: int = 200,
) -> tuple[Array, SolveInfo]:
    """Minimises |apply(x) - right|^2 + ridge |x|^2, from zero, without a matrix.

    Conjugate gradients on the normal equations in the form of Hestenes and Stiefel
    (CGLS), which keeps the residual of the equations themselves: systems that are
    singular or contradict themselves converge too, to the solution of least norm. Under
    `jax.vmap`, each system stops on its own.

    Args:
        apply: a linear function.
        transpose: its transpose.
        right: the right side.
        ridge: weight of the squared norm of x.
        rtol: stops when the norm of the gradient has shrunk to this share,
        atol: or to this value: what counts as zero where the first gradient is.
        max_steps: the most steps.

    Returns:
        The minimiser, and a `SolveInfo`. It cannot be differentiated in reverse: the
        number of steps depends on the values.
    """
    gradient = transpose(right)
    square = jnp.sum(gradient * gradient)
    small = jnp.maximum(rtol * jnp.sqrt(square), atol)

    def unfinished(state):
        steps, *_, left = state
        return (steps < max_steps) & (left > small**2)

    def step(state):
        steps, x, rest, direction, left = state
        image = apply(direction)
        curvature = jnp.sum(image * image) + ridge * jnp.sum(direction * direction)
        length = left / curvature
        x, rest = x + length * direction, rest - length * image
        gradient = transpose(rest) - ridge * x
        now = jnp.sum(gradient * gradient)
        return steps + 1, x, rest, gradient + now / left * direction, now

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros_like(gradient),
        right,
        gradient,
        square,
    )
    steps, x, rest, *_ = jax.lax.while_loop(unfinished, step, start)
    left = safe_divide(norm(rest), norm(right))
    return x, SolveInfo(steps, left, jnp.zeros((), bool))


class _Descent(NamedTuple):
    """The state of conjugate gradients; `rest` and `x` in units of the first rest.

    Attributes:
        steps: how many steps were taken.
        x: the way from the start.
        rest: what is left of the equations.
        direction: where the next step goes.
        slope: the product of `rest` with itself, in the metric of the preconditioner.
        square: that of `direction`.
        steepest: the largest curvature met, per square.
        stuck: whether a step was refused.
        indefinite: whether that was because the curvature or slope was negative.
    """

    steps: Array
    x: Array
    rest: Array
    direction: Array
    slope: Array
    square: Array
    steepest: Array
    stuck: Array
    indefinite: Array


def conjugate_gradient(
    apply: Callable[[Array], Array],
    right: Array,
    start: Array,
    *,
    precondition: Callable[[Array], Array] | None = None,
    rtol: Array | float = 1e-6,
    atol: Array | float = 0.0,
    max_steps: Array | int = 200,
) -> tuple[Array, SolveInfo]:
    """Solves apply(x) = right, from a start, without a matrix.

    The method of Hestenes and Stiefel. Where the system is singular, the start decides:
    nothing is added in directions that `apply` maps to zero. Stopped early, it has gone
    furthest in the directions of largest curvature. Under `jax.vmap`, each system stops
    on its own.

    Args:
        apply: a linear function, symmetric and positive semidefinite.
        right: the right side, an array of any shape.
        start: an array like `right`.
        precondition: a linear function, symmetric and positive semidefinite, near to
            the inverse of `apply`. It changes where early steps go.
        rtol: stops when the norm of the residual is this share of that of the right
            side, or where that is zero, of the first residual's,
        atol: or when it is this value.
        max_steps: the most steps.

    Returns:
        The last iterate, and a `SolveInfo`, with the residual recomputed. No step is
        taken along which the curvature is negative, or vanishes up to rounding, nor one
        where `precondition` is negative. It cannot be differentiated in reverse: the
        number of steps depends on the values.

    Example:
        >>> matrix = jax.numpy.array([[2.0, 1.0], [1.0, 3.0]])
        >>> right = jax.numpy.array([3.0, 4.0])
        >>> x, info = conjugate_gradient(matrix.dot, right, jax.numpy.zeros(2))
        >>> print(x.round(4), info.steps)
        [1. 1.] 2
    """
    dot = functools.partial(jnp.vdot, precision="highest")
    precondition = precondition or (lambda rest: rest)
    rest = right - apply(start)
    first, size = norm(rest), norm(right)
    size = jnp.where(size > 0, size, first)
    # In this unit, squares of small numbers do not vanish; a power of two is exact.
    unit = jnp.ldexp(jnp.ones_like(first), jnp.frexp(first)[1])
    small = jnp.maximum(rtol * size, atol) / unit
    rounding = 8 * jnp.finfo(rest.dtype).eps

    def unfinished(state: _Descent) -> Array:
        left = dot(state.rest, state.rest)
        return (state.steps < max_steps) & (left > small**2) & ~state.stuck

    def step(state: _Descent) -> _Descent:
        image = apply(state.direction)
        curvature = dot(state.direction, image)
        steepness = safe_divide(curvature, state.square)
        steepest = jnp.maximum(state.steepest, steepness)
        # Of a negative slope and a negative curvature, the quotient is positive.
        downhill = state.slope >= 0
        stuck = ~(downhill & (steepness > rounding * steepest))
        length = state.slope / jnp.where(stuck, 1, curvature)
        rest = state.rest - jnp.where(stuck, 0, length * image)
        nearer = precondition(rest)
        slope = dot(rest, nearer)
        keep = safe_divide(slope, state.slope)
        return _Descent(
            state.steps + ~stuck,
            state.x + jnp.where(stuck, 0, length * state.direction),
            rest,
            nearer + keep * state.direction,
            slope,
            slope + keep * keep * state.square,
            steepest,
            stuck,
            ~(downhill & (steepness >= -rounding * steepest)),
        )

    rest = rest / unit
    direction = precondition(rest)
    slope = dot(rest, direction)
    no, zero = jnp.zeros((), bool), jnp.zeros_like(slope)
    begin = _Descent(
        steps=jnp.zeros((), jnp.int32),
        x=jnp.zeros_like(rest),
        rest=rest,
        direction=direction,
        slope=slope,
        square=slope,
        steepest=zero,
        stuck=no,
        indefinite=no,
    )
    end = jax.lax.while_loop(unfinished, step, begin)
    x = start + unit * end.x
    left = safe_divide(norm(right - apply(x)), size)
    return x, SolveInfo(end.steps, left, end.indefinite)
