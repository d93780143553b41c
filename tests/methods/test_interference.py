"""WUDI-Merging against float64 versions and known answers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_tasks import close, merged_matrix, orthogonal_tasks, random_matrices

from jaxmerge import wudi


def closed_form(tasks, **options):
    return merged_matrix(wudi, tasks, solver="closed_form", **options)


def gradient(merged, tasks):
    """Half the slope of the interference, task by task."""
    return sum((merged - d) @ d.T @ d / np.sum(d * d) for d in tasks if d.any())


def interference(merged, tasks):
    return sum(
        np.sum(((merged - d) @ d.T) ** 2) / np.sum(d * d) for d in tasks if d.any()
    )


def adam(tasks, steps, learning_rate):
    x = sum(tasks)
    mean = square = np.zeros_like(x)
    for step in range(1, steps + 1):
        slope = 2 * gradient(x, tasks)
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope**2
        root = np.sqrt(square / (1 - 0.999**step)) + 1e-8
        x = x - learning_rate * mean / (1 - 0.9**step) / root
    return x


def least_squares(tasks):
    """The minimum next to the sum: all conditions as one system of equations."""
    total = sum(tasks)
    inputs = [d / np.linalg.norm(d) for d in tasks]
    wanted = [
        i @ (d - total).T  # What the change of the sum should do to these inputs.
        for d, i in zip(tasks, inputs, strict=True)
    ]
    system = np.concatenate(inputs), np.concatenate(wanted)
    return total + np.linalg.lstsq(*system, rcond=1e-8)[0].T


def flow(tasks, time, steps=2000):
    """The gradient flow by the method of Runge and Kutta."""
    x, h = sum(tasks), time / steps
    for _ in range(steps):
        a = -gradient(x, tasks)
        b = -gradient(x + h / 2 * a, tasks)
        c = -gradient(x + h / 2 * b, tasks)
        d = -gradient(x + h * c, tasks)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


@pytest.mark.parametrize("steps", [1, 40])
@pytest.mark.parametrize("shape", [(12, 9), (5, 14)])
def test_adam_takes_the_steps_of_the_authors(steps, shape):
    tasks = [3e-4 * task for task in random_matrices(shape=shape)]
    got = merged_matrix(wudi, tasks, steps=steps)
    want = adam(tasks, steps, 1e-5)
    assert np.abs(want - sum(tasks)).max() > 0.9e-5 * steps**0.5
    np.testing.assert_allclose(got, want, atol=1e-8)


def test_steps_of_adam_are_as_long_as_the_learning_rate():
    tasks = [1e-2 * task for task in random_matrices()]
    got = merged_matrix(wudi, tasks, steps=20)
    assert np.abs(got - sum(tasks)).max() <= 21e-5
    tripled = merged_matrix(wudi, [3 * t for t in tasks], steps=20, learning_rate=3e-5)
    np.testing.assert_allclose(tripled, 3 * got, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("shape", [(12, 9), (3, 14)])
def test_closed_form_ends_at_the_minimum(rank, shape):
    tasks = random_matrices(3, shape=shape, rank=rank)
    got = closed_form(tasks)
    close(got, least_squares(tasks), rtol=1e-4)
    assert np.abs(gradient(got, tasks)).max() <= 1e-5 * np.abs(sum(tasks)).max()


def test_adam_approaches_the_closed_form():
    tasks = [0.1 * task for task in random_matrices(3, shape=(12, 5))]
    least = closed_form(tasks)
    far, near, there = (
        np.linalg.norm(merged_matrix(wudi, tasks, steps=n, learning_rate=1e-2) - least)
        for n in (0, 30, 300)
    )
    assert far > 2 * near > 1e4 * there


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("time", [0.0, 0.3, 20.0])
def test_closed_form_follows_the_gradient_flow(rank, time):
    tasks = random_matrices(3, rank=rank)
    close(closed_form(tasks, time=time), flow(tasks, time))


def test_times_of_any_length_are_defined_and_may_be_traced():
    tasks = random_matrices(3, rank=2)
    least = closed_form(tasks)
    for time in (1e8, 1e38):
        close(closed_form(tasks, time=time), least, rtol=1e-3)
    base, *models = ({"kernel": np.float32(task.T)} for task in [0 * tasks[0], *tasks])

    def merge(time):
        return wudi(base, models, solver="closed_form", time=time)["kernel"]

    several = jax.vmap(merge)(jnp.array([0.5, 5.0, math.inf]))
    for got, time in zip(several, (0.5, 5.0, math.inf), strict=True):
        np.testing.assert_allclose(got.T, closed_form(tasks, time=time), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e-2},
        {"solver": "closed_form", "time": 0.1},
        {"solver": "closed_form"},
    ],
    ids=str,
)
def test_interference_is_less_than_that_of_the_sum(seed, options):
    tasks = random_matrices(seed=seed)
    got = merged_matrix(wudi, tasks, **options)
    assert interference(got, tasks) < 0.95 * interference(sum(tasks), tasks)


@pytest.mark.parametrize("solver", ["adam", "closed_form"])
def test_one_task_and_tasks_of_other_inputs_stay_as_they_are(solver):
    (task,) = random_matrices(1)
    np.testing.assert_array_equal(
        merged_matrix(wudi, [task], solver=solver), np.float32(task)
    )
    close(
        merged_matrix(wudi, orthogonal_tasks(), solver=solver, steps=300),
        sum(orthogonal_tasks()),
    )
    draw = np.random.default_rng(0).standard_normal
    inputs = np.linalg.qr(draw((9, 6)))[0].T
    apart = [1e-3 * draw((12, 2)) @ inputs[2 * t : 2 * t + 2] for t in range(3)]
    # Adam may take a rounding error for a slope, and a step along it.
    np.testing.assert_allclose(
        merged_matrix(wudi, apart, solver=solver), sum(apart), atol=1e-5
    )


@pytest.mark.parametrize("solver", ["adam", "closed_form"])
def test_zero_tasks_count_for_nothing(solver):
    tasks = [1e-3 * task for task in random_matrices(3)]
    got = merged_matrix(wudi, [*tasks, 0 * tasks[0]], solver=solver)
    np.testing.assert_allclose(
        got, merged_matrix(wudi, tasks, solver=solver), rtol=1e-6, atol=1e-9
    )


def test_copies_of_a_task_are_averaged():
    (task,) = random_matrices(1, rank=4)
    close(closed_form([task] * 4), task, rtol=1e-4)
    close(closed_form([k * task for k in (1, 2, 3, 4)]), 2.5 * task, rtol=1e-4)
    close(closed_form([task, -task]), 0 * task)


def test_slopes_by_numbers_and_by_the_models():
    base, *models = ({"kernel": np.float32(m)} for m in random_matrices(3))
    (direction,) = random_matrices(1, seed=1)

    def total(way, **options):
        moved = [{"kernel": m["kernel"] + way * direction} for m in models]
        return jnp.sum(wudi(base, moved, **options)["kernel"] ** 2)

    def by_adam(way, rate):
        return total(way, learning_rate=rate, steps=3)

    def by_flow(way, time):
        return total(way, solver="closed_form", time=time)

    assert np.isfinite(jax.grad(by_adam, argnums=(0, 1))(0.0, 0.1)).all()
    for time in (2.0, math.inf):
        numeric = (by_flow(1e-2, time) - by_flow(-1e-2, time)) / 2e-2
        assert jax.grad(by_flow)(0.0, time) == pytest.approx(float(numeric), rel=2e-2)
    assert np.isfinite(jax.grad(by_flow, argnums=1)(0.0, 2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "sgd"}, "solver is 'sgd'; it must be one of 'adam', 'closed_form'"),
        ({"steps": -1}, "steps is -1; it must be a whole number of at least 0"),
        ({"steps": 1.5}, "steps is 1.5; it must be a whole number"),
        ({"learning_rate": -1e-5}, "learning_rate is -1e-05; it must be in"),
        ({"time": 1.0}, "time has no effect without solver='closed_form'"),
        (
            {"solver": "closed_form", "steps": 10},
            "steps has no effect without solver='adam'",
        ),
        (
            {"solver": "closed_form", "learning_rate": 1e-3},
            "learning_rate has no effect without solver='adam'",
        ),
        ({"solver": "closed_form", "time": -1.0}, "time is -1; it must be in"),
        ({"solver": "closed_form", "time": math.nan}, "time is nan, not finite"),
    ],
)
def test_wrong_options_are_refused(options, message):
    tree = {"kernel": np.ones((2, 2), np.float32)}
    with pytest.raises(ValueError, match=f"^wudi: {message}"):
        wudi(tree, [tree], **options)
