"""Notebooks convert, point to what exists, and the shortest runs from top to bottom.

`make notebooks` runs all of them.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

import jaxmerge
from jaxmerge import plots

HERE = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(HERE.glob("*.py"))
NAMES = {"jaxmerge": jaxmerge.__all__, "plots": plots.__all__}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_five():
    names = ["coefficients", "first_merge", "four_papers", "mesh", "task_vectors"]
    assert [path.stem for path in NOTEBOOKS] == names


@every_notebook
def test_becomes_a_notebook_with_a_title_code_and_what_to_read_next(path):
    notebook = jupytext.reads(jupytext.writes(jupytext.read(path), "ipynb"), "ipynb")
    first, *middle, last = notebook.cells
    assert notebook.metadata.kernelspec.name == "python3"
    assert first.cell_type == last.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "## What to read next" in last.source
    code = [cell.source for cell in middle if cell.cell_type == "code"]
    assert len(code) > 4
    for source in code:
        ast.parse(source)


@every_notebook
def test_names_and_links_exist(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jaxmerge"):
            exec(compile(ast.Module([node], []), str(path), "exec"))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.attr in NAMES.get(node.value.id, [node.attr])
    cells = jupytext.read(path).cells
    text = "".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (HERE / link).exists()


def test_first_merge_runs():
    process = subprocess.run(
        [sys.executable, HERE / "first_merge.py"],
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    rows = [line.strip("| ").split(" | ") for line in process.stdout.splitlines()]
    means = {row[0]: float(row[-3]) for row in rows if row[0] in ("start", "ties")}
    assert means["start"] + 5 < means["ties"]
    assert "mean accuracy of the checkpoint" in process.stdout
