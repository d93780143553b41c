"""Recipes from files: this library's, mergekit's, and those that reports repeat."""

import json
import os
from pathlib import Path

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
        The recipe, and the SHA-256 of the inputs then: `sha256` of `merge_checkpoints`.

    Raises:
        OSError: the file cannot be read.
        RecipeError: it is no such report, or this version reads its recipe otherwise.
    """
    path = Path(path)
    try:
        report = json.loads(_read(path, "a report is JSON"))
        parts, text = report["parts"], report["recipe"]
        sha256, directory = report["sha256"], report["directory"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path} is no report of a merge ({error!r}); it is called "
            "jaxmerge_report.json, next to the weights."
        ) from error
    source = str(path)
    if text is not None and is_mergekit(read_yaml(text, source).value):
        return parse_mergekit(text, source=source, directory=directory), sha256
    output = {name: report[name] for name in ("max_shard_bytes", "format")}
    return Recipe(**parts[0], **output, text=text or "", source=source), sha256


def _read(path: Path, expected: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: {expected} in UTF-8, but {error}; is this the right file?"
        ) from error
