"""The command line from end to end: what it writes, prints, and how it fails."""

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

import jaxmerge
from jaxmerge.checkpoints import save, writer
from jaxmerge.cli import main
from jaxmerge.registry import methods


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("base", "math", "code"):
        save(
            tmp_path / name,
            {
                "model.layers.0.weight": rng.normal(size=(4, 6)).astype(np.float32),
                "model.norm[0].weight": rng.normal(size=6).astype(np.float32),
            },
        )
    return tmp_path


def write_recipe(runs, **changes):
    recipe = {
        "method": "task_arithmetic",
        "base": "base",
        "models": ["math", "code"],
        "options": {"scale": 0.5},
    }
    path = runs / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return str(path)


def test_merge_equals_the_method_in_memory(runs, capsys):
    assert main(["merge", write_recipe(runs), "out"]) == 0
    printed = capsys.readouterr()
    base, math, code = (jaxmerge.load(runs / name) for name in ("base", "math", "code"))
    expected = jaxmerge.task_arithmetic(base, [math, code], scale=0.5)
    out = jaxmerge.load("out")
    assert out.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(out[name], leaf)
    assert "Leaves: 2 merged.\n" in printed.out
    assert re.search(r"Norm over merged leaves: \d", printed.out)
    assert "Wrote out in" in printed.out
    assert "120 bytes of 120 bytes" in printed.out
    assert printed.err == ""


def fail(capsys, *argv):
    assert main(argv) == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert printed.err.startswith("jaxmerge: ")
    return printed.err


def test_a_typo_in_the_recipe(runs, capsys):
    path = write_recipe(runs, options={"scal": 0.5})
    message = fail(capsys, "merge", path, "out")
    assert f"{path}:7: unknown option 'scal' of task_arithmetic; did you" in message
    assert not (runs / "out").exists()


def test_no_recipe(runs, capsys):
    message = fail(capsys, "merge", "none.yaml", "out")
    assert message == "jaxmerge: none.yaml: No such file or directory\n"


def test_a_missing_model(runs, capsys):
    message = fail(capsys, "merge", write_recipe(runs, models=["physics"]), "out")
    assert "physics does not exist" in message


def test_an_existing_output(runs, capsys):
    message = fail(capsys, "merge", write_recipe(runs), "base")
    assert message == (
        "jaxmerge: base exists already; remove it or choose another name.\n"
    )


def test_an_option_out_of_range(runs, capsys):
    path = write_recipe(runs, method="ties", options={"density": 2})
    assert "density" in fail(capsys, "merge", path, "out")


def test_a_full_disk(runs, capsys, monkeypatch):
    def full(file, *arguments):
        raise OSError(28, "No space left on device", file.name)

    monkeypatch.setattr(writer, "_write_at", full)
    message = fail(capsys, "merge", write_recipe(runs), "out")
    assert message.endswith("model.safetensors: No space left on device\n")
    assert sorted(path.name for path in runs.iterdir()) == [
        *("base", "code", "math", "recipe.yaml")
    ]


def test_unexpected_errors_keep_their_traceback(runs, monkeypatch):
    def broken(*arguments, **keywords):
        raise ValueError("a bug")

    monkeypatch.setattr("jaxmerge.merging.merge_checkpoints", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["merge", write_recipe(runs), "out"])


@pytest.mark.parametrize("argv", [[], ["murge"], ["merge", "recipe.yaml"]])
def test_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: jaxmerge" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{jaxmerge.__version__}\n"


def test_methods(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    for name, method in methods().items():
        row = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert method.summary in row
        assert method.paper in row


def test_one_method(capsys):
    assert main(["methods", "dare"]) == 0
    printed = capsys.readouterr().out
    assert "https://arxiv.org/abs/2311.03099" in printed
    assert "Needs a base, models, a seed." in printed
    assert re.search(r"\n  density +0\.5 +\S", printed)
    assert not re.search(r"\n  (key|names) ", printed)


def test_unknown_method(capsys):
    message = fail(capsys, "methods", "tise")
    assert message == "jaxmerge: unknown method 'tise'; did you mean 'ties'?\n"


def test_inspect_reads_no_weights(runs, capsys, monkeypatch):
    monkeypatch.setattr(np, "memmap", None)
    assert main(["inspect", "base"]) == 0
    printed = capsys.readouterr().out
    row = r"model\.norm\[0\]\.weight +\[6\] +float32 +24 bytes"
    assert re.search(row, printed)
    assert "2 leaves, 30 entries, 120 bytes, float32\n" in printed
    assert "Format: safetensors, directory" in printed


def test_inspect_what_is_no_checkpoint(runs, capsys):
    (runs / "empty").mkdir()
    assert "empty holds no weights" in fail(capsys, "inspect", "empty")


def test_compare(runs, capsys):
    assert main(["compare", "base", "math", "code", "--csv", "table.csv"]) == 0
    printed = capsys.readouterr().out
    base, math, code = (jaxmerge.load(runs / name) for name in ("base", "math", "code"))
    vectors = [
        np.concatenate([(model[name] - base[name]).ravel() for name in base])
        for model in (math, code)
    ]
    norms = np.linalg.norm(vectors, axis=1)
    cosine = vectors[0] @ vectors[1] / norms.prod()
    assert re.search(rf"\n  math +{norms[0]:.4g} .* 1\.000 +{cosine:.3f}", printed)
    assert "model.layers.0" in printed
    with open("table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["leaf"] for row in rows} == base.keys()
    total = np.hypot(*(float(row["norm math"]) for row in rows))
    assert total == pytest.approx(norms[0], rel=1e-5)


def test_compare_one_model_or_one_twice(runs, capsys):
    assert main(["compare", "base", "math"]) == 0
    assert "nan" not in capsys.readouterr().out
    assert "given twice" in fail(capsys, "compare", "base", "math", "math")


def test_compare_replaces_no_file(runs, capsys):
    (runs / "mine.csv").write_text("mine")
    message = fail(capsys, "compare", "base", "math", "code", "--csv", "mine.csv")
    assert "mine.csv: File exists" in message
    assert (runs / "mine.csv").read_text() == "mine"


def test_names_of_files_are_no_names_for_directories(runs, capsys):
    message = fail(capsys, "merge", write_recipe(runs), "out.safetensors")
    assert "is a name for a file" in message
    assert "choose 'out'" in message


def test_words_of_mergekit_are_translated(runs, capsys):
    path = write_recipe(runs, base_model="base")
    assert "here it is called 'base'" in fail(capsys, "merge", path, "out")


def test_an_interrupted_merge_goes_on(runs, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.Writer, "write", interrupt)
        assert main(["merge", write_recipe(runs), "out"]) == 130
    assert "a merge goes on where it was" in capsys.readouterr().err
    assert not (runs / "out").exists()
    assert main(["merge", write_recipe(runs), "out"]) == 0
    assert not list(runs.glob(".out*"))


def test_the_demo_says_what_to_install(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for module in [name for name in sys.modules if name.startswith("jaxmerge.demo.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("jaxmerge.demo.run", raising=False)
    message = fail(capsys, "demo")
    assert "the demo needs sklearn" in message
    assert "jaxmerge[demo]" in message


def test_the_demo_spares_directories_of_others(runs, capsys):
    (runs / "mine").mkdir()
    (runs / "mine" / "notes.txt").write_text("mine")
    assert "choose a new directory" in fail(capsys, "demo", "--out", "mine")
    assert [path.name for path in (runs / "mine").iterdir()] == ["notes.txt"]


def test_compare_models_of_one_name(runs, capsys):
    save(runs / "old/math", jaxmerge.load("code"))
    assert main(["compare", "base", "math", "old/math"]) == 0
    assert "cos old/math" in capsys.readouterr().out


def test_runs_as_a_module(runs):
    done = subprocess.run(
        [sys.executable, "-m", "jaxmerge", "merge", write_recipe(runs), "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((runs / "out/jaxmerge_report.json").read_text())["totals"]


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "jaxmerge", "methods", "ties"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
