"""Merges done again from their reports, and files that are no such reports."""

import json

import numpy as np
import pytest
from counting import Memory

from jaxmerge.checkpoints import load, save
from jaxmerge.cli import main
from jaxmerge.merging import merge_checkpoints
from jaxmerge.planning import Inputs, Part
from jaxmerge.recipe_files import recipe_of_report
from jaxmerge.recipes import Recipe, RecipeError
from jaxmerge.registry import methods
from jaxmerge.reports import describe

NAMES = ("base", "a", "b")
MERGED_BY_RECIPES = [n for n, m in methods().items() if not m.needs_statistics]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in NAMES:
        save(tmp_path / name, {"w": rng.normal(size=(3, 4)).astype(np.float32)})
    return tmp_path


def recipe_for(name, directory, **fields):
    method = methods()[name]
    base = directory / "base" if method.needs_base else None
    models = {m: directory / m for m in NAMES[1 : 1 + (method.max_models or 2)]}
    return Recipe(name, models, **{"base": base, **fields})


@pytest.mark.parametrize("name", MERGED_BY_RECIPES)
def test_what_a_report_says_of_a_method_is_a_recipe(name, tmp_path):
    recipe = recipe_for(name, tmp_path, dtype="bfloat16", take={"head": "first"})
    base = recipe.base and Memory({}, recipe.base)
    models = {label: Memory({}, path) for label, path in recipe.models.items()}
    said = describe(Part(recipe, Inputs(base, models), {}))
    again = Recipe(**json.loads(json.dumps(said)))
    options = {n: p.default for n, p in methods()[name].options.items()}
    assert again.options.keys() == options.keys()
    assert list(again.models) == list(recipe.models)
    assert (again.dtype, again.take) == (recipe.dtype, recipe.take)
    # Said again, it is the same, so that a merge of a merge's report goes on with it.
    assert describe(Part(again, Inputs(base, models), {})) == said


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("karcher", {}),
        ("multislerp", {"options": {"weights": [1, {"w": 3}]}}),
        ("nuslerp", {"base": "base", "options": {"origin": "base"}}),
        ("dare", {"seed": 7, "dtype": "float16", "max_shard_bytes": 10}),
    ],
)
def test_a_merge_is_done_again_from_its_report(name, fields, runs):
    merge_checkpoints(recipe_for(name, runs, **fields), "out")
    report = runs / "out" / "jaxmerge_report.json"
    recipe, blake3 = recipe_of_report(report)
    assert recipe.max_shard_bytes == fields.get("max_shard_bytes", 5_000_000_000)
    assert set(map(str, [runs / "a", runs / "b"])) <= blake3.keys()
    assert main(["merge", "--from-report", str(report), "again"]) == 0
    first, second = load("out")["w"], load("again")["w"]
    np.testing.assert_array_equal(first, second, strict=True)


def without(key):
    return lambda report: {k: v for k, v in report.items() if k != key}


def of_part(**fields):
    return lambda r: {**r, "parts": [{**part, **fields} for part in r["parts"]]}


DAMAGES = {
    "no parts": lambda r: {**r, "parts": []},
    "several parts": lambda r: {**r, "parts": r["parts"] * 2},
    "parts of another kind": lambda r: {**r, "parts": [3]},
    "an unknown field": of_part(colour="red"),
    "models without paths": of_part(models={"a": 3}),
    "a list of models": of_part(models=["a"]),
    "options of another kind": of_part(options=[1]),
    "an unknown method": of_part(method="none"),
    "no size of shards": without("max_shard_bytes"),
    "no hashes": without("blake3"),
    "hashes of another kind": lambda r: {**r, "blake3": {"a": "00"}},
    "a recipe of another kind": lambda r: {**r, "recipe": 3},
    "a recipe that is no YAML": lambda r: {**r, "recipe": "a: [b"},
    "a list": lambda r: [r],
    "a number": lambda r: 3,
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        save(path / name, {"w": np.ones(2, np.float32)})
    return merge_checkpoints(recipe_for("average", path), path / "out")


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_no_reports(damage, report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    recipe_of_report(path)
    path.write_text(json.dumps(DAMAGES[damage](report)))
    with pytest.raises(RecipeError, match=rf"^{path}"):
        recipe_of_report(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 10**5, b"\xff", b"method: ties"],
    ids=["empty", "cut off", "deep", "no text", "a recipe"],
)
def test_files_that_are_no_json(content, tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=rf"^{path}"):
        recipe_of_report(path)
