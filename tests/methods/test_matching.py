"""Methods that solve linear systems, against dense solutions in float64."""

import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import cg
from task_statistics import layer_of, random_statistics, statistics_of

import jaxmerge as jm
from jaxmerge.matrices import MatrixAxes
from jaxmerge.statistics import collect


class Task(NamedTuple):
    """A weight (inputs, outputs), what enters it, and the gradients of what leaves."""

    weight: np.ndarray
    inputs: np.ndarray
    gradients: np.ndarray

    @property
    def gram(self):
        return self.inputs.T @ self.inputs / len(self.inputs)

    @property
    def factor(self):
        return self.gradients.T @ self.gradients / len(self.gradients)


def random_tasks(count=3, inputs=12, outputs=8, tokens=60, seed=0):
    draw = np.random.default_rng(seed).standard_normal

    def mixed(size):
        return draw((tokens, size)) @ (
            np.eye(size) + 0.5 * draw((size, size)) / size**0.5
        )

    return [
        Task(draw((inputs, outputs)), mixed(inputs), 1e-3 * mixed(outputs))
        for _ in range(count)
    ]


def arguments(tasks):
    models = [{"kernel": jnp.float32(task.weight)} for task in tasks]
    statistics = [
        statistics_of(model, {"kernel": task.inputs}, {"kernel": task.gradients})
        for model, task in zip(models, tasks, strict=True)
    ]
    return models, statistics


def merged(method, tasks, **options):
    return np.asarray(method(*arguments(tasks), **options)["kernel"])


def told(method, tasks, **options):
    tree, info = method(*arguments(tasks), info=True, **options)
    return np.asarray(tree["kernel"]), info["kernel"]


def close(got, want, rtol=1e-5):
    assert np.linalg.norm(got - want) <= rtol * np.linalg.norm(want)


def by_grams(tasks, grams=None):
    grams = [task.gram for task in tasks] if grams is None else grams
    right = sum(a @ task.weight for a, task in zip(grams, tasks, strict=True))
    return np.linalg.solve(sum(grams), right)


def dense_system(tasks):
    left = sum(np.kron(task.gram, task.factor) for task in tasks)
    right = sum(task.gram @ task.weight @ task.factor for task in tasks)
    return left, right


def by_kronecker(tasks):
    left, right = dense_system(tasks)
    return np.linalg.solve(left, right.ravel()).reshape(right.shape)


def conjugate_gradients(left, right, x, steps):
    """As in a textbook, for a dense system."""
    shape, right, x = right.shape, right.ravel(), x.ravel()
    rest = right - left @ x
    direction = rest
    for _ in range(steps):
        image = left @ direction
        length = rest @ rest / (direction @ image)
        x, before = x + length * direction, rest
        rest = rest - length * image
        direction = rest + (rest @ rest) / (before @ before) * direction
    return x.reshape(shape)


TIGHT = {"steps": 3000, "rtol": 1e-7}
EXACT = {"shrinkage": 1.0, "ridge": 0.0}
PRECONDITIONS = ["none", "jacobi", "kronecker"]


def average(tasks):
    return sum(task.weight for task in tasks) / len(tasks)


@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_grams_are_solved_as_in_regmean(precondition):
    tasks = random_tasks()
    want = by_grams(tasks)
    got, info = told(jm.mats, tasks, precondition=precondition, **TIGHT)
    close(got, want)
    assert info.steps <= 1.5 * 12
    assert info.residual <= 1e-6
    close(merged(jm.regmean, tasks, **EXACT), want)


@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_kronecker_factors_are_solved_as_the_dense_system(precondition):
    tasks = random_tasks()
    options = {"metric": "kronecker", "precondition": precondition, **TIGHT}
    close(merged(jm.mats, tasks, **options), by_kronecker(tasks), rtol=1e-5)


def test_two_tasks_have_a_closed_form():
    tasks = random_tasks(2)

    def both_diagonal(p, q):
        """u.T @ p @ u = 1 and u.T @ q @ u = diag(values)."""
        root = np.linalg.inv(np.linalg.cholesky(p))
        values, v = np.linalg.eigh(root @ q @ root.T)
        return root.T @ v, values

    u, a = both_diagonal(*(task.gram for task in tasks))
    v, g = both_diagonal(*(task.factor for task in tasks))
    _, right = dense_system(tasks)
    want = u @ (u.T @ right @ v / (1 + np.outer(a, g))) @ v.T
    close(want, by_kronecker(tasks), rtol=1e-9)
    close(merged(jm.mats, tasks, metric="kronecker", **TIGHT), want, rtol=2e-5)


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("metric", ["gram", "kronecker"])
def test_early_steps_are_those_of_conjugate_gradients_on_the_whole_system(
    metric, steps
):
    tasks = random_tasks()
    left, right = dense_system(tasks)
    if metric == "gram":
        left = np.kron(sum(task.gram for task in tasks), np.eye(8))
        right = sum(task.gram @ task.weight for task in tasks)
    start = np.random.default_rng(1).standard_normal((12, 8))
    got, info = told(
        jm.mats,
        tasks,
        metric=metric,
        init={"kernel": jnp.float32(start)},
        steps=steps,
        stop="steps",
    )
    close(got, conjugate_gradients(left, right, start, steps), rtol=2e-5)
    assert info.steps == steps


def test_equal_factors_drop_out():
    tasks = random_tasks()
    alike = [task._replace(gradients=tasks[0].gradients) for task in tasks]
    options = {"metric": "kronecker", **TIGHT}
    close(merged(jm.mats, alike, **options), by_grams(tasks))
    alike = [task._replace(inputs=tasks[0].inputs) for task in tasks]
    want = sum(t.weight @ t.factor for t in tasks) @ np.linalg.inv(
        sum(t.factor for t in tasks)
    )
    close(merged(jm.mats, alike, **options), want, rtol=2e-5)


@pytest.mark.parametrize("method", [jm.mats, jm.regmean])
def test_proportional_grams_weigh_models(method):
    tasks = random_tasks()
    scaled = [
        task._replace(inputs=np.sqrt(c) * tasks[0].inputs)
        for c, task in zip((1, 2, 5), tasks, strict=True)
    ]
    want = sum(c * t.weight for c, t in zip((1, 2, 5), tasks, strict=True)) / 8
    options = TIGHT if method is jm.mats else EXACT
    close(merged(method, scaled, **options), want)
    equal = [task._replace(inputs=tasks[0].inputs) for task in tasks]
    close(merged(method, equal, weights=[1, 2, 5], **options), want)
    # What a task weighs does not depend on its scale, if asked.
    close(merged(method, scaled, normalize="trace", **options), average(tasks))


@pytest.mark.parametrize("metric", ["identity", "gram"])
def test_equal_curvatures_give_the_average_in_one_step(metric):
    tasks = [t._replace(inputs=np.sqrt(20) * np.eye(12)) for t in random_tasks()]
    start = {"kernel": jnp.float32(tasks[0].weight)}
    got, info = told(jm.mats, tasks, metric=metric, init=start)
    close(got, average(tasks), rtol=1e-6)
    assert info.steps == 1
    got, info = told(jm.mats, tasks, metric=metric)
    assert info.steps == 0


METRICS = ["gram", "kronecker", "fisher", "fisher_block", "identity"]


def every_kind():
    """Models of stacked layers, of a matrix and a vector."""
    draw = np.random.default_rng(0).standard_normal
    models = [
        {"kernel": jnp.float32(draw((2, 6, 4))), "bias": jnp.float32(draw((2, 4)))}
        for _ in range(3)
    ]
    return models, random_statistics(models, stacked=1)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_models_and_single_models_come_back_as_they_are(metric):
    models, statistics = every_kind()
    for alike, known in [([models[0]] * 3, statistics), (models[:1], statistics[:1])]:
        got = jm.mats(alike, known, metric=metric, stop="steps")
        jax.tree.map(np.testing.assert_array_equal, got, models[0])


def test_regmean_of_equal_models_is_exact():
    models, statistics = every_kind()
    got = jm.regmean([models[0]] * 3, statistics)
    jax.tree.map(np.testing.assert_array_equal, got, models[0])


@pytest.mark.parametrize("metric", METRICS)
def test_no_steps_leave_the_start(metric):
    models, statistics = every_kind()
    start = jax.tree.map(lambda x: x + 1, models[1])
    got, info = jm.mats(
        models, statistics, metric=metric, init=start, steps=0, info=True
    )
    for path in info:
        np.testing.assert_array_equal(got[path], start[path])
        assert np.all(info[path].residual > 0.1)
        assert info[path].steps.shape == (2,)
    for path in set(start) - set(info):
        want = sum(model[path] for model in models) / 3
        np.testing.assert_allclose(got[path], want, atol=1e-6)


def test_another_number_of_steps_compiles_nothing(compilations):
    known = arguments(random_tasks())
    jm.mats(*known, steps=3)
    compilations.clear()
    jm.mats(*known, steps=4)
    assert not compilations


def test_starts_by_name():
    tasks = random_tasks()
    start, info = told(jm.mats, tasks, init="average", steps=0)
    close(start, average(tasks), rtol=1e-6)
    start, info = told(jm.mats, tasks, init="regmean", steps=0)
    close(start, merged(jm.regmean, tasks), rtol=1e-6)
    _, info = told(jm.mats, tasks, init={"kernel": start}, shrinkage=0.9, rtol=1e-3)
    assert info.steps == 0


@pytest.mark.parametrize("method", [jm.mats, jm.regmean])
@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_shrinkage(method, shrinkage):
    tasks = random_tasks()
    grams = [np.where(np.eye(12), task.gram, shrinkage * task.gram) for task in tasks]
    want = by_grams(tasks, grams)
    if shrinkage == 0:
        powers = np.stack([np.diag(task.gram) for task in tasks])[..., None]
        weights = np.stack([task.weight for task in tasks])
        close(want, (powers * weights).sum(0) / powers.sum(0), rtol=1e-9)
    options = TIGHT if method is jm.mats else {"ridge": 0.0}
    close(merged(method, tasks, **options | {"shrinkage": shrinkage}), want)


def test_shrinkage_of_both_factors():
    tasks = random_tasks()
    options = {"metric": "kronecker", "shrinkage": 0.0, **TIGHT}
    shares = [np.outer(np.diag(t.gram), np.diag(t.factor)) for t in tasks]
    want = sum(s * t.weight for s, t in zip(shares, tasks, strict=True)) / sum(shares)
    close(merged(jm.mats, tasks, **options), want)


@pytest.mark.filterwarnings("ignore:.*too few tokens")
@pytest.mark.parametrize("steps", [20, 500])
def test_directions_without_data_stay_where_they_start(steps):
    tasks = random_tasks(tokens=3)
    start = np.random.default_rng(1).standard_normal((12, 8))
    grams = [task.gram for task in tasks]
    left = sum(grams)
    rest = sum(a @ (t.weight - start) for a, t in zip(grams, tasks, strict=True))
    want = start + np.linalg.pinv(left, rcond=1e-9, hermitian=True) @ rest
    got, info = told(
        jm.mats,
        tasks,
        init={"kernel": jnp.float32(start)},
        steps=steps,
        stop="steps" if steps == 20 else "relative",
    )
    close(got, want, rtol=1e-3)
    assert 9 <= info.steps <= 20


def test_too_few_samples_are_told():
    models, statistics = arguments(random_tasks(tokens=3))
    message = "regmean: .* too few tokens, .* 9 for the 12 inputs of 'kernel'"
    with pytest.warns(UserWarning, match=message):
        got = jm.regmean(models, statistics)
    spread = np.abs(models[0]["kernel"]).max()
    assert np.abs(got["kernel"]).max() < 5 * spread


def warned(call):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call()
    assert all(one.filename == __file__ for one in told)
    return [str(one.message) for one in told]


def test_each_warning_comes_once_and_from_where_the_merge_is_called():
    known = arguments(random_tasks(tokens=3))
    for call, method in [
        (lambda: jm.regmean(*known), "regmean"),
        (lambda: jm.mats(*known), "mats"),
        (lambda: jm.mats(*known, init="regmean"), "mats"),
        (lambda: jm.mats(*known, metric="identity", init="regmean"), "mats"),
    ]:
        (message,) = warned(call)
        assert message.startswith(f"{method}: the second moments are of too few tok")
    assert not warned(lambda: jm.matching_objective(*known, known[0][0]))
    known = arguments(random_tasks())
    negative = {"weights": [1, -2, 0.5], "init": "regmean"}
    (message,) = warned(lambda: jm.mats(*known, **negative))
    assert message.startswith("mats: the systems of these leaves are not positive def")


def test_too_few_samples_of_outputs_and_of_vectors_are_told():
    known = arguments(random_tasks(inputs=4, tokens=2))
    (message,) = warned(lambda: jm.mats(*known, metric="kronecker"))
    assert "6 for the 8 outputs of 'kernel'" in message
    models = [{"bias": jnp.ones(12)}] * 2
    blocks = {"bias": np.eye(12)}
    statistics = [statistics_of(m, fisher_block=blocks, examples=5) for m in models]
    (message,) = warned(lambda: jm.mats(models, statistics, metric="fisher_block"))
    assert "too few examples, in all tasks together 10 for the 12 entries" in message


@pytest.mark.filterwarnings("ignore:.*too few tokens")
def test_regmean_of_dependent_inputs_is_that_of_float64():
    tasks = random_tasks(inputs=64, tokens=15)
    constant = [
        t._replace(inputs=t.inputs - t.inputs.mean(1, keepdims=True)) for t in tasks
    ]
    for case in (tasks, constant):
        left = sum(task.gram for task in case)
        left = left + 1e-4 * np.diag(np.diag(left))
        mean = average(case)
        right = sum(task.gram @ (task.weight - mean) for task in case)
        want = mean + np.linalg.solve(left, right)
        close(merged(jm.regmean, case, shrinkage=1.0), want, rtol=5e-3)


@pytest.mark.parametrize("metric", ["gram", "kronecker"])
def test_scale_of_statistics_is_without_effect(metric):
    tasks = random_tasks()
    want, info = told(jm.mats, tasks, metric=metric)
    for inputs, gradients in [(1e3, 1.0), (1.0, 1e-9), (1e-4, 1e6)]:
        scaled = [
            Task(t.weight, inputs * t.inputs, gradients * t.gradients) for t in tasks
        ]
        got, told_of = told(jm.mats, scaled, metric=metric)
        close(got, want, rtol=1e-4)
        assert abs(told_of.steps - info.steps) <= 1


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_published_rule(scale):
    tasks = [t._replace(gradients=scale * t.gradients) for t in random_tasks()]
    left, right = dense_system(tasks)
    start = average(tasks)
    got, info = told(jm.mats, tasks, metric="kronecker", stop="published")
    first = np.linalg.norm(right.ravel() - left @ start.ravel())
    if first <= 1e-5:
        assert info.steps == 0
        close(got, start, rtol=1e-6)
        return
    steps = []
    cg(left, right.ravel(), start.ravel(), rtol=1e-5, callback=steps.append)
    assert abs(info.steps - len(steps)) <= 2
    rest = right.ravel() - left @ got.astype(float).ravel()
    assert np.linalg.norm(rest) <= 2e-5 * np.linalg.norm(right)
    # The rule met both of its cases.
    assert scale > 1e-4


def test_preconditioners_need_fewer_steps():
    draw = np.random.default_rng(0).standard_normal
    decay = np.logspace(0, -1.5, 24)
    tasks = [
        Task(draw((24, 16)), draw((99, 24)) * decay, draw((99, 16)) * decay[:16])
        for _ in range(3)
    ]
    options = {"metric": "kronecker", "steps": 2000}
    steps = [
        told(jm.mats, tasks, precondition=p, **options)[1].steps for p in PRECONDITIONS
    ]
    assert steps[0] > 4 * steps[1] > 8 * steps[2]


def test_fisher_information_of_entries_and_of_vectors():
    models, statistics = every_kind()
    got = jm.mats(models, statistics, metric="fisher", **TIGHT)
    want = jm.fisher_average(models, statistics, floor=0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)

    got = jm.mats(models, statistics, metric="fisher_block", **TIGHT)["bias"]
    for i in range(2):
        blocks = [np.float64(known.fisher_block["bias"][i]) for known in statistics]
        right = sum(
            block @ np.float64(model["bias"][i])
            for block, model in zip(blocks, models, strict=True)
        )
        np.testing.assert_allclose(
            got[i], np.linalg.solve(sum(blocks), right), atol=1e-4
        )


def test_objective():
    tasks = random_tasks()
    models, statistics = arguments(tasks)

    def objective(x, grams, factors):
        return sum(
            np.trace((x - t.weight).T @ a @ (x - t.weight) @ g)
            for t, a, g in zip(tasks, grams, factors, strict=True)
        )

    grams, factors = ([getattr(t, n) for t in tasks] for n in ("gram", "factor"))
    eye = [np.eye(8)] * 3
    params = {"kernel": models[1]["kernel"] + 1}
    x = np.float64(params["kernel"])
    for metric, want in {
        "gram": objective(x, grams, eye),
        "kronecker": objective(x, grams, factors),
        "identity": objective(x, [np.eye(12)] * 3, eye),
    }.items():
        got = jm.matching_objective(models, statistics, params, metric=metric)
        assert got["kernel"] == pytest.approx(want, rel=1e-5)
    values = [
        jm.matching_objective(models, statistics, merge)["kernel"]
        for merge in (jm.regmean(models, statistics, **EXACT), jm.average(models))
    ]
    assert values[0] < 0.9 * values[1]


@pytest.mark.parametrize("metric", METRICS)
def test_objective_of_layers_and_at_its_minimum(metric):
    models, statistics = every_kind()
    best = jm.mats(models, statistics, metric=metric, **TIGHT)
    least = jm.matching_objective(models, statistics, best, metric=metric)
    assert set(least) == {
        "gram": {"kernel"},
        "kronecker": {"kernel"},
        "fisher_block": {"bias"},
    }.get(metric, {"kernel", "bias"})
    draw = np.random.default_rng(1).standard_normal
    moved = jax.tree.map(lambda x: x + jnp.float32(1e-2 * draw(x.shape)), best)
    more = jm.matching_objective(models, statistics, moved, metric=metric)
    for path, value in least.items():
        assert value.shape == (2,)
        assert np.all(more[path] > value)


@pytest.mark.parametrize("method", [jm.mats, jm.regmean])
def test_weights(method):
    tasks = random_tasks()
    options = TIGHT if method is jm.mats else EXACT
    close(merged(method, tasks, weights=[0, 1, 0], **options), tasks[1].weight)
    want = by_grams(tasks, [w * t.gram for w, t in zip((1, 2, 3), tasks, strict=True)])
    close(merged(method, tasks, weights=[1, 2, 3], **options), want)
    sweep = jax.vmap(lambda w: method(*arguments(tasks), weights=[w, 2, 3], **options))
    close(sweep(jnp.array([1.0, 5.0]))["kernel"][0], want)


@pytest.mark.parametrize("method", [jm.mats, jm.regmean])
def test_indefinite_systems_are_told_by_leaf(method):
    tasks = random_tasks()
    message = rf"{method.__name__}: .* not positive definite: kernel\. The last"
    with pytest.warns(UserWarning, match=message):
        got, info = told(method, tasks, weights=[1, -2, 0.5])
    assert info.indefinite
    assert np.isfinite(got).all()


def two_tasks():
    """With inputs of several sizes, and Fisher information."""
    draw = np.random.default_rng(0)
    tasks = [
        Task(t.weight, t.inputs * draw.uniform(0.3, 3, 12), t.gradients)
        for t in random_tasks(2)
    ]
    models, _ = arguments(tasks)
    statistics = [
        statistics_of(
            model,
            {"kernel": task.inputs},
            {"kernel": task.gradients},
            fisher={"kernel": draw.uniform(0.5, 2, (12, 8))},
        )
        for model, task in zip(models, tasks, strict=True)
    ]
    return models, statistics


@pytest.mark.filterwarnings("ignore:.*not positive definite")
@pytest.mark.parametrize("precondition", PRECONDITIONS)
@pytest.mark.parametrize("weights", [[1, -100], [-1, -1], [1, -0.99]])
@pytest.mark.parametrize("metric", ["gram", "kronecker", "fisher"])
def test_a_negative_diagonal_is_told_before_any_step(metric, weights, precondition):
    if metric == "fisher" and precondition == "kronecker":
        precondition = "jacobi"  # There are no factors.
    models, statistics = two_tasks()
    start = jax.tree.map(lambda x: x + 1, models[0])
    got, info = jm.mats(
        models,
        statistics,
        metric=metric,
        weights=weights,
        precondition=precondition,
        init=start,
        info=True,
    )
    assert info["kernel"].indefinite
    assert info["kernel"].steps == 0
    np.testing.assert_array_equal(got["kernel"], start["kernel"])


@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_weights_that_leave_a_minimum_may_be_negative(precondition):
    tasks = random_tasks(2)
    want = by_grams(tasks, [tasks[0].gram, -0.01 * tasks[1].gram])
    options = {"weights": [1, -0.01], "precondition": precondition, **TIGHT}
    got, info = told(jm.mats, tasks, **options)
    assert not info.indefinite
    close(got, want, rtol=1e-4)


@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_differences_that_no_curvature_sees_need_no_steps(precondition):
    tasks = random_tasks(2)
    # As of softmax, whose outputs are the same for logits that all grow alike.
    tasks = [
        t._replace(gradients=t.gradients - t.gradients.mean(1, keepdims=True))
        for t in tasks
    ]
    models, statistics = arguments(tasks)
    models = [models[0], {"kernel": models[0]["kernel"] + 0.1}]
    options = {"metric": "kronecker", "precondition": precondition, "ridge": 1e-4}
    got, info = jm.mats(models, statistics, info=True, **options)
    assert (info["kernel"].steps, info["kernel"].residual) == (0, 0)
    close(got["kernel"], models[0]["kernel"] + 0.05, rtol=1e-6)
    # A difference that is seen, however little, is not taken for rounding.
    models[1]["kernel"] += 1e-3 * tasks[1].weight
    _, info = jm.mats(models, statistics, info=True, **options)
    assert info["kernel"].steps > 0
    assert info["kernel"].residual < 1e-3


@pytest.mark.parametrize("normalize", ["count", "none"])
def test_more_data_of_a_task_weigh_more_if_asked(normalize):
    tasks = random_tasks()
    more = tasks[0]._replace(
        inputs=np.tile(tasks[0].inputs, (4, 1)),
        gradients=np.tile(tasks[0].gradients, (4, 1)),
    )
    for metric in ("gram", "kronecker"):
        options = {"metric": metric, **TIGHT}
        got = merged(jm.mats, [more, *tasks[1:]], normalize=normalize, **options)
        weights = [1, 1, 1] if normalize == "count" else [4, 1, 1]
        close(got, merged(jm.mats, tasks, weights=weights, **options))


def test_experts_without_tokens_are_averaged():
    draw = np.random.default_rng(0).standard_normal
    models = [{"kernel": jnp.float32(draw((2, 6, 4)))} for _ in range(2)]
    statistics = random_statistics(models, stacked=1)
    for known in statistics:
        known.gram["kernel"][1] = 0
        known.tokens["kernel"][1] = 0
    mean = (models[0]["kernel"][1] + models[1]["kernel"][1]) / 2
    for method in (jm.mats, jm.regmean):
        with pytest.warns(UserWarning, match="0 for the 6 inputs"):
            got = method(models, statistics)["kernel"]
        np.testing.assert_allclose(got[1], mean, atol=1e-6)


def with_leaves_of_other_kinds():
    draw = np.random.default_rng(0).standard_normal
    models = [
        {
            "embedding": jnp.float32(draw((5, 3))),
            "kernel": jnp.float32(draw((3, 4))),
            "bias": jnp.float32(draw(4)),
            "scale": jnp.float32(draw(3)),
            "steps": jnp.array(i),
        }
        for i in range(2)
    ]
    counts = np.array([[3.0, 0, 1, 0, 6], [1, 4, 1, 0, 4]])
    powers = draw((2, 3)) ** 2
    statistics = [
        statistics_of(
            model,
            {"kernel": draw((20, 3))},
            diagonal={
                "embedding": np.repeat(counts[i][:, None], 3, 1),
                "bias": np.full(4, 10),
                "scale": powers[i],
            },
        )
        for i, model in enumerate(models)
    ]
    return models, statistics, counts, powers


@pytest.mark.parametrize("method", [jm.mats, jm.regmean])
def test_leaves_that_are_no_maps(method):
    models, statistics, counts, powers = with_leaves_of_other_kinds()
    mean = jm.average(models)
    plain = method(models, statistics)
    used = method(models, statistics, others="diagonal")
    for path in ("embedding", "bias", "scale"):
        np.testing.assert_allclose(plain[path], mean[path], atol=1e-6)
    for path, shares in (("embedding", counts[..., None]), ("scale", powers)):
        values = np.stack([model[path] for model in models])
        total = np.sum(shares, 0)
        want = (shares * values).sum(0) / np.where(total, total, 1)
        # Rows that were never looked up are averaged.
        want = np.where(total > 0, want, mean[path])
        np.testing.assert_allclose(used[path], want, atol=1e-6)
    np.testing.assert_allclose(used["bias"], mean["bias"], atol=1e-6)
    np.testing.assert_array_equal(used["kernel"], plain["kernel"])
    assert used["steps"] == 0


def test_an_embedding_is_a_weight_with_one_hot_inputs():
    models, statistics, *_ = with_leaves_of_other_kinds()
    used = jm.regmean(models, statistics, others="diagonal")["embedding"]
    rows = [[0, 0, 0, 2, 4, 4, 4, 4, 4, 4], [0, 1, 1, 1, 1, 2, 4, 4, 4, 4]]
    lookups = [{"kernel": model["embedding"]} for model in models]
    one_hot = [
        statistics_of(model, {"kernel": np.eye(5)[row]})
        for model, row in zip(lookups, rows, strict=True)
    ]
    want = jm.regmean(lookups, one_hot, **EXACT)["kernel"]
    np.testing.assert_allclose(used, want, atol=1e-5)


@pytest.mark.parametrize("normalize", ["count", "none", "trace"])
@pytest.mark.parametrize("method", [jm.mats, jm.regmean])
def test_look_ups_of_tied_embeddings_count_beside_their_inputs(method, normalize):
    def apply(params, tokens):
        features = jnp.tanh(params["embedding"][tokens])
        return features @ params["embedding"].T @ params["head"]

    draw = np.random.default_rng(0)
    models = [
        {
            "embedding": draw.standard_normal((5, 3)),
            "head": draw.standard_normal((5, 2)),
        }
        for _ in range(2)
    ]
    models = jax.tree.map(jnp.float32, models)
    data = [draw.choice(5, 30, p=p) for p in ([0.4, 0.4, 0.1, 0.1, 0], [0.2] * 5)]
    statistics = [
        collect(apply, model, [tokens])
        for model, tokens in zip(models, data, strict=True)
    ]
    options = TIGHT if method is jm.mats else EXACT
    options = options | {"normalize": normalize}
    got = method(models, statistics, others="diagonal", **options)
    left, right = 0, 0
    for model, tokens in zip(models, data, strict=True):
        rows = np.float64(model["embedding"])
        features = np.tanh(rows)[tokens]
        counts = np.bincount(tokens, minlength=5)
        # One system for each row, of what reads it and of what looks it up.
        own = features.T @ features + counts[:, None, None] * np.eye(3)
        if normalize == "trace":
            own /= np.trace(own, axis1=1, axis2=2).mean() / 3
        left, right = left + own, right + np.einsum("vij,vj->vi", own, rows)
    want = np.linalg.solve(left, right[..., None])[..., 0]
    close(got["embedding"], want, rtol=2e-5)
    plain = method(models, statistics, **options)
    np.testing.assert_array_equal(got["head"], plain["head"])
    assert np.abs(plain["embedding"] - want).max() > 1e-2


def test_weights_without_a_factor_are_averaged():
    models, _ = every_kind()
    models = [{"head": model, **model} for model in models]
    statistics = random_statistics(models, stacked=1)
    for known in statistics:
        del known.output_gradient["head/kernel"]
    got, info = jm.mats(models, statistics, metric="kronecker", info=True)
    assert set(info) == {"kernel"}
    mean = jm.average(models)
    np.testing.assert_allclose(got["head"]["kernel"], mean["head"]["kernel"], atol=1e-6)
    assert not np.allclose(got["kernel"], mean["kernel"], atol=1e-2)


def test_axes_come_from_the_statistics():
    tasks = random_tasks(inputs=6, outputs=8)
    axes = {"odd": MatrixAxes((), (1, 2), (0,))}
    models = [{"odd": jnp.float32(t.weight.T.reshape(8, 2, 3))} for t in tasks]
    statistics = [
        statistics_of(model, {"odd": task.inputs}, axes=axes)
        for model, task in zip(models, tasks, strict=True)
    ]
    got = jm.regmean(models, statistics, **EXACT)["odd"]
    close(got.reshape(8, 6).T, by_grams(tasks))


def test_each_layer_of_a_stack_is_a_system_of_its_own():
    draw = np.random.default_rng(0).standard_normal
    models = [{"kernel": jnp.float32(draw((3, 12, 8)))} for _ in range(2)]
    spread = np.stack([np.logspace(0, -d, 12) for d in (0, 0.5, 1)])[:, None]
    statistics = [
        statistics_of(model, {"kernel": draw((3, 60, 12)) * spread}, stacked=1)
        for model in models
    ]
    merge, info = jm.mats(models, statistics, info=True)
    steps = info["kernel"].steps
    assert steps[0] < steps[1] < steps[2]
    for i in range(3):
        alone = [{"kernel": model["kernel"][i]} for model in models]
        known = [
            layer_of(whole, model, i)
            for whole, model in zip(statistics, alone, strict=True)
        ]
        want, info = jm.mats(alone, known, info=True)
        np.testing.assert_allclose(merge["kernel"][i], want["kernel"], atol=1e-4)
        assert abs(info["kernel"].steps - steps[i]) <= 1


@pytest.mark.parametrize("metric", ["kronecker", "fisher"])
def test_statistics_and_models_on_a_mesh(metric, mesh):
    models, statistics = every_kind()
    options = {"metric": metric, "init": models[2]}
    if metric == "kronecker":
        options["precondition"] = "kronecker"
    want = jm.mats(models, statistics, **options)
    placed = [jm.place(model, mesh) for model in models]
    known = [jm.place(one, mesh) for one in statistics]
    merge = lambda m, s: jm.mats(m, s, **options)  # noqa: E731
    elsewhere = jax.device_put(statistics, jax.devices()[1])
    for got in (merge(placed, elsewhere), jax.jit(merge)(placed, known)):
        for path, leaf in want.items():
            np.testing.assert_allclose(got[path], leaf, atol=1e-4)


def test_statistics_in_bfloat16():
    tasks = random_tasks()
    models, statistics = arguments(tasks)
    want = jm.regmean(models, statistics)["kernel"]
    for known in statistics:
        known.gram["kernel"] = jnp.bfloat16(known.gram["kernel"])
    got = jm.regmean(models, statistics)["kernel"]
    assert got.dtype == jnp.float32
    close(got, want, rtol=5e-2)


def test_double_precision():
    with jax.enable_x64(True):
        tasks = random_tasks()
        models, statistics = arguments(tasks)
        models = [{"kernel": jnp.asarray(task.weight)} for task in tasks]
        statistics = [
            statistics_of(model, {"kernel": task.inputs})
            for model, task in zip(models, tasks, strict=True)
        ]
        got = jm.mats(models, statistics, steps=100, rtol=1e-12)["kernel"]
        assert got.dtype == jnp.float64
        grams = [np.float64(known.gram["kernel"]) / 60 for known in statistics]
        close(got, by_grams(tasks, grams), rtol=1e-9)


def refused(message, method=jm.mats, **options):
    models, statistics = every_kind()
    inputs = {"models": models, "statistics": statistics} | options
    with pytest.raises(ValueError, match=message):
        method(**inputs)


def test_statistics_that_do_not_fit_are_refused():
    models, known = every_kind()
    empty = [statistics_of(model, stacked=1) for model in models]
    refused("^mats: there are 2 statistics for 3 models", statistics=known[:2])
    refused("^regmean: statistics is a Statistics", jm.regmean, statistics=known[0])
    refused(
        r"^mats: statistics\[1\] is a dict; collect",
        statistics=[known[0], {}, known[2]],
    )
    refused(
        r"^mats: statistics\[0\] has no gram and no output_gradient; collect it with "
        r"what=\('gram', 'output_gradient'\)",
        statistics=empty,
        metric="kronecker",
    )
    refused(r"statistics\[0\] has no gram;", jm.regmean, statistics=empty)
    refused(r"has no fisher_block;", statistics=empty, metric="fisher_block")
    refused(
        r"has no fisher;",
        jm.matching_objective,
        statistics=empty,
        metric="fisher",
        params=models[0],
    )
    renamed = [{"kernel": m["kernel"], "offset": m["bias"]} for m in models]
    other = random_statistics(renamed, stacked=1)
    refused(
        r"statistics\[2\] is of another model than models\[2\]: it knows no leaf 'bi",
        statistics=[*known[:2], other[2]],
    )
    half = jax.tree.map(jnp.bfloat16, models)
    refused(
        r"statistics\[0\] is of another model .* leaf 'bias' is bfloat16\(2, 4\), it "
        r"knows one that is float32\(2, 4\)",
        models=half,
    )
    flat = statistics_of(models[1], {}, stacked=1, gram=known[1].gram)
    refused(
        r"statistics\[1\] was collected from a function that uses the leaves otherwise",
        statistics=[known[0], flat, known[2]],
    )


def test_leaves_that_are_too_large_are_named():
    params = {"kernel": jnp.ones((20, 3))}
    apply = lambda params, x: x @ params["kernel"]  # noqa: E731
    known = collect(apply, params, [jnp.ones((9, 20))], max_size=10)
    message = (
        r"^regmean: statistics\[0\] has no gram: of leaf 'kernel', it would have 20 "
        r"rows, more than max_size=10\.$"
    )
    refused(message, jm.regmean, models=[params], statistics=[known])


def test_numbers_that_are_no_jax_arrays():
    draw = np.random.default_rng(0).standard_normal
    models = [{"kernel": draw((4, 3)), "scale": 0.5 + i} for i in range(2)]
    apply = lambda params, x: x @ params["kernel"] * params["scale"]  # noqa: E731
    batch = [np.float32(draw((9, 4)))]
    kinds = ("gram", "fisher")
    known = [collect(apply, model, batch, what=kinds) for model in models]
    arrays = jax.tree.map(jnp.float32, models)
    for method, options in [
        (jm.regmean, {"others": "diagonal"}),
        (jm.mats, {}),
        (jm.mats, {"metric": "fisher"}),
        (jm.fisher_average, {}),
    ]:
        got = method(models, known, **options)
        want = method(arrays, known, **options)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_options_that_do_not_fit_are_refused():
    refused("^mats: metric is 'hessian'; it must be one of", metric="hessian")
    refused("^mats: stop is 'never'", stop="never")
    refused(
        "^mats: init is 'zeros'; it must be one of 'average', 'regmean'", init="zeros"
    )
    refused(
        "^mats: .*only models\\[0\\] has leaf 'bias', init has not",
        init={"kernel": jnp.ones((2, 6, 4))},
    )
    refused("^mats: precondition is 'ilu'", precondition="ilu")
    refused("^mats: steps is -1", steps=-1)
    refused("^mats: rtol is -1; it must be in", rtol=-1.0)
    refused("^mats: shrinkage is 2; it must be in", shrinkage=2.0)
    refused("^mats: shrinkage has no effect without", metric="fisher", shrinkage=0.5)
    refused(
        "precondition='kronecker' needs a metric of second moments",
        metric="identity",
        precondition="kronecker",
    )
    refused("^mats: rtol has no effect without stop='rel", stop="steps", rtol=0.5)
    for option in ({"normalize": "trace"}, {"others": "diagonal"}):
        name = next(iter(option))
        refused(f"^mats: {name} has no effect without a", metric="identity", **option)
    refused("^mats: others is 'base'", others="base")
    refused("^regmean: normalize is 'sum'", jm.regmean, normalize="sum")
    refused("^regmean: ridge is -1", jm.regmean, ridge=-1.0)
    refused(
        re.escape("mats: weights of leaf 'bias' has 2 values for 3 models"),
        metric="identity",
        weights=[1, 2],
    )


def test_statistics_of_a_model():
    def apply(params, tokens):
        x = params["embedding"][tokens] * params["scale"][None, None]
        heads = jnp.einsum("btd,dhk->bthk", x, params["query"])
        keys = jnp.einsum("btd,dhk->bthk", x, params["key"])
        mixed = (jnp.tanh(heads) * keys).mean(1)
        return jnp.einsum("bhk,hko->bo", mixed, params["out"]) + params["bias"][None]

    draw = np.random.default_rng(0)
    shapes = {"query": (4, 2, 3), "key": (4, 2, 3), "out": (2, 3, 5), "scale": (4,)}
    shapes |= {"embedding": (7, 4), "bias": (5,)}
    models = [
        {
            path: jnp.float32(draw.standard_normal(shape))
            for path, shape in shapes.items()
        }
        for _ in range(2)
    ]
    kinds = ("gram", "output_gradient")
    data = [[draw.integers(0, 7, (12, 3))] for _ in models]
    statistics = [
        collect(apply, model, batches, what=kinds, labels="sample", key=0)
        for model, batches in zip(models, data, strict=True)
    ]
    for metric in ("gram", "kronecker"):
        best = jm.mats(models, statistics, metric=metric, others="diagonal", **TIGHT)
        least, more = (
            jm.matching_objective(models, statistics, params, metric=metric)
            for params in (best, jm.average(models))
        )
        assert set(least) == {"query", "key", "out"}
        assert all(least[path] < 0.999 * more[path] for path in least)


def test_kronecker_factors_of_a_model_are_matched_best_by_mats():
    def apply(params, x):
        return jnp.tanh(x @ params["up"]) @ params["head"]

    draw = np.random.default_rng(0).standard_normal
    shapes = {"up": (6, 8), "head": (8, 4)}
    models = [
        {path: jnp.float32(draw(shape)) for path, shape in shapes.items()}
        for _ in range(3)
    ]
    kinds = ("gram", "output_gradient", "fisher")
    statistics = [
        collect(apply, m, [np.float32(draw((40, 6)) * spread)], what=kinds)
        for m, spread in zip(models, np.abs(draw((3, 6))), strict=True)
    ]
    best = jm.mats(models, statistics, metric="kronecker", **TIGHT)
    others = [
        jm.regmean(models, statistics, **EXACT),
        jm.fisher_average(models, statistics),
        jm.average(models),
    ]
    least, *more = (
        jm.matching_objective(models, statistics, params, metric="kronecker")
        for params in (best, *others)
    )
    for objective in more:
        assert all(least[path] < 0.98 * objective[path] for path in shapes)


def test_a_part_of_a_model_goes_with_statistics_of_the_whole():
    models, statistics = every_kind()
    want = jm.regmean(models, statistics)
    for path in want:
        parts = [{path: model[path]} for model in models]
        got = jm.regmean(parts, statistics)
        np.testing.assert_array_equal(got[path], want[path])
