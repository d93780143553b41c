"""Recipes: what they say, and every message about what they say wrongly."""

import textwrap
from pathlib import Path

import pytest

from jaxmerge import registry
from jaxmerge.recipe_files import load_recipe
from jaxmerge.recipes import Recipe, RecipeError, parse_recipe

FULL = """\
method: ties
base: checkpoints/start
models:
  - checkpoints/math
  - path: checkpoints/code
    name: coder
options:
  density: 0.2
  weights: [1.0, 0.7]
  scale:
    ".*attention.*": 5e-1
    ".*": 1
dtype: bfloat16
take:
  "lm_head.*": base
max_shard_size: 5GB
"""

HEAD = "method: task_arithmetic\nbase: a\nmodels: [b, c]\n"


def errors(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(textwrap.dedent(text), source="r.yaml")
    return str(caught.value).splitlines()


def test_every_key_is_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(FULL)
    recipe = load_recipe(path)
    assert recipe == Recipe(
        "ties",
        {
            "math": tmp_path / "checkpoints/math",
            "coder": tmp_path / "checkpoints/code",
        },
        base=tmp_path / "checkpoints/start",
        options={
            "density": 0.2,
            "weights": [1.0, 0.7],
            "scale": {".*attention.*": 0.5, ".*": 1},
        },
        dtype="bfloat16",
        take={"lm_head.*": "base"},
        max_shard_bytes=5_000_000_000,
        text=FULL,
        source=str(path),
    )
    assert list(recipe.models) == ["math", "coder"]


def test_paths_start_at_the_recipe_unless_absolute(tmp_path):
    text = "method: average\nmodels: [../x/, /abs/y, '~/z']"
    recipe = parse_recipe(text, directory=tmp_path / "recipes")
    assert recipe.models == {
        "x": tmp_path / "x",
        "y": Path("/abs/y"),
        "z": Path.home() / "z",
    }


def test_defaults():
    recipe = parse_recipe("method: average\nmodels: [a]")
    assert (recipe.base, recipe.options, recipe.seed) == (None, {}, 0)
    assert (recipe.dtype, recipe.take) == (None, {})


def test_unknown_key_names_line_and_nearest():
    assert errors(HEAD + "optoins: {scale: 1}") == [
        "r.yaml:4: unknown key 'optoins'; did you mean 'options'?"
    ]


def test_unknown_method_names_line_and_nearest():
    assert errors("models: [a]\nmethod: task_aritmetic") == [
        "r.yaml:2: unknown method 'task_aritmetic'; did you mean 'task_arithmetic'?"
    ]


def test_unknown_option_names_line_and_nearest():
    assert errors(HEAD + "options:\n  scale: 1\n  wieghts: 1\n") == [
        "r.yaml:6: unknown option 'wieghts' of task_arithmetic; did you mean 'weights'?"
    ]


def test_unknown_option_far_from_all_lists_them():
    assert errors(HEAD + "options: {xyz: 1}") == [
        "r.yaml:4: unknown option 'xyz' of task_arithmetic; "
        "there are weights, scale, normalize"
    ]


@pytest.mark.parametrize("option", ["key", "names"])
def test_options_that_the_recipe_fills_in_are_not_its_own(option):
    text = f"method: dare\nbase: a\nmodels: [b]\noptions: {{{option}: 1}}"
    assert f"unknown option '{option}' of dare" in errors(text)[0]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("seed: 1\nseed: 2", 5, "key 'seed' is there twice, first in line 4"),
        ("options: [1]", 4, "options must be a mapping from options to values"),
        ("options:", 4, "options must be a mapping from options to values, found noth"),
        ("dtype: 16", 4, "dtype must be one of bfloat16, float16"),
        ("dtype: bfloat", 4, "unknown dtype 'bfloat'; did you mean 'bfloat16'?"),
        ("dtype: int8", 4, "unknown dtype 'int8'"),
        ("max_shard_size: 5 parsecs", 4, "max_shard_size is '5 parsecs'; write a size"),
        ("max_shard_size: 0", 4, "the largest size of a shard must be positive"),
        ("take: {'.*': bsae}", 4, "unknown take action 'bsae'; did you mean 'base'?"),
        ("take: {'*x': base}", 4, "'*x' is no valid regular expression: nothing to"),
        ("options: {scale: {'(x': 1}}", 4, "'(x' is no valid regular expression"),
        (
            "options: {scale: 'much'}",
            4,
            "option 'scale' is 'much'; it must be a number",
        ),
        (
            "options: {scale: [1, 2]}",
            4,
            "option 'scale' is [1, 2]; it must be a number",
        ),
        ("options: {weights: [1]}", 4, "option 'weights' has 1 values for 2 models"),
        ("options: {weights: [1, x]}", 4, "option 'weights' is [1, 'x']"),
        (
            "options: {normalize: 'yes'}",
            4,
            "option 'normalize' is 'yes'; it must be tru",
        ),
        ("options: {scale: true}", 4, "option 'scale' is True; it must be a number"),
        ("seed: 1", 4, "seed has no effect: task_arithmetic draws nothing at random"),
        ("seed: 1.5", 4, "seed must be a whole number, found 1.5"),
    ],
)
def test_message_names_the_line(text, line, message):
    found = errors(HEAD + text)
    assert any(each.startswith(f"r.yaml:{line}: {message}") for each in found), found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: [a]", "r.yaml:1: the key 'method' is missing"),
        ("method: average", "r.yaml:1: the key 'models' is missing"),
        ("method: average\nmodels: []", "r.yaml:2: models is empty; list at least"),
        ("method: average\nmodels: a", "r.yaml:2: models must be a list of paths"),
        (
            "method: average\nmodels:\n  - a\n  - {path: b, nmae: c}",
            "r.yaml:4: models[1]: unknown key 'nmae'; did you mean 'name'?",
        ),
        ("method: average\nmodels:\n  - {name: c}", "r.yaml:3: models[0] needs a path"),
        ("method: average\nmodels:\n  - 7", "r.yaml:3: models[0] must be a path, or"),
        (
            "method: average\nmodels:\n  - path: a\n    name: on",
            "r.yaml:4: the name of models[0] must be text, found True; put it in",
        ),
        (
            "method: average\nmodels:\n  - a/x\n  - b/x",
            "r.yaml:4: models[1] is the second that is named 'x'; write `path:` and",
        ),
        (
            "models: [a]\nmethod: ties",
            "r.yaml:2: method ties needs a base; add the key 'base'",
        ),
        (
            "models: [a]\nmethod: regmean",
            "r.yaml:2: method regmean needs statistics of data, which recipes cannot",
        ),
        (
            "method: average\nmodels: [a]\nbase: b",
            "r.yaml:3: method average has no base; remove it",
        ),
        (
            "method: nuslerp\nmodels: [a, b]\noptions: {origin: base}",
            "r.yaml:1: method nuslerp needs a base; add the key 'base'",
        ),
        (
            "method: nuslerp\nmodels: [a, b]\nbase: c\noptions:\n  origin: zero",
            "r.yaml:5: option 'origin' is 'zero'; it must be 'base'",
        ),
        (
            "method: slerp\nmodels: [a, b, c]",
            "r.yaml:2: method slerp merges at most 2 models, found 3",
        ),
        (
            "method: average\nmodels: [a]\ntake: {'.*': base}",
            "r.yaml:3: take: base, but the recipe has no base",
        ),
        (
            "method: dare\nbase: a\nmodels: [b]\nseed: -1",
            "r.yaml:4: seed is -1; it must be in [0, 2**32)",
        ),
        (
            "method: ties\nbase: a\nmodels: [b]\noptions:\n  scope: modle",
            "r.yaml:5: option 'scope' is 'modle'; it must be one of 'leaf', 'model'",
        ),
        ("", "r.yaml:1: a recipe is a mapping"),
        ("- a", "r.yaml:1: a recipe is a mapping"),
        ("method: [a\nmodels: b", "r.yaml:2: no valid YAML"),
        ("method: average\n\tmodels: [a]", "r.yaml:2: no valid YAML"),
        ("method: average\ntake:\n  *head: base", "r.yaml:3: 'head' is marked as an"),
        ("method: average\ntake:\n  *head*: base", "r.yaml:3: no valid YAML"),
        ("method: \x00", "r.yaml: no valid YAML"),
    ],
)
def test_one_error(text, expected):
    found = errors(text)
    assert len(found) == 1, found
    assert found[0].startswith(expected), found


def test_all_errors_come_together_by_line():
    found = errors(
        """\
        method: task_arithmetic
        modles: [a]
        options:
          scal: 1
          weights: high
        dtype: float12
        """
    )
    assert [line.split(": ")[0] for line in found] == [
        *("r.yaml:1", "r.yaml:1", "r.yaml:2", "r.yaml:4", "r.yaml:5", "r.yaml:6")
    ]
    assert "'models' is missing" in found[0]
    assert "needs a base" in found[1]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-2", -2),
        ("010", 10),
        ("+1.", 1.0),
    ],
)
def test_numbers_are_what_people_mean(written, value):
    recipe = parse_recipe(HEAD + f"options: {{scale: {written}}}")
    assert recipe.options["scale"] == value


@pytest.mark.parametrize("written", ["1:30", "'0.5'", "1_000", ".inf", "2026-01-01"])
def test_what_is_no_number_is_refused(written):
    assert "it must be a number" in errors(HEAD + f"options: {{scale: {written}}}")[0]


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 MB", 5 * 10**8),
        ("1.5GiB", 3 * 2**29),
        ("64kb", 64_000),
        ("1000", 1000),
        ("12B", 12),
    ],
)
def test_sizes(written, size):
    recipe = parse_recipe(HEAD + f"max_shard_size: {written}")
    assert recipe.max_shard_bytes == size


def test_a_recipe_built_in_python_is_checked_too():
    with pytest.raises(RecipeError, match=r"^recipe: unknown option 'densty' of ties"):
        Recipe("ties", {"a": "a"}, base="b", options={"densty": 0.1})
    with pytest.raises(RecipeError, match="needs a base"):
        Recipe("ties", {"a": "a"})


def test_options_without_annotations_take_any_value(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry.methods()))

    @registry.register(paper="A paper", link="https://example.org")
    def halfway(models, *, t=0.5):
        """Goes half the way."""

    assert Recipe("halfway", {"a": "a"}, options={"t": [1]}).options == {"t": [1]}


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"weights.bin: a recipe is YAML in UTF-8"):
        load_recipe(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_recipe(tmp_path / "none.yaml")
