"""Input statistics of models of all kinds, against hooks and closed formulas."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hooks import close, gram, init, integers, linen_inputs, normal

from jaxmerge.matrices import MatrixAxes, to_matrix
from jaxmerge.statistics import collect


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(x)
        x = nn.relu(nn.Dense(16)(x))
        x = nn.gelu(nn.Dense(8)(x))
        return nn.Dense(3)(x)


def test_linen_mlp():
    model, x = MLP(), normal(0, 5, 7, 6)
    params = init(model, x)
    statistics = collect(model.apply, params, [x[:3], x[3:]])
    assert not statistics.unknown
    assert statistics.examples == 5
    for name, data in linen_inputs(model, params, x).items():
        close(statistics.gram[f"params/{name}/kernel"], gram(data))
        assert statistics.tokens[f"params/{name}/kernel"] == 35
    np.testing.assert_array_equal(
        statistics.diagonal["params/Dense_1/bias"], np.full(8, 35.0)
    )


def test_scale_of_a_norm_sees_normalised_data():
    """Flax multiplies the scale with the deviation before it meets the data."""
    model, x = nn.LayerNorm(), normal(0, 50, 6)
    params = init(model, x)
    scale = collect(model.apply, params, [x]).diagonal["params/scale"]
    centred = x - x.mean(-1, keepdims=True)
    normalised = centred / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    close(scale, jnp.sum(normalised**2, 0))


def group_norm(params, x):
    y = x.reshape(*x.shape[:-1], 2, 3)
    y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-6)
    return y.reshape(x.shape), y.reshape(x.shape) * params["scale"]


def gemma_norm(params, x):
    y = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True))
    return y, y * (1 + params["scale"])


def narrow_norm(params, x):
    y = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True))
    inverse = jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True)).astype(jnp.bfloat16)
    y = inverse.astype(jnp.float32) * x
    return y, (inverse * params["scale"].astype(jnp.bfloat16)).astype(jnp.float32) * x


def batch_norm(params, x):
    variance = jnp.var(x, 0)
    factor = params["scale"] / jnp.sqrt(variance)
    return x / jnp.sqrt(variance), x * factor[None]


def frozen_batch_norm(params, x):
    factor = params["scale"] / jnp.sqrt(jnp.arange(1.0, 7))
    return x / jnp.sqrt(jnp.arange(1.0, 7))[None], (x - 0.0) * factor[None]


def scaled_embedding(params, x):
    return 3 * x, 3.0 * params["scale"] * x


def repeated_norm(params, x):
    variance = jnp.mean(x.reshape(-1, 2, 3) ** 2, -1, keepdims=True)
    variance = jnp.broadcast_to(variance, (len(x), 2, 3)).reshape(x.shape)
    inverse = jax.lax.rsqrt(variance + 1e-6)
    return x * inverse, x * (inverse * params["scale"])


@pytest.mark.parametrize(
    "norm",
    [
        group_norm,
        repeated_norm,
        gemma_norm,
        narrow_norm,
        batch_norm,
        frozen_batch_norm,
        scaled_embedding,
    ],
)
def test_scales_meet_all_their_factors(norm):
    x, params = normal(0, 50, 6), {"scale": normal(1, 6)}
    with jax.numpy_rank_promotion("allow"):
        factor, _ = norm(params, x)
        statistics = collect(lambda p, x: norm(p, x)[1], params, [x])
    assert not statistics.unknown
    close(statistics.diagonal["scale"], jnp.sum(factor**2, 0), rtol=5e-3)


def test_scale_whose_factors_part_is_unknown():
    def apply(params, x):
        factor = params["scale"] * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True))
        return x * factor - x.mean() * factor

    with jax.numpy_rank_promotion("allow"):
        statistics = collect(apply, {"scale": jnp.ones(6)}, [normal(0, 50, 6)])
    ((path, primitive, reason),) = statistics.unknown
    assert (path, primitive) == ("scale", "mul")
    assert reason == "it enters mul, mul before it has met all its factors"
    assert not statistics.diagonal


def test_frequencies_of_an_embedding_of_time():
    def apply(params, time):
        angle = time[:, None] * params["frequency"][None]
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    time = normal(0, 5)
    statistics = collect(apply, {"frequency": normal(1, 8)}, [time])
    assert not statistics.unknown
    close(statistics.diagonal["frequency"], jnp.full(8, jnp.sum(time**2)))


def test_numbers_that_leaves_are_multiplied_with_belong_to_the_input():
    def apply(params, x):
        x = x @ (-params["negative"]) + 3.0 * params["bias"][None]
        x = x @ (params["half"].T * 0.5) + x @ params["whole"]
        return jax.lax.scan(lambda x, w: (x @ (w / 4), None), x, 2 * params["layers"])

    params = {name: normal(i, 4, 4) for i, name in enumerate(["negative", "half"])}
    params |= {"whole": jnp.eye(4), "layers": normal(2, 3, 4, 4), "bias": normal(3, 4)}
    x = normal(4, 6, 4)
    statistics = collect(apply, params, [x])
    assert not statistics.unknown
    close(statistics.gram["negative"], gram(x))
    x = x @ -params["negative"] + 3 * params["bias"][None]
    close(statistics.gram[statistics.inputs["half"]], gram(0.5 * x))
    close(statistics.gram[statistics.inputs["whole"]], gram(x))
    np.testing.assert_array_equal(statistics.diagonal["bias"], np.full(4, 6 * 9.0))
    x = x @ params["half"].T * 0.5 + x
    close(statistics.gram["layers"][0], gram(x / 2))
    assert statistics.tokens["layers"].tolist() == [6, 6, 6]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(
            nn.LayerNorm()(x)
        )
        y = nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(8, name="down")(y), None


class Transformer(nn.Module):
    layers: int = 3
    scan: bool = True

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, name="embed")
        x = embed(tokens)
        if self.scan:
            block = nn.scan(
                nn.remat(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.layers,
            )
            x, _ = block(name="blocks")(x, None)
        else:
            for i in range(self.layers):
                x, _ = Block(name=f"block{i}")(x, None)
        return embed.attend(x)


def test_linen_transformer_under_scan_and_remat():
    tokens = integers(0, 11, 4, 5)
    stacked, unrolled = Transformer(), Transformer(scan=False)
    params = init(stacked, tokens)
    statistics = collect(stacked.apply, params, [tokens])
    assert not statistics.unknown

    layers = {
        f"block{i}": jax.tree.map(lambda x, i=i: x[i], params["params"]["blocks"])
        for i in range(3)
    }
    apart = {"params": {"embed": params["params"]["embed"], **layers}}
    inputs = linen_inputs(unrolled, apart, tokens)
    for name, features in [
        ("MultiHeadDotProductAttention_0/query", 1),
        ("MultiHeadDotProductAttention_0/value", 1),
        ("MultiHeadDotProductAttention_0/out", 2),
        ("up", 1),
        ("down", 1),
    ]:
        path = f"params/blocks/{name}/kernel"
        expected = [gram(inputs[f"block{i}/{name}"], features) for i in range(3)]
        close(statistics.gram[statistics.inputs[path]], np.stack(expected))
        np.testing.assert_array_equal(statistics.tokens[statistics.inputs[path]], 20)

    attention = "params/blocks/MultiHeadDotProductAttention_0"
    assert statistics.axes[f"{attention}/out/kernel"] == MatrixAxes((0,), (1, 2), (3,))
    assert statistics.axes[f"{attention}/key/kernel"] == MatrixAxes((0,), (1,), (2, 3))
    names = {statistics.inputs[f"{attention}/{n}/kernel"] for n in ("query", "value")}
    assert names == {f"{attention}/key/kernel"}  # the first of the three


def test_tied_embedding_has_both_statistics():
    tokens = integers(0, 11, 4, 5)
    model = Transformer(layers=1)
    params = init(model, tokens)
    statistics = collect(model.apply, params, [tokens])
    path = "params/embed/embedding"
    assert statistics.axes[path] == MatrixAxes((), (1,), (0,))
    assert statistics.gram[path].shape == (8, 8)
    counts = np.bincount(np.ravel(tokens), minlength=11)
    np.testing.assert_array_equal(
        statistics.diagonal[path], np.repeat(counts[:, None], 8, axis=1)
    )


def test_rows_count_as_products_with_one_hot_vectors():
    tokens, params = integers(0, 7, 4, 5), {"w": normal(1, 7, 3)}
    rows = collect(lambda p, t: p["w"][t], params, [tokens])
    products = collect(lambda p, t: jax.nn.one_hot(t, 7) @ p["w"], params, [tokens])
    close(rows.diagonal["w"][:, 0], jnp.diag(products.gram["w"]))
    close(products.gram["w"], jnp.diag(rows.diagonal["w"][:, 0]))


def test_nnx_block_with_lora():
    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                num_heads=2, in_features=8, decode=False, rngs=rngs
            )
            self.head = nnx.LoRALinear(8, 5, lora_rank=2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.attention(self.norm(x)))

    graph, params = nnx.split(Attention(nnx.Rngs(0)))
    inputs = {}

    def apply(params, x):
        return nnx.merge(graph, params)(x)

    x = normal(0, 3, 4, 8)
    statistics = collect(apply, params, [x])
    model = nnx.merge(graph, params)
    inputs["attention/query"] = model.norm(x)
    inputs["head"] = model.attention(model.norm(x))
    a = model.head.lora.lora_a[...]
    inputs["head/lora/lora_b"] = inputs["head"] @ a

    def path(name):
        return next(p for p in statistics.axes if p.startswith(name))

    assert not statistics.unknown
    for name, data in {
        "attention/query/kernel": inputs["attention/query"],
        "attention/value/kernel": inputs["attention/query"],
        "head/kernel": inputs["head"],
        "head/lora/lora_a": inputs["head"],
        "head/lora/lora_b": inputs["head/lora/lora_b"],
    }.items():
        close(statistics.gram[statistics.inputs[path(name)]], gram(data))
    assert statistics.inputs[path("head/lora/lora_a")] == path("head/kernel")


def gpt(params, tokens):
    """A transformer with all that may make axes hard to follow."""
    x = params["embed"][tokens]
    data = []

    def layer(x, w):
        seen = {"qkv": x * w["scale"][None, None]}
        qkv = jnp.einsum("btd,dchk->btchk", seen["qkv"], w["qkv"])
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        p = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k), -1)
        seen["out"] = jnp.einsum("bhts,bshk->bthk", p, v)
        x = x + jnp.einsum("bthk,khd->btd", seen["out"], w["out"])
        seen["up"] = x
        seen["down"] = jnp.tanh(jax.jit(jnp.matmul)(x, w["up"].T))
        x = x + seen["down"] @ w["down"].reshape(12, 8)
        seen["shared"] = x
        return x + x @ params["shared"], seen

    x, data = jax.lax.scan(layer, x, params["layers"])
    return x @ params["embed"].T, data


def gpt_params():
    layers = {
        "scale": normal(1, 3, 8),
        "qkv": normal(2, 3, 8, 3, 2, 4),
        "out": normal(3, 3, 4, 2, 8),
        "up": normal(4, 3, 12, 8),
        "down": normal(5, 3, 96),
    }
    return {"embed": normal(6, 11, 8), "layers": layers, "shared": normal(7, 8, 8)}


def test_plain_gpt():
    params = gpt_params()
    params["layers"]["down"] = params["layers"]["down"].reshape(3, 3, 4, 8)
    tokens = integers(0, 11, 4, 5)
    _, data = jax.jit(gpt)(params, tokens)
    statistics = collect(lambda p, t: gpt(p, t)[0], params, [tokens])
    assert not statistics.unknown
    transposed = jnp.swapaxes(data["out"], -1, -2)  # the leaf has k before h
    for name, x, features in [
        ("qkv", data["qkv"], 1),
        ("out", transposed, 2),
        ("up", data["up"], 1),
        ("down", data["down"], 1),
    ]:
        expected = np.stack([gram(layer, features) for layer in x])
        close(statistics.gram[f"layers/{name}"], expected)
    close(statistics.gram["shared"], gram(data["shared"]))
    assert statistics.tokens["shared"] == 60
    assert statistics.axes["layers/up"] == MatrixAxes((0,), (2,), (1,))
    assert statistics.axes["layers/down"] == MatrixAxes((0,), (1, 2), (3,))
    assert statistics.axes["layers/out"] == MatrixAxes((0,), (1, 2), (3,))


def test_gram_and_matrix_have_the_same_order():
    """tr(W'AW) is the sum of squares of what comes out."""
    params = gpt_params()
    w, x = params["layers"]["out"][0], normal(8, 6, 2, 4)
    statistics = collect(
        lambda p, x: jnp.einsum("thk,khd->td", x, p["w"]), {"w": w}, [x]
    )
    matrix = to_matrix(w, statistics.axes["w"])
    squares = jnp.trace(matrix.T @ statistics.gram["w"] @ matrix)
    close(squares, jnp.sum(jnp.einsum("thk,khd->td", x, w) ** 2))


def test_axes_that_are_split_and_mixed():
    """A flat leaf, of which the model makes heads, and heads that it permutes."""
    x, w = normal(0, 7, 4, 3), normal(1, 12, 5)

    def apply(params, x):
        kernel = params["w"].reshape(3, 4, 5).transpose(1, 0, 2)
        return jnp.einsum("thk,hkd->td", x, kernel)

    statistics = collect(apply, {"w": w}, [x])
    assert statistics.axes["w"] == MatrixAxes((), (0,), (1,))
    close(statistics.gram["w"], gram(jnp.swapaxes(x, 1, 2), features=2))


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("groups", [1, 6])
def test_convolution(strides, groups):
    """tr(W'AW) is the sum of squares of what comes out (of each group)."""
    conv = nn.Conv(
        6 if groups > 1 else 4,
        (3, 2),
        strides=strides,
        feature_group_count=groups,
        use_bias=False,
        precision="highest",
    )
    x = normal(0, 2, 8, 7, 6)
    params = init(conv, x)
    statistics = collect(conv.apply, params, [x])
    assert not statistics.unknown
    path, y = "params/kernel", conv.apply(params, x)
    axes, matrices = statistics.axes[path], params["params"]["kernel"]
    assert axes.stack == (() if groups == 1 else (3,))
    matrices = to_matrix(matrices, axes)
    squares = jnp.einsum(
        "...io,...ij,...jo->", matrices, statistics.gram[path], matrices
    )
    close(squares, jnp.sum(y**2))
    np.testing.assert_array_equal(statistics.tokens[path], y[..., 0].size)


def test_groups_of_a_convolution_that_are_an_axis_of_the_leaf():
    x, w = normal(0, 2, 9, 6), normal(1, 3, 3, 2, 4)  # groups, window, in, out

    def convolve(params, x):
        kernel = params["w"].transpose(1, 2, 0, 3).reshape(3, 2, 12)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=3,
            precision="highest",
        )

    statistics = collect(convolve, {"w": w}, [x])
    assert statistics.axes["w"] == MatrixAxes((0,), (1, 2), (3,))
    matrices, y = to_matrix(w, statistics.axes["w"]), convolve({"w": w}, x)
    squares = jnp.einsum("gio,gij,gjo->g", matrices, statistics.gram["w"], matrices)
    close(squares, jnp.sum(y.reshape(-1, 3, 4) ** 2, (0, 2)))


def test_groups_that_cut_an_axis_are_unknown():
    conv = nn.Conv(8, (3,), feature_group_count=2, use_bias=False)
    x = normal(0, 2, 9, 4)
    statistics = collect(conv.apply, init(conv, x), [x])
    (use,) = statistics.unknown
    assert (use.path, use.primitive) == ("params/kernel", "conv_general_dilated")
    assert "axis 2" in use.reason


def test_experts_under_vmap_count_the_tokens_they_got():
    params = {"up": normal(0, 4, 5, 7), "down": normal(1, 4, 7, 5)}
    tokens = normal(2, 12, 5)
    expert = jnp.asarray([0, 1, 1, 3] * 3)

    def apply(params, tokens):
        slots = jax.nn.one_hot(expert, 4).T[:, :, None] * tokens[None]

        def run(up, down, x):
            return jnp.tanh(x @ up) @ down

        return jnp.sum(jax.vmap(run)(params["up"], params["down"], slots), 0)

    statistics = collect(apply, params, [tokens])
    assert not statistics.unknown
    assert statistics.axes["up"] == MatrixAxes((0,), (1,), (2,))
    np.testing.assert_array_equal(statistics.tokens["up"], [3, 6, 0, 3])
    expected = [gram(tokens[expert == e]) for e in range(4)]
    close(statistics.gram["up"], np.stack(expected))
    hidden = [jnp.tanh(tokens[expert == e] @ params["up"][e]) for e in range(4)]
    close(statistics.gram["down"], np.stack([gram(h) for h in hidden]))


def test_branches_loops_and_custom_derivatives():
    @jax.custom_vjp
    def act(x, w):
        return jnp.tanh(x @ w)

    act.defvjp(lambda x, w: (act(x, w), None), lambda _, g: (g, g))
    params = {name: normal(i, 4, 4) for i, name in enumerate(["a", "b", "c", "d"])}
    x = normal(9, 5, 4)

    def apply(p, x):
        x = act(x, p["a"])
        x = jax.lax.cond(
            jnp.sum(x) > 100, lambda x: x @ p["b"], lambda x: x @ p["c"], x
        )

        def step(state):
            n, x = state
            return n + 1, jnp.tanh(x @ p["d"])

        return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, x))[1]

    statistics = collect(apply, params, [x])
    assert not statistics.unknown
    close(statistics.gram["a"], gram(x))
    np.testing.assert_array_equal(statistics.gram["b"], np.zeros((4, 4)))
    assert statistics.tokens["b"] == 0
    x = act(x, params["a"])
    close(statistics.gram["c"], gram(x))
    assert statistics.tokens["c"] == 5
    x, total = x @ params["c"], 0
    for _ in range(3):
        total += gram(x)
        x = jnp.tanh(x @ params["d"])
    close(statistics.gram["d"], total)
    assert statistics.tokens["d"] == 15


def test_nested_scans_over_weights():
    w, x = normal(0, 2, 3, 5, 5), normal(1, 6, 5)

    def inner(x, w):
        return jnp.tanh(x @ w), None

    def apply(params, x):
        return jax.lax.scan(
            lambda x, w: jax.lax.scan(inner, x, w, reverse=True), x, params["w"]
        )[0]

    statistics = collect(apply, {"w": w}, [x])
    assert statistics.axes["w"] == MatrixAxes((0, 1), (2,), (3,))
    expected = np.zeros((2, 3, 5, 5))
    for i in range(2):
        for j in reversed(range(3)):
            expected[i, j] = gram(x)
            x = jnp.tanh(x @ w[i, j])
    close(statistics.gram["w"], expected)


def test_scan_over_an_axis_that_is_not_the_first():
    w, x = normal(0, 5, 3, 5), normal(1, 6, 5)

    def apply(params, x):
        layers = jnp.moveaxis(params["w"], 1, 0)
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

    statistics = collect(apply, {"w": w}, [x])
    assert statistics.axes["w"] == MatrixAxes((1,), (0,), (2,))
    expected = []
    for i in range(3):
        expected.append(gram(x))
        x = jnp.tanh(x @ w[:, i])
    close(statistics.gram["w"], np.stack(expected))


def test_biases_are_counted_wherever_they_are_added():
    params = {"bias": normal(0, 2, 3), "cls": normal(1, 6), "gate": normal(2)}

    def apply(params, x):
        x = x + params["bias"].reshape(6)[None, None]
        cls = jnp.tile(params["cls"].reshape(1, 1, 6), (len(x), 1, 1))
        return params["gate"] * jnp.concatenate([cls, x], axis=1)

    x = normal(3, 4, 5, 6)
    statistics = collect(apply, params, [x])
    assert not statistics.unknown
    np.testing.assert_array_equal(statistics.diagonal["bias"], np.full((2, 3), 20.0))
    np.testing.assert_array_equal(statistics.diagonal["cls"], np.full(6, 4.0))
    y = apply(params, x) / params["gate"]
    close(statistics.diagonal["gate"], jnp.sum(y**2))


def test_products_without_a_contraction():
    x, params = normal(0, 4, 5, 6), {"w": normal(1, 6)}
    statistics = collect(lambda p, x: jnp.einsum("btd,d->btd", x, p["w"]), params, [x])
    close(statistics.diagonal["w"], jnp.sum(x**2, (0, 1)))


def test_weight_that_is_used_twice_adds_up():
    params = {"w": normal(0, 4, 4)}
    x = normal(1, 5, 4)
    statistics = collect(lambda p, x: (x @ p["w"]) @ p["w"], params, [x])
    close(statistics.gram["w"], gram(x) + gram(x @ params["w"]))
    assert statistics.tokens["w"] == 10


def test_half_precision_is_summed_in_float32():
    x, params = normal(0, 4096, 4).astype(jnp.bfloat16), {"w": normal(1, 4, 2)}
    statistics = collect(
        lambda p, x: x @ p["w"].astype(jnp.bfloat16), params, [x], dtype="bfloat16"
    )
    assert statistics.gram["w"].dtype == jnp.bfloat16
    close(statistics.gram["w"], gram(x), rtol=4e-3)
    exact = collect(lambda p, x: x @ p["w"].astype(jnp.bfloat16), params, [x])
    close(exact.gram["w"], gram(x), rtol=1e-6)
