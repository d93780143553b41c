"""Layers found from names, slices put together, heads that are tied."""

import json
import textwrap

import cases
import numpy as np
import pytest

from jaxmerge.checkpoints import CheckpointError
from jaxmerge.mergekit import parse_mergekit
from jaxmerge.mergekit.layers import Layers, find_layers
from jaxmerge.mergekit.resolving import resolve
from jaxmerge.recipe_syntax import RecipeError


def leaf(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gpt(layers, seed, head=True):
    """Some leaves of a model with the names of GPT-2."""
    leaves = {"transformer.wte.weight": leaf(6, 4, seed=seed)}
    for i in range(layers):
        leaves[f"transformer.h.{i}.mlp.c_fc.weight"] = leaf(4, 4, seed=seed + i + 1)
    leaves["transformer.ln_f.weight"] = leaf(4, seed=seed + 50)
    if head:
        leaves["lm_head.weight"] = leaf(6, 4, seed=seed + 60)
    return leaves


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for name, leaves in {"a": gpt(3, 0), "b": gpt(2, 100, head=False)}.items():
        layers = {"n_layer": len(leaves) - 2 - ("lm_head.weight" in leaves)}
        types = {"layer_types": [f"{name}{i}" for i in range(layers["n_layer"])]}
        config = {"text_config": {"vocab_size": 6} | layers | types, **layers}
        config["vision_config"] = {"n_layer": 7, "vocab_size": 9}
        cases.write_model(path / name, leaves, config)
    return path


def plan(text, directory):
    return resolve(parse_mergekit(textwrap.dedent(text), directory=directory))


@pytest.mark.parametrize(
    ("names", "config", "want"),
    [
        (["model.layers.0.a", "model.layers.1.a"], {}, Layers("model.layers.", 2)),
        (["h/0/a", "h/1/experts/0/b"], {}, Layers("h/", 2)),
        (["v.0.a", "v.1.a", "t.0.a"], {"text_config": {"n_layer": 1}}, Layers("t.", 1)),
        (["a.0.x", "a.2.x", "h.0.x"], {}, Layers("h.", 1)),
    ],
)
def test_layers_are_found_by_names(names, config, want):
    assert find_layers(names, config, "m") == want


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        (["wte"], {}, "m has no numbered layers"),
        (["e.0.a", "d.0.a"], {}, r"'e\.' \(1\), 'd\.' \(1\), .*nothing about"),
        (["e.0.a"], {"n_layer": 3}, "its config.json says 3: which of them"),
    ],
)
def test_layers_that_are_not_clear(names, config, message):
    with pytest.raises(CheckpointError, match=message):
        find_layers(names, config, "m")


def test_slices_number_layers_anew_and_take_ends_from_first_and_last(models):
    made = plan(
        """\
        merge_method: passthrough
        slices:
        - sources: [{model: b, layer_range: [1, 2]}]
        - sources: [{model: a, layer_range: [0, 3]}]
        """,
        models,
    )
    merged = cases.carried_out(made)
    a, b = gpt(3, 0), gpt(2, 100)
    mlp = "transformer.h.{}.mlp.c_fc.weight"
    want = {
        "transformer.wte.weight": b["transformer.wte.weight"],
        mlp.format(0): b[mlp.format(1)],
        **{mlp.format(i + 1): a[mlp.format(i)] for i in range(3)},
        "transformer.ln_f.weight": a["transformer.ln_f.weight"],
        "lm_head.weight": a["lm_head.weight"],
    }
    assert merged.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(merged[name], array)
    assert json.loads(made.sidecars["config.json"]) == {
        "dtype": "float32",
        "n_layer": 4,
        "num_hidden_layers": 0,
        "text_config": {
            "vocab_size": 6,
            "n_layer": 4,
            "layer_types": ["b1", "a0", "a1", "a2"],
        },
        "tie_word_embeddings": False,
        "vision_config": {"n_layer": 7, "vocab_size": 9},
        "vocab_size": 64,
    }


def test_a_head_that_is_tied_is_the_embeddings(models, tmp_path):
    cases.write_model(tmp_path / "c", gpt(2, 200))
    (tmp_path / "b").symlink_to(models / "b")
    made = plan(
        """\
        merge_method: linear
        parameters: {weight: 1, normalize: false}
        models: [{model: b}, {model: c}]
        """,
        tmp_path,
    )
    merged = cases.carried_out(made, ["lm_head.weight"])
    want = gpt(2, 200)["lm_head.weight"] + gpt(2, 100)["transformer.wte.weight"]
    np.testing.assert_allclose(merged["lm_head.weight"], want, rtol=1e-6)
    assert b'"tie_word_embeddings": false' in made.sidecars["config.json"]


@pytest.mark.parametrize(
    ("models_of", "message"),
    [
        (
            "slices: [{sources: [{model: b, layer_range: [0, 3]}]}]",
            r"layer_range \[0, 3\] of .*b, which has 2 layers",
        ),
        (
            "models: [{model: a}, {model: b}]\nparameters: {weight: 1}",
            r"not in b: transformer\.h\.2\.mlp.*\nTake them out",
        ),
    ],
)
def test_what_does_not_fit(models_of, message, models):
    method = "passthrough" if "slices" in models_of else "linear"
    with pytest.raises((CheckpointError, RecipeError), match=message):
        plan(f"merge_method: {method}\n{models_of}", models)
