"""Recipes of mergekit: what they say, and every message about what they say wrongly."""

import textwrap

import cases
import pytest

from jaxmerge.mergekit import is_mergekit, parse_mergekit
from jaxmerge.mergekit.recipe import ModelRef, TokenSource
from jaxmerge.recipe_syntax import RecipeError

TIES = """\
merge_method: ties
base_model: inputs/base
models:
  - model: inputs/ft1
    parameters: {weight: 1}
"""


def errors(text, root):
    with pytest.raises(RecipeError) as caught:
        parse_mergekit(textwrap.dedent(text), source="r.yml", directory=root)
    return str(caught.value).replace(f"{root}/", "").splitlines()


def test_everything_that_is_wrong_is_said_at_once(root):
    text = """\
        merge_method: ties
        base_model: inputs/base
        dtpye: float32
        parameters:
          int8_mask: 1
          normalise: true
        models:
          - model: inputs/ft1
            parameters: {wieght: 0.5}
          - modle: inputs/ft2
          - model: inputs/no_such
            parameters: {density: [0.5, x]}
    """
    assert errors(text, root) == [
        "r.yml:3: unknown key 'dtpye'; did you mean 'dtype'?",
        "r.yml:5: parameter 'int8_mask' must be true or false, found 1",
        "r.yml:6: unknown parameter 'normalise' of ties; did you mean 'normalize'?",
        "r.yml:9: unknown parameter 'wieght' of ties; did you mean 'weight'?",
        "r.yml:10: unknown key 'modle'; did you mean 'model'?",
        "r.yml:11: 'inputs/no_such' does not exist; paths start where jaxmerge runs, "
        "as in mergekit; for a repository of the Hugging Face hub, download it first "
        "(`hf download inputs/no_such --local-dir no_such`) and write that directory",
        "r.yml:12: parameter 'density' must be a number, found 'x'",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("ties", "tise"), "1: unknown method 'tise'; did you mean 'ties'?"),
        (("inputs/ft1", "inputs/ft1+a+b"), "4: 'inputs/ft1+a+b' has several adapters"),
        (("inputs/ft1", "inputs/ft1@v2"), "4: 'inputs/ft1@v2' does not exist"),
        (("inputs/ft1", "lora/inputs/lora"), "4: lora/inputs/lora is a LoRA adapter"),
        (("inputs/ft1", "[a]"), "4: a model is a path, found ['a']"),
        (
            ("inputs/ft1", "{model: inputs/ft1, override_architecture: X}"),
            "4: override_architecture has no use here",
        ),
        (("inputs/ft1", "inputs/base"), "at least 1 model besides the base_model"),
        (("models:", "slices:"), "4: a slice is a mapping with a list of sources"),
        (("models:", "modles:"), "1: a recipe has one of models, slices and modules"),
        (("models:", "slices: []\nmodels:"), "found models and slices"),
        (("base_model: inputs/base\n", ""), "ties needs a base; add the key 'base_mo"),
        (("parameters: {weight: 1}", ""), "needs the parameter 'weight'"),
        (
            ("models:", "dtype: int64\nmodels:"),
            "3: dtype is 'int64'; models are merged",
        ),
        (("models:", "tokenizer: x\nmodels:"), "3: tokenizer must be a mapping"),
        (
            ("models:", "tokenizer: {tokens: {a: {source: {kind: mean}}}}\nmodels:"),
            "3: unknown kind 'mean'; there are model_token, zero",
        ),
        (
            ("models:", "tokenizer: {pad_to_multiple_of: 0.5}\nmodels:"),
            "3: must be a whole number of at least 1, found 0.5",
        ),
        (
            ("models:", "tokenizer: {}\ntokenizer_source: base\nmodels:"),
            "3: give one of tokenizer and tokenizer_source",
        ),
        (
            ("models:", "tokenizer: {tokens: {a: {force: true}}}\nmodels:"),
            "3: force needs a source",
        ),
        (
            ("models:", "chat_template: alpaca\nmodels:"),
            "3: the chat template 'alpaca' is not known by name (auto and chatml, ll",
        ),
        (("models:", "gate_mode: x\nmodels:"), "3: unknown key 'gate_mode'"),
        (
            ("weight: 1", "weight: &w 1"),
            "5: 'w' is marked as an anchor or alias; write",
        ),
    ],
)
def test_what_is_not_supported_is_named(change, message, root):
    assert message in "\n".join(errors(TIES.replace(*change), root))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: a\nexperts: []", "r.yml:2: 'experts' belongs to mergekit-moe"),
        ("models: []", "r.yml:1: the key 'merge_method' is missing"),
        ("- a", "r.yml:1: a recipe is a mapping"),
        (
            "merge_method: linear\nmodules: {text: {}, vision: {}}",
            "r.yml:2: modules must be a mapping with one entry; parts of a model",
        ),
        (
            "merge_method: slerp\nbase_model: inputs/ft1\nmodels:\n"
            "- model: inputs/ft1\n- model: inputs/ft2",
            "r.yml:3: slerp needs the parameter 't'; give it under `parameters`",
        ),
        (
            "merge_method: karcher\nmodels:\n- model: inputs/ft1\n- model: inputs/ft1",
            "r.yml:4: inputs/ft1 is here twice",
        ),
        (
            "merge_method: ties\nbase_model: inputs/base\nslices:\n"
            "- sources:\n  - model: inputs/ft1\n    layer_range: [0, 2]\n"
            "    parameters: {weight: 1}",
            "r.yml:4: the base_model inputs/base is not among the sources",
        ),
        (
            "merge_method: passthrough\nslices:\n"
            "- residual_weight: 1\n  sources:\n  - model: inputs/ft1\n"
            "    layer_range: [2, 0]",
            "r.yml:3: residual_weight has no effect in mergekit either",
        ),
    ],
)
def test_what_is_no_recipe(text, message, root):
    assert message in "\n".join(errors(text, root))


def test_a_range_of_layers_is_two_rising_numbers(root):
    text = "merge_method: passthrough\nslices:\n- sources:\n  - model: inputs/ft1\n"
    assert "layer_range must be [first, end]" in errors(text, root)[0]


def test_models_with_adapters_and_levels(root):
    text = """\
        name: chained
        merge_method: linear
        base_model: {model: {path: inputs/base}, lora: {path: inputs/lora}}
        dtype: torch.float32
        out_dtype: bfloat16
        parameters: {normalize: false}
        modules:
          default:
            parameters: {weight: 0.5}
            models:
            - model: inputs/base+inputs/lora
            - model: inputs/ft2
              parameters: {weight: 0.25}
    """
    recipe = parse_mergekit(textwrap.dedent(text), directory=root / "lora")
    base = ModelRef(root / "lora/inputs/base", root / "lora/inputs/lora")
    assert recipe.models == [base, ModelRef(root / "lora/inputs/ft2")]
    assert recipe.base == base
    assert recipe.dtype == "bfloat16"
    assert recipe.slices[0].levels == ({"weight": 0.5}, {"normalize": False})
    assert [s.parameters for s in recipe.slices[0].sources] == [{}, {"weight": 0.25}]


def test_tokens_of_a_tokenizer(root):
    text = TIES + textwrap.dedent("""\
        tokenizer:
          source: inputs/ft2
          pad_to_multiple_of: 8
          tokens:
            a: {source: inputs/ft1, force: true}
            b: {source: {kind: zero}}
            c: {source: {kind: model_token, model: inputs/ft1, token_id: 3}}
            d: {source: {kind: model_token, model: inputs/ft1, token: x}}
    """)
    spec = parse_mergekit(text, directory=root).tokenizer
    first = ModelRef(root / "inputs/ft1")
    assert spec is not None
    assert spec.source == ModelRef(root / "inputs/ft2")
    assert spec.multiple == 8
    assert spec.tokens == {
        "a": TokenSource(first, force=True),
        "b": TokenSource(zero=True),
        "c": TokenSource(first, 3),
        "d": TokenSource(first, "x"),
    }


def test_paths_start_where_the_process_is(root, monkeypatch):
    monkeypatch.chdir(root)
    models = parse_mergekit(TIES).models
    assert [str(model) for model in models] == ["inputs/base", "inputs/ft1"]


def test_which_documents_are_of_mergekit():
    assert is_mergekit({"merge_method": "ties"})
    assert is_mergekit({"experts": []})
    assert not is_mergekit({"method": "ties"})
    assert not is_mergekit(["merge_method"])


def test_every_golden_recipe_is_one():
    assert all("merge_method:" in text for text in cases.CASES["recipes"].values())
