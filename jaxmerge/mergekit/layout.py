"""Which leaves an output has, and which leaves of which models each is made of."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxmerge.checkpoints import Checkpoint, CheckpointError
from jaxmerge.mergekit.embeddings import is_embedding, is_head
from jaxmerge.mergekit.layers import Layers, find_layers, is_input
from jaxmerge.mergekit.recipe import MergekitRecipe, ModelRef, Slice, SliceSource
from jaxmerge.mergekit.settings import has_gradient
from jaxmerge.recipe_syntax import RecipeError


class Opened(NamedTuple):
    """A model that was opened.

    Attributes:
        label: its name in messages and reports, and what draws at random are keyed by.
        checkpoint: its leaves.
        stored: the checkpoint without an adapter, whose dtypes the model has. (Leaves
            that an adapter changes are in float32 until they are merged.)
        config: its config.json; empty if it has none.
    """

    label: str
    checkpoint: Checkpoint
    stored: Checkpoint
    config: Mapping[str, Any]


Models = Mapping[ModelRef, Opened]


class Origin(NamedTuple):
    """A leaf of a model that an output leaf is made of.

    Attributes:
        source: the model, with its settings.
        name: the leaf there.
    """

    source: SliceSource
    name: str


class OutputLeaf(NamedTuple):
    """A leaf of the output.

    Attributes:
        name: its path.
        slice: where in the recipe it is from.
        origins: what it is made of, one for each source of the slice.
        position: where among the layers of the slice it is, from 0 to 1; 0 outside.
    """

    name: str
    slice: Slice
    origins: tuple[Origin, ...]
    position: float


class Layout(NamedTuple):
    """All leaves of an output.

    Attributes:
        leaves: in order.
        layers: for each layer of a recipe with slices, the model that it is named and
            configured after, and its number there; else empty.
    """

    leaves: list[OutputLeaf]
    layers: list[tuple[ModelRef, int]]


def lay_out(recipe: MergekitRecipe, models: Models) -> Layout:
    """The leaves of the output of a recipe.

    Raises:
        CheckpointError: a model has no layers to slice, or not so many.
        RecipeError: leaves that not all models have.
    """
    if recipe.slices[0].sources[0].layers is None:
        layout = Layout(list(_whole(recipe.slices[0], models)), [])
    else:
        layout = _sliced(recipe, models)
    leaves = [leaf._replace(origins=_untie(leaf, models)) for leaf in layout.leaves]
    _check_present(recipe, leaves, models)
    return layout._replace(leaves=leaves)


def _whole(slice_: Slice, models: Models) -> Iterator[OutputLeaf]:
    ordered = [models[source.model] for source in slice_.sources]
    if slice_.base is not None:
        ordered.insert(0, models[slice_.base])
    settings = [*slice_.levels, *(source.parameters for source in slice_.sources)]
    layers = None
    if any(has_gradient(value) for level in settings for value in level.values()):
        first = ordered[0]
        layers = find_layers(first.checkpoint.leaves, first.config, first.label)
    for name in _all_names(ordered):
        origins = tuple(Origin(source, name) for source in slice_.sources)
        place = layers.split(name) if layers else None
        position = _position(place[0], layers.depth) if place and layers else 0.0
        yield OutputLeaf(name, slice_, origins, position)


def _sliced(recipe: MergekitRecipe, models: Models) -> Layout:
    """Leaves in front of the layers, the layers slice by slice, and those behind.

    What is in front comes from the models of the first slice, what is behind from
    those of the last one, as in mergekit.
    """
    used = {source.model for each in recipe.slices for source in each.sources}
    layers = {
        ref: find_layers(models[ref].checkpoint.leaves, models[ref].config, str(ref))
        for ref in models
        if ref in used
    }
    for slice_ in recipe.slices:
        for source in slice_.sources:
            _check_range(recipe, source, layers[source.model])

    front = _outside(recipe.slices[0], models, layers, front=True)
    behind = _outside(recipe.slices[-1], models, layers, front=False)
    named_after = layers[recipe.slices[0].sources[0].model]
    inner = {ref: _by_layer(models[ref], own) for ref, own in layers.items()}
    inside: list[OutputLeaf] = []
    taken: list[tuple[ModelRef, int]] = []
    for slice_ in recipe.slices:
        spans = [source.span for source in slice_.sources]
        for offset, numbers in enumerate(zip(*spans, strict=True)):
            places = list(zip(slice_.sources, numbers, strict=True))
            rests = (r for s, number in places for r in inner[s.model][number])
            inside += [
                OutputLeaf(
                    named_after.name(len(taken), rest),
                    slice_,
                    tuple(Origin(s, layers[s.model].name(n, rest)) for s, n in places),
                    _position(offset, len(spans[0])),
                )
                for rest in dict.fromkeys(rests)
            ]
            taken.append((slice_.sources[0].model, numbers[0]))
    return Layout([*front, *inside, *behind], taken)


def _by_layer(model: Opened, layers: Layers) -> dict[int, list[str]]:
    """The paths of leaves within each layer."""
    rests: dict[int, list[str]] = {}
    for name in model.checkpoint.leaves:
        if place := layers.split(name):
            rests.setdefault(place[0], []).append(place[1])
    return rests


def _outside(
    slice_: Slice, models: Models, layers: Mapping[ModelRef, Layers], front: bool
) -> Iterator[OutputLeaf]:
    ordered = [models[source.model] for source in slice_.sources]
    apart = [layers[source.model] for source in slice_.sources]
    for name in _all_names(ordered):
        if is_input(name) == front and not any(each.split(name) for each in apart):
            origins = tuple(Origin(source, name) for source in slice_.sources)
            yield OutputLeaf(name, slice_, origins, 0.0)


def _position(layer: int, count: int) -> float:
    return layer / (count - 1) if count > 1 else 1.0


def _check_range(recipe: MergekitRecipe, source: SliceSource, layers: Layers) -> None:
    if source.layers and source.layers[1] > layers.depth:
        raise CheckpointError(
            f"{recipe.source}: layer_range {list(source.layers)} of {source.model}, "
            f"which has {layers.depth} layers; the last number may be {layers.depth}."
        )


def _all_names(models: Iterable[Opened]) -> list[str]:
    return list(dict.fromkeys(n for model in models for n in model.checkpoint.leaves))


def _untie(leaf: OutputLeaf, models: Models) -> tuple[Origin, ...]:
    """Origins of a head, which are the embeddings in a model that ties both."""

    def untied(origin: Origin) -> Origin:
        leaves = models[origin.source.model].checkpoint.leaves
        if origin.name in leaves:
            return origin
        embeddings = [n for n in leaves if is_embedding(n)]
        return origin._replace(name=embeddings[0]) if len(embeddings) == 1 else origin

    if not is_head(leaf.name):
        return leaf.origins
    return tuple(untied(origin) for origin in leaf.origins)


def _check_present(
    recipe: MergekitRecipe, leaves: Iterable[OutputLeaf], models: Models
) -> None:
    missing: dict[str, list[str]] = {}
    for leaf in leaves:
        lacking = [
            models[origin.source.model].label
            for origin in leaf.origins
            if origin.name not in models[origin.source.model].checkpoint.leaves
        ]
        if lacking:
            missing.setdefault(", ".join(lacking), []).append(leaf.name)
    if missing:
        lines = [f"{recipe.source}: leaves that not all models have cannot be merged."]
        for lacking, names in missing.items():
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"  not in {lacking}: {', '.join(names[:5])}{more}")
        lines.append(
            "Take them out of the models that have them, or write the recipe with the "
            "keys of jaxmerge, where `take` says what becomes of them."
        )
        raise RecipeError("\n".join(lines))
