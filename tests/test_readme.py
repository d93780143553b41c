"""What the README says is what the library does."""

import re
from pathlib import Path

import numpy as np
import pytest

import jaxmerge
from jaxmerge.cli import main
from jaxmerge.registry import markdown_table

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    fences = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Three checkpoints of the names that the README uses."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0).standard_normal
    start = {
        "mlp": {"kernel": draw((4, 4)), "bias": draw(4)},
        "head": {"bias": draw(2)},
    }
    for name in ("start", "math", "code"):
        params = {
            module: {
                leaf: np.float32(x + 0.1 * draw(x.shape)) for leaf, x in leaves.items()
            }
            for module, leaves in start.items()
        }
        jaxmerge.save(f"checkpoints/{name}", params)
    return tmp_path


def test_table_of_methods_is_that_of_the_registry():
    assert markdown_table() in README, "copy this into the README:\n" + markdown_table()


def test_python_examples_run(checkpoints):
    first, second = blocks("python")
    exec(first, {})
    assert jaxmerge.load("checkpoints/merged")["mlp"]["kernel"].shape == (4, 4)
    names: dict = {}
    exec(second, names)
    assert names["sweep"]["mlp"]["kernel"].shape == (200, 4, 4)
    np.testing.assert_allclose(names["merged"]["mlp"]["bias"], 0, atol=1e-6)


def test_recipe_and_commands_run(checkpoints, capsys):
    (recipe,) = blocks("yaml")
    Path("recipe.yaml").write_text(recipe)
    commands = [
        line.split("#")[0].split()[1:]
        for block in blocks("")
        for line in block.splitlines()
        if line.startswith("jaxmerge ")
    ]
    assert len(commands) == 4
    for command in commands:
        assert main(command) == 0, command
    merged = jaxmerge.load("merged")
    assert merged["mlp"]["kernel"].dtype == "bfloat16"
    assert "mlp/kernel" in capsys.readouterr().out


def test_links_to_files_work():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
