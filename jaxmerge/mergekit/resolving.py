"""What a recipe of mergekit means: parts for the engine, and the files beside them.

Each part is a merge in the terms of this library, of views of the models whose leaves
have the names and shapes of the output: slices, renamed layers and vocabularies are
gone. Leaves are in one part if one method merges them, of the same models, with options
that differ in numbers only; these become rules on leaf paths.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.checkpoints import (
    Checkpoint,
    LeafInfo,
    open_checkpoint,
)
from jaxmerge.checkpoints.files import as_json
from jaxmerge.checkpoints.views import Source, View
from jaxmerge.mergekit import embeddings, sidecars, tokens
from jaxmerge.mergekit.conventions import Parameter, Values
from jaxmerge.mergekit.layers import find_layers
from jaxmerge.mergekit.layout import Layout, Models, Opened, OutputLeaf, lay_out
from jaxmerge.mergekit.recipe import (
    MergekitRecipe,
    ModelRef,
    SliceSource,
    TokenizerSpec,
)
from jaxmerge.mergekit.settings import as_rules, value_of
from jaxmerge.planning import Inputs, Part, Plan, Step, difference
from jaxmerge.recipe_syntax import RecipeError
from jaxmerge.recipes import Recipe
from jaxmerge.tree import common_dtype, is_float


def resolve(recipe: MergekitRecipe) -> Plan:
    """Opens the models of a recipe and decides what becomes of each leaf.

    Arithmetic is in float32 whatever `dtype` says, and is rounded once, to `out_dtype`
    or `dtype`, or without both to the dtype of the base, or of the widest model. Where
    vocabularies differ and the recipe says nothing of tokenizers, embeddings are cut
    to the rows of the base that task vectors start from, or to those that all have.

    Raises:
        CheckpointError: a model is missing or damaged, or lacks layers or tokens that
            the recipe names.
        RecipeError: leaves that cannot be merged, or values that a leaf lacks.
    """
    models = _open(recipe.models)
    layout = lay_out(recipe, models)
    vocabulary = _tokens(recipe, models)
    made = [_made(recipe, models, leaf, vocabulary) for leaf in layout.leaves]
    if vocabulary is not None and not any(each.is_vocabulary for each in made):
        raise RecipeError(
            f"{recipe.source}: no leaf has one row per token, so that there is nothing "
            "to do for the tokenizer; leave the key out."
        )
    parts = _parts(recipe, models, made)
    facts = _facts(models, layout, made, parts)
    files = _files(recipe, models, facts, vocabulary)
    return Plan(parts, files, text=recipe.text)


def _open(refs: Iterable[ModelRef]) -> dict[ModelRef, Opened]:
    models: dict[ModelRef, Opened] = {}
    labels: set[str] = set()
    for ref in refs:
        name = ref.path.name if ref.lora is None else f"{ref.path.name}+{ref.lora.name}"
        taken = sum(label.partition("#")[0] == name for label in labels)
        label = f"{name}#{taken + 1}" if taken else name
        labels.add(label)
        stored = checkpoint = open_checkpoint(ref.path)
        if ref.lora is not None:
            checkpoint = open_checkpoint(ref.lora, stored)
        config = sidecars.read_config(stored)
        models[ref] = Opened(label, checkpoint, stored, config)
    return models


# Tokens.


class _Tokens(NamedTuple):
    """What is known of tokens, if the recipe says what becomes of them.

    Attributes:
        spec: what it says.
        output: the tokenizer of the output.
        known: that of each model.
    """

    spec: TokenizerSpec
    output: tokens.Tokenizer
    known: Mapping[ModelRef, tokens.Tokenizer]


def _tokens(recipe: MergekitRecipe, models: Models) -> _Tokens | None:
    spec = recipe.tokenizer
    if spec is None:
        return None
    found = {ref: tokens.read_tokenizer(ref.path) for ref in models}
    first, *others = found
    start = found[first]
    if start is None:
        raise RecipeError(
            f"{recipe.source}: {first} has no tokenizer.json, which the tokenizer of "
            "the output is made from; add the file."
        )
    # A model without a tokenizer is taken to know what the first one knows.
    known = {ref: own or start for ref, own in found.items()}
    output = start
    if spec.source == "union":
        output = tokens.united(start, (known[ref] for ref in others))
    elif isinstance(spec.source, ModelRef):
        output = tokens.read_tokenizer(spec.source.path)
        if output is None:
            raise RecipeError(f"{recipe.source}: {spec.source} has no tokenizer.json.")
    return _Tokens(spec, tokens.with_tokens(output, spec.tokens), known)


# Leaves.


class _Made(NamedTuple):
    """An output leaf, ready to be merged.

    Attributes:
        leaf: which leaf.
        views: where it comes from in each source of its slice.
        is_vocabulary: whether it has one row per token.
    """

    leaf: OutputLeaf
    views: dict[ModelRef, Source]
    is_vocabulary: bool

    @property
    def info(self) -> LeafInfo:
        return next(iter(self.views.values())).info


def _made(
    recipe: MergekitRecipe,
    models: Models,
    leaf: OutputLeaf,
    vocabulary: _Tokens | None,
) -> _Made:
    views = {
        origin.source.model: Source(models[origin.source.model].checkpoint, origin.name)
        for origin in leaf.origins
    }
    is_vocabulary = all(
        embeddings.is_vocabulary(view.name, view.info, models[ref].config)
        for ref, view in views.items()
    )
    if is_vocabulary and vocabulary is not None:
        views = _remapped(leaf, views, vocabulary)
    elif is_vocabulary:
        views = _cut(recipe, leaf, views)
    infos = {models[ref].label: view.info for ref, view in views.items()}
    checkpoints = {models[ref].label: view.checkpoint for ref, view in views.items()}
    if reason := difference(infos, checkpoints):
        raise RecipeError(
            f"{recipe.source}: leaf {leaf.name!r} cannot be merged: it is {reason}. "
            "Repair or leave out the model, or write the recipe with the keys of "
            "jaxmerge, where `take` says what becomes of such leaves."
        )
    return _Made(leaf, views, is_vocabulary)


def _remapped(
    leaf: OutputLeaf, views: Mapping[ModelRef, Source], vocabulary: _Tokens
) -> dict[ModelRef, Source]:
    spec, output, known = vocabulary
    vocabularies = [
        embeddings.Vocabulary(ref, view.checkpoint, view.name, known[ref])
        for ref, view in views.items()
    ]
    base = leaf.slice.base
    transforms = embeddings.remap(
        vocabularies, base, output, spec.tokens, spec.multiple
    )
    pairs = zip(views.items(), transforms, strict=True)
    return {ref: view._replace(transform=how) for (ref, view), how in pairs}


def _cut(
    recipe: MergekitRecipe, leaf: OutputLeaf, views: Mapping[ModelRef, Source]
) -> dict[ModelRef, Source]:
    rows = {ref: view.info.shape[0] for ref, view in views.items()}
    common = min(rows.values())
    base = leaf.slice.base
    if recipe.convention.base == "start" and base is not None:
        if common < rows[base]:
            least = min(rows, key=rows.__getitem__)
            raise RecipeError(
                f"{recipe.source}: leaf {leaf.name!r} has {common} rows in {least}, "
                f"fewer than the {rows[base]} of the base_model; say with "
                "`tokenizer_source: union` or `base` which tokens are which."
            )
        common = rows[base]
    return {
        ref: view
        if rows[ref] == common
        else view._replace(transform=embeddings.Rows(common))
        for ref, view in views.items()
    }


# Parts.


class _Task(NamedTuple):
    """How one leaf is merged: what part it belongs to, and its numbers."""

    models: tuple[ModelRef, ...]
    base: ModelRef | None
    options: dict[str, Any]

    @property
    def part(self) -> str:
        """The same text for leaves of the same part."""
        plain = {k: v for k, v in self.options.items() if not _is_number(v)}
        return json.dumps([str(self.models), str(self.base), [*self.options], plain])


def _parts(recipe: MergekitRecipe, models: Models, made: Sequence[_Made]) -> list[Part]:
    groups: dict[str, list[tuple[_Made, _Task]]] = {}
    for each in made:
        task = _task(recipe, models, each)
        groups.setdefault(task.part, []).append((each, task))
    return [_part(recipe, models, group) for group in groups.values()]


def _task(recipe: MergekitRecipe, models: Models, made: _Made) -> _Task:
    convention, leaf = recipe.convention, made.leaf
    sources = recipe.merged(leaf.slice)
    names = {origin.source.model: origin.name for origin in leaf.origins}

    def value(parameter: Parameter, source: SliceSource | None) -> Any:
        levels = leaf.slice.levels
        name = leaf.name
        if source is not None:
            levels, name = (source.parameters, *levels), names[source.model]
        found = value_of(parameter.name, levels, name, leaf.position)
        found = parameter.default if found is None else found
        if found is None:
            of = "" if source is None else f" of {models[source.model].label}"
            raise RecipeError(
                f"{recipe.source}: leaf {name!r}{of} has no {parameter.name}, as no "
                "filter is part of its name; end the filters with `- value: ...`."
            )
        return float(found) if parameter.kind is float else found

    shared = [p for p in convention.parameters if p.of == "merge"]
    own = [p for p in convention.parameters if p.of == "model"]
    values = Values(
        {p.name: value(p, None) for p in shared},
        [{p.name: value(p, source) for p in own} for source in sources],
        len(made.info.shape),
    )
    try:
        options = convention.options(values)
    except ValueError as error:
        raise RecipeError(f"{recipe.source}: leaf {leaf.name!r}: {error}.") from None
    base = leaf.slice.base if convention.base in ("start", "origin") else None
    if base is not None and convention.base == "origin":
        options = {**options, "origin": "base"}
    return _Task(tuple(source.model for source in sources), base, options)


def _is_number(value: Any) -> bool:
    """Whether an option is one that leaves of a part may have different values of."""
    return type(value) is float or (isinstance(value, list) and bool(value))


def _part(
    recipe: MergekitRecipe, models: Models, group: Sequence[tuple[_Made, _Task]]
) -> Part:
    _, task = group[0]

    def view(ref: ModelRef) -> View:
        path = models[ref].checkpoint.path
        return View(path, {made.leaf.name: made.views[ref] for made, _ in group})

    base = None if task.base is None else view(task.base)
    views: dict[str, Checkpoint] = {models[ref].label: view(ref) for ref in task.models}
    inputs = Inputs(base, views)
    part = Recipe(
        recipe.convention.method,
        {models[ref].label: models[ref].checkpoint.path for ref in task.models},
        None if base is None else base.path,
        _options({made.leaf.name: each.options for made, each in group}),
        dtype=recipe.dtype,
        text=recipe.text,
        source=recipe.source,
    )
    copied = recipe.method == "passthrough" and not task.options
    steps = {
        made.leaf.name: _step(recipe, models, made, inputs.like, copied)
        for made, _ in group
    }
    return Part(part, inputs, steps)


def _options(by_leaf: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Options of all leaves of a part: numbers as rules, the rest as it is."""
    first = next(iter(by_leaf.values()))
    merged: dict[str, Any] = {}
    for option, value in first.items():
        if type(value) is float:
            merged[option] = as_rules({n: o[option] for n, o in by_leaf.items()})
        elif _is_number(value):
            merged[option] = [
                as_rules({n: o[option][i] for n, o in by_leaf.items()})
                for i in range(len(value))
            ]
        else:
            merged[option] = value
    return merged


def _step(
    recipe: MergekitRecipe, models: Models, made: _Made, like: Checkpoint, copied: bool
) -> Step:
    if not is_float(made.info):
        return Step("copied: integer", like, like.leaves[made.leaf.name])
    stored = {
        ref: models[ref].stored.leaves[view.name].dtype
        for ref, view in made.views.items()
    }
    if recipe.dtype is not None:
        dtype = np.dtype(recipe.dtype)
    elif recipe.convention.needs_base and made.leaf.slice.base is not None:
        dtype = stored[made.leaf.slice.base]
    else:
        dtype = common_dtype(stored.values())
    treatment = "taken: first" if copied else "merged"
    return Step(treatment, like, made.info._replace(dtype=dtype))


# Files.


def _facts(
    models: Models, layout: Layout, made: Sequence[_Made], parts: Sequence[Part]
) -> sidecars.Facts:
    donor = next(iter(models.values()))
    outs = [step.out for part in parts for step in part.steps.values()]
    dtypes = {str(out.dtype) for out in outs if is_float(out)}
    rows = {each.info.shape[0] for each in made if each.is_vocabulary}
    before = {
        info.shape[0]
        for name, info in donor.checkpoint.leaves.items()
        if embeddings.is_vocabulary(name, info, donor.config)
    }
    depth = None
    if layout.layers:
        depth = find_layers(donor.checkpoint.leaves, donor.config, donor.label).depth
    return sidecars.Facts(
        dtypes.pop() if len(dtypes) == 1 else None,
        dict.fromkeys(before, rows.pop()) if len(rows) == 1 else {},
        depth,
        [(models[ref].config, number) for ref, number in layout.layers],
        untied=any(embeddings.is_head(each.leaf.name) for each in made),
    )


def _files(
    recipe: MergekitRecipe,
    models: Models,
    facts: sidecars.Facts,
    vocabulary: _Tokens | None,
) -> sidecars.Sidecars:
    """Those of the base, or of the first model, made to agree with the output."""
    donor = next(iter(models.values()))
    files: sidecars.Sidecars = {p.name: p for p in donor.checkpoint.sidecars()}
    if donor.config:
        config = sidecars.consistent(donor.config, facts)
        files[sidecars.CONFIG_NAME] = as_json(config)
    if vocabulary is not None:
        files = sidecars.replace_tokenizer(files, vocabulary.output)
    template = recipe.chat_template
    if template == "auto":
        template = sidecars.usual_template([ref.path for ref in models])
    return files if template is None else sidecars.replace_template(files, template)
