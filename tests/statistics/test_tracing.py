"""Which leaf is which matrix, and what is not understood, from shapes alone."""

import jax
import jax.numpy as jnp
import pytest

from jaxmerge.matrices import MatrixAxes
from jaxmerge.statistics import trace


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_trace_needs_no_data():
    def apply(params, x):
        q = jnp.einsum("btd,dhk->bthk", x, params["q"])
        x = jnp.einsum("bthk,hkd->btd", q, params["o"]) + params["bias"][None, None]
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0]

    params = {
        "q": shape(8, 2, 4),
        "o": shape(2, 4, 8),
        "bias": shape(8),
        "layers": shape(3, 8, 8),
    }
    found = trace(apply, params, shape(2, 5, 8))
    assert found.axes == {
        "layers": MatrixAxes((0,), (1,), (2,)),
        "o": MatrixAxes((), (0, 1), (2,)),
        "q": MatrixAxes((), (0,), (1, 2)),
    }
    assert not found.unknown
    assert [site.path for site in found.sites] == ["bias", "layers", "o", "q"]


def test_single_inputs_outputs_and_layers():
    def apply(params, x):
        x = jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0]
        return x @ params["in_of_one"] @ params["out_of_one"], x @ params["vector"]

    params = {
        "layers": shape(1, 8, 8),
        "in_of_one": shape(8, 1),
        "out_of_one": shape(1, 8),
        "vector": shape(8),
    }
    assert trace(apply, params, shape(5, 8)).axes == {
        "layers": MatrixAxes((0,), (1,), (2,)),
        "in_of_one": MatrixAxes((), (0,), (1,)),
        "out_of_one": MatrixAxes((), (0,), (1,)),
        "vector": MatrixAxes((), (0,), ()),
    }


def weight_norm(p, x):
    return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))


def merged_lora(p, x):
    return x @ (p["w"] + p["a"] @ p["b"])


def shard_map(p, x):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    run = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, spec), out_specs=spec
    )
    return run(x, p["w"])


def parts(p, x):
    return x @ p["w"][:, :3]


def expert_per_token(p, x):
    return jnp.einsum("ti,tio->to", x, p["layers"][jnp.argmax(x, -1) % 3])


def expert_by_index(p, x):
    return x @ jax.lax.dynamic_index_in_dim(p["layers"], jnp.argmax(x), keepdims=False)


def unused(p, x):
    return x


def initial_state(p, x):
    return jax.lax.scan(lambda h, x: (h + x, None), p["a"][0], x)[0]


def loop_condition(p, x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < p["w"][0, 0], jnp.exp, x)


def branches(p, x):
    return x @ jax.lax.cond(jnp.sum(x) > 0, lambda: p["w"], lambda: 2 * p["w"])


def both_ways(p, x):
    return x @ p["w"] @ p["w"].T


def divided(p, x):
    return x / p["w"][None, 0]


def temperature(p, x):
    return x * jnp.exp(p["scalar"])


def flipped(p, x):
    return x @ jnp.flip(p["w"], 0)


def two_weights(p, x):
    return x @ (p["w"] @ p["w"])


def scaled_weight(p, x):
    return x @ (p["w"] * jnp.arange(4.0)[None])


def expert_per_token_of_many(p, x):
    return jnp.einsum("ti,tio->to", x, 3 * p["layers"][jnp.argmax(x, -1) % 3])


def contracted_before_its_factors(p, x):
    return jnp.sum(x[:, :, None] * p["w"][None], 1)


def quantised(p, x):
    return x @ jnp.round(p["w"]).astype(jnp.int8).astype(jnp.float32)


def cast(p, x):
    return x @ p["w"].astype(jnp.int8).astype(jnp.float32)


def summed(p, x):
    return x + jnp.sum(p["w"], 0, keepdims=True)


LEAVES = {
    "w": shape(4, 4),
    "a": shape(4, 4),
    "b": shape(4, 4),
    "layers": shape(3, 4, 4),
    "scalar": shape(),
}


@pytest.mark.parametrize(
    ("apply", "path", "primitive", "reason"),
    [
        (weight_norm, "w", "div", "changed before it meets data"),
        (merged_lora, "w", "add", "changed before"),
        (merged_lora, "a", "dot_general", "changed before"),
        (shard_map, "w", "shard_map", "no rule"),
        (parts, "w", "slice", "a part of it is taken"),
        (expert_by_index, "layers", "dynamic_slice", "no rule"),
        (expert_per_token, "layers", "gather", "matrices of it are looked up"),
        (expert_per_token_of_many, "layers", "gather", "matrices of it are looked up"),
        (contracted_before_its_factors, "w", "mul", "it enters reduce_sum before"),
        (unused, "w", "none", "no data meets it"),
        (initial_state, "a", "slice", "a part"),
        (loop_condition, "w", "while", "decides when the loop ends"),
        (branches, "w", "cond", "changed before"),
        (both_ways, "w", "dot_general", "elsewhere MatrixAxes"),
        (divided, "w", "slice", "a part"),
        (temperature, "scalar", "exp", "changed before"),
        (flipped, "w", "rev", "changed before"),
        (two_weights, "w", "dot_general", "changed before"),
        (scaled_weight, "w", "mul", "changed before"),
        (summed, "w", "reduce_sum", "changed before"),
        (quantised, "w", "round", "changed before"),
        (cast, "w", "convert_element_type", "more than the order"),
    ],
)
def test_what_is_not_understood_is_listed(apply, path, primitive, reason):
    found = trace(apply, LEAVES, shape(5, 4))
    reasons = {(use.path, use.primitive): use.reason for use in found.unknown}
    assert reason in reasons[path, primitive]
    unknown = {use.path for use in found.unknown}
    assert found.axes.keys() | unknown == LEAVES.keys()
