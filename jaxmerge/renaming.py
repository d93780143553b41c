"""Names and axes of one library as another has them: ordered rules, and their inverse.

A file of rules is YAML, from regular expressions, which must match a whole name, to
new names, with the order of axes where it changes. The first match wins:

    'embed\\.weight': embed/embedding
    'layers\\.(\\d+)\\.(query|key)\\.weight':
      to: 'layers_\\1/\\2/kernel'
      axes: (h=8 d) i -> i h d
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxmerge.checkpoints.interface import Checkpoint, CheckpointError
from jaxmerge.checkpoints.transforms import Rearrange
from jaxmerge.checkpoints.views import Source, View
from jaxmerge.recipe_syntax import (
    Document,
    Problem,
    RecipeError,
    raise_problems,
    read_yaml,
    unknown,
)

_PRESETS = Path(__file__).with_name("presets")


class Rule(NamedTuple):
    r"""How leaves that match are renamed.

    Attributes:
        pattern: regular expression for the whole name.
        name: the new name, with `\1` for what the first group matched.
        axes: what becomes of the axes; nothing by default.

    Example:
        >>> rule = Rule(r"(\d+)\.up\.weight", r"\1/up/kernel")
        >>> print(*rule.inverse[:2])
        (\d+)/up/kernel \g<1>.up.weight
    """

    pattern: str
    name: str
    axes: Rearrange | None = None

    @property
    def inverse(self) -> "Rule":
        """The rule that undoes this one.

        Raises:
            ValueError: the pattern is more than text and groups, each of which the new
                name has once, so that there is no telling what it matched.
        """
        parts = list(_parts_of_pattern(self.pattern))
        groups = [part for part in parts if part.startswith("(")]
        words = [word for word in _REFERENCE.split(self.name) if word is not None]
        order = [int(number) for number in words[1::2]]
        if sorted(order) != list(range(1, len(groups) + 1)):
            raise ValueError(
                f"{self.name!r} must have each of the {len(groups)} groups once"
            )
        pattern = "".join(
            groups[int(word) - 1] if odd % 2 else re.escape(word)
            for odd, word in enumerate(words)
        )
        numbers = iter(range(1, len(groups) + 1))
        name = "".join(
            rf"\g<{1 + order.index(next(numbers))}>" if part.startswith("(") else part
            for part in parts
        )
        return Rule(pattern, name, self.axes and self.axes.inverse)


_REFERENCE = re.compile(r"\\(?:g<(?=\d+>))?(\d+)>?")
_GROUP = re.compile(r"\((?!\?)(?:[^()\\]|\\.|\(\?:(?:[^()\\]|\\.)*\))*\)")
_TEXT = re.compile(r"(?:[^\\()\[\]{}.*+?|^$]|\\[^\w])+")


def _parts_of_pattern(pattern: str) -> Iterator[str]:
    """The groups of a pattern, and the text between them, unescaped."""
    end = 0
    while end < len(pattern):
        found = _GROUP.match(pattern, end) or _TEXT.match(pattern, end)
        if found is None:
            raise ValueError(
                f"{pattern!r} is more than text and groups, from {pattern[end:]!r} on; "
                "put what varies in a group, and a backslash before a dot"
            )
        yield found[0] if found[0][0] == "(" else re.sub(r"\\(.)", r"\1", found[0])
        end = found.end()


def presets() -> list[str]:
    """The names of the rules that come with the library."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def load_rules(name: str, *, inverse: bool = False) -> list[Rule]:
    """Reads rules from a file, or those of a preset.

    Args:
        name: one of `presets()`, which rename from Hugging Face to flax, or the path of
            a YAML file.
        inverse: whether to undo the rules instead.

    Raises:
        RecipeError: no such preset or file; a rule that means nothing, or that has no
            inverse though it needs one. The message names the line.

    Example:
        >>> presets()
        ['bert', 'llama', 'vit']
        >>> load_rules("llama", inverse=True)[0].pattern
        'embed_tokens/embedding'
    """
    path = _PRESETS / f"{name}.yaml" if name in presets() else Path(name)
    if not path.is_file():
        raise RecipeError(f"{unknown('preset', name, presets())}, or name a YAML file.")
    document = read_yaml(path.read_text(encoding="utf-8"), str(path))
    problems = list(document.problems)
    rules = []
    for pattern, value in _entries(document, path):
        try:
            rule = _rule(pattern, value)
            rules.append(rule.inverse if inverse else rule)
        except ValueError as error:
            problems.append(Problem(document.line_of((pattern,)), f"{error}."))
    raise_problems(problems, str(path))
    return rules


def _entries(document: Document, path: Path) -> list[tuple[str, Any]]:
    if not isinstance(document.value, dict) or not document.value:
        raise RecipeError(
            f"{path} has no rules; write 'regular expression': new/name, one a line."
        )
    return list(document.value.items())


def _rule(pattern: str, value: Any) -> Rule:
    match value:
        case str(name):
            axes = None
        case {"to": str(name), "axes": str(text)} if len(value) == 2:
            axes = Rearrange.parse(text)
        case _:
            raise ValueError(
                f"{pattern!r} needs a new name, or both 'to' (a name) and 'axes' (such "
                "as 'o i -> i o')"
            )
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    for number in _REFERENCE.findall(name):
        if not 1 <= int(number) <= groups:
            raise ValueError(f"{name!r} refers to group {number} of {groups}")
    return Rule(pattern, name, axes)


def rename(
    checkpoint: Checkpoint, rules: Sequence[Rule], *, keep_rest: bool = False
) -> View:
    """Views a checkpoint with other names and orders of axes.

    Args:
        checkpoint: what to view.
        rules: of these the first that matches a whole name counts.
        keep_rest: whether leaves that no rule matches stay as they are.

    Raises:
        CheckpointError: lists the leaves that no rule matches; two leaves that would
            get one name; axes that do not fit a leaf.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    sources: dict[str, Source] = {}
    unmatched = []
    for name in checkpoint.leaves:
        for pattern, rule in compiled:
            if found := pattern.fullmatch(name):
                new, axes = found.expand(rule.name), rule.axes
                break
        else:
            unmatched.append(name)
            new, axes = name, None
        if new in sources:
            raise CheckpointError(
                f"{checkpoint.path}: leaves {sources[new].name!r} and {name!r} would "
                f"both be named {new!r}; make the rules tell them apart."
            )
        sources[new] = Source(checkpoint, name, axes)
    if unmatched and not keep_rest:
        more = f" and {len(unmatched) - 10} more" if unmatched[10:] else ""
        raise CheckpointError(
            f"{checkpoint.path}: no rule matches {', '.join(unmatched[:10])}{more}. "
            "Add rules for them, or keep their names with keep_rest."
        )
    return View(checkpoint.path, sources)
