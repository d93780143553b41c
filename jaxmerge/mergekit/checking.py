"""What holds for a recipe of mergekit as a whole: its base, its models, its values."""

from collections.abc import Iterator

from jaxmerge.mergekit.conventions import Parameter
from jaxmerge.mergekit.recipe import MergekitRecipe, Slice

_APART = ("start", "origin")


def problems_of(recipe: MergekitRecipe) -> Iterator[tuple[int | None, str]]:
    """What is wrong with a recipe: the number of a slice, or None, and a message."""
    if recipe.tokenizer and recipe.tokenizer.source == "base" and not recipe.base:
        yield None, "the tokenizer is that of the base, but there is no base_model"
    for i, slice_ in enumerate(recipe.slices):
        if recipe.convention.needs_base and slice_.base is None:
            yield i, f"{recipe.method} needs a base; add the key 'base_model'"
            continue
        for message in _model_problems(recipe, slice_):
            yield i, message
        for parameter in recipe.convention.parameters:
            if parameter.default is None:
                for message in _value_problems(recipe, slice_, parameter):
                    yield i, message


def _model_problems(recipe: MergekitRecipe, slice_: Slice) -> Iterator[str]:
    convention = recipe.convention
    models = [source.model for source in slice_.sources]
    if convention.base != "member" and slice_.base not in (None, *models):
        yield (
            f"the base_model {slice_.base} is not among the sources of a slice; list "
            "it there with its layer_range"
        )
    count = len(recipe.merged(slice_))
    least, most = convention.models
    if count < least or count > (count if most is None else most):
        bound = f"exactly {least}" if least == most else f"at least {least}"
        noun = "model" if least == 1 else "models"
        besides = " besides the base_model" if convention.base in _APART else ""
        yield f"{recipe.method} merges {bound} {noun}{besides}, found {count}"


def _value_problems(
    recipe: MergekitRecipe, slice_: Slice, parameter: Parameter
) -> Iterator[str]:
    """Says where a required parameter has no setting on any level."""
    if any(parameter.name in level for level in slice_.levels):
        return
    if parameter.of == "merge":
        yield (
            f"{recipe.method} needs the parameter {parameter.name!r}; give it under "
            "`parameters`"
        )
        return
    for source in recipe.merged(slice_):
        if parameter.name not in source.parameters:
            too = (
                f": {recipe.method} averages the base_model, too; give it one, or "
                "leave out the base_model"
            )
            yield (
                f"{source.model} needs the parameter {parameter.name!r}"
                f"{too if source.model == slice_.base else ''}"
            )
