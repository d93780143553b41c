"""Recipes of mergekit by the command line: read, merged, written, and done again."""

import json

import cases
import numpy as np
import pytest
from cases import CASES
from counting import count_bytes

from jaxmerge.checkpoints import open_checkpoint
from jaxmerge.cli import main

RECIPES = {
    "slices_frankenmerge": "root",
    "slices_linear": "root",
    "ta_gradient_filter": "root",
    "ties_d05": "root",
    "tok_union": "vocabulary_root",
}


@pytest.mark.parametrize("case", RECIPES)
def test_what_is_written_is_mergekits(case, request, tmp_path, monkeypatch):
    monkeypatch.chdir(request.getfixturevalue(RECIPES[case]))
    recipe = tmp_path / "mergekit.yml"
    recipe.write_text(CASES["recipes"][case])
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 0
    out = open_checkpoint(tmp_path / "out")
    expected = cases.below(case)
    assert expected
    for name in expected.keys() & out.leaves.keys():
        np.testing.assert_allclose(
            out.read(name), expected[name], rtol=1e-5, atol=1e-6, err_msg=name
        )
    config = json.loads((tmp_path / "out/config.json").read_text())
    layers = {name.split(".")[2] for name in out.leaves if ".layers." in name}
    assert config["num_hidden_layers"] == len(layers)


@pytest.mark.parametrize("case", RECIPES)
def test_plans_have_the_bytes_of_the_merge(case, request, tmp_path, monkeypatch):
    monkeypatch.chdir(request.getfixturevalue(RECIPES[case]))
    recipe = tmp_path / "mergekit.yml"
    recipe.write_text(CASES["recipes"][case])
    totals, _ = count_bytes(monkeypatch)
    path = tmp_path / "plan.json"

    def planned(*words):
        assert main(["plan", str(recipe), "--json", str(path), *words]) == 0
        plan = json.loads(path.read_text())["plan"]
        path.unlink()
        return plan

    spread = planned("--mesh=x=4,y=2", "--shard=.*proj.*=x")
    shares = {n: group["share"] for group in spread["groups"] for n in group["names"]}
    assert all(shares[n] == (1 / 4 if "proj" in n else 1 / 8) for n in shares)
    expected = [planned()["totals"][key] for key in ("read", "written")]
    assert totals == [0, 0]
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 0
    assert totals == expected
    assert shares.keys() == open_checkpoint(tmp_path / "out").leaves.keys()


def test_plans_say_all_that_is_wrong(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)
    recipe = tmp_path / "mergekit.yml"
    recipe.write_text(CASES["recipes"]["ties_d05"])
    words = ["--out", str(tmp_path), "--mesh=x=2", "--shard=nothing=x"]
    assert main(["plan", str(recipe), *words]) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path} exists already" in message
    assert "the rule 'nothing' matches no leaf" in message


def test_done_again_from_its_report(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    recipe = tmp_path / "mergekit.yml"
    recipe.write_text(CASES["recipes"]["slices_linear"])
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path)
    report = str(tmp_path / "out/jaxmerge_report.json")
    assert main(["merge", "--from-report", report, "again"]) == 0
    first, second = (tmp_path / name for name in ("out", "again"))
    weights = "model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()
    assert (second / "config.json").read_bytes() == (first / "config.json").read_bytes()


def test_what_is_wrong_is_said_with_its_line(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)
    recipe = tmp_path / "mergekit.yml"
    text = "merge_method: ties\nbase_model: inputs/base\nmodels:\n"
    recipe.write_text(text + "  - model: inputs/ft1\n    parameters: {densty: 0.5}\n")
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert f"{recipe}:5:" in message
    assert "did you mean 'density'?" in message
    assert not (tmp_path / "out").exists()
