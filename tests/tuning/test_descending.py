"""Coefficients by gradient: optima that are known, and what the papers define."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge.tuning import adamerging, few_shot_coefficients

SHAPES = {"kernel": (8, 4), "bias": (4,)}


def tree(rng, scale=1.0):
    return {n: np.float32(scale * rng.normal(size=s)) for n, s in SHAPES.items()}


@pytest.fixture
def tasks():
    """A base, three models, and inputs for each."""
    rng = np.random.default_rng(0)
    base = tree(rng)
    models = [jax.tree.map(np.add, base, tree(rng, 0.5)) for _ in range(3)]
    return base, models, [np.float32(rng.normal(size=(16, 8))) for _ in models]


def apply(params, inputs):
    return inputs @ params["kernel"] + params["bias"][None]


def square(outputs, labels):
    return (outputs - labels) ** 2


def combine(base, models, coefficients):
    """The base plus task vectors by coefficients, one row for each leaf."""
    return {
        name: x + sum(c * (m[name] - x) for c, m in zip(row, models, strict=True))
        for (name, x), row in zip(base.items(), coefficients, strict=True)
    }


def learn(tasks, examples, **options):
    base, models, _ = tasks
    how = {"loss": square, "steps": 400, "learning_rate": 0.03} | options
    return few_shot_coefficients(apply, base, models, examples, **how)


def test_the_optimum_of_a_quadratic_is_found_by_task_and_by_layer(tasks):
    base, models, inputs = tasks
    by_task, by_layer = [0.7, -0.2, 0.4], [[0.7, -0.2, 0.4], [0.1, 1.1, 0.5]]
    for granularity, rows in (("task", [by_task] * 2), ("layer", by_layer)):
        goal = combine(base, models, rows)
        found = learn(
            tasks, (inputs[0], apply(goal, inputs[0])), granularity=granularity
        )
        names = [".*"] if granularity == "task" else list(SHAPES)
        assert list(found.coefficients) == sorted(names)
        for name in names:
            row = rows[0 if granularity == "task" else list(SHAPES).index(name)]
            np.testing.assert_allclose(found.coefficients[name], row, atol=2e-3)
        for name, leaf in found.params.items():
            np.testing.assert_allclose(leaf, goal[name], atol=5e-3)
        assert found.option == "weights"
        assert found.losses[-1] < 1e-4 < found.losses[0]


def test_one_scale_for_all_models_is_found_in_closed_form(tasks):
    base, models, inputs = tasks
    merged = jaxmerge.ties(base, models)
    goal = apply(models[0], inputs[0])
    move = apply(merged, inputs[0]) - apply(base, inputs[0])
    best = np.vdot(move, goal - apply(base, inputs[0])) / np.vdot(move, move)
    found = learn(tasks, (inputs[0], goal), method=jaxmerge.ties, option="scale")
    np.testing.assert_allclose(found.coefficients[".*"], best, atol=1e-3)
    assert found.coefficients[".*"].shape == ()


def test_what_is_learned_can_be_given_to_the_method_again(tasks):
    base, models, inputs = tasks
    for option, method in (("weights", jaxmerge.ties), ("scale", jaxmerge.magmax)):
        found = learn(
            tasks,
            (inputs[0], apply(models[0], inputs[0])),
            granularity="layer",
            method=method,
            steps=3,
        )
        assert found.option == option
        again = method(base, models, **{option: found.coefficients})
        jax.tree.map(np.testing.assert_array_equal, found.params, again)


def test_task_vectors_are_scaled_for_methods_without_such_an_option(tasks):
    base, models, inputs = tasks
    found = learn(
        tasks,
        (inputs[0], apply(models[0], inputs[0])),
        method=lambda base, models: jaxmerge.average(models),
        steps=2,
        learning_rate=0.1,
    )
    assert found.option == "task vectors"
    rows = [found.coefficients[".*"] / 3] * 2
    want = combine(base, models, rows)
    for name, leaf in found.params.items():
        np.testing.assert_allclose(leaf, want[name], atol=1e-6)


def test_options_that_are_fixed_are_not_learned(tasks):
    base, models, inputs = tasks
    weights = [0.7, 0.2, 0.1]
    examples = inputs[0], apply(models[0], inputs[0])
    method = functools.partial(jaxmerge.task_arithmetic, weights=weights)
    found = learn(tasks, examples, method=method, steps=2)
    assert found.option == "scale"
    rows = [found.coefficients[".*"] * np.float32(weights)] * 2
    want = combine(base, models, rows)
    for name, leaf in found.params.items():
        np.testing.assert_allclose(leaf, want[name], atol=1e-5)
    both = functools.partial(method, scale=0.5)
    assert learn(tasks, examples, method=both, steps=1).option == "task vectors"
    with pytest.raises(ValueError, match="method has weights fixed by functools"):
        learn(tasks, examples, method=method, option="weights")


def test_slopes_are_the_same_backwards_and_forwards(tasks):
    _, models, inputs = tasks
    examples = (inputs[0], apply(models[0], inputs[0]))

    def in_a_loop(base, models, weights):
        """The same, behind a loop whose length depends on a value."""
        merged = jaxmerge.task_arithmetic(base, models, weights=weights)
        once = lambda x: jax.lax.while_loop(  # noqa: E731
            lambda s: s[0] < 1, lambda s: (s[0] + 1, s[1]), (0 * x.ravel()[0], x)
        )[1]
        return jax.tree.map(once, merged)

    courses = [
        learn(tasks, examples, method=method, steps=5, granularity="layer")
        for method in (jaxmerge.task_arithmetic, in_a_loop)
    ]
    np.testing.assert_allclose(courses[0].losses, courses[1].losses, rtol=1e-5)


def test_adamerging_finds_where_predictions_are_most_certain():
    """Logits (0, z) have an entropy that falls with z, which is largest at 0.6."""
    base, models = {"w": jnp.zeros(())}, [{"w": jnp.ones(())}]

    def peaked(params, inputs):
        z = inputs * (2 - (params["w"] - 0.6) ** 2)
        return jnp.stack([jnp.zeros_like(z), z], axis=-1)

    found = adamerging(peaked, base, models, jnp.ones(4), learning_rate=0.02, steps=200)
    np.testing.assert_allclose(found.coefficients[".*"], [0.6], atol=1e-3)
    z = 2 - (0.3 - 0.6) ** 2
    p = 1 / (1 + np.exp(-z))
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    np.testing.assert_allclose(found.losses[0], entropy, rtol=1e-5)


def test_coefficients_stay_between_bounds():
    base, models = {"w": jnp.zeros((2, 2))}, [{"w": 3 * jnp.eye(2)}] * 2
    for bounds, end in (((0.0, 1.0), 1.0), ((0.1, 0.5), 0.5)):
        found = adamerging(
            lambda params, x: x @ params["w"],
            base,
            models,
            jnp.eye(2),
            bounds=bounds,
            learning_rate=0.1,
            steps=20,
        )
        assert found.coefficients[".*"].tolist() == [end, end]
    free = adamerging(
        lambda params, x: x @ params["w"],
        base,
        models,
        jnp.eye(2),
        bounds=None,
        learning_rate=0.1,
        steps=20,
    )
    assert min(free.coefficients[".*"]) > 1


def test_one_scale_has_no_bounds_by_default():
    """Of logits, whose entropy falls with the scale for as long as one looks."""
    base, models = {"w": jnp.zeros((2, 2))}, [{"w": 3 * jnp.eye(2)}] * 2
    ends = {
        option: adamerging(
            lambda params, x: x @ params["w"],
            base,
            models,
            jnp.eye(2),
            option=option,
            learning_rate=0.1,
            steps=20,
        ).coefficients[".*"]
        for option in ("weights", "scale", "task vectors")
    }
    assert ends["weights"].tolist() == ends["task vectors"].tolist() == [1, 1]
    assert ends["scale"] > 1


def test_adamerging_plus_plus_scales_trimmed_and_elected_task_vectors(tasks):
    base, models, inputs = tasks
    method = functools.partial(
        jaxmerge.ties, vote="mass", aggregate="sum", density=0.5, scope="model"
    )
    found = adamerging(apply, base, models, inputs[0], method=method, steps=5)
    flat = lambda t: np.concatenate([t[n].ravel() for n in SHAPES])  # noqa: E731
    deltas = np.stack([flat(m) - flat(base) for m in models])
    keep = int(0.5 * deltas.shape[1]) + 1
    for delta in deltas:
        delta[np.abs(delta) < np.sort(np.abs(delta))[-keep]] = 0
    kept = np.where(np.sign(deltas) == np.sign(deltas.sum(axis=0)), deltas, 0)
    want = flat(base) + found.coefficients[".*"] @ kept
    np.testing.assert_allclose(flat(found.params), want, atol=1e-5)
    assert found.option == "weights"


def test_tasks_with_heads_and_batches_of_their_own(tasks):
    base, models, inputs = tasks
    heads = np.float32(np.random.default_rng(1).normal(size=(2, 4, 3)))
    traces = []

    def forward(head, params, batch):
        traces.append(1)
        return apply(params, batch["x"]) @ head

    run = {f"t{i}": functools.partial(forward, heads[i]) for i in range(2)}
    batches = {
        "t0": [{"x": inputs[0]}, {"x": inputs[1]}],
        "t1": {"x": inputs[2]},
    }
    found = adamerging(run, base, models, batches, steps=4, learning_rate=1e-6)

    def entropy(task, batch):
        logits = run[task](combine(base, models, [[0.3] * 3] * 2), batch)
        p = jax.nn.softmax(logits)
        return float(-(p * jnp.log(p)).sum(axis=-1).mean())

    assert len(traces) == 2
    first, second = (entropy("t0", batch) for batch in batches["t0"])
    other = entropy("t1", batches["t1"])
    want = [(first + other) / 2, (second + other) / 2] * 2
    np.testing.assert_allclose(found.losses, want, rtol=1e-4)


def test_leaves_without_floats_and_narrow_ones(tasks):
    base, models, inputs = tasks
    narrow = lambda t: {n: jnp.bfloat16(x) for n, x in t.items()} | {"n": np.int32(5)}  # noqa: E731
    found = adamerging(
        apply, narrow(base), [narrow(m) for m in models], inputs[0], steps=2
    )
    assert found.params["n"] == 5
    assert found.params["kernel"].dtype == jnp.bfloat16
    assert found.coefficients[".*"].dtype == np.float32


@pytest.mark.parametrize("method", [jaxmerge.ties, jaxmerge.tsv_merge])
def test_sharded_models(tasks, mesh, method):
    base, models, inputs = tasks
    how = {"method": method, "steps": 2, "granularity": "layer", "learning_rate": 0.01}
    want = adamerging(apply, base, models, inputs[0], **how)
    specs = {"kernel": P("data", "model"), "bias": P("model")}
    put = lambda tree: jaxmerge.place(tree, mesh, specs)  # noqa: E731
    found = adamerging(apply, put(base), [put(m) for m in models], inputs[0], **how)
    np.testing.assert_allclose(found.losses, want.losses, rtol=1e-5)
    for name, leaf in found.params.items():
        np.testing.assert_allclose(leaf, want.params[name], atol=1e-5)
        assert leaf.sharding.is_equivalent_to(put(base)[name].sharding, leaf.ndim)


def test_examples_that_are_no_pairs_are_refused(tasks):
    batch = np.ones((4, 8), np.float32), np.ones((4, 4), np.float32)
    for examples, message in (
        ({"image": batch[0], "label": batch[1]}, "task 'image': batch 0 is no pair"),
        ((batch, batch), "a tuple of pairs; put several batches"),
    ):
        with pytest.raises(ValueError, match=f"^few_shot_coefficients: .*{message}"):
            learn(tasks, examples)


def test_a_lone_batch_that_is_a_dict_goes_into_a_list(tasks):
    base, models, inputs = tasks
    run = lambda params, batch: apply(params, batch["x"])  # noqa: E731
    found = adamerging(run, base, models, [{"x": inputs[0]}], steps=1)
    want = adamerging(apply, base, models, inputs[0], steps=1)
    np.testing.assert_array_equal(found.losses, want.losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": []}, "needs at least one model"),
        ({"models": [{"kernel": np.ones(2)}]}, r"models\[0\] "),
        ({"inputs": []}, "task '' has no batches"),
        ({"inputs": {}}, "there are no tasks"),
        ({"apply": {"a": apply}, "inputs": {"b": [1]}}, "no function for 'b'"),
        ({"granularity": "block"}, "granularity is 'block'"),
        ({"steps": 0}, "steps is 0"),
        ({"bounds": "none"}, "bounds is 'none'; it must be one of 'paper'"),
        ({"learning_rate": 0.0}, "learning_rate is 0; it must be in"),
        ({"initial": 1.5}, r"initial is 1.5, outside of bounds \(0.0, 1.0\)"),
        ({"method": jaxmerge.average}, "method takes no base; wrap it"),
        ({"option": "wieghts"}, "no option 'wieghts'; there are weights, scale"),
        ({"inputs": np.full((2, 8), np.nan, np.float32)}, "the loss is nan at step 0"),
        ({"apply": lambda p, x: apply(p, x).sum(0)}, r"shape \(\) for 16"),
    ],
)
def test_errors(tasks, options, message):
    base, models, inputs = tasks
    given = {"apply": apply, "base": base, "models": models, "inputs": inputs[0]}
    with pytest.raises(ValueError, match=message) as caught:
        adamerging(**{**given, "steps": 2, **options})
    assert str(caught.value).startswith("adamerging: ")
