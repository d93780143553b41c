import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmerge.matrices import (
    FLAX,
    HUGGING_FACE,
    MatrixAxes,
    from_matrix,
    leaf_axes,
    matrix_axes,
    row_axes,
    to_matrix,
)
from jaxmerge.options import Leaf
from jaxmerge.tree import named_leaves


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.MultiHeadDotProductAttention(num_heads=2, normalize_qk=True)(x, x)
        return nn.LayerNorm()(nn.Dense(6)(x)), None


class Linen(nn.Module):
    """One of everything: embedding, scanned and plain blocks, convolutions, norms."""

    @nn.compact
    def __call__(self, tokens, image):
        x = nn.Embed(11, 6)(tokens)
        x = x + self.param("pos_embedding", nn.initializers.zeros, (1, 5, 6))
        scanned = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = scanned(name="layers")(x, None)
        x, _ = Block(name="last")(x)
        x = x * self.param("temperature", nn.initializers.ones, ())
        patches = nn.GroupNorm(2)(nn.Conv(4, (3, 2))(image))
        return nn.Dense(7, name="head")(x), nn.Conv(4, (3,), name="conv")(x), patches


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.norm = nnx.RMSNorm(6, rngs=rngs)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.adapted = nnx.LoRALinear(6, 4, lora_rank=2, rngs=rngs)


@pytest.fixture(scope="module")
def linen_shapes():
    tokens, image = jnp.zeros((1, 5), int), jnp.zeros((1, 6, 6, 3))
    return jax.eval_shape(Linen().init, jax.random.key(0), tokens, image)["params"]


STACKED = {"layers/.*": 1, ".*": 0}


def groups(axes):
    """The matrices among all leaves, as (stack, inputs, outputs)."""
    return {path: tuple(found) for path, found in axes.items() if found.is_matrix}


def test_linen_modules(linen_shapes):
    attention = "MultiHeadDotProductAttention_0"
    one = {
        **{f"{attention}/{name}/kernel": ((0,), (1, 2)) for name in ("key", "query")},
        f"{attention}/value/kernel": ((0,), (1, 2)),
        f"{attention}/out/kernel": ((0, 1), (2,)),
        "Dense_0/kernel": ((0,), (1,)),
    }
    shifted = {
        f"layers/{path}": ((0,), *(tuple(axis + 1 for axis in group) for group in both))
        for path, both in one.items()
    }
    axes = matrix_axes(linen_shapes, stack_axes=STACKED)
    assert axes.keys() == named_leaves(linen_shapes).keys()
    assert groups(axes) == {
        **shifted,
        **{f"last/{path}": ((), *both) for path, both in one.items()},
        "Conv_0/kernel": ((), (0, 1, 2), (3,)),
        "conv/kernel": ((), (0, 1), (2,)),
        "head/kernel": ((), (0,), (1,)),
    }
    assert axes["Embed_0/embedding"] == MatrixAxes((), (), (1,))
    assert axes["pos_embedding"] == MatrixAxes((), (), (2,))
    assert axes["temperature"] == MatrixAxes((), (), ())
    assert axes[f"layers/{attention}/query/bias"] == MatrixAxes((0,), (), (1, 2))


@pytest.mark.parametrize("boxed", [True, False])
def test_nnx_modules(boxed):
    state = nnx.state(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))), nnx.Param)
    end = "/value" if boxed else ""
    axes = matrix_axes(state if boxed else nnx.to_pure_dict(state), preset=FLAX)
    heads = {f"attention/{name}/kernel" for name in ("query", "key", "value")}
    assert groups(axes) == {
        **{path + end: ((), (0,), (1, 2)) for path in heads},
        f"attention/out/kernel{end}": ((), (0, 1), (2,)),
        f"conv/kernel{end}": ((), (0, 1, 2), (3,)),
        f"adapted/kernel{end}": ((), (0,), (1,)),
        f"adapted/lora/lora_a{end}": ((), (0,), (1,)),
        f"adapted/lora/lora_b{end}": ((), (0,), (1,)),
    }


IN_OUT, OUT_IN = MatrixAxes((), (0,), (1,)), MatrixAxes((), (1,), (0,))
CONV, ROWS = MatrixAxes((), (1, 2, 3), (0,)), MatrixAxes((), (), (1,))
HUGGING_FACE_LEAVES = {
    "model.embed_tokens.weight": ((32, 8), ROWS),
    "model.layers.0.self_attn.q_proj.weight": ((6, 8), OUT_IN),
    "model.layers.0.mlp.down_proj.weight": ((8, 16), OUT_IN),
    "model.layers.0.mlp.experts.3.w1.weight": ((16, 8), OUT_IN),
    "lm_head.weight": ((32, 8), OUT_IN),
    "embed_out.weight": ((32, 8), OUT_IN),
    "bert.embeddings.position_embeddings.weight": ((12, 8), ROWS),
    "bert.encoder.layer.0.attention.self.query.weight": ((8, 8), OUT_IN),
    "classifier.weight": ((3, 8), OUT_IN),
    "encoder.in_proj_weight": ((24, 8), OUT_IN),
    "transformer.wte.weight": ((32, 8), ROWS),
    "wpe.weight": ((12, 8), ROWS),
    "transformer.h.0.attn.c_attn.weight": ((8, 24), IN_OUT),
    "transformer.h.0.mlp.c_fc.weight": ((8, 32), IN_OUT),
    "h.11.mlp.c_proj.weight": ((32, 8), IN_OUT),
    "shared.weight": ((32, 8), ROWS),
    "encoder.block.0.layer.0.SelfAttention.q.weight": ((8, 8), OUT_IN),
    "block.0.SelfAttention.relative_attention_bias.weight": ((32, 2), ROWS),
    "vit.embeddings.patch_embeddings.projection.weight": ((8, 3, 4, 4), CONV),
    "vision_model.embeddings.patch_embedding.weight": ((8, 3, 4, 4), CONV),
    "resnet.layer1.0.conv2.weight": ((8, 4, 3, 3), CONV),
    "model.encoder.conv1.weight": ((8, 4, 3), MatrixAxes((), (1, 2), (0,))),
    "model.q_proj.lora_A.weight": ((2, 8), OUT_IN),
}


@pytest.mark.parametrize("name", HUGGING_FACE_LEAVES)
@pytest.mark.parametrize("preset", [HUGGING_FACE, {**FLAX, **HUGGING_FACE}])
def test_hugging_face_matrices_and_embeddings(name, preset):
    shape, want = HUGGING_FACE_LEAVES[name]
    assert leaf_axes(name, shape, preset=preset) == want


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (8,)),
        ("model.layers.0.self_attn.q_proj.bias", (8,)),
        ("h.0.attn.bias", (1, 1, 12, 12)),
        ("vit.embeddings.cls_token", (1, 1, 8)),
        ("vit.embeddings.position_embeddings", (1, 17, 8)),
        ("clip.logit_scale", ()),
    ],
)
def test_hugging_face_leaves_that_are_no_matrices(name, shape):
    assert not leaf_axes(name, shape).is_matrix


def test_names_may_be_nested_dicts():
    nested = {"h": {"0": {"attn": {"c_attn": {"weight": np.ones((8, 24))}}}}}
    assert matrix_axes(nested)["h/0/attn/c_attn/weight"] == IN_OUT


def test_users_rules_come_first_and_the_first_of_them_wins():
    params = {"a.c_fc.weight": np.ones((8, 32)), "b.c_fc.weight": np.ones((8, 32))}
    axes = matrix_axes(params, {r"a\..*": "oi", r".*": "eo"})
    assert axes == {"a.c_fc.weight": OUT_IN, "b.c_fc.weight": ROWS}


@pytest.mark.parametrize(
    ("pattern", "shape", "want"),
    [
        ("i*o", (2, 3, 4, 5), ((), (0, 1, 2), (3,))),
        ("i*o", (2, 3), ((), (0,), (1,))),
        ("i*o", (2,), ((), (), (0,))),
        ("oi*", (2, 3, 4), ((), (1, 2), (0,))),
        ("ie*o", (2, 3, 4, 5), ((), (0,), (3,))),
        ("ioi", (2, 3, 4), ((), (0, 2), (1,))),
    ],
)
def test_patterns(pattern, shape, want):
    assert tuple(leaf_axes("w", shape, {"w": pattern})) == want


@pytest.mark.parametrize(
    ("shape", "rules", "stack_axes", "message"),
    [
        ((2, 3, 4), None, 0, r"leaf 'up/kernel' of shape \(2, 3, 4\).*stack_axes"),
        ((2, 3, 4), {".*": "io"}, 0, "pattern 'io' for leaf 'up/kernel' .* 3 axes"),
        ((2, 3), {".*": "ioo*o"}, 0, "pattern 'ioo.*' for leaf .* 2 axes"),
        ((2, 3), {".*": "ix"}, 0, "'ix' .* one letter i, o or e"),
        ((2, 3), {".*": "*o"}, 0, "one letter i, o or e"),
        (
            (2, 3),
            {"up/kernel": IN_OUT._replace(stack=(2,))},
            0,
            "each of its 2 axes once",
        ),
        (
            (2, 3, 4),
            {"up/kernel": IN_OUT},
            0,
            r"leaf 'up/kernel' of shape .* 3 axes once",
        ),
        ((2, 3), None, 3, r"stack_axes is 3 for leaf 'up/kernel' .* \[0, 2\]"),
        ((2, 3), None, {"layers/.*": 1}, "No rule of stack_axes matches .*'.*': 0"),
    ],
)
def test_says_what_does_not_fit(shape, rules, stack_axes, message):
    params = {"up": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    with pytest.raises(ValueError, match=message):
        matrix_axes(params, rules, stack_axes)


def test_undeclared_stacks_are_not_taken_for_matrices(linen_shapes):
    with pytest.raises(ValueError, match="layers/Dense_0/kernel"):
        matrix_axes({"layers": {"Dense_0": linen_shapes["layers"]["Dense_0"]}})


def test_axes_by_path_come_before_patterns_and_know_what_is_stacked():
    params = {
        "blocks[0]": np.ones((3, 8, 4)),
        "blocks0": np.ones((8, 4)),
        "[q": np.ones((8, 2, 4)),
        "bias": np.ones((3, 4)),
    }
    traced = {
        "blocks[0]": MatrixAxes((0,), (2,), (1,)),
        "[q": MatrixAxes((), (0,), (1, 2)),
        "of another part": IN_OUT,
    }
    rules = {"bias": "o", ".*": "io", **traced}
    axes = matrix_axes(params, rules, {"bias": 1, ".*": 0})
    assert axes["blocks[0]"] == traced["blocks[0]"]
    assert axes["[q"] == traced["[q"]
    assert axes["blocks0"] == IN_OUT


def test_rows_are_outputs_of_linear_maps_and_entries_of_tables():
    rows = row_axes({"odd": "oi"})
    stacked = Leaf("della", "layers/query/kernel", (3, 8, 2, 4), 2, units=(0,))
    assert rows(stacked) == (2, 3)
    assert rows(Leaf("della", "odd", (8, 4), 2)) == (0,)
    assert rows(Leaf("della", "embedding", (8, 4), 2)) == (0,)
    assert rows(Leaf("della", "bias", (4,), 2)) == ()
    with pytest.raises(ValueError, match=r"della: .*leaf 'new'"):
        rows(Leaf("della", "new", (8, 4), 2))
    rows = row_axes({"new": MatrixAxes((1,), (0,), (2,))})
    assert rows(Leaf("della", "new", (8, 3, 4), 2)) == (1, 2)
    with pytest.raises(ValueError, match=r"^della: stack_axes is 1 for leaf 'new'"):
        rows(Leaf("della", "new", (8, 3, 4), 2, units=(0,)))


def test_flax_and_pytorch_copies_of_weights_give_the_same_matrices():
    kernel = np.random.default_rng(0).standard_normal((6, 2, 4)).astype(np.float32)
    flax = {"attention": {"query": {"kernel": kernel}}}
    torch = {"attention.query.weight": kernel.reshape(6, 8).T}
    matrices = [
        to_matrix(leaf, matrix_axes(params)[path])
        for params in (flax, torch)
        for path, leaf in named_leaves(params).items()
    ]
    np.testing.assert_array_equal(*matrices)
    assert matrices[0].shape == (6, 8)


@st.composite
def shapes_and_axes(draw):
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=2, max_size=5)))
    order = draw(st.permutations(range(len(shape))))
    inputs = draw(st.integers(0, len(shape) - 2))
    outputs = draw(st.integers(inputs + 1, len(shape) - 1))
    groups = order[:inputs], order[inputs:outputs], order[outputs:]
    return shape, MatrixAxes(*map(tuple, groups))


@given(shapes_and_axes())
@settings(deadline=None, max_examples=25)
def test_matrices_go_back_to_the_leaf(shape_and_axes):
    shape, axes = shape_and_axes
    leaf = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    matrix = to_matrix(leaf, axes)
    assert matrix.shape == (
        *(shape[axis] for axis in axes.stack),
        math.prod(shape[axis] for axis in axes.inputs),
        math.prod(shape[axis] for axis in axes.outputs),
    )
    np.testing.assert_array_equal(from_matrix(matrix, shape, axes), leaf)


def test_a_matrix_contracts_the_inputs():
    rng = np.random.default_rng(0)
    kernel, x = rng.standard_normal((3, 2, 4, 6)), rng.standard_normal((3, 2, 4))
    matrix = to_matrix(kernel, MatrixAxes(stack=(0,), inputs=(1, 2), outputs=(3,)))
    got = jnp.einsum("li,lio->lo", x.reshape(3, 8), matrix)
    np.testing.assert_allclose(got, np.einsum("lij,lijo->lo", x, kernel), rtol=1e-4)


def test_a_vector_is_a_matrix_of_one_output():
    vectors = np.arange(6.0).reshape(2, 3)
    axes = MatrixAxes(stack=(0,), inputs=(1,), outputs=())
    matrix = to_matrix(vectors, axes)
    assert matrix.shape == (2, 3, 1)
    np.testing.assert_array_equal(from_matrix(matrix, (2, 3), axes), vectors)


@pytest.mark.parametrize("axes", [ROWS, MatrixAxes((), (0,), (1, 2)), IN_OUT])
def test_leaves_that_are_no_matrix_are_refused(axes):
    shape = (4, 3) if axes != IN_OUT else (4, 3, 2)
    with pytest.raises(ValueError, match="every axis must be in one"):
        to_matrix(np.ones(shape), axes)
