"""Adapters in memory: products of factors added to leaves of any layout."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge import LowRank, apply_adapter


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def low_rank(outputs, inputs, rank=2, stack=(), seed=1):
    return LowRank(
        draw(*stack, outputs, rank, seed=seed), draw(*stack, rank, inputs, seed=seed)
    )


def product(update):
    return np.float64(update.left) @ np.float64(update.right)


LAYOUTS = {
    "mlp/kernel": ((6, 4), low_rank(4, 6), lambda d: d.T),
    "mlp.weight": ((4, 6), low_rank(4, 6), lambda d: d),
    "attn/query/kernel": ((6, 2, 3), low_rank(6, 6), lambda d: d.T.reshape(6, 2, 3)),
    "attn/out/kernel": ((2, 3, 5), low_rank(5, 6), lambda d: d.T.reshape(2, 3, 5)),
    "attn.c_attn.weight": ((4, 12), low_rank(12, 4), lambda d: d.T),
    "embed_tokens.weight": ((9, 4), low_rank(4, 9), lambda d: d.T),
    "embed/embedding": ((9, 4), low_rank(4, 9), lambda d: d.T),
    "conv.weight": ((4, 3, 2, 2), low_rank(4, 12), lambda d: d.reshape(4, 3, 2, 2)),
    "norm/scale": ((5,), draw(5, seed=2), np.float64),
}


@pytest.mark.parametrize("path", LAYOUTS)
def test_layouts(path):
    shape, update, to_leaf = LAYOUTS[path]
    base = {path: draw(*shape), "other": draw(3)}
    model = apply_adapter(base, {path: update}, scale=0.5)
    delta = product(update) if isinstance(update, LowRank) else update
    np.testing.assert_allclose(
        model[path], base[path] + 0.5 * to_leaf(delta), rtol=1e-5, atol=1e-6
    )
    assert model["other"] is base["other"]


def test_stacked_layers_equal_a_loop():
    base = {"layers": {"kernel": draw(3, 6, 4)}, "head": {"kernel": draw(6, 4)}}
    update = low_rank(4, 6, rank=2, stack=(3,))
    adapter = {"layers/kernel": update, "head/kernel": low_rank(4, 6, rank=5)}
    rules = {"layers/.*": 1, ".*": 0}
    model = apply_adapter(base, adapter, stack_axes=rules)
    for i in range(3):
        layer = {"kernel": base["layers"]["kernel"][i]}
        update_i = LowRank(update.left[i], update.right[i])
        expected = apply_adapter(layer, {"kernel": update_i})["kernel"]
        np.testing.assert_allclose(model["layers"]["kernel"][i], expected, rtol=1e-6)
    expected = apply_adapter(base["head"], {"kernel": adapter["head/kernel"]})
    np.testing.assert_array_equal(model["head"]["kernel"], expected["kernel"])


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(0, 6), st.floats(-2, 2, width=32)
)
def test_any_rank(outputs, inputs, rank, scale):
    base = {"w.weight": draw(outputs, inputs)}
    update = low_rank(outputs, inputs, rank)
    model = apply_adapter(base, {"w.weight": update}, scale=scale)
    expected = base["w.weight"] + scale * product(update)
    np.testing.assert_allclose(model["w.weight"], expected, rtol=1e-4, atol=1e-5)


def test_small_updates_of_bfloat16_leaves_survive():
    base = {"w.weight": np.ones((2, 2), ml_dtypes.bfloat16), "b": draw(2)}
    update = LowRank(np.full((2, 1), 1e-2, np.float32), np.full((1, 2), 1e-2))
    model = apply_adapter(base, {"w.weight": update})
    assert model["w.weight"].dtype == np.float32
    np.testing.assert_allclose(model["w.weight"] - 1, 1e-4, rtol=1e-3)


def test_the_product_is_as_exact_as_float32_on_any_device():
    base, update = {"w.weight": draw(4, 6)}, low_rank(4, 6)
    jaxpr = jax.make_jaxpr(lambda u: apply_adapter(base, {"w.weight": u}))(update)
    assert "HIGHEST" in str(jaxpr)


def test_rules_for_axes_and_scale():
    base = {"a.weight": draw(6, 4), "b.weight": draw(4, 6)}
    update = low_rank(4, 6)
    model = apply_adapter(
        base,
        {"a.weight": update, "b.weight": update},
        scale={"a.*": 2.0, ".*": 0.0},
        matrices={r"a\.weight": "io"},
    )
    expected = base["a.weight"] + 2 * product(update).T
    np.testing.assert_allclose(model["a.weight"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model["b.weight"], base["b.weight"])


def test_jit_vmap_and_grad():
    base, adapter = {"w.weight": draw(4, 6)}, {"w.weight": low_rank(4, 6)}
    scales = jnp.array([0.0, 0.5, 2.0])
    expected = [apply_adapter(base, adapter, scale=s)["w.weight"] for s in scales]
    compiled = jax.jit(lambda b, a, s: apply_adapter(b, a, scale=s))
    for scale, want in zip(scales, expected, strict=True):
        got = compiled(base, adapter, scale)["w.weight"]
        np.testing.assert_allclose(got, want, rtol=1e-6)
    many = jax.vmap(lambda s: apply_adapter(base, adapter, scale=s)["w.weight"])(scales)
    np.testing.assert_allclose(many, expected, rtol=1e-6)
    slope = jax.grad(lambda s: apply_adapter(base, adapter, scale=s)["w.weight"].sum())
    want = product(adapter["w.weight"]).sum()
    np.testing.assert_allclose(slope(1.0), want, rtol=1e-5)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_leaves_on_a_mesh_keep_their_shardings(mesh, as_array):
    base = {"w": {"kernel": draw(8, 4), "bias": draw(4)}}
    adapter = {"w/kernel": low_rank(4, 8, rank=3), "w/bias": draw(4, seed=3)}
    expected = apply_adapter(base, adapter)
    spec = {"kernel": P("data", "model"), "bias": P("model")}
    placed = {
        "w": {
            name: jax.device_put(leaf, NamedSharding(mesh, spec[name]))
            for name, leaf in base["w"].items()
        }
    }
    model = apply_adapter(placed, jax.tree.map(as_array, adapter))
    for name, leaf in model["w"].items():
        assert leaf.sharding == placed["w"][name].sharding
        np.testing.assert_allclose(leaf, expected["w"][name], rtol=1e-6, atol=1e-6)


BASE = {
    "w.weight": np.ones((4, 6), np.float32),
    "bias": np.ones(4, np.float32),
    "steps": np.ones((4, 6), np.int32),
    "packed.weight": np.ones((4, 6), ml_dtypes.float8_e4m3fn),
    "odd": np.ones((4, 6), np.float32),
}
W = low_rank(4, 6)


@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        ("runs/math", {}, "adapter is a str; it must map leaf paths to updates"),
        ({"w.wieght": W}, {}, r"no leaf 'w.wieght'. Did you mean 'w.weight'\?"),
        ({"steps": W}, {}, "leaf 'steps' is int32, to which no update can be added"),
        ({"packed.weight": W}, {}, "'packed.weight' is float8_e4m3fn, to which"),
        ({"bias": W}, {}, r"leaf 'bias' of shape \(4,\) is no matrix.*as an array"),
        ({"odd": W}, {}, "which axes of leaf 'odd' .* are the option `matrices`"),
        (
            {"w.weight": low_rank(6, 4)},
            {},
            r"from 6 inputs to 4 outputs.*factors \(6, 2\) and \(2, 4\).*`matrices`",
        ),
        ({"w.weight": LowRank(W.left, W.right[0])}, {}, "they must be"),
        ({"w.weight": low_rank(4, 6, stack=(2,))}, {}, r"\(2, 4, 2\).*`stack_axes`"),
        ({"w.weight": np.ones((6, 4))}, {}, r"has shape \(4, 6\) in base, but"),
        ({"w.weight": W}, {"scale": [1, 2]}, "scale of leaf 'w.weight' is"),
        ({"w.weight": W}, {"scale": float("nan")}, "not finite"),
    ],
)
def test_errors(adapter, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        apply_adapter(BASE, adapter, **options)
    assert str(caught.value).startswith("apply_adapter: ")


@pytest.mark.parametrize(
    "name", ["q.lora_A.weight", "q.lora_embedding_B", "layer/lora_a"]
)
def test_methods_refuse_to_merge_factors_one_by_one(name):
    adapters = [{"q.weight": low_rank(4, 6, seed=seed)} for seed in (1, 2)]
    with pytest.raises(
        ValueError, match=r"average: .*'q.weight/lora_B'.*apply_adapter"
    ):
        jaxmerge.average(adapters)
    as_in_a_file = [{name: draw(2, 6)}] * 2
    with pytest.raises(ValueError, match=r"one of 1 factors of LoRA updates"):
        jaxmerge.task_arithmetic(as_in_a_file[0], as_in_a_file)
