"""What becomes of each leaf in a merge of checkpoints, decided from headers alone."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxmerge.checkpoints import (
    FORMATS,
    MAX_SHARD_BYTES,
    Checkpoint,
    LeafInfo,
    open_checkpoint,
)
from jaxmerge.checkpoints.views import stored
from jaxmerge.recipe_syntax import MergeError
from jaxmerge.recipes import Recipe, rules_in
from jaxmerge.registry import Method, methods
from jaxmerge.tree import first_match, is_factor, is_float

_SHOWN = 20
_FACTORS = (
    "factors of LoRA updates, of which only products can be merged (name the directory "
    "of the adapter, with its adapter_config.json, and a base)"
)


class Inputs(NamedTuple):
    """The checkpoints of a recipe, opened; `models` by name.

    A method without a base has one here only if models are adapters to it, or if it is
    the origin.
    """

    base: Checkpoint | None
    models: dict[str, Checkpoint]

    @property
    def like(self) -> Checkpoint:
        """The one that the output is like: the base, without one the first model."""
        return next(iter(self.models.values())) if self.base is None else self.base

    @property
    def labelled(self) -> dict[str, Checkpoint]:
        """All of them, by what messages call them."""
        base = {} if self.base is None else {"base": self.base}
        return base | {
            f"models[{i}] ({name})": model
            for i, (name, model) in enumerate(self.models.items())
        }


class Step(NamedTuple):
    """What becomes of one leaf.

    Attributes:
        treatment: "merged", "copied: integer", "taken: base", "taken: first" or
            "skipped".
        source: the checkpoint that it is read from; of a merged or skipped leaf, the
            first that has it.
        out: shape and dtype to write, unless it is skipped.
    """

    treatment: str
    source: Checkpoint
    out: LeafInfo


class Part(NamedTuple):
    """Leaves that one method makes of one set of checkpoints.

    Attributes:
        recipe: the method, its options, and the names of the models.
        inputs: the checkpoints, with the names that leaves have in the output.
        steps: what becomes of each leaf.
    """

    recipe: Recipe
    inputs: Inputs
    steps: dict[str, Step]

    @property
    def method(self) -> Method:
        """The method of the recipe."""
        return methods()[self.recipe.method]

    @property
    def merged(self) -> list[str]:
        """The names of the leaves that the method makes."""
        return [n for n, step in self.steps.items() if step.treatment == "merged"]

    @property
    def written(self) -> dict[str, LeafInfo]:
        """Shape and dtype of each leaf of the output."""
        steps = self.steps.items()
        return {n: step.out for n, step in steps if step.treatment != "skipped"}

    def shapes(self, checkpoint: Checkpoint) -> dict[str, jax.ShapeDtypeStruct]:
        """The leaves that are merged, as a checkpoint has them."""
        leaves = checkpoint.leaves
        return {name: jax.ShapeDtypeStruct(*leaves[name]) for name in self.merged}


class Plan(NamedTuple):
    """An output that is made part by part.

    Attributes:
        parts: which together have each leaf of the output once.
        sidecars: the files beside the weights by name: their bytes, or what to copy.
        max_shard_bytes: values per file of weights.
        format: what the output is written as, one of `FORMATS`.
        text: what the recipe was read from.
    """

    parts: list[Part]
    sidecars: dict[str, bytes | Path]
    max_shard_bytes: int = MAX_SHARD_BYTES
    format: str = FORMATS[0]
    text: str = ""

    @property
    def written(self) -> dict[str, LeafInfo]:
        """Shape and dtype of each leaf of the output."""
        return {n: info for part in self.parts for n, info in part.written.items()}

    def stored(self) -> list[Checkpoint]:
        """The checkpoints on disk that parts are read from, each once."""
        views = [v for part in self.parts for v in part.inputs.labelled.values()]
        by_path = {each.path: each for view in views for each in stored(view)}
        return list(by_path.values())


def open_inputs(recipe: Recipe) -> Inputs:
    """Opens all checkpoints of a recipe; adapters as the models they make of its base.

    Raises:
        CheckpointError: one is missing or damaged, or an adapter does not fit the base.
    """
    base = None if recipe.base is None else open_checkpoint(recipe.base)
    models = {n: open_checkpoint(path, base) for n, path in recipe.models.items()}
    return Inputs(base, models)


def plan_leaves(recipe: Recipe, inputs: Inputs) -> dict[str, Step]:
    """Decides what becomes of each leaf, in the order of the base.

    Raises:
        MergeError: leaves that cannot be merged, or rules that match no leaf.
    """
    checkpoints = inputs.labelled
    names = dict.fromkeys(
        name for checkpoint in checkpoints.values() for name in checkpoint.leaves
    )
    _check_rules(recipe, names)
    steps, unlike = {}, {}
    for name in names:
        infos = {
            label: checkpoint.leaves[name]
            for label, checkpoint in checkpoints.items()
            if name in checkpoint.leaves
        }
        action = _taken(recipe.take, name)
        if action is None and is_factor(name):
            unlike[name] = _FACTORS
        elif action is None and (reason := difference(infos, checkpoints)):
            unlike[name] = reason
        elif action == "base" and "base" not in infos:
            unlike[name] = "to be taken from the base, which has not got it"
        elif action == "first" and infos.keys() == {"base"}:
            unlike[name] = "to be taken from the first model that has it, but none has"
        else:
            steps[name] = _step(recipe, inputs, name, action)
    if unlike:
        raise MergeError(_explain(recipe, inputs, names, unlike))
    if not any(step.treatment == "merged" for step in steps.values()):
        raise MergeError(f"{recipe.source}: no floating-point leaf is left to merge")
    return steps


def _step(recipe: Recipe, inputs: Inputs, name: str, action: str | None) -> Step:
    candidates = (
        inputs.models.values() if action == "first" else inputs.labelled.values()
    )
    source = next(each for each in candidates if name in each.leaves)
    info = source.leaves[name]
    if action == "skip":
        return Step("skipped", source, info)
    if is_float(info) and recipe.dtype is not None:
        info = info._replace(dtype=np.dtype(recipe.dtype))
    if action is not None:
        return Step(f"taken: {action}", source, info)
    return Step("merged" if is_float(info) else "copied: integer", source, info)


def _taken(take: Mapping[str, str], name: str) -> str | None:
    try:
        return first_match(take, name)
    except KeyError:
        return None


def _check_rules(recipe: Recipe, names: Collection[str]) -> None:
    """Checks that every rule matches a leaf: one that does not is likely a typo."""
    rules = {"take": list(recipe.take)} | {
        f"option {option}": list(rules_in(value))
        for option, value in recipe.options.items()
    }
    for where, patterns in rules.items():
        _check_matches(f"{recipe.source}: {where}", patterns, names)


def check_placed(plan: Plan, rules: Collection[str]) -> None:
    """Checks that every rule on how leaves lie on a mesh matches one that is written.

    Raises:
        MergeError: one does not.
    """
    where = f"{plan.parts[0].recipe.source}: how leaves lie on the mesh"
    _check_matches(where, rules, plan.written)


def _check_matches(
    where: str, patterns: Collection[str], names: Collection[str]
) -> None:
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise MergeError(
                f"{where}: the rule {pattern!r} matches no leaf. A rule must match the "
                f"whole path, such as {next(iter(names))!r}."
            )


def difference(
    infos: Mapping[str, LeafInfo], checkpoints: Mapping[str, Checkpoint]
) -> str:
    """Why a leaf cannot be merged; empty if it can."""
    if missing := [label for label in checkpoints if label not in infos]:
        return f"in {', '.join(infos)}, but not in {', '.join(missing)}"
    if len({info.shape for info in infos.values()}) > 1:
        shapes = (f"{label} {list(info.shape)}" for label, info in infos.items())
        return f"of different shapes: {', '.join(shapes)}"
    if len({is_float(info) for info in infos.values()}) > 1:
        dtypes = (f"{label} {info.dtype}" for label, info in infos.items())
        return f"of different kinds: {', '.join(dtypes)}"
    if any(info.dtype.kind == "c" for info in infos.values()):
        return "complex, which no method merges"
    if any(is_float(info) and info.dtype.itemsize == 1 for info in infos.values()):
        return "float8, which is meaningless without its scales: convert to bfloat16"
    return ""


def _explain(
    recipe: Recipe, inputs: Inputs, names: Collection[str], unlike: Mapping[str, str]
) -> str:
    """Lists leaves that cannot be merged by reason, with the rules that would help."""
    groups: dict[str, list[str]] = {}
    for name in list(unlike)[:_SHOWN]:
        groups.setdefault(unlike[name], []).append(name)
    lines = [f"{recipe.source}: {len(unlike)} of {len(names)} leaves cannot be merged."]
    for reason, members in groups.items():
        lines += [f"  {reason}:", *(f"    {name}" for name in members)]
    if len(unlike) > _SHOWN:
        lines.append(f"  and {len(unlike) - _SHOWN} more")
    lines += [
        "To leave them unmerged, say in the recipe whose to take (base, first, skip):",
        "take:",
        *_take_rules(inputs, names, unlike),
    ]
    return "\n".join(lines)


def _take_rules(
    inputs: Inputs, names: Collection[str], unlike: Mapping[str, str]
) -> Iterator[str]:
    """YAML rules that match the leaves in `unlike` and no others."""
    any_number = {name: re.sub(r"\d+", r"\\d+", re.escape(name)) for name in names}
    # Layers share a rule, unless it would also take leaves that can be merged.
    too_wide = {any_number[name] for name in names if name not in unlike}
    rules = {}
    for name in unlike:
        wide = any_number[name]
        in_base = inputs.base is not None and name in inputs.base.leaves
        pattern = re.escape(name) if wide in too_wide else wide
        rules.setdefault(pattern, "base" if in_base else "first")
    for pattern, action in list(rules.items())[:_SHOWN]:
        quoted = pattern.replace("'", "''")
        yield f"  '{quoted}': {action}"
    if len(rules) > _SHOWN:
        yield f"  # and {len(rules) - _SHOWN} more"
