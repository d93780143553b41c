"""Docstrings as the library writes them, for autodoc.

They are Google's, but formulas stand between dollars, which reStructuredText does not
know; letters may follow code, and an asterisk may stand for any number of axes, neither
of which it takes; and the first line of "Returns" may hold a colon, which napoleon
takes for the end of a type.
"""

import re
from typing import Any

# `code` comes first, so that a dollar in it does not begin a formula.
_CODE_OR_FORMULA = re.compile(
    r"(?P<code>``?[^`]+``?)|\$\$(?P<display>.+?)\$\$|\$(?P<inline>[^$]+)\$", re.DOTALL
)
_AXES = re.compile(r"(?<=[(,\s])\*(?=[a-z]+\b[^*])")
_RETURNS = re.compile(r"^Returns:\n(?=    )", re.MULTILINE)


def to_rst(docstring: str) -> str:
    """The docstring in reStructuredText, but for the sections that napoleon reads."""
    plain = _AXES.sub(r"\\*", docstring)
    return _RETURNS.sub(":returns:\n", _CODE_OR_FORMULA.sub(_markup, plain))


def _markup(match: re.Match[str]) -> str:
    # An escaped blank ends what letters follow, and is not shown.
    end = "\\ " if match.string[match.end() : match.end() + 1].isalnum() else ""
    if match["code"]:
        return match["code"].replace(r"\*", "*") + end
    if match["display"]:
        return f".. math:: {' '.join(match['display'].split())}"
    return f":math:`{' '.join(match['inline'].split())}`{end}"


def _process(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = to_rst("\n".join(lines)).split("\n")


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> Any:
    """Leaves out the fields of a NamedTuple: "Attributes" describes them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Any) -> dict[str, bool]:
    # Before napoleon, which comes with the default priority of 500.
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}
