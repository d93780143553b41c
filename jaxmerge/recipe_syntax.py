"""YAML as recipes use it: plain values that know the line they come from."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import yaml

Place = tuple[str | int, ...]
"""The keys and list indices that lead to a value in a document."""

# YAML 1.1 reads 1e-3 as text, 1:30 as 90 and 010 as 8; this is what people mean.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?))?b", re.IGNORECASE)
_ADVICE = "regular expressions need quotes in YAML"


class RecipeError(ValueError):
    """A recipe that cannot be carried out; one line of the message per problem."""


class MergeError(ValueError):
    """Checkpoints that cannot be merged as the recipe says; the message says why."""


class Problem(NamedTuple):
    """What is wrong in a line of a document; None where there are no lines."""

    line: int | None
    message: str


class Document(NamedTuple):
    """The content of a YAML text.

    Attributes:
        value: nested dicts, lists, text, numbers, booleans and None.
        lines: the line of every key and list item, by place; the first is 1.
        problems: what could be read in two ways.
    """

    value: Any
    lines: dict[Place, int]
    problems: list[Problem]

    def line_of(self, place: Place) -> int:
        """The line of a place, or of what it should be in."""
        while place not in self.lines:
            place = place[:-1]
        return self.lines[place]


def read_yaml(text: str, source: str) -> Document:
    """Reads one YAML document, without anchors and aliases.

    Raises:
        RecipeError: no valid YAML; the message starts with `source` and the line.

    Example:
        >>> document = read_yaml("seed: 1\\nscale: {mlp: 1e-3}", "recipe")
        >>> document.value, document.line_of(("scale", "mlp"))
        ({'seed': 1, 'scale': {'mlp': 0.001}}, 2)
    """
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
                message = f"{token.value!r} is marked as an anchor or alias; write out "
                message += f"what it stands for ({_ADVICE})"
                raise RecipeError(_format(token.start_mark.line + 1, message, source))
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        message = f"no valid YAML: {error.problem}; {_ADVICE}"
        if error.problem == "but found another document":
            message = (
                "a second recipe starts here; put each into a file of its own and run "
                "them one after another, each into the directory that later ones name"
            )
        raise RecipeError(_format(line, message, source)) from error
    except yaml.YAMLError as error:
        message = f"no valid YAML: {str(error).splitlines()[0]}"
        raise RecipeError(_format(None, message, source)) from error
    document = Document(None, {(): 1}, [])
    return document._replace(value=_value(root, (), document))


def raise_problems(problems: Iterable[Problem], source: str) -> None:
    """Raises a `RecipeError` that lists `problems` by line, if there are any."""
    ordered = sorted(problems, key=lambda problem: problem.line or 0)
    if ordered:
        raise RecipeError("\n".join(_format(*problem, source) for problem in ordered))


def unknown(what: str, name: object, valid: Sequence[str], of: str = "") -> str:
    """Says that there is no `name`, and which valid one may be meant.

    Example:
        >>> unknown("option", "densty", ["density", "scale"], of="ties")
        "unknown option 'densty' of ties; did you mean 'density'?"
    """
    of = f" of {of}" if of else ""
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    if close:
        return f"unknown {what} {name!r}{of}; did you mean {close[0]!r}?"
    return f"unknown {what} {name!r}{of}; there are {', '.join(valid) or 'none'}"


def size_in_bytes(size: Any) -> int:
    """The number of bytes in a size as people write it.

    Raises:
        ValueError: it is none; the message says what it is.

    Example:
        >>> size_in_bytes("1.5 GB"), size_in_bytes("2MiB"), size_in_bytes(7)
        (1500000000, 2097152, 7)
    """
    if type(size) is int:
        return size
    match = _SIZE.fullmatch(str(size))
    if match is None:
        raise ValueError(f"{size!r}; write a size such as 5GB or 500MiB")
    number, prefix, binary = match.groups()
    power = " kmgt".index(prefix.lower()) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def _format(line: int | None, message: str, source: str) -> str:
    return f"{source}:{line}: {message}" if line else f"{source}: {message}"


def _value(node: yaml.Node | None, place: Place, document: Document) -> Any:
    """The value of a node; notes lines and problems in `document` on the way."""
    if isinstance(node, yaml.MappingNode):
        mapping = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            at = (*place, key)
            if key in mapping:
                message = f"key {key!r} is there twice, first in line "
                message += str(document.lines[at])
                document.problems.append(Problem(line, message))
            else:
                document.lines[at] = line
                mapping[key] = _value(value_node, at, document)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            document.lines[(*place, i)] = item.start_mark.line + 1
        return [
            _value(item, (*place, i), document) for i, item in enumerate(node.value)
        ]
    return _scalar(node) if isinstance(node, yaml.ScalarNode) else None


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text = node.value
    if node.style is not None:
        return text
    if _NUMBER.fullmatch(text):
        return float(text) if set(text) & set(".eE") else int(text)
    if node.tag == "tag:yaml.org,2002:null":
        return None
    if node.tag == "tag:yaml.org,2002:bool":
        return text.lower() in ("true", "yes", "on")
    return text
