"""Recipes: a merge as a YAML file, checked as a whole before anything is loaded.

```yaml
method: ties
base: checkpoints/start            # methods without a base need it for adapters only
models:
  - checkpoints/math               # a path, also of a LoRA adapter to the base, or
  - path: checkpoints/code         #   a path and a name
    name: code
options:                           # keyword parameters of the method
  density: 0.2
  weights: [1.0, 0.7]              # one per model
  scale:                           # rules on whole leaf paths, the first match wins
    ".*attention.*": 0.5
    ".*": 1.0
seed: 0                            # of methods that draw at random
dtype: bfloat16                    # of the floating-point leaves that are written
take:                              # leaves that are not merged: base, first or skip
  "lm_head.*": base
max_shard_size: 5GB
format: safetensors                # of the output: safetensors, orbax or msgpack
```

Relative paths start at the recipe file.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxmerge.checkpoints import FORMATS, MAX_SHARD_BYTES, is_adapter
from jaxmerge.recipe_syntax import (
    Place,
    Problem,
    RecipeError,
    raise_problems,
    read_yaml,
    size_in_bytes,
    unknown,
)
from jaxmerge.registry import Method, methods

DTYPES = ("bfloat16", "float16", "float32", "float64")
TAKE_ACTIONS = ("base", "first", "skip")

_KEYS = (
    *("method", "base", "models", "options"),
    *("seed", "dtype", "take", "max_shard_size", "format"),
)
_MERGEKIT_KEYS = {
    "base_model": "base",
    "merge_method": "method",
    "out_dtype": "dtype",
    "parameters": "options",
}
_IN_WORDS = {
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    str: "text",
    NoneType: "null",
}

_Misplaced = tuple[Place, str]
"""Where something is wrong in a recipe, and what."""


@dataclass(frozen=True)
class Recipe:
    """What is merged, and how.

    Attributes:
        method: the name of a registered method.
        models: name -> checkpoint of each model, or LoRA adapter to the base, in order.
            Methods that draw at random draw by name.
        base: the checkpoint of the common start, for methods that have one; for others
            only where `models` has LoRA adapters, which belong to it, or where the
            option `origin` is "base".
        options: keyword parameters of the method.
        seed: for methods that draw at random.
        dtype: one of `DTYPES` for all floating-point leaves that are written; None
            keeps that of the base (without a base: of the first model).
        take: rules from leaf paths to "base", "first" (the first model that has the
            leaf) or "skip", for leaves that are not merged.
        max_shard_bytes: values per file of the output.
        format: what the output is written as, one of `FORMATS`.
        text: what the recipe was read from.
        source: where it was read from, for messages.

    Raises:
        RecipeError: lists everything that is wrong.

    Example:
        >>> runs = {"math": "runs/math", "code": "runs/code"}
        >>> recipe = Recipe("average", runs, options={"weights": [1, 3]})
        >>> list(recipe.models)
        ['math', 'code']
    """

    method: str
    models: Mapping[str, str | os.PathLike[str]]
    base: str | os.PathLike[str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str | None = None
    take: Mapping[str, str] = field(default_factory=dict)
    max_shard_bytes: int = MAX_SHARD_BYTES
    format: str = FORMATS[0]
    text: str = field(default="", repr=False)
    source: str = "recipe"

    def __post_init__(self):
        problems = [Problem(None, message) for _, message in _problems(vars(self))]
        raise_problems(problems, self.source)


def parse_recipe(
    text: str, *, source: str = "recipe", directory: str | os.PathLike[str] = "."
) -> Recipe:
    """Checks the text of a recipe.

    Args:
        text: YAML.
        source: how messages call it.
        directory: where relative paths start.

    Raises:
        RecipeError: lists everything that is wrong, with line numbers.

    Example:
        >>> parse_recipe("method: average\\nmodels: [runs/math, runs/code]").models
        {'math': PosixPath('runs/math'), 'code': PosixPath('runs/code')}
    """
    document = read_yaml(text, source)
    if not isinstance(document.value, dict):
        raise RecipeError(f"{source}:1: a recipe is a mapping, such as `method: ties`")
    problems: list[_Misplaced] = []
    fields = _fields(document.value, Path(directory), problems)
    problems += _problems(fields)
    located = [Problem(document.line_of(place), text) for place, text in problems]
    raise_problems(document.problems + located, source)
    return Recipe(**fields, text=text, source=source)


# The schema: from plain values to the fields of a Recipe.


def _fields(
    recipe: dict[str, Any], directory: Path, problems: list[_Misplaced]
) -> dict[str, Any]:
    """The fields of `Recipe`, without those that are missing or of a wrong type."""
    for key in recipe.keys() - set(_KEYS):
        message = unknown("key", key, _KEYS)
        if key in _MERGEKIT_KEYS:
            message = f"unknown key {key!r}; here it is called {_MERGEKIT_KEYS[key]!r}"
        problems.append(((key,), message))
    for key in ("method", "models"):
        if key not in recipe:
            problems.append(((), f"the key {key!r} is missing"))

    def read(key: str, kind: type, expected: str) -> None:
        value = recipe.get(key)
        if type(value) is kind:
            fields[key] = value
        elif key in recipe:
            found = "nothing" if value is None else repr(value)
            problems.append(((key,), f"{key} must be {expected}, found {found}"))

    fields: dict[str, Any] = {}
    read("method", str, "the name of a method")
    read("base", str, "a path")
    read("models", list, "a list of paths")
    read("options", dict, "a mapping from options to values")
    read("seed", int, "a whole number")
    read("dtype", str, f"one of {', '.join(DTYPES)}")
    read("format", str, f"one of {', '.join(FORMATS)}")
    read("take", dict, "a mapping from patterns to actions")
    if "base" in fields:
        fields["base"] = _resolve(fields["base"], directory)
    elif "base" not in recipe:
        fields["base"] = None
    if "models" in fields:
        models = _models(fields["models"], directory, problems)
        if len(models) == len(fields["models"]):
            fields["models"] = models
        else:
            del fields["models"]
    method = methods().get(fields.get("method", ""))
    if "seed" in fields and method and not method.needs_key:
        message = f"seed has no effect: {method.name} draws nothing at random"
        problems.append((("seed",), f"{message}; remove it"))
    if "max_shard_size" in recipe:
        size = recipe["max_shard_size"]
        try:
            fields["max_shard_bytes"] = size_in_bytes(size)
        except ValueError as error:
            problems.append((("max_shard_size",), f"max_shard_size is {error}"))
    return fields


def _models(
    entries: list[Any], directory: Path, problems: list[_Misplaced]
) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for i, entry in enumerate(entries):
        place = ("models", i)
        if isinstance(entry, str):
            entry = {"path": entry}
        if not isinstance(entry, dict):
            message = f"models[{i}] must be a path, or a mapping with path and name"
            problems.append((place, f"{message}, found {entry!r}"))
            continue
        for key in entry.keys() - {"path", "name"}:
            message = unknown("key", key, ("path", "name"))
            problems.append(((*place, key), f"models[{i}]: {message}"))
        path, name = entry.get("path"), entry.get("name", "")
        if not isinstance(path, str):
            problems.append((place, f"models[{i}] needs a path, found {path!r}"))
            continue
        if not isinstance(name, str):
            message = f"the name of models[{i}] must be text, found {name!r}"
            problems.append(((*place, "name"), f"{message}; put it in quotes"))
            continue
        resolved = _resolve(path, directory)
        name = name or resolved.name
        if name in models:
            message = f"models[{i}] is the second that is named {name!r}"
            problems.append((place, f"{message}; write `path:` and a distinct `name:`"))
        models[name] = resolved
    return models


def _resolve(path: str, directory: Path) -> Path:
    return Path(os.path.normpath(directory / Path(path).expanduser()))


# Meaning: what holds for a recipe from YAML and from Python.


def _problems(fields: Mapping[str, Any]) -> Iterator[_Misplaced]:
    """What is wrong with the fields of a recipe; those not there are not judged."""
    known = methods()
    if "method" in fields and fields["method"] not in known:
        yield ("method",), unknown("method", fields["method"], list(known))
    if method := known.get(fields.get("method", "")):
        yield from _method_problems(method, fields)
        yield from _option_problems(method, fields)
    for pattern, action in fields.get("take", {}).items():
        yield from _pattern_problems(("take", pattern), pattern)
        if action not in TAKE_ACTIONS:
            yield ("take", pattern), unknown("take action", action, TAKE_ACTIONS)
        elif action == "base" and fields.get("base", "") is None:
            message = "take: base, but the recipe has no base; take first or skip"
            yield ("take", pattern), message
    dtype = fields.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        yield ("dtype",), unknown("dtype", dtype, DTYPES)
    if fields.get("format", FORMATS[0]) not in FORMATS:
        yield ("format",), unknown("format", fields["format"], FORMATS)
    if not 0 <= fields.get("seed", 0) < 2**32:
        yield ("seed",), f"seed is {fields['seed']}; it must be in [0, 2**32)"
    if fields.get("max_shard_bytes", 1) < 1:
        yield ("max_shard_size",), "the largest size of a shard must be positive"


def _method_problems(method: Method, fields: Mapping[str, Any]) -> Iterator[_Misplaced]:
    if method.needs_statistics:
        message = f"method {method.name} needs statistics of data, which recipes"
        yield ("method",), f"{message} cannot give; call jaxmerge.{method.name}"
    uses_base = method.uses_base(fields.get("options", {}))
    if uses_base and fields.get("base", "") is None:
        yield ("method",), f"method {method.name} needs a base; add the key 'base'"
    if (
        not uses_base
        and fields.get("base") is not None
        and not any(
            is_adapter(Path(path)) for path in fields.get("models", {}).values()
        )
    ):
        message = f"method {method.name} has no base; remove it, or list it in 'models'"
        yield ("base",), f"{message} (only LoRA adapters need one)"
    if "models" not in fields:
        return
    count = len(fields["models"])
    if count == 0:
        yield ("models",), "models is empty; list at least one checkpoint"
    if method.max_models is not None and count > method.max_models:
        message = f"method {method.name} merges at most {method.max_models} models"
        yield ("models",), f"{message}, found {count}"


def _option_problems(method: Method, fields: Mapping[str, Any]) -> Iterator[_Misplaced]:
    options = fields.get("options", {})
    allowed = method.options
    for name, parameter in allowed.items():
        if parameter.required and name not in options:
            yield ("options",), f"method {method.name} needs the option {name!r}"
    hints = get_type_hints(method.function)
    models = len(fields["models"]) if "models" in fields else None
    for name, value in options.items():
        place = ("options", name)
        if name not in allowed:
            yield place, unknown("option", name, list(allowed), of=method.name)
        elif name == "origin" and value not in (None, "base"):
            yield place, f"option 'origin' is {value!r}; it must be 'base'"
        elif not _fits(value, hints.get(name, Any)):
            expected = _expected(hints[name])
            yield place, f"option {name!r} is {value!r}; it must be {expected}"
        for pattern in rules_in(value):
            yield from _pattern_problems((*place, pattern), pattern)
        if isinstance(value, list | tuple) and len(value) != (models or len(value)):
            message = f"option {name!r} has {len(value)} values for {models} models"
            yield place, f"{message}; give one number or one per model"


def rules_in(option: Any) -> Iterator[str]:
    """The patterns of all rules in the value of an option, also those per model."""
    if isinstance(option, Mapping):
        yield from option
        option = list(option.values())
    if isinstance(option, list | tuple):
        for value in option:
            yield from rules_in(value)


def _pattern_problems(place: Place, pattern: str) -> Iterator[_Misplaced]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield place, f"{pattern!r} is no valid regular expression: {error}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is one that a parameter annotated `hint` takes."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(item, inner[1]) for item in value.values()
        )
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(
            _fits(item, inner[0]) for item in value
        )
    if hint is float:
        return type(value) in (int, float)
    if getattr(hint, "__name__", "") == "Array":  # Of jax, which takes time to import.
        return isinstance(value, hint)
    return hint is Any or type(value) is hint


def _expected(hint: Any) -> str:
    """Says in words what `_fits` accepts."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return ", or ".join(filter(None, map(_expected, inner)))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin is not None and issubclass(origin, Mapping):
        return "rules from patterns to values"
    if origin is not None and issubclass(origin, Sequence):
        return "a list of one per model"
    return _IN_WORDS.get(hint, "")
