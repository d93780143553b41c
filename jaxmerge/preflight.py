"""All that would stop a merge, at once: what a merge itself says error by error."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from jaxmerge.checkpoints import CheckpointError, open_checkpoint
from jaxmerge.checkpoints.files import lack_of_space
from jaxmerge.mergekit import MergekitRecipe
from jaxmerge.merging import resolve
from jaxmerge.parts import PartMerge, Rules, is_wide
from jaxmerge.planning import (
    Inputs,
    MergeError,
    Part,
    Plan,
    Step,
    check_placed,
    difference,
    plan_leaves,
)
from jaxmerge.recipe_syntax import RecipeError
from jaxmerge.recipes import Recipe
from jaxmerge.streaming import precision
from jaxmerge.tree import is_float


def checked(
    recipe: Recipe | MergekitRecipe,
    out: str | os.PathLike[str] | None,
    memory: int,
    mesh: AbstractMesh | None,
    rules: Rules,
) -> tuple[Plan, list[PartMerge]]:
    """What a merge would do, after everything that can be wrong was looked for.

    Args:
        recipe: what to merge, and how.
        out: the directory to create, if that is to be checked.
        memory: about how many bytes values may take.
        mesh: the devices to merge on.
        rules: how leaves lie on them.

    Returns:
        What becomes of each leaf, and the parts, on their way.

    Raises:
        MergeError: everything that would stop the merge, a paragraph each.
    """
    errors: list[str] = []
    if out is not None and os.path.lexists(out):
        errors.append(f"{out} exists already; remove it or choose another name.")
    plan = _resolved(recipe, rules, errors)
    if plan is None:
        raise MergeError("\n".join(errors))
    if out is not None:
        needed = sum(info.nbytes for info in plan.written.values())
        errors += filter(None, [lack_of_space(Path(out).absolute(), needed)])
    merges = []
    for part in plan.parts:
        try:
            merges.append(PartMerge(part, memory, mesh, rules))
        except MergeError as error:
            errors += dict.fromkeys([str(error), *_option_errors(part)])
    if errors:
        raise MergeError("\n".join(errors))
    return plan, merges


def _resolved(
    recipe: Recipe | MergekitRecipe, rules: Rules, errors: list[str]
) -> Plan | None:
    """What becomes of each leaf, as far as what is wrong allows to say it."""
    if isinstance(recipe, MergekitRecipe):
        try:
            plan = resolve(recipe)
            check_placed(plan, rules)
        except (CheckpointError, MergeError, OSError, RecipeError) as error:
            errors.append(str(error))
            return None
        return plan
    inputs = _open_inputs(recipe, errors)
    if inputs is None:
        return None
    try:
        plan = Plan([Part(recipe, inputs, plan_leaves(recipe, inputs))], {})
        check_placed(plan, rules)
    except MergeError as error:
        errors.append(str(error))
        plan = Plan([Part(recipe, inputs, _those_alike(inputs))], {})
    return plan


def _open_inputs(recipe: Recipe, errors: list[str]) -> Inputs | None:
    base, models = None, {}
    for name, path in {None: recipe.base, **recipe.models}.items():
        if path is None:
            continue
        try:
            opened = open_checkpoint(path, base)
        except (CheckpointError, OSError) as error:
            errors.append(str(error))
            continue
        if name is None:
            base = opened
        else:
            models[name] = opened
    complete = len(models) == len(recipe.models)
    complete &= base is not None or recipe.base is None
    return Inputs(base, models) if complete else None


def _those_alike(inputs: Inputs) -> dict[str, Step]:
    """The leaves that could be merged if others did not stand in the way."""
    checkpoints = inputs.labelled
    steps = {}
    for name, info in inputs.like.leaves.items():
        found = {k: x.leaves[name] for k, x in checkpoints.items() if name in x.leaves}
        if is_float(info) and not difference(found, checkpoints):
            steps[name] = Step("merged", inputs.like, info)
    return steps


def _option_errors(part: Part) -> Iterator[str]:
    """What the method says to each option without the others."""
    options = part.recipe.options
    required = [n for n, p in part.method.options.items() if p.required]
    needed = {name: options[name] for name in required if name in options}
    base = None if part.inputs.base is None else part.shapes(part.inputs.base)
    models = [part.shapes(model) for model in part.inputs.models.values()]
    for name in options:
        tried = needed | {name: options[name]}
        call = part.method.bind(tried, part.recipe.seed, list(part.recipe.models))
        try:
            with precision(is_wide(part)):
                jax.eval_shape(call, base, models)
        except ValueError as error:
            yield f"{part.recipe.source}: {error}"
