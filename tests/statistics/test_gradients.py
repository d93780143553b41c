"""Output gradients and Fisher information, against hooks and enumeration."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hooks import close, gram, init, integers, linen_output_gradients, normal

from jaxmerge.statistics import collect


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(jnp.tanh(nn.Dense(4)(x)))


def negative_log_likelihood(logits, batch):
    losses = -jnp.take_along_axis(
        jax.nn.log_softmax(logits), batch["label"][..., None], -1
    )[..., 0]
    return losses.reshape(len(losses), -1).sum(-1)


def task(*tokens, seed=0):
    x = normal(seed, 5, *tokens, 6, scale=1.0)
    label = integers(seed + 1, 3, 5, *tokens)
    return {"x": x, "label": label}


def mlp(params, batch):
    return MLP().apply(params, batch["x"])


@pytest.fixture(scope="module")
def params():
    return init(MLP(), task()["x"])


def test_empirical_output_gradients_and_fisher_against_hooks(params):
    batch = task(7)
    statistics = collect(
        mlp,
        params,
        [batch],
        what=("gram", "output_gradient", "fisher", "fisher_block"),
        labels="empirical",
        loss=negative_log_likelihood,
        chunk=2,
    )

    def loss(logits):
        return negative_log_likelihood(logits, batch).sum()

    gradients = linen_output_gradients(MLP(), params, loss, batch["x"])
    for name, g in gradients.items():
        close(statistics.output_gradient[f"params/{name}/kernel"], gram(g))

    def example(params, x, label):
        one = {"x": x[None], "label": label[None]}
        return negative_log_likelihood(mlp(params, one), one)[0]

    each = jax.vmap(jax.grad(example), (None, 0, 0))(
        params, *map(batch.get, ["x", "label"])
    )
    for name in ("Dense_0", "Dense_1"):
        kernel, bias = each["params"][name]["kernel"], each["params"][name]["bias"]
        close(statistics.fisher[f"params/{name}/kernel"], jnp.sum(kernel**2, 0))
        close(statistics.fisher_block[f"params/{name}/bias"], gram(bias))
    assert f"params/{name}/kernel" not in statistics.fisher_block


def enumerated(params, batch, seconds):
    """The expectation over all labels of what `seconds` makes of a gradient."""
    each = [range(3)] * batch["label"][0].size
    labels = jnp.array(list(itertools.product(*each)))

    @jax.jit
    def expectation(x):
        def log_likelihood(params, labels):
            chances = jax.nn.log_softmax(mlp(params, {"x": x[None]}))[0]
            labels = labels.reshape(*x.shape[:-1], 1)
            return jnp.take_along_axis(chances, labels, -1).sum()

        def weighted(labels):
            value, gradient = jax.value_and_grad(log_likelihood)(params, labels)
            return jax.tree.map(lambda g: jnp.exp(value) * seconds(g), gradient)

        total = jax.vmap(weighted)(labels)["params"]
        return jax.tree.map(lambda g: g.sum(0), total)

    return jax.tree.map(lambda *g: sum(g), *map(expectation, batch["x"]))


@pytest.mark.parametrize("tokens", [(), (2,)])
def test_expectation_is_exact(params, tokens):
    batch = task(*tokens)
    batch = {name: x[:3] for name, x in batch.items()}
    statistics = collect(mlp, params, [batch], what=("fisher", "output_gradient"))
    expected = enumerated(params, batch, jnp.square)
    for path, value in statistics.fisher.items():
        _, layer, name = path.split("/")
        close(value, expected[layer][name])

    def outer(g):
        return jnp.outer(g, g) if g.ndim == 1 else g

    if not tokens:  # then the gradient of a bias is that of the output
        expected = enumerated(params, batch, outer)
        for path, value in statistics.output_gradient.items():
            close(value, expected[path.split("/")[1]]["bias"])


def test_sampling_is_unbiased_and_the_square_of_a_batch_is_not(params):
    batch = {"x": jnp.repeat(task()["x"][:2], 1000, axis=0)}
    exact = collect(mlp, params, [batch], what="fisher", chunk=1000).fisher
    options = {"labels": "sample", "key": 0, "chunk": 1000}
    drawn = collect(mlp, params, [batch], what=("fisher", "output_gradient"), **options)
    for path in exact:
        close(drawn.fisher[path], exact[path], rtol=0.1)
    close(
        np.diag(drawn.output_gradient["params/Dense_1/kernel"]),
        exact["params/Dense_1/bias"],
        rtol=0.1,
    )

    # A batch's gradient, squared: what is often called by the same name.
    def mean_loss(params):
        labels = integers(0, 3, 2000)
        losses = negative_log_likelihood(mlp(params, batch), {"label": labels})
        return losses.mean()

    shortcut = jax.grad(mean_loss)(params)["params"]["Dense_1"]["bias"] ** 2
    error = jnp.linalg.norm(shortcut - exact["params/Dense_1/bias"] / 2000)
    assert error > 0.5 * jnp.linalg.norm(exact["params/Dense_1/bias"] / 2000)


def test_draws_depend_on_the_key_alone(params):
    batch = task()
    found = [
        collect(mlp, params, [batch], what="fisher", labels="sample", key=key, chunk=n)
        for key, n in [(0, 8), (jax.random.key(0), 2), (1, 8)]
    ]
    first, same, other = (f.fisher["params/Dense_0/kernel"] for f in found)
    close(first, same)
    assert not np.allclose(first, other)


def layers(params, x):
    def layer(x, w):
        return jnp.tanh(x @ w + x @ params["shared"]), None

    return jax.lax.scan(jax.checkpoint(layer), x, params["layers"])[0]


def test_inputs_and_output_gradients_multiply_to_the_gradient_of_the_weight():
    """With one example per batch, X'g is dW, for every layer of a scan."""
    params = {"layers": normal(0, 3, 4, 4), "shared": normal(1, 4, 4)}
    x = normal(2, 1, 4)
    statistics = collect(
        layers,
        params,
        [x],
        what=("gram", "output_gradient", "fisher"),
        labels="empirical",
        loss=lambda y, _: jnp.sum(jnp.sin(y), -1),
    )
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(layers(p, x))))(params)["layers"]
    # One token: both factors have rank one, and so has their product.
    squares = jnp.einsum(
        "lii,ljj->lij",
        statistics.gram["layers"],
        statistics.output_gradient["layers"],
    )
    close(squares, gradient**2)
    close(statistics.fisher["layers"], gradient**2)
    assert statistics.output_gradient["shared"].shape == (4, 4)
    # The shared weight has the outputs of all layers.
    close(
        statistics.output_gradient["shared"],
        jnp.sum(statistics.output_gradient["layers"], 0),
    )


def test_output_gradients_of_convolutions():
    conv = nn.Conv(4, (3,), use_bias=False, padding="VALID")
    x = normal(0, 2, 9, 3)
    params = init(conv, x)
    statistics = collect(
        conv.apply,
        params,
        [x],
        what="output_gradient",
        labels="empirical",
        loss=lambda y, _: jnp.sum(jnp.sin(y), (1, 2)),
    )
    close(
        statistics.output_gradient["params/kernel"],
        gram(jnp.cos(conv.apply(params, x))),
    )
    assert not statistics.gram
    assert statistics.tokens["params/kernel"] == 14


def test_blocks_of_stacked_vectors():
    params = {"scale": normal(0, 2, 3, 4), "w": normal(1, 2, 12, 12)}

    def apply(params, x):
        def layer(x, w):
            return jnp.tanh((x @ w["w"]).reshape(-1, 3, 4) * w["scale"][None]).reshape(
                x.shape
            ), None

        return jax.lax.scan(layer, x, params)[0]

    x = normal(2, 5, 12)
    statistics = collect(
        apply,
        params,
        [x],
        what="fisher_block",
        labels="empirical",
        loss=lambda y, _: jnp.sum(y**3, -1),
    )
    each = jax.vmap(jax.grad(lambda p, x: jnp.sum(apply(p, x[None]) ** 3)), (None, 0))
    gradients = each(params, x)["scale"]
    expected = [gram(gradients[:, layer].reshape(5, 12)) for layer in range(2)]
    close(statistics.fisher_block["scale"], np.stack(expected))


def test_integer_leaves_have_no_gradients():
    params = {"w": normal(0, 4, 3), "order": jnp.arange(4)}
    statistics = collect(
        lambda p, x: x[:, p["order"]] @ p["w"], params, [normal(1, 5, 4)], what="fisher"
    )
    assert set(statistics.fisher) == {"w"}
    assert [site.path for site in statistics.sites] == ["w"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "hessian"}, "what is 'hessian'; it must be one of 'gram'"),
        ({"what": ()}, "what is empty; choose from gram, output_gradient"),
        ({"labels": "sample", "key": 0}, "labels has no effect without 'output_gra"),
        ({"what": "fisher", "labels": "true"}, "labels is 'true'; it must be one of"),
        ({"what": "fisher", "labels": "sample"}, "needs a key to draw them"),
        ({"what": "fisher", "labels": "empirical"}, "'empirical' needs a loss"),
        ({"what": "fisher", "loss": max}, "the other kinds of labels take none"),
        ({"chunk": 0}, "chunk is 0; it must be a whole number of at least 1"),
        (
            {
                "what": "fisher",
                "labels": "empirical",
                "loss": lambda y, b: negative_log_likelihood(y, b).mean(),
            },
            r"log-likelihood of each of the 5 examples, \(5,\)\. A scalar is a sum or "
            "a mean over examples",
        ),
    ],
)
def test_options_are_checked_before_work(params, options, message):
    with pytest.raises(ValueError, match=message):
        collect(mlp, params, [task()], **options)


def test_draws_take_any_integer(params):
    drawn = [
        collect(mlp, params, [task()], what="fisher", labels="sample", key=key)
        for key in (3, np.int64(3), jnp.int32(3))
    ]
    assert jax.tree.all(jax.tree.map(np.array_equal, *drawn[:2]))
    assert jax.tree.all(jax.tree.map(np.array_equal, *drawn[1:]))


def test_double_precision():
    with jax.enable_x64(True):
        x, params = normal(0, 5, 4), {"w": normal(1, 4, 3)}
        x, params = np.float64(x), jax.tree.map(np.float64, params)
        options = {"what": ("gram", "output_gradient", "fisher")}
        found = collect(lambda p, x: x @ p["w"], params, [x], **options)
        drawn = collect(
            lambda p, x: x @ p["w"], params, [x], labels="sample", key=0, **options
        )
    assert found.fisher["w"].dtype == found.gram["w"].dtype == jnp.float32
    assert drawn.fisher["w"].dtype == jnp.float32
    close(found.gram["w"], gram(x))
    chance = jax.nn.softmax(x @ params["w"])
    expected = sum(np.diag(c) - np.outer(c, c) for c in np.float64(chance))
    close(found.output_gradient["w"], expected)


def test_gradients_through_while_loops_are_refused():
    def apply(params, x):
        def step(state):
            return state[0] + 1, jnp.tanh(state[1] @ params["w"])

        return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, x))[1]

    for what in ("output_gradient", "fisher"):
        with pytest.raises(ValueError, match=r"do not go back .* jax\.lax\.scan"):
            collect(apply, {"w": normal(0, 4, 4)}, [normal(1, 5, 4)], what=what)


def test_logits_are_checked_before_work(params):
    with pytest.raises(ValueError, match=r"logits of one class.* Give two logits, or"):
        collect(lambda p, b: mlp(p, b)[:, :1], params, [task()], what="output_gradient")
    with pytest.raises(ValueError, match=r"needs logits, one array \(5, classes\)"):
        collect(lambda p, b: mlp(p, b).mean(), params, [task()], what="fisher")
    with pytest.raises(ValueError, match=r"would take 120,000 passes back"):
        collect(lambda p, b: jnp.zeros((5, 40, 3000)), params, [task()], what="fisher")
