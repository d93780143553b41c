"""Conjugate gradients: the steps of JAX's, and an answer where it has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.sparse.linalg import cg

from jaxmerge.linalg import conjugate_gradient, map_matrices, matmul


def system(size=24, condition=1e3, columns=5, seed=0, rank=None):
    """A symmetric positive matrix, a right side of its range, a start."""
    draw = np.random.default_rng(seed).standard_normal
    q = np.linalg.qr(draw((size, size)))[0]
    values = np.logspace(0, -np.log10(condition), size)
    values[rank or size :] = 0
    matrix = (q * values) @ q.T
    return matrix, matrix @ draw((size, columns)), draw((size, columns))


@pytest.mark.parametrize("preconditioned", [False, True])
def test_takes_the_steps_of_jax(preconditioned):
    with jax.enable_x64(True):
        matrix, right, start = map(jnp.asarray, system())
        scale = 1 / jnp.linspace(1, 9, len(matrix))[:, None]
        towards = (lambda x: scale * x) if preconditioned else None
        apply = matrix.dot
        solve = jax.jit(
            lambda steps: conjugate_gradient(
                apply, right, start, precondition=towards, max_steps=steps
            ),
            static_argnums=0,
        )
        x, info = solve(200)
        theirs = jax.jit(
            lambda steps: cg(apply, right, start, tol=1e-6, M=towards, maxiter=steps)[0]
        )
        steps = int(info.steps)
        assert 5 < steps < 100
        for n in (1, 5, steps - 1, steps):
            np.testing.assert_allclose(solve(n)[0], theirs(n), rtol=1e-9, atol=1e-12)
        assert np.array_equal(theirs(steps), theirs(200))
        assert not np.array_equal(theirs(steps - 1), theirs(200))
        assert info.residual <= 1e-6 < solve(steps - 1)[1].residual
        left = np.linalg.norm(right - matrix @ x) / np.linalg.norm(right)
        assert info.residual == pytest.approx(left, rel=1e-6)


def test_each_system_of_a_stack_stops_on_its_own(mesh):
    systems = [system(condition=c, seed=i) for i, c in enumerate((2, 20, 200))]
    stacks = [np.float32(part) for part in map(np.stack, zip(*systems, strict=True))]

    def solve(matrix, right, start):
        apply = lambda x: matmul(matrix, x)  # noqa: E731
        return conjugate_gradient(apply, right, start, rtol=1e-4, max_steps=500)

    x, info = map_matrices(solve, *stacks)
    assert info.steps[0] < info.steps[1] < info.steps[2] < 500
    for i, alone in enumerate(zip(*stacks, strict=True)):
        want, told = jax.jit(solve)(*alone)
        np.testing.assert_allclose(x[i], want, atol=5e-3)
        assert abs(info.steps[i] - told.steps) <= 1


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-20, 1e12])
def test_small_and_large_systems_are_solved_as_any(scale):
    matrix, right, _ = map(jnp.float32, system(condition=50))
    solve = jax.jit(
        lambda a, b: conjugate_gradient(a.dot, b, jnp.zeros_like(b), rtol=1e-5)
    )
    x, info = solve(scale * matrix, scale * right)
    want, told = solve(matrix, right)
    np.testing.assert_allclose(x, want, rtol=1e-3, atol=1e-3)
    assert abs(info.steps - told.steps) <= 1
    assert info.residual < 1e-4


def test_nothing_to_do_is_done_in_no_steps():
    matrix, right, _ = map(jnp.float32, system(condition=4))
    zero = jnp.zeros_like(right)
    x, info = conjugate_gradient(matrix.dot, zero, zero)
    assert (info.steps, info.residual) == (0, 0)
    assert not x.any()
    solution = np.float32(np.linalg.solve(np.float64(matrix), right))
    x, info = conjugate_gradient(matrix.dot, right, solution, rtol=1e-4)
    assert info.steps == 0
    assert np.array_equal(x, solution)
    x, info = conjugate_gradient(matrix.dot, right, solution + 1, max_steps=0)
    assert np.array_equal(x, solution + 1)
    assert info.residual > 0.1
    x, info = conjugate_gradient(matrix.dot, right, solution + 1, atol=np.inf)
    assert info.steps == 0


def test_a_right_side_of_zero_is_solved_from_any_start():
    matrix, right, start = map(jnp.float32, system(condition=4))
    x, info = conjugate_gradient(matrix.dot, jnp.zeros_like(right), start)
    assert np.abs(x).max() < 1e-4
    assert info.residual < 1e-5
    assert not info.indefinite


@pytest.mark.parametrize("max_steps", [30, 1000])
def test_directions_that_are_mapped_to_zero_keep_the_start(max_steps):
    matrix, right, start = system(condition=30, rank=9)
    solve = jax.jit(
        lambda a, b, x: conjugate_gradient(
            lambda x: matmul(a, x), b, x, rtol=0.0, max_steps=max_steps
        )
    )
    x, info = solve(*map(np.float32, (matrix, right, start)))
    pinv = np.linalg.pinv(matrix, rcond=1e-9, hermitian=True)
    want = start + pinv @ (right - matrix @ start)
    # Also when it goes on until nothing but rounding is left.
    np.testing.assert_allclose(x, want, atol=2e-3 * np.abs(want).max())
    assert 9 <= info.steps <= max_steps
    assert not info.indefinite


@pytest.mark.parametrize("least", [-1e-3, -1.0])
def test_an_operator_that_is_not_positive_is_noticed(least):
    matrix, right, start = system(condition=10)
    values, q = np.linalg.eigh(matrix)
    values[0] = least
    matrix = jnp.float32((q * values) @ q.T)
    x, info = conjugate_gradient(
        matrix.dot, np.float32(right), np.float32(start), rtol=1e-7, max_steps=100
    )
    assert info.indefinite
    assert info.steps < 100
    assert np.isfinite(x).all()


@pytest.mark.parametrize("signs", [(-1.0, -1.0, -1.0), (-1.0, 1.0, 1.0)])
def test_a_preconditioner_that_is_not_positive_is_noticed(signs):
    diagonal = jnp.array(signs) * jnp.array([1.0, 2.0, 4.0])
    x, info = conjugate_gradient(
        lambda x: diagonal * x,
        jnp.array([3.0, 2.0, 1.0]),
        jnp.zeros(3),
        precondition=lambda x: x / diagonal,
    )
    # The first step would reach the maximum, or the saddle point.
    assert info.indefinite
    assert info.steps == 0
    assert not x.any()


def test_nan_is_noticed():
    x, info = conjugate_gradient(lambda x: x * jnp.nan, jnp.ones(3), jnp.zeros(3))
    assert info.steps == 0
    x, info = conjugate_gradient(
        lambda x: 2 * x, jnp.ones(3), jnp.zeros(3), precondition=lambda x: x * jnp.nan
    )
    assert info.indefinite
    assert not x.any()
