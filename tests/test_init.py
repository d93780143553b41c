import ast
import subprocess
import sys
from pathlib import Path

import jaxmerge


def test_all_public_names_are_there():
    assert set(jaxmerge._HOME_OF) == set(jaxmerge.__all__)
    for name in jaxmerge.__all__:
        assert getattr(jaxmerge, name).__name__ == name
    assert set(jaxmerge.__all__) <= set(dir(jaxmerge))


def test_type_checkers_see_what_is_there():
    source = ast.parse(Path(jaxmerge.__file__).read_text())
    imported = {
        (node.module, alias.name)
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    homes = {(f"jaxmerge.{home}", name) for name, home in jaxmerge._HOME_OF.items()}
    assert imported == homes


def test_the_command_line_answers_before_jax_is_loaded():
    code = (
        "import sys\n"
        "from jaxmerge.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
