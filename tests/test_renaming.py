"""Rules and presets: names and axes as another library has them, there and back."""

import numpy as np
import pytest
from counting import Memory

from jaxmerge.checkpoints import CheckpointError
from jaxmerge.checkpoints.stacking import stack_layers, unstack_layers
from jaxmerge.checkpoints.transforms import Rearrange
from jaxmerge.recipe_syntax import RecipeError
from jaxmerge.renaming import Rule, load_rules, presets, rename


def model(shapes):
    rng = np.random.default_rng(0)
    return Memory(
        {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    )


def with_biases(names, outputs, inputs):
    weights = {f"{name}.weight": (outputs, inputs) for name in names}
    return weights | {f"{name}.bias": (outputs,) for name in names}


def norms(*names):
    return {f"{n}.{kind}": (4,) for n in names for kind in ("weight", "bias")}


def llama():
    shapes = {"model.embed_tokens.weight": (7, 4)}
    for i in range(11):
        layer = f"model.layers.{i}"
        heads = [f"{layer}.self_attn.{n}_proj" for n in "qkv"]
        shapes |= with_biases(heads, 6, 4)
        shapes |= {f"{layer}.self_attn.o_proj.weight": (4, 6)}
        shapes |= {f"{layer}.self_attn.q_norm.weight": (2,)}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (8, 4) for n in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (4, 8)}
        shapes |= {f"{layer}.input_layernorm.weight": (4,)}
        shapes |= {f"{layer}.post_attention_layernorm.weight": (4,)}
    return shapes | {"model.norm.weight": (4,), "lm_head.weight": (7, 4)}


def bert(prefix=""):
    word = f"{prefix}embeddings."
    shapes = {f"{word}{n}_embeddings.weight": (5, 4) for n in ("word", "position")}
    shapes |= norms(f"{word}LayerNorm")
    for i in range(2):
        layer = f"{prefix}encoder.layer.{i}."
        heads = [f"{layer}attention.self.{n}" for n in ("query", "key", "value")]
        shapes |= with_biases([*heads, f"{layer}attention.output.dense"], 4, 4)
        shapes |= norms(
            f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"
        )
        shapes |= with_biases([f"{layer}intermediate.dense"], 8, 4)
        shapes |= with_biases([f"{layer}output.dense"], 4, 8)
    shapes |= with_biases([f"{prefix}pooler.dense"], 4, 4)
    if prefix:
        shapes |= with_biases(["classifier", "cls.predictions.transform.dense"], 2, 4)
        shapes |= norms("cls.predictions.transform.LayerNorm")
        shapes |= {"cls.predictions.bias": (7,)}
        shapes |= with_biases(["cls.predictions.decoder"], 7, 4)
    return shapes


def vit(prefix=""):
    word = f"{prefix}embeddings."
    shapes = {f"{word}cls_token": (1, 1, 4), f"{word}position_embeddings": (1, 5, 4)}
    shapes |= {f"{word}patch_embeddings.projection.weight": (4, 3, 2, 2)}
    shapes |= {f"{word}patch_embeddings.projection.bias": (4,)}
    for i in range(2):
        layer = f"{prefix}encoder.layer.{i}."
        heads = [f"{layer}attention.attention.{n}" for n in ("query", "key", "value")]
        shapes |= with_biases([*heads, f"{layer}attention.output.dense"], 4, 4)
        shapes |= norms(f"{layer}layernorm_before", f"{layer}layernorm_after")
        shapes |= with_biases([f"{layer}intermediate.dense"], 8, 4)
        shapes |= with_biases([f"{layer}output.dense"], 4, 8)
    shapes |= norms(f"{prefix}layernorm")
    return shapes | (with_biases(["classifier"], 3, 4) if prefix else {})


MODELS = {
    "llama": ("llama", llama()),
    "bert": ("bert", bert("bert.")),
    "bare bert": ("bert", bert()),
    "vit": ("vit", vit("vit.")),
    "bare vit": ("vit", vit()),
}


@pytest.mark.parametrize("name", MODELS)
def test_presets_and_back_are_bit_for_bit(name):
    preset, shapes = MODELS[name]
    original = model(shapes)
    flax = rename(original, load_rules(preset))
    back = rename(flax, load_rules(preset, inverse=True))
    assert list(back.leaves) == list(shapes)
    for leaf, array in original.arrays.items():
        np.testing.assert_array_equal(back.read(leaf), array, strict=True)
    assert not any("." in leaf or leaf.endswith("weight") for leaf in flax.leaves)


@pytest.mark.parametrize(
    ("name", "leaf", "source", "axes"),
    [
        *[
            (
                "llama",
                f"layers_10/self_attn/{n}/kernel",
                f"self_attn.{n}.weight",
                (1, 0),
            )
            for n in ("q_proj", "o_proj")
        ],
        ("llama", "layers_10/self_attn/k_proj/bias", "self_attn.k_proj.bias", (0,)),
        ("llama", "layers_10/input_layernorm/scale", "input_layernorm.weight", (0,)),
        ("llama", "embed_tokens/embedding", "embed_tokens.weight", (0, 1)),
        ("llama", "norm/scale", "model.norm.weight", (0,)),
        ("llama", "lm_head/kernel", "lm_head.weight", (1, 0)),
        (
            *("bert", "bert/encoder/layer/1/attention/self/key/kernel"),
            *("layer.1.attention.self.key.weight", (1, 0)),
        ),
        (
            *("vit", "vit/embeddings/patch_embeddings/projection/kernel"),
            *("patch_embeddings.projection.weight", (2, 3, 1, 0)),
        ),
        ("vit", "vit/embeddings/cls_token", "cls_token", (0, 1, 2)),
    ],
)
def test_presets_give_flax_names_and_axes(name, leaf, source, axes):
    preset, shapes = MODELS[name]
    original = model(shapes)
    last = [n for n in shapes if n.endswith(source)][-1]
    found = rename(original, load_rules(preset)).read(leaf)
    np.testing.assert_array_equal(found, original.arrays[last].transpose(axes))


def test_all_presets_are_tested():
    assert {preset for preset, _ in MODELS.values()} == set(presets())


def test_the_first_match_counts(tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "'a\\.special': one/special\n"
        "'(\\w)\\.(\\w+)': {to: '\\2/\\g<1>0', axes: (h=2 d) i -> i h d}\n"
    )
    memory = model({"a.special": (3,), "a.w": (4, 3), "b.w": (4, 5)})
    view = rename(memory, load_rules(str(rules)))
    assert {name: info.shape for name, info in view.leaves.items()} == {
        "one/special": (3,),
        "w/a0": (3, 2, 2),
        "w/b0": (5, 2, 2),
    }
    back = rename(view, load_rules(str(rules), inverse=True))
    for name, array in memory.arrays.items():
        np.testing.assert_array_equal(back.read(name), array)


def test_leaves_without_a_rule():
    memory = model({"model.norm.weight": (2,), **{f"x{i}": (1,) for i in range(12)}})
    with pytest.raises(CheckpointError, match=r"no rule matches x0, .*, x9 and 2 more"):
        rename(memory, load_rules("llama"))
    view = rename(memory, load_rules("llama"), keep_rest=True)
    assert list(view.leaves) == ["norm/scale", *(f"x{i}" for i in range(12))]


def test_one_name_for_two_leaves():
    rules = [Rule(r"\w", "same")]
    with pytest.raises(CheckpointError, match="'a' and 'b' would both be named 'same'"):
        rename(model({"a": (1,), "b": (1,)}), rules)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("a.b", "c"), ("a+", "c"), (r"(\d)", "c"), (r"(\d)", r"\1\1"), ("((a)b)", r"\1")],
)
def test_rules_that_cannot_be_undone(pattern, name):
    with pytest.raises(ValueError, match=r"more than text and groups|groups once"):
        Rule(pattern, name).inverse  # noqa: B018


def test_groups_may_change_places():
    rule = Rule(r"(\d+)-(a|b)\.w", r"\2/\1/k")
    assert rule.inverse == Rule(r"(a|b)/(\d+)/k", r"\g<2>-\g<1>.w")
    back = rule.inverse.inverse
    assert rename(model({"12-b.w": (1,)}), [back]).leaves.keys() == {"b/12/k"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rules; write"),
        ("- a", "has no rules; write"),
        ("'a': 3", r"rules.yaml:1: 'a' needs a new name, or both"),
        ("a: b\n'c': {to: d}", r"rules.yaml:2: 'c' needs a new name, or both"),
        ("'a': {to: b, axes: o i}", "'o i' is not of the form"),
        ("'(a': b", "'\\(a' is no regular expression"),
        ("'(a)': 'b\\2'", "refers to group 2 of 1"),
        ("'a': b\n'a': c", "rules.yaml:2: key 'a' is there twice"),
    ],
)
def test_files_that_mean_nothing(tmp_path, text, message):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_rules(str(path))


def test_what_has_no_inverse_or_does_not_exist(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("a: b\n'c.*': d\n")
    load_rules(str(path))
    with pytest.raises(RecipeError, match=r"rules.yaml:2: 'c\.\*' is more than text"):
        load_rules(str(path), inverse=True)
    with pytest.raises(RecipeError, match="'lama'; did you mean 'llama'\\?, or name a"):
        load_rules("lama")


def test_stacking_a_renamed_model():
    original = model(llama())
    flax = rename(original, load_rules("llama"))
    stacked = stack_layers(flax, "layers_{}")
    kernel = stacked.read("layers/self_attn/q_proj/kernel", (slice(9, 11),))
    assert kernel.shape == (2, 4, 6)
    np.testing.assert_array_equal(
        kernel[1], original.arrays["model.layers.10.self_attn.q_proj.weight"].T
    )
    assert "norm/scale" in stacked.leaves
    assert not any("layers_" in name for name in stacked.leaves)
    back = unstack_layers(stacked, "layers_{}")
    back = rename(back, load_rules("llama", inverse=True))
    assert back.leaves.keys() == original.leaves.keys()
    for name, array in original.arrays.items():
        np.testing.assert_array_equal(back.read(name), array, strict=True)


@pytest.mark.parametrize("layers", ["h/{}", "blocks.{}", "layer_{}"])
def test_names_of_layers(layers):
    apart = {f"net/{layers.format(i)}/w": (2, 3) for i in range(3)} | {"other": (1,)}
    stacked = stack_layers(model(apart), layers)
    assert set(stacked.leaves) == {f"net/{layers[:-3]}/w", "other"}
    assert set(unstack_layers(stacked, layers).leaves) == set(apart)


@pytest.mark.parametrize(
    ("change", "shapes", "message"),
    [
        (stack_layers, {"a": (1,)}, "has no layers 'l_{}' to stack"),
        (stack_layers, {"l_0/w": (1,), "l_2/w": (1,)}, "'l_0/w' but no 'l_1/w'"),
        (
            stack_layers,
            {"l_0/w": (1,), "l_1/w": (1,), "l_0/b": (1,)},
            "'l_0/b' but no 'l_1/b', so these layers cannot be stacked",
        ),
        (stack_layers, {"l_0/w": (1,), "l_1/w": (2,)}, "'l_1/w' is float32.2., but"),
        (unstack_layers, {"a": (1,)}, "has no leaves below 'l' to unstack"),
        (
            unstack_layers,
            {"l/a": (2, 1), "l/b": (3,)},
            "stacks 3 layers, 'l/a' stacks 2",
        ),
        (unstack_layers, {"l/a": ()}, "'l/a' of shape .. stacks 0 layers"),
    ],
)
def test_layers_that_do_not_stack(change, shapes, message):
    with pytest.raises(CheckpointError, match=message):
        change(model(shapes), "l_{}")
    with pytest.raises(CheckpointError, match="'layers' does not say where the number"):
        change(model(shapes), "layers")


def test_heads():
    heads = Rearrange.parse("(h=2 d) i -> i h d")
    rules = [Rule(r"(\w)\.weight", r"\1/kernel", heads)]
    view = rename(model({"q.weight": (6, 5)}), rules)
    assert view.leaves["q/kernel"].shape == (5, 2, 3)
