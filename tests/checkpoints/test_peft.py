"""PEFT adapters: what they do to their base, and every refusal."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from blake3 import blake3

import jaxmerge
from jaxmerge import LowRank, load_adapter, merge_checkpoints
from jaxmerge.checkpoints import (
    CheckpointError,
    LeafInfo,
    is_adapter,
    open_adapter,
    open_checkpoint,
)
from jaxmerge.cli import main
from jaxmerge.planning import MergeError
from jaxmerge.recipe_files import load_recipe
from jaxmerge.recipes import Recipe, RecipeError

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
Q, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
PREFIX = "base_model.model."
GOLDEN = Path(__file__).parents[1] / "golden" / "lora"
REAL = Path(__file__).parents[3] / "shared" / "data" / "lora"


def draw(*shape, seed=0, dtype=F32):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def pair(module, outputs, inputs, rank=2, seed=1, dtype=F32, infix=""):
    """The two tensors of a linear layer, as PEFT names them."""
    return {
        f"{PREFIX}{module}.lora_A{infix}.weight": draw(
            rank, inputs, seed=seed, dtype=dtype
        ),
        f"{PREFIX}{module}.lora_B{infix}.weight": draw(
            outputs, rank, seed=seed, dtype=dtype
        ),
    }


def product(tensors):
    """B @ A of the two tensors of a layer."""
    a, b = (np.float64(tensors[key]) for key in sorted(tensors))
    return b @ a


def write_adapter(path, tensors, name="adapter_model.safetensors", **config):
    path.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3} | config
    (path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, path / name)
    return path


def write_base(path, leaves):
    path.mkdir(parents=True)
    safetensors.numpy.save_file(leaves, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


LEAVES = {
    f"{Q}.weight": draw(4, 6, dtype=BF16),
    f"{V}.weight": draw(5, 6, dtype=BF16),
    f"{V}.bias": draw(5, dtype=BF16),
    "model.norm.weight": draw(6, dtype=BF16),
    "lm_head.weight": draw(7, 6),
}


@pytest.fixture
def base(tmp_path):
    return open_checkpoint(write_base(tmp_path / "base", LEAVES))


def test_the_model_that_an_adapter_makes(tmp_path, base):
    q, v = pair(Q, 4, 6), pair(V, 5, 6, dtype=BF16)
    path = write_adapter(tmp_path / "adapter", q | v)
    model = open_checkpoint(path, base)
    assert model.path == path
    for name, tensors in ((f"{Q}.weight", q), (f"{V}.weight", v)):
        assert model.leaves[name] == LeafInfo(LEAVES[name].shape, F32)
        expected = LEAVES[name].astype(np.float64) + 1.5 * product(tensors)
        got = model.read(name)
        assert got.dtype == F32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        for index in ((), (slice(1, 3),), (slice(0, 2), slice(2, 5))):
            np.testing.assert_allclose(model.read(name, index), got[index], rtol=1e-6)
    for name in (f"{V}.bias", "model.norm.weight", "lm_head.weight"):
        assert model.leaves[name] == base.leaves[name]
        np.testing.assert_array_equal(model.read(name), LEAVES[name])
    assert model.sidecars() == base.sidecars() == [tmp_path / "base/config.json"]
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert model.digest() == {
        name: blake3((path / name).read_bytes()).hexdigest() for name in files
    }
    with pytest.raises(CheckpointError, match=r"no leaf 'lm_head'. Did you mean"):
        model.read("lm_head")


def test_loading_adapters_and_their_models(tmp_path, base):
    q = pair(Q, 4, 6, infix=".default")
    path = write_adapter(tmp_path / "adapter", q, name="other.safetensors")
    adapter = load_adapter(path)
    (update,) = adapter.values()
    assert list(adapter) == [f"{Q}.weight"]
    assert isinstance(update, LowRank)
    assert (update.left.shape, update.right.shape) == ((4, 2), (2, 6))
    np.testing.assert_allclose(update.left @ update.right, 1.5 * product(q), rtol=1e-5)
    model = jaxmerge.load(path, base.path)
    assert model.keys() == LEAVES.keys()
    in_memory = jaxmerge.apply_adapter(jaxmerge.load(base.path), adapter)
    for name, leaf in model.items():
        assert leaf.dtype == in_memory[name].dtype
        np.testing.assert_allclose(leaf, in_memory[name], rtol=1e-6, atol=1e-6)


def test_an_adapter_is_no_model_without_its_base(tmp_path, base):
    path = write_adapter(tmp_path / "adapter", pair(Q, 4, 6))
    with pytest.raises(CheckpointError, match="is a LoRA adapter; it needs the base"):
        open_checkpoint(path)
    shutil.copy(base.path / "model.safetensors", path)
    assert not is_adapter(path)
    assert open_checkpoint(path).leaves == base.leaves


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, {"q": 3 / 2, "v": 3 / 2}),
        ({"use_rslora": True}, {"q": 3 / math.sqrt(2), "v": 3 / math.sqrt(2)}),
        ({"r": 8, "rank_pattern": {"[qv]_proj": 2}}, {"q": 3 / 2, "v": 3 / 2}),
        ({"alpha_pattern": {"q_proj": 5}}, {"q": 5 / 2, "v": 3 / 2}),
        ({"alpha_pattern": {"self_attn.v_proj": 5.0}}, {"q": 3 / 2, "v": 5 / 2}),
        ({"alpha_pattern": {Q: 4, "self_attn.._proj": 6}}, {"q": 2, "v": 3}),
        ({"alpha_pattern": {f"^{Q}": 4, "q_proj|v_proj": 6}}, {"q": 2, "v": 3}),
        ({"alpha_pattern": {"proj": 9, "attn": 9, "_proj": 9}}, {"q": 1.5, "v": 1.5}),
        (
            {"r": 8, "rank_pattern": {".*": 2}, "use_rslora": True},
            {"q": 3 / math.sqrt(2), "v": 3 / math.sqrt(2)},
        ),
    ],
)
def test_scaling(tmp_path, config, scaling):
    tensors = pair(Q, 4, 6) | pair(V, 5, 6)
    adapter = open_adapter(write_adapter(tmp_path / "adapter", tensors, **config))
    got = {name[-13]: f.scaling for name, f in adapter.factors.items()}
    assert got == pytest.approx(scaling)


def test_ranks_may_differ(tmp_path, base):
    q, v = pair(Q, 4, 6, rank=1), pair(V, 5, 6, rank=4)
    path = write_adapter(tmp_path / "a", q | v, r=4, rank_pattern={"q_proj": 1})
    model = open_checkpoint(path, base)
    for name, tensors, scaling in ((f"{Q}.weight", q, 3), (f"{V}.weight", v, 3 / 4)):
        expected = LEAVES[name].astype(np.float64) + scaling * product(tensors)
        np.testing.assert_allclose(model.read(name), expected, rtol=1e-5, atol=1e-6)


C, SQUARE = "h.0.attn.c_attn", "h.0.attn.c_proj"


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_layers_that_store_inputs_first(tmp_path, fan_in_fan_out):
    tensors = pair(SQUARE, 6, 6)
    expected = 1.5 * product(tensors)
    if fan_in_fan_out:
        tensors |= pair(C, 9, 6)
        expected = expected.T
    base = write_base(
        tmp_path / "base",
        {f"{SQUARE}.weight": np.zeros((6, 6)), f"{C}.weight": np.zeros((6, 9))},
    )
    path = write_adapter(tmp_path / "a", tensors, fan_in_fan_out=fan_in_fan_out)
    model = open_checkpoint(path, open_checkpoint(base))
    got = model.read(f"{SQUARE}.weight")
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    index = (slice(1, 3), slice(4))
    np.testing.assert_allclose(model.read(f"{SQUARE}.weight", index), got[index])
    if fan_in_fan_out:
        assert model.read(f"{C}.weight").any()


def test_shapes_prove_the_setting_wrong(tmp_path):
    leaves = {f"{C}.weight": np.zeros((6, 9)), f"{SQUARE}.weight": np.zeros((6, 6))}
    base = open_checkpoint(write_base(tmp_path / "base", leaves))
    alone = write_adapter(tmp_path / "alone", pair(C, 9, 6))
    expected = 1.5 * product(pair(C, 9, 6)).T
    got = open_checkpoint(alone, base).read(f"{C}.weight")
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    both = write_adapter(tmp_path / "both", pair(C, 9, 6) | pair(SQUARE, 6, 6))
    message = r"fan_in_fan_out is False .*c_attn.weight.*contradicts.*c_proj.*not tell"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(both, base)


def test_embeddings_and_convolutions(tmp_path):
    table, image, signal = draw(9, 4), draw(5, 3, 2, 2), draw(5, 3, 4)
    leaves = {"wte.weight": table, "image.weight": image, "signal.weight": signal}
    tensors = {
        "wte.lora_embedding_A": draw(2, 9),
        "wte.lora_embedding_B.default": draw(4, 2),
        "image.lora_A.weight": draw(2, 3, 2, 2),
        "image.lora_B.weight": draw(5, 2, 1, 1),
        "signal.lora_A.weight": draw(2, 3, 4),
        "signal.lora_B.weight": draw(5, 2, 1),
    }
    a, b, c, d, e, f = tensors.values()
    expected = {
        "wte.weight": table + 1.5 * (b @ a).T,
        "image.weight": image + 1.5 * np.einsum("or,rihw->oihw", d[..., 0, 0], c),
        "signal.weight": signal + 1.5 * np.einsum("or,rik->oik", f[..., 0], e),
    }
    path = write_adapter(tmp_path / "a", {PREFIX + k: v for k, v in tensors.items()})
    base = write_base(tmp_path / "base", leaves)
    model = open_checkpoint(path, open_checkpoint(base))
    in_memory = jaxmerge.apply_adapter(
        jaxmerge.load(base),
        load_adapter(path),
        matrices={r"(image|signal)\.weight": "oi*"},
    )
    for name, want in expected.items():
        got = model.read(name)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(in_memory[name], want, rtol=1e-4, atol=1e-5)
        index = (slice(1, 4), slice(0, 2))
        np.testing.assert_allclose(model.read(name, index), got[index], rtol=1e-5)


def test_leaves_that_were_trained_as_a_whole(tmp_path, base):
    new = {
        f"{V}.base_layer.bias": draw(5, seed=2, dtype=BF16),
        "model.norm.weight": draw(6, seed=2),
        "lm_head.base_layer.weight": draw(7, 6, seed=2),
    }
    factors = pair("lm_head", 7, 6)
    tensors = {PREFIX + name: leaf for name, leaf in new.items()} | factors
    path = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["norm"])
    model = open_checkpoint(path, base)
    expected = {
        f"{V}.bias": new[f"{V}.base_layer.bias"],
        "model.norm.weight": new["model.norm.weight"],
        "lm_head.weight": new["lm_head.base_layer.weight"] + 1.5 * product(factors),
    }
    with pytest.raises(CheckpointError, match=r"stores leaf '.*as a whole.*, jaxmerge"):
        load_adapter(path)
    adapter = load_adapter(path, base)
    assert adapter.keys() == expected.keys()
    for name, want in expected.items():
        got = model.read(name)
        assert got.dtype == F32
        np.testing.assert_allclose(got, np.float32(want), rtol=1e-5, atol=1e-6)
        delta = np.float32(want) - np.float32(LEAVES[name])
        np.testing.assert_allclose(adapter[name], delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'.*merge_and_unload"),
        ({"peft_type": "VERA"}, "peft_type is 'VERA'; only LORA"),
        ({"peft_type": None}, "lacks 'peft_type', 'r' or 'lora_alpha'"),
        ({"lora_alpha": "big"}, "lacks 'peft_type', 'r' or 'lora_alpha'"),
        ({"use_dora": True}, "use_dora is True; only plain LoRA.*merge_and_unload"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens is \[3\]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"target_parameters": ["experts"]}, "target_parameters is"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base before training"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"r": 4}, r"rank 4 by adapter_config.json.*lora_A.*\(2, 6\).*lora_B"),
        ({"rank_pattern": {"q_proj": 3}}, "rank 3 by adapter_config.json"),
        ({"alpha_pattern": {"(": 3}}, r"'\(' in alpha_pattern is no valid regular"),
        ({"rank_pattern": {"q": None}}, "rank_pattern gives None for 'q', which is no"),
    ],
)
def test_configurations_that_are_not_understood(tmp_path, config, message):
    path = write_adapter(tmp_path / "adapter", pair(Q, 4, 6), **config)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_adapter(path)
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.lora_magnitude_vector": draw(4)}, "else than plain LoRA.*merge_and"),
        ({f"{Q}.lora_B.bias": draw(4)}, "else than plain LoRA"),
        ({f"{Q}.token_adapter.trainable_tokens_delta": draw(4)}, "else than plain"),
        ({"score.modules_to_save.default.weight": draw(4)}, "else than plain"),
        ({f"{V}.lora_A.weight": draw(2, 6)}, "there is lora_A; it takes an A and a B"),
        (
            {f"{Q}.lora_A.other.weight": draw(2, 6)},
            r"'.*lora_A.other.weight' and '.*', both for leaf .*several adapters",
        ),
        (
            {f"{V}.lora_A.weight": draw(2, 6), f"{V}.lora_B.weight": draw(5, 2, 3)},
            "are no pair of factors",
        ),
        (
            {
                f"{V}.lora_A.weight": np.ones((2, 6), np.int8),
                f"{V}.lora_B.weight": draw(5, 2),
            },
            "is int8; save the adapter in bfloat16",
        ),
    ],
)
def test_tensors_that_are_not_understood(tmp_path, tensors, message):
    tensors = {PREFIX + key: tensor for key, tensor in tensors.items()}
    path = write_adapter(tmp_path / "adapter", pair(Q, 4, 6) | tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_adapter(path)
    assert str(path / "adapter_model.safetensors") in str(caught.value)


def test_keys_that_are_not_pefts(tmp_path):
    path = write_adapter(tmp_path / "adapter", {"unet.lora_A.weight": draw(2, 2)})
    with pytest.raises(CheckpointError, match=r"does not start with 'base_model.model"):
        open_adapter(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("model.layers.0.q_proj", 4, 6), r"has no leaf .* Did you mean '.*q_proj"),
        (pair(Q, 5, 6), r"shape \(5, 6\) for leaf .* has shape \(4, 6\) in .*'llama'"),
        ({f"{PREFIX}lm_head.weight": draw(9, 6)}, r"update of shape \(9, 6\)"),
        (pair("packed", 4, 6), "which is float8_e4m3fn in"),
    ],
)
def test_adapters_that_do_not_fit_the_base(tmp_path, tensors, message):
    packed = {"packed.weight": np.ones((4, 6), ml_dtypes.float8_e4m3fn)}
    jaxmerge.save(tmp_path / "base", LEAVES | packed)
    base = open_checkpoint(tmp_path / "base")
    path = tmp_path / "adapter"
    write_adapter(path, tensors, base_model_name_or_path="llama")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path, base)
    assert str(path) in str(caught.value)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(path, base)


def test_damaged_directories(tmp_path):
    path = write_adapter(tmp_path / "adapter", pair(Q, 4, 6))
    with pytest.raises(CheckpointError, match=r"no LoRA adapter: it has no adapter_c"):
        load_adapter(tmp_path)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither adapter_model.safetensors nor"):
        load_adapter(path)
    (path / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pickle format.*save_pretrained"):
        load_adapter(path)
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json is not JSON"):
        load_adapter(path)


def test_opening_does_not_wait_for_jax(tmp_path, base):
    path = write_adapter(tmp_path / "adapter", pair(Q, 4, 6))
    code = (
        "import sys\n"
        "from jaxmerge.checkpoints import open_checkpoint\n"
        "base = open_checkpoint(sys.argv[1])\n"
        f"open_checkpoint(sys.argv[2], base).read('{Q}.weight')\n"
        "assert 'jax' not in sys.modules"
    )
    arguments = [sys.executable, "-c", code, str(base.path), str(path)]
    subprocess.run(arguments, check=True, cwd=Path(__file__).parents[2])


# Merging.


@pytest.fixture
def adapters(tmp_path, base):
    """Two adapters to `base`, of different ranks."""
    math = pair(Q, 4, 6, seed=3) | pair(V, 5, 6, seed=3)
    code = pair(Q, 4, 6, rank=3, seed=4, dtype=BF16)
    code[f"{PREFIX}lm_head.weight"] = draw(7, 6, seed=4)
    return {
        "math": write_adapter(tmp_path / "math", math),
        "code": write_adapter(tmp_path / "code", code, r=3),
    }


RECIPE = """\
method: {method}
base: base
models: [math, code]
dtype: {dtype}
"""


@pytest.mark.parametrize(
    ("method", "options"),
    [("ties", {"density": 0.4}), ("task_arithmetic", {}), ("average", {})],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_adapters_equals_merging_their_models(
    tmp_path, base, adapters, method, options, dtype, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = RECIPE.format(method=method, dtype=dtype) + f"options: {options}\n"
    Path("recipe.yaml").write_text(text)
    assert main(["merge", "recipe.yaml", "merged"]) == 0
    merged = jaxmerge.load("merged")

    models = [jaxmerge.load(path, "base") for path in adapters.values()]
    wide = [{n: x.astype(F32) for n, x in model.items()} for model in models]
    start = {name: leaf.astype(F32) for name, leaf in LEAVES.items()}
    arguments = (wide,) if method == "average" else (start, wide)
    expected = getattr(jaxmerge, method)(*arguments, **options)
    for name, leaf in expected.items():
        assert merged[name].dtype == dtype
        np.testing.assert_array_equal(merged[name], np.asarray(leaf).astype(dtype))
    report = json.loads(Path("merged/jaxmerge_report.json").read_text())
    digests = {"code": open_checkpoint("code", base).digest(), "base": base.digest()}
    for name, digest in digests.items():
        assert report["blake3"][str(Path(name).resolve())] == digest


def test_merging_is_not_averaging_factors(tmp_path, base, adapters):
    recipe = Recipe("average", adapters, base=base.path)
    merge_checkpoints(recipe, tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged").read(f"{Q}.weight")
    same_rank = write_adapter(tmp_path / "other", pair(Q, 4, 6, seed=4))
    updates = [load_adapter(p)[f"{Q}.weight"] for p in (adapters["math"], same_rank)]
    left, right = (np.mean([u[i] for u in updates], axis=0) for i in (0, 1))
    apart = LEAVES[f"{Q}.weight"].astype(F32) + left @ right
    recipe = Recipe("average", {"a": adapters["math"], "b": same_rank}, base=base.path)
    merge_checkpoints(recipe, tmp_path / "merged2")
    merged = open_checkpoint(tmp_path / "merged2").read(f"{Q}.weight")
    together = np.mean([u.left @ u.right for u in updates], axis=0)
    together += LEAVES[f"{Q}.weight"].astype(F32)
    np.testing.assert_array_equal(merged, together.astype(BF16))
    assert np.abs(apart - together).max() > 0.1


def test_without_a_dtype_the_output_has_that_of_the_base(tmp_path, base, adapters):
    recipe = Recipe("average", adapters | {"plain": base.path}, base=base.path)
    merge_checkpoints(recipe, tmp_path / "merged")
    assert open_checkpoint(tmp_path / "merged").leaves == base.leaves


def test_wide_output_of_methods_without_a_base_is_rounded_once(tmp_path, adapters):
    """The first model is in bfloat16, the base in float32."""
    wide = {name: leaf.astype(F32) for name, leaf in LEAVES.items()}
    base = write_base(tmp_path / "wide", wide)
    models = {"narrow": tmp_path / "base", "math": adapters["math"]}
    merge_checkpoints(Recipe("average", models, base=base), tmp_path / "merged")
    merged = jaxmerge.load(tmp_path / "merged")[f"{Q}.weight"]
    update = product(pair(Q, 4, 6, seed=3)) * 1.5
    expected = wide[f"{Q}.weight"] + update / 2
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


def test_recipes_need_a_base_for_adapters_and_else_only_if_the_method_does(
    tmp_path, base, adapters
):
    with pytest.raises(CheckpointError, match="math is a LoRA adapter; it needs the"):
        merge_checkpoints(Recipe("average", adapters), tmp_path / "merged")
    with pytest.raises(RecipeError, match=r"average has no base.*only LoRA adapters"):
        Recipe("average", {"plain": base.path}, base=base.path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(method="average", dtype="f16"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert "has no base" not in str(caught.value)


def test_files_of_factors_are_not_merged(tmp_path, adapters):
    files = {n: path / "adapter_model.safetensors" for n, path in adapters.items()}
    message = r"(?s)of which only products can be merged.*lora_A\.weight"
    with pytest.raises(MergeError, match=message):
        merge_checkpoints(Recipe("average", files), tmp_path / "merged")
    with pytest.raises(ValueError, match=r"jaxmerge.apply_adapter\(base, adapter\)"):
        jaxmerge.average([jaxmerge.load(files["math"])] * 2)


def test_agrees_with_mergekit(tmp_path):
    models = {"lora": GOLDEN / "adapter", "ft2": GOLDEN / "ft2"}
    recipe = Recipe(
        "average", models, base=GOLDEN / "base", options={"weights": [0.6, 0.4]}
    )
    merge_checkpoints(recipe, tmp_path / "merged")
    merged = jaxmerge.load(tmp_path / "merged")
    base = jaxmerge.load(GOLDEN / "base")
    expected = jaxmerge.load(GOLDEN / "lora_linear")
    assert merged.keys() == expected.keys()
    for name, want in expected.items():
        np.testing.assert_allclose(merged[name], want, rtol=1e-5, atol=1e-6)
        assert np.abs(want - base[name]).max() > 1e-3


# The command line.


def test_inspect_and_compare(tmp_path, base, adapters, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "code"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert [f"{Q}.weight", "[4,", "6]", "3", "1"] in lines
    assert ["lm_head.weight", "[7,", "6]", "whole", "-"] in lines
    assert "2 leaves changed, of the base 'unknown'\n" in printed
    assert main(["compare", "base", "math", "code"]) == 0
    printed = capsys.readouterr().out
    vector = [
        1.5 * product(pair(module, outputs, 6, seed=3))
        for module, outputs in ((Q, 4), (V, 5))
    ]
    norm = np.linalg.norm(np.concatenate(vector))
    assert re.search(rf"\n +math +{norm:.4g} ", printed)
    assert main(["compare", "math", "code"]) == 1
    assert "it needs the base model" in capsys.readouterr().err


# Real adapters.


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no adapters in {REAL}")
@pytest.mark.parametrize("task", ["legal", "medical", "sports"])
def test_real_adapters_to_gpt2(tmp_path, task):
    path = tmp_path / task
    path.mkdir()
    shutil.copy(REAL / f"{task}.safetensors", path)
    shutil.copy(REAL / f"{task}.adapter_config.json", path / "adapter_config.json")
    adapter = open_adapter(path)
    assert len(adapter.factors) == 36
    assert {(f.rank, f.scaling) for f in adapter.factors.values()} == {(8, 2.0)}
    module = "transformer.h.3.attn"
    leaves = {
        name: np.zeros(adapter.product_shape(name)[::-1], BF16)
        for name in adapter.factors
        if name.startswith(module)
    }
    tensors = safetensors.numpy.load_file(path / f"{task}.safetensors")
    updates = load_adapter(path)
    model = jaxmerge.apply_adapter(leaves, {name: updates[name] for name in leaves})
    for layer in ("c_attn", "c_proj"):
        a, b = (
            np.float64(tensors[f"{PREFIX}{module}.{layer}.lora_{side}.weight"])
            for side in "AB"
        )
        got = model[f"{module}.{layer}.weight"]
        np.testing.assert_allclose(got, 2 * (b @ a).T, rtol=1e-4, atol=1e-6)
