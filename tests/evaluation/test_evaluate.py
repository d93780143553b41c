"""Metrics of models on tasks: every example counts once, with one program for all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge.evaluation import accuracy, cross_entropy, evaluate


def linear(params, inputs):
    return inputs @ params["w"] + params["b"][None]


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    params = {
        "w": np.float32(rng.normal(size=(8, 4))),
        "b": np.float32(rng.normal(size=4)),
    }
    inputs = np.float32(rng.normal(size=(23, 8)))
    return params, inputs, rng.integers(0, 4, 23)


def in_batches(inputs, labels, size):
    for i in range(0, len(inputs), size):
        yield inputs[i : i + size], labels[i : i + size]


def oracle(params, inputs, labels):
    """Accuracy and loss in float64."""
    logits = np.float64(inputs) @ params["w"] + params["b"]
    chosen = logits[np.arange(len(labels)), labels]
    loss = np.log(np.exp(logits).sum(axis=1)) - chosen
    return np.mean(logits.argmax(axis=1) == labels), loss.mean()


@pytest.mark.parametrize("size", [1, 5, 23, 40])
def test_ragged_batches_do_not_bias_the_mean(problem, size):
    params, inputs, labels = problem
    found = evaluate(linear, params, in_batches(inputs, labels, size))
    want = oracle(params, inputs, labels)
    np.testing.assert_allclose([found["accuracy"], found["cross_entropy"]], want, 1e-5)


def test_ragged_batches_and_other_models_are_not_compiled_again(problem, compilations):
    params, inputs, labels = problem
    evaluate(linear, params, in_batches(inputs[:10], labels[:10], 5))
    compilations.clear()
    evaluate(linear, params, in_batches(inputs, labels, 5))
    evaluate(
        linear, jax.tree.map(lambda x: 2 * x, params), in_batches(inputs, labels, 5)
    )
    assert not compilations


def test_one_pass_gives_all_metrics(problem):
    params, inputs, labels = problem
    calls = []

    def apply(params, inputs):
        calls.append(1)
        return linear(params, inputs)

    evaluate(apply, params, (inputs, labels))
    assert len(calls) == 1


def test_tasks_with_heads_of_their_own(problem):
    params, inputs, labels = problem
    heads = {"even": np.float32([[1, 0], [0, 1], [1, 0], [0, 1]]), "all": np.eye(4)}

    def with_head(head, params, inputs):
        return linear(params, inputs) @ head

    apply = {task: functools.partial(with_head, head) for task, head in heads.items()}
    labels_of = {"even": labels % 2, "all": labels}
    batches = {task: [(inputs, labels_of[task])] for task in heads}
    found = evaluate(apply, params, batches, "accuracy")
    assert list(found) == ["even", "all"]
    for task, head in heads.items():
        folded = {"w": params["w"] @ head, "b": params["b"] @ head}
        want = oracle(folded, inputs, labels_of[task])[0]
        np.testing.assert_allclose(found[task], want, rtol=1e-6)


def test_any_function_is_a_metric_and_further_axes_are_averaged(problem):
    params, inputs, labels = problem

    def off(outputs, labels):
        return jnp.abs(outputs - labels[:, None])

    found = evaluate(linear, params, in_batches(inputs, labels, 6), off)
    want = np.abs(inputs @ params["w"] + params["b"] - labels[:, None]).mean()
    np.testing.assert_allclose(found, want, rtol=1e-5)
    both = evaluate(linear, params, (inputs, labels), [off, "accuracy"])
    assert list(both) == ["off", "accuracy"]


def test_inputs_may_be_any_tree(problem):
    params, inputs, labels = problem
    halves = {"left": inputs[:, :4], "right": inputs[:, 4:]}

    def apply(params, inputs):
        return linear(params, jnp.concatenate([inputs["left"], inputs["right"]], 1))

    found = evaluate(apply, params, [(halves, labels)], "accuracy")
    np.testing.assert_allclose(found, oracle(params, inputs, labels)[0], rtol=1e-6)


def test_inputs_and_labels_may_be_pairs(problem):
    params, inputs, labels = problem

    def apply(params, inputs):
        return linear(params, inputs[0]) * inputs[1][:, None]

    def right(outputs, labels):
        return (outputs.argmax(axis=1) == labels[0]) * labels[1]

    batch = (inputs, np.ones(23)), (labels, np.ones(23))
    found = evaluate(apply, params, batch, right)
    np.testing.assert_allclose(found, oracle(params, inputs, labels)[0], rtol=1e-6)
    # Pairs that could be batches come in a list.
    both = (inputs, inputs), (inputs, inputs)
    same = lambda outputs, labels: outputs == labels[0]  # noqa: E731
    assert evaluate(lambda _, x: x[0], params, [both], same) == 1


def test_low_precision_outputs_are_judged_in_float32():
    logits = jnp.zeros((3, 1000), jnp.bfloat16)
    np.testing.assert_allclose(
        cross_entropy(logits, jnp.arange(3)), np.log(1000), rtol=1e-6
    )
    assert accuracy(logits, jnp.arange(3)).tolist() == [1, 0, 0]


def test_sharded_parameters_and_inputs(problem, mesh):
    params, inputs, labels = problem
    want = evaluate(linear, params, in_batches(inputs, labels, 8))
    placed = jaxmerge.place(params, mesh, {"w": P("data", "model"), "b": P("model")})
    found = evaluate(linear, placed, in_batches(inputs, labels, 8))
    on_mesh = jaxmerge.place(
        {"x": inputs[:16], "y": labels[:16]}, mesh, {".*": P("data")}
    )
    batches = [(on_mesh["x"], on_mesh["y"]), (inputs[16:], labels[16:])]
    again = evaluate(linear, placed, batches)
    for name in want:
        np.testing.assert_allclose([found[name], again[name]], want[name], rtol=1e-5)


def test_it_can_be_traced(problem):
    params, inputs, labels = problem

    @jax.jit
    def slope(params):
        score = lambda p: evaluate(linear, p, (inputs, labels), "cross_entropy")  # noqa: E731
        return jax.grad(score)(params)

    logits = inputs @ params["w"] + params["b"]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    want = inputs.T @ (p - np.eye(4)[labels]) / len(labels)
    np.testing.assert_allclose(slope(params)["w"], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "there are no examples"),
        ({"batches": {}}, "there are no tasks"),
        ({"metric": "acuracy"}, "unknown metric 'acuracy'; there are accuracy, cross"),
        ({"metric": []}, "needs at least one metric"),
        ({"metric": ["accuracy", accuracy]}, "two metrics are called 'accuracy'"),
        ({"batches": {"a": [np.ones((3, 8))]}}, "task 'a': batch 0 is no pair"),
        ({"batches": (np.ones((3, 8)), np.ones(2))}, r"of sizes \[\(2,\), \(3,\)\]"),
        ({"batches": ((np.ones((3, 8)), np.ones(3)),) * 2}, "a tuple of pairs; put"),
        ({"batches": {"a": ((np.ones((3, 8)), np.ones(3)),) * 3}}, "'a': .* a tuple"),
        ({"batches": (np.ones((3, 8)),) * 3}, "batch 0 is no pair"),
        ({"batches": ()}, "batch 0 is no pair"),
        ({"metric": lambda o, y: o.mean()}, r"shape \(\) for 23 examples"),
        ({"apply": {"a": linear}, "batches": {"b": []}}, "no function for 'b'; .* 'a'"),
    ],
)
def test_errors(problem, change, message):
    params, inputs, labels = problem
    given = {"apply": linear, "params": params, "batches": (inputs, labels)} | change
    with pytest.raises(
        ValueError, match=f"^evaluate: .*{message}|^evaluate: {message}"
    ):
        evaluate(**given)
