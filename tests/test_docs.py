"""The documentation leaves nothing out. `make docs` builds it and runs its cells."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from jaxmerge import plots
from jaxmerge.registry import methods

DOCS = Path(__file__).parents[1] / "docs"
PUBLIC = [
    "jaxmerge",
    "jaxmerge.analysis",
    "jaxmerge.checkpoints",
    "jaxmerge.compression",
    "jaxmerge.evaluation",
    "jaxmerge.landscape",
    "jaxmerge.overlap",
    "jaxmerge.plots",
    "jaxmerge.spectra",
    "jaxmerge.statistics",
    "jaxmerge.tuning",
]
# Plain values, and names for types that pages describe in words.
WITHOUT_PAGE = {"MAX_SHARD_BYTES", "REPORT_NAME", "Progress"}


def resolve(name):
    """The object of a dotted name, whichever part of it is the module."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def names_in(module):
    """The public names of a package, or of a module what it defines."""
    defined = [
        name
        for name, thing in vars(module).items()
        if getattr(thing, "__module__", None) == module.__name__ and name[0] != "_"
    ]
    return getattr(module, "__all__", defined)


@pytest.fixture(scope="module")
def documented():
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.rst"))
    names = re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.MULTILINE)
    assert len(names) == len(set(names)), "a name stands on two pages"
    return [resolve(name) for name in names]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_in_the_reference(module, documented):
    public = importlib.import_module(module)
    missing = [
        name
        for name in names_in(public)
        if name not in WITHOUT_PAGE
        and not any(getattr(public, name) is thing for thing in documented)
    ]
    assert not missing, "add these to a page in docs/api"


def test_every_picture_is_shown():
    text = (DOCS / "plots.md").read_text()
    cells = re.findall(r"^```\{code-cell\} ipython3\n(.*?)^```", text, re.M | re.S)
    shown = [re.search(r"^plots\.(\w+)\(", cell, re.MULTILINE) for cell in cells]
    assert {found[1] for found in shown if found} == set(plots.__all__)


def test_registered_methods_have_a_section():
    text = "\n".join(page.read_text() for page in (DOCS / "methods").glob("*.md"))
    for name in methods():
        section = f"(method-{name})=\n## `{name}`\n\n```{{method-facts}} {name}\n```\n"
        assert text.count(section) == 1, f"docs/methods needs the section\n{section}"


def test_pages_name_what_there_is():
    pages = [*DOCS.glob("*.md"), *DOCS.glob("methods/*.md"), *DOCS.glob("howto/*.md")]
    named = {
        name
        for page in pages
        for name in re.findall(r"\{func\}`(jaxmerge[\w.]+)`", page.read_text())
    }
    assert len(named) > 20
    for name in named:
        assert callable(resolve(name)), name


def cells():
    """The code of all cells, by page and number."""
    fence = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    pages = {page: fence.findall(page.read_text()) for page in DOCS.rglob("*.md")}
    for notebook in (DOCS.parent / "notebooks").glob("*.py"):
        pages[notebook] = re.split(
            r"^# %%.*$", notebook.read_text(), flags=re.MULTILINE
        )
    return {
        f"{page.name}, cell {i}": code
        for page, codes in pages.items()
        for i, code in enumerate(codes)
    }


def test_cells_that_draw_end_with_the_figure():
    drawing = {
        name: ast.parse(code)
        for name, code in cells().items()
        if re.search(r"\bplots\.\w+\(", code)
    }
    assert len(drawing) > 8
    silent = [n for n, c in drawing.items() if not isinstance(c.body[-1], ast.Expr)]
    assert not silent, "what they draw is not shown; end them with an expression"


def extension(name):
    """A module of the site, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"extensions/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("docstring", "rst"),
    [
        (r"With $\tau_t$, a", r"With :math:`\tau_t`, a"),
        ("$a +\n    b$s", r":math:`a + b`\ s"),
        ("`P`s of `$HOME`", r"`P`\ s of `$HOME`"),
        ("of shape (*stack, m)", r"of shape (\*stack, m)"),
        ("`(*stack, m)`, *selfish*", "`(*stack, m)`, *selfish*"),
        ("Returns:\n    One: two.", ":returns:\n    One: two."),
    ],
)
def test_docstrings_become_restructured_text(docstring, rst):
    assert extension("docstrings").to_rst(docstring) == rst


def test_notebooks_lead_to_pages_of_the_site():
    source = (
        "# See [the\n# mesh](mesh.py), [all](../README.md) and [JAX](https://jax.dev)."
    )
    assert extension("notebook_links").on_site(source) == (
        "# See {doc}`the\n# mesh </notebooks/mesh>`, all and [JAX](https://jax.dev)."
    )
