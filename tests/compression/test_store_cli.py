"""The commands of a store: what they write, print, and how they fail."""

import re

import numpy as np
import pytest

import jaxmerge
from jaxmerge.cli import main
from jaxmerge.compression import open_store


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("base", "math", "code", "law"):
        leaves = {"a.weight": rng.normal(size=(40, 60)), "b.bias": rng.normal(size=9)}
        jaxmerge.save(
            tmp_path / name, {n: x.astype(np.float32) for n, x in leaves.items()}
        )
    return tmp_path


def fail(capsys, *argv):
    assert main(argv) == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert printed.err.startswith("jaxmerge: ")
    return printed.err


def test_a_store_from_end_to_end(runs, capsys):
    create = ["store", "create", "base", "math", "code", "--out", "all"]
    assert main([*create, "--threshold", "0.3"]) == 0
    assert "Wrote all: 2 tasks in" in capsys.readouterr().out
    assert main(["store", "add", "all", "law"]) == 0
    assert "Added law to all." in capsys.readouterr().out
    assert main(["store", "list", "all"]) == 0
    printed = capsys.readouterr().out
    for task in ("math", "code", "law"):
        assert re.search(rf"\n +{task} +2 +\S+ (bytes|kB)", printed)
    assert (
        "Kind: tall (threshold 0.3, multi_task task_arithmetic, scope leaf)" in printed
    )
    assert "3 tasks in" in printed
    assert main(["store", "extract", "all", "code", "out"]) == 0
    assert capsys.readouterr().out.endswith("Wrote out.\n")
    params = open_store("all").params("code")
    for name, leaf in jaxmerge.load("out").items():
        np.testing.assert_array_equal(leaf, params[name])
    assert main(["store", "verify", "all"]) == 0
    assert "all is undamaged: 2 leaves, 3 tasks." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("tall", ["--multi-task", "ties", "--scope", "model"]),
        ("emr", []),
        ("tsv", ["--rank", "3"]),
        ("tvq", ["--bits", "3"]),
        ("rtvq", ["--bits", "1", "--shared-bits", "4"]),
        ("bitdelta", []),
    ],
)
def test_kinds(runs, capsys, kind, options):
    words = ["store", "create", "base", "math", "law", "--as", kind, *options]
    assert main([*words, "--out", "few"]) == 0
    store = open_store("few")
    assert (store.kind, store.tasks) == (kind, ["law", "math"])
    chosen = store.files.document["options"]
    for flag, value in zip(options[::2], options[1::2], strict=True):
        assert str(chosen[flag.strip("-").replace("-", "_")]) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "base", "math", "--out", "law"], "law exists already"),
        (["create", "base", "math", "math", "--out", "x"], "store create: a model is"),
        (["create", "base", "none", "--out", "x"], "none does not exist"),
        (["create", "base", "math", "--as", "zip", "--out", "x"], "kind is 'zip'"),
        (
            ["create", "base", "math", "--as", "emr", "--bits", "2", "--out", "x"],
            "a store of kind 'emr' has no option 'bits'",
        ),
        (["list", "base"], "base is no store: no store.json; base contains"),
        (["extract", "none", "math", "out"], "none is no store"),
        (["verify", "none"], "none is no store"),
        (["add", "none", "math"], "none is no store"),
    ],
)
def test_failures(runs, capsys, words, message):
    assert message in fail(capsys, "store", *words)
    assert not (runs / "x").exists()


def test_models_of_one_name(runs, capsys):
    jaxmerge.save(runs / "old/math", jaxmerge.load("code"))
    words = ["store", "create", "base", "math", "old/math", "--out", "x"]
    assert "rename a directory" in fail(capsys, *words)


def test_damage_is_named(runs, capsys):
    assert main(["store", "create", "base", "math", "code", "--out", "all"]) == 0
    path = runs / "all/tasks/code/leaves.bin"
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    for words in (["verify", "all"], ["extract", "all", "code", "out"]):
        message = fail(capsys, "store", *words)
        assert "task 'code' is damaged at leaf 'b.bias'" in message
    assert not (runs / "out").exists()
    assert main(["store", "extract", "all", "math", "out"]) == 0
