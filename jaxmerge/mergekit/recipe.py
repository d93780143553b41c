"""mergekit's recipes as values: models, slices, settings, tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from jaxmerge.mergekit.conventions import CONVENTIONS, Convention
from jaxmerge.mergekit.settings import Level


class ModelRef(NamedTuple):
    """A model of a recipe.

    Attributes:
        path: its checkpoint.
        lora: an adapter to it, which makes the model.
    """

    path: Path
    lora: Path | None = None

    def __str__(self) -> str:
        return str(self.path) if self.lora is None else f"{self.path}+{self.lora}"


class SliceSource(NamedTuple):
    """A model in a slice.

    Attributes:
        model: which one.
        layers: the first of its layers and the one after the last; None for all.
        parameters: settings for it alone.
    """

    model: ModelRef
    layers: tuple[int, int] | None
    parameters: Level

    @property
    def span(self) -> range:
        """The layers that it names; empty if that is all."""
        return range(*(self.layers or (0, 0)))


class Slice(NamedTuple):
    """Layers of the output, or all of them, and the models that they are made of.

    Attributes:
        sources: the models.
        base: its base_model, if the recipe names one for it or for all.
        levels: settings from the narrowest level (slice) to the widest (recipe).
    """

    sources: tuple[SliceSource, ...]
    base: ModelRef | None
    levels: tuple[Level, ...]


class TokenSource(NamedTuple):
    """Where the embedding of a token comes from, in models that lack it.

    Attributes:
        model: one that has it; None without `token` is left to mergekit's rules.
        token: another token of that model, or the number of one.
        zero: whether it is zero instead.
        force: whether models that have the token get that embedding, too.
    """

    model: ModelRef | None = None
    token: str | int | None = None
    zero: bool = False
    force: bool = False


class TokenizerSpec(NamedTuple):
    """The tokenizer of the output.

    Attributes:
        source: "union", "base" or a model.
        tokens: for some tokens, where their embeddings come from.
        multiple: of which the number of rows of embeddings is one.
    """

    source: str | ModelRef
    tokens: Mapping[str, TokenSource]
    multiple: int


@dataclass(frozen=True)
class MergekitRecipe:
    """A recipe of mergekit, from `parse_mergekit`.

    Attributes:
        method: mergekit's name of the method.
        slices: what the output is made of: one slice with all layers if the recipe
            lists `models`.
        base: the base_model of the recipe.
        dtype: of floating-point leaves of the output: its out_dtype, or its dtype.
        tokenizer: None leaves tokenizers and vocabularies alone.
        chat_template: "auto", or a Jinja template.
        text: what it was read from.
        source: where it was read from, for messages.
    """

    method: str
    slices: tuple[Slice, ...]
    base: ModelRef | None = None
    dtype: str | None = None
    tokenizer: TokenizerSpec | None = None
    chat_template: str | None = None
    text: str = field(default="", repr=False)
    source: str = "recipe"

    @property
    def convention(self) -> Convention:
        return CONVENTIONS[self.method]

    @property
    def models(self) -> list[ModelRef]:
        """Every model once: the base first, then in the order of the recipe."""
        base = [] if self.base is None else [self.base]
        bases = [each.base for each in self.slices if each.base is not None]
        sources = [source.model for each in self.slices for source in each.sources]
        return list(dict.fromkeys([*base, *bases, *sources]))

    def merged(self, slice_: Slice) -> list[SliceSource]:
        """The models of the method in a slice: all sources but a base that is apart."""
        if self.convention.base == "member":
            return list(slice_.sources)
        others = [source for source in slice_.sources if source.model != slice_.base]
        if self.convention.base == "first":
            return [s for s in slice_.sources if s.model == slice_.base] + others
        return others
