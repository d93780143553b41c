"""Recipes from files: this library's, mergekit's, and those that reports repeat."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmerge.mergekit import MergekitRecipe, is_mergekit, parse_mergekit
from jaxmerge.recipe_syntax import RecipeError, read_yaml
from jaxmerge.recipes import Recipe, parse_recipe


def load_recipe(path: str | os.PathLike[str]) -> Recipe | MergekitRecipe:
    """Reads and checks a recipe file: of this library, or of mergekit.

    Relative paths start at the file; in recipes of mergekit, as there, where the
    process runs.

    Raises:
        OSError: the file cannot be read.
        RecipeError: lists everything that is wrong, with line numbers.
    """
    path = Path(path)
    text = _read(path, "a recipe is YAML")
    if is_mergekit(read_yaml(text, str(path)).value):
        return parse_mergekit(text, source=str(path))
    return parse_recipe(text, source=str(path), directory=path.parent)


def recipe_of_report(
    path: str | os.PathLike[str],
) -> tuple[Recipe | MergekitRecipe, dict[str, dict[str, str]]]:
    """The recipe of a merge, from the report that it left next to its weights.

    Returns:
        The recipe, and the BLAKE3 of the inputs then: `blake3` of `merge_checkpoints`.

    Raises:
        OSError: the file cannot be read.
        RecipeError: it is no such report, or this version reads its recipe otherwise.
    """
    path = Path(path)
    try:
        report = json.loads(_read(path, "a report is JSON"))
        made = {key: report[key] for key in _REPORTED}
        _check_types(made, _REPORTED)
        _check_types(made["blake3"], dict.fromkeys(made["blake3"], dict))
        return _recipe_in(made, str(path)), made["blake3"]
    except RecipeError:
        raise
    except (
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise RecipeError(
            f"{path} is damaged, or no report of a merge by this version ({error!r}). "
            "Reports are called jaxmerge_report.json, next to the weights."
        ) from error


def _recipe_in(made: Mapping[str, Any], source: str) -> Recipe | MergekitRecipe:
    text = made["recipe"] or ""
    if is_mergekit(read_yaml(text, source).value):
        return parse_mergekit(text, source=source, directory=made["directory"])
    if len(made["parts"]) != 1:
        raise ValueError(f"{len(made['parts'])} parts without a recipe of mergekit")
    (part,) = made["parts"]
    _check_types(part, _PART)
    _check_types(part["models"], dict.fromkeys(part["models"], str))
    output = {key: made[key] for key in ("max_shard_bytes", "format")}
    return Recipe(**part, **output, text=text, source=source)


# What of a report, and of a part of it, makes the merge again.
_REPORTED = {
    "recipe": str | None,
    "directory": str,
    "parts": list,
    "format": str,
    "max_shard_bytes": int,
    "blake3": dict,
}
_PART = {
    "method": str,
    "options": dict,
    "seed": int,
    "dtype": str | None,
    "take": dict,
    "base": str | None,
    "models": dict,
}


def _check_types(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if not isinstance(value, kinds[name]):
            raise TypeError(f"{name} is {value!r:.60}")


def _read(path: Path, expected: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: {expected} in UTF-8, but {error}; is this the right file?"
        ) from error
