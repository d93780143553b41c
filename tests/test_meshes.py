"""Meshes and rules as options of commands: what they mean, and what is refused."""

import argparse

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmerge import meshes
from jaxmerge.checkpoints import save
from jaxmerge.cli import main
from jaxmerge.console import CommandError
from jaxmerge.merging import resolve
from jaxmerge.planning import check_placed
from jaxmerge.recipe_syntax import MergeError
from jaxmerge.recipes import Recipe


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXMERGE_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("a", "b"):
        save(tmp_path / name, {"w": np.ones((8, 8), np.float32)})
    (tmp_path / "recipe.yaml").write_text("method: average\nmodels: [a, b]\n")
    return str(tmp_path / "recipe.yaml")


def options(*given):
    parser = argparse.ArgumentParser()
    meshes.add_to(parser)
    return parser.parse_args(given)


def test_rules_and_meshes():
    given = options("--mesh=data=2,model=4", "--shard=.*=model,-", "--shard=b=x+y")
    assert dict(meshes.mesh_of(given).shape) == {"data": 2, "model": 4}
    assert meshes.rules_of(given) == {".*": P("model", None), "b": P(("x", "y"))}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mesh=data=1,data=1"], "has two axes 'data'"),
        (["--mesh=data=8,data=8"], "has two axes 'data'"),
        (["--mesh=data=3"], "has 3 devices, but there are 8"),
        (["--mesh=data"], "'data' is no axis such as data=2"),
        (["--shard=w=data"], "--shard needs a --mesh"),
        (["--mesh=data=8", "--shard=w"], "'w' has no '='"),
        (["--mesh=data=8", "--shard=w=data", "--shard=w=-"], "two rules for 'w'"),
        (["--mesh=data=8", "--shard=(w=data"], r"'\(w' is no valid regular"),
    ],
)
def test_options_that_mean_nothing(given, message):
    arguments = options(*given)
    with pytest.raises(CommandError, match=message):
        meshes.mesh_of(arguments), meshes.rules_of(arguments)


@pytest.mark.parametrize("axes", ["data,data", "data+data"])
def test_an_axis_of_the_mesh_cuts_a_leaf_once(axes, recipe, capsys):
    assert main(["merge", recipe, "out", "--mesh=data=8", f"--shard=w={axes}"]) == 1
    message = capsys.readouterr().err
    assert "leaf 'w' of shape (8, 8) cannot be sharded" in message
    assert "it names ['data'] twice" in message


def test_a_rule_must_match_a_leaf(recipe):
    plan = resolve(Recipe("average", {"a": "a", "b": "b"}))
    check_placed(plan, {"w": P(), "[vw]": P()})
    with pytest.raises(MergeError, match=r"rule 'nomatch' matches no leaf.*'w'"):
        check_placed(plan, {"w": P(), "nomatch": P()})


def test_processes_that_do_not_meet(recipe, capsys):
    # JAX computes already here, so that it refuses to meet others.
    assert main(["merge", recipe, "out", "--distributed"]) == 1
    message = capsys.readouterr().err
    assert "the processes did not meet" in message
    assert "--coordinator" in message
