"""Parts of a plan: what is merged apart, in which dtypes, with which rules."""

import textwrap

import numpy as np
import pytest
from cases import CASES, VOCABULARY, carried_out, leaves_of, write_model

from jaxmerge import load
from jaxmerge.mergekit import parse_mergekit
from jaxmerge.mergekit.resolving import resolve
from jaxmerge.recipe_syntax import RecipeError


def plan(text, directory):
    return resolve(parse_mergekit(textwrap.dedent(text), directory=directory))


def test_numbers_are_rules_and_other_values_are_parts(root):
    made = plan(
        """\
        merge_method: linear
        parameters:
          normalize: [{filter: norm, value: false}, {value: true}]
          weight: 1
        models:
        - model: inputs/ft1
          parameters: {weight: [{filter: mlp, value: 3}]}
        - {model: inputs/ft2}
        """,
        root,
    )
    whole, sums = sorted(made.parts, key=lambda p: -p.recipe.options["normalize"])
    assert sums.recipe.options == {"weights": [1.0, 1.0], "normalize": False}
    assert whole.recipe.options["weights"] == [
        {r"model\.layers\.\d+\.mlp\.down_proj\.weight": 3.0, ".*": 1.0},
        1.0,
    ]
    leaves = [name for part in made.parts for name in part.steps]
    assert sorted(leaves) == sorted(leaves_of("ft1"))
    merged = carried_out(made, ["model.norm.weight"])["model.norm.weight"]
    name = "model.norm.weight"
    both = leaves_of("ft1")[name] + leaves_of("ft2")[name]
    np.testing.assert_allclose(merged, both, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "models", "tail", "dtype"),
    [
        ("linear", ["ft1_bf16", "ft2"], "", "float32"),
        ("linear", ["ft1_bf16", "ft2_bf16"], "", "bfloat16"),
        ("linear", ["ft1_bf16", "ft2"], "dtype: float16", "float16"),
        ("linear", ["ft1"], "dtype: float32\nout_dtype: bfloat16", "bfloat16"),
        ("ties", ["ft1"], "base_model: inputs/base_bf16", "bfloat16"),
        ("ties", ["ft1_bf16"], "base_model: inputs/base", "float32"),
        ("multislerp", ["ft1"], "base_model: inputs/base_bf16", "float32"),
    ],
)
def test_dtypes_of_the_output(method, models, tail, dtype, root):
    listed = ", ".join(f"{{model: inputs/{model}}}" for model in models)
    text = f"merge_method: {method}\nmodels: [{listed}]\nparameters: {{weight: 1}}\n"
    made = plan(text + tail, root)
    dtypes = {
        str(step.out.dtype) for part in made.parts for step in part.steps.values()
    }
    assert dtypes == {dtype}
    assert f'"dtype": "{dtype}"'.encode() in made.sidecars["config.json"]


@pytest.mark.parametrize("tail", ["", "tokenizer_source: union\n"])
def test_halves_of_both_kinds_make_float32(tail, tmp_path):
    for name, dtype in (("b", "bfloat16"), ("f", "float16")):
        leaves = {VOCABULARY[0]: np.ones((64, 2), dtype), "norm": np.ones(3, dtype)}
        write_model(tmp_path / name, leaves)
    text = "merge_method: linear\nparameters: {weight: 1}\n" + tail
    made = plan(text + "models: [{model: b}, {model: f}]", tmp_path)
    (part,) = made.parts
    assert {str(step.out.dtype) for step in part.steps.values()} == {"float32"}
    merged = carried_out(made)
    assert {str(leaf.dtype) for leaf in merged.values()} == {"float32"}
    assert all((leaf == 1).all() for leaf in merged.values())


def test_an_adapter_leaves_the_dtype_of_its_model(root, tmp_path):
    lora = root / "lora" / "inputs"
    half = {n: leaf.astype(np.float16) for n, leaf in load(lora / "base").items()}
    write_model(tmp_path / "base", half)
    (tmp_path / "adapter").symlink_to(lora / "lora")
    text = """\
        merge_method: linear
        parameters: {weight: 1}
        models: [{model: base}, {model: base+adapter}]
    """
    (part,) = plan(text, tmp_path).parts
    assert list(part.recipe.models) == ["base", "base+adapter"]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert part.inputs.models["base+adapter"].leaves[name].dtype == np.float32
    assert {str(step.out.dtype) for step in part.steps.values()} == {"float16"}


def test_slices_of_one_model_twice_are_one_model(root):
    made = plan(
        """\
        merge_method: passthrough
        slices:
        - sources: [{model: inputs/deep_ft1, layer_range: [0, 2]}]
        - sources:
          - model: inputs/deep_ft1
            layer_range: [1, 3]
            parameters: {scale: [{filter: q_proj, value: 0}]}
        """,
        root,
    )
    copied, scaled = made.parts
    assert {s.treatment for s in copied.steps.values()} == {"taken: first"}
    assert scaled.recipe.options == {"weights": [0.0], "normalize": False}
    assert len(scaled.steps) == 2
    assert list(copied.inputs.models) == list(scaled.inputs.models) == ["deep_ft1"]


def test_models_of_one_name_are_told_apart(root, tmp_path):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(root / "inputs" / f"ft{name}")
    text = """\
        merge_method: karcher
        models: [{model: 1/model}, {model: 2/model}]
    """
    (part,) = plan(text, tmp_path).parts
    assert list(part.recipe.models) == ["model", "model#2"]


def test_a_leaf_that_no_filter_names_is_named(root):
    text = """\
        merge_method: linear
        models:
        - model: inputs/ft1
          parameters: {weight: [{filter: mlp, value: 1}]}
    """
    with pytest.raises(RecipeError, match=r"leaf 'model\..*' of ft1 has no weight"):
        plan(text, root)


def test_a_density_of_zero_must_not_count_in_normalize(root):
    text = CASES["recipes"]["della_d0"].replace("della", "della_linear")
    with pytest.raises(RecipeError, match="takes part in normalize only"):
        plan(text + "parameters: {normalize: true}", root)


def test_a_window_of_densities_must_fit(root):
    text = CASES["recipes"]["della_d0"].replace("density: 0.0", "density: 0.1")
    with pytest.raises(RecipeError, match=r"density 0\.1 -/\+ epsilon 0\.15 must lie"):
        plan(text, root)


def test_whole_numbers_are_copied_and_files_come_from_the_first(tmp_path):
    for name, step in (("a", 1), ("b", 2)):
        leaves = {"w": np.ones(2, np.float32), "ids": np.full(3, step)}
        write_model(tmp_path / name, leaves)
        (tmp_path / name / "notes.txt").write_text(name)
    text = """\
        merge_method: linear
        parameters: {weight: 1}
        models: [{model: b}, {model: a}]
    """
    made = plan(text, tmp_path)
    assert carried_out(made)["ids"].tolist() == [2, 2, 2]
    assert made.sidecars["notes.txt"] == tmp_path / "b" / "notes.txt"
