"""Embeddings of one vocabulary, made from those of models with different ones.

Embeddings and heads have one row per token. `Rows` cuts them, and `Remapped` puts them
into the order of another tokenizer, with what mergekit takes for tokens that a model
lacks.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.checkpoints import Checkpoint, CheckpointError, Index, LeafInfo
from jaxmerge.checkpoints.indexing import ranges
from jaxmerge.checkpoints.transforms import Read
from jaxmerge.mergekit.layers import parts_of
from jaxmerge.mergekit.recipe import ModelRef, TokenSource
from jaxmerge.mergekit.tokens import Tokenizer
from jaxmerge.tree import common_dtype

_EMBEDDING = re.compile(
    r"(.*[./])?(wte|shared|embed_tokens|embed_in|tok_embeddings|word_embeddings|"
    r"embeddings)[./](weight|embedding)"
)
_HEAD = re.compile(r"(.*[./])?(lm_head|embed_out|output)[./](weight|bias)")

_BLOCK_BYTES = 1 << 24  # What is read at a time of tables of which a mean is taken.


def is_embedding(name: str) -> bool:
    """Whether a leaf holds the embeddings of tokens, by its name."""
    return _EMBEDDING.fullmatch(name) is not None


def is_head(name: str) -> bool:
    """Whether a leaf belongs to the head that scores tokens, by its name."""
    return _HEAD.fullmatch(name) is not None


def is_vocabulary(name: str, info: LeafInfo, config: Mapping[str, Any]) -> bool:
    """Whether a leaf has one row per token: by its name, and by config.json.

    Example:
        >>> info = LeafInfo((64, 32), np.dtype("float32"))
        >>> is_vocabulary("lm_head.weight", info, {"vocab_size": 64})
        True
        >>> is_vocabulary("lm_head.weight", info, {"vocab_size": 65})
        False
    """
    sizes = {
        part["vocab_size"]
        for part in (config, *parts_of(config))
        if "vocab_size" in part
    }
    named = is_embedding(name) or is_head(name)
    return named and bool(info.shape) and info.shape[0] in sizes


class Rows(NamedTuple):
    """The first rows of a leaf, all others left out (a `Transform`)."""

    kept: int

    def info(self, source: LeafInfo) -> LeafInfo:
        return source._replace(shape=(self.kept, *source.shape[1:]))

    def read(self, read: Read, source: LeafInfo, index: Index) -> np.ndarray:
        rows, *rest = (slice(None),) if index is ... or not index else index
        start, stop, step = rows.indices(self.kept)
        return read((slice(start, stop, step), *rest))


class Donor(NamedTuple):
    """A row that another model gives."""

    checkpoint: Checkpoint
    name: str
    row: int


@dataclass(frozen=True, eq=False)
class Remapped:
    """Rows in the order of another vocabulary (a `Transform`), of one source.

    Attributes:
        own: for each token, which row it is in the source, or -1 where others give it.
        given: from such tokens to the rows whose mean they are; none is zero.
        padding: how many rows follow, each the mean of all before.
        dtype: of the result.
    """

    own: np.ndarray
    given: Mapping[int, Sequence[Donor]]
    padding: int
    dtype: np.dtype
    _means: list[np.ndarray] = field(default_factory=list, init=False, repr=False)

    def info(self, source: LeafInfo) -> LeafInfo:
        rows = len(self.own) + self.padding
        return LeafInfo((rows, *source.shape[1:]), self.dtype)

    def read(self, read: Read, source: LeafInfo, index: Index) -> np.ndarray:
        rows, *rest = (slice(None),) if index is ... or not index else index
        wanted = np.arange(len(self.own) + self.padding)[rows]
        _, *others = ranges((slice(None), *rest), source.shape)
        result = np.zeros((len(wanted), *map(len, others)), self.dtype)
        padded = wanted >= len(self.own)
        if padded.any():
            result[padded] = self._average(read, source)[tuple(rest)]
        places = np.flatnonzero(~padded)
        own = self.own[wanted[places]]
        if (own >= 0).any():
            result[places[own >= 0]] = _rows(read, own[own >= 0], rest)
        for place in places[own < 0]:
            donors = self.given.get(int(wanted[place]), ())
            if donors:
                rows_given = [
                    d.checkpoint.read(d.name, (slice(d.row, d.row + 1), *rest))[0]
                    for d in donors
                ]
                result[place] = _mean(np.stack(rows_given))
        return result

    def _average(self, read: Read, source: LeafInfo) -> np.ndarray:
        """The mean of all rows but the padding; kept, as it takes the whole table."""
        if not self._means:
            rows = len(self.own)
            step = max(1, _BLOCK_BYTES * rows // max(1, self.info(source).nbytes))
            blocks = (
                self.read(read, source, (slice(start, min(start + step, rows)),))
                for start in range(0, rows, step)
            )
            sums = [block.astype(np.float64).sum(axis=0) for block in blocks]
            self._means.append((np.sum(sums, axis=0) / rows).astype(self.dtype))
        return self._means[0]


def _rows(read: Read, numbers: np.ndarray, rest: Sequence[slice]) -> np.ndarray:
    """Rows of a table by their numbers; neighbours are read together."""
    ordered, places = np.unique(numbers, return_inverse=True)
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    parts = [read((slice(int(run[0]), int(run[-1]) + 1), *rest)) for run in runs]
    return np.concatenate(parts)[places]


def _mean(rows: np.ndarray) -> np.ndarray:
    wide = np.promote_types(rows.dtype, np.float32)
    return rows.astype(wide).mean(axis=0)


class Vocabulary(NamedTuple):
    """What one model knows of the tokens of the output.

    Attributes:
        model: which model.
        checkpoint: its leaves.
        name: the leaf that is looked at.
        tokenizer: its own tokens.
    """

    model: ModelRef
    checkpoint: Checkpoint
    name: str
    tokenizer: Tokenizer

    @property
    def info(self) -> LeafInfo:
        return self.checkpoint.leaves[self.name]

    def row_of(self, token: str) -> int | None:
        """The row of a token; None if there is none."""
        row = self.tokenizer.ids.get(token)
        return row if row is not None and row < self.info.shape[0] else None

    def donor(self, token: str | int) -> Donor:
        """The row of a token, or of a number of a token.

        Raises:
            CheckpointError: the model has no such token.
        """
        row = self.row_of(token) if isinstance(token, str) else token
        if row is None or not 0 <= row < self.info.shape[0]:
            raise CheckpointError(
                f"{self.model} is to give the embedding of the token {token!r}, which "
                "it has not got; name a model that has it under `tokens`."
            )
        return Donor(self.checkpoint, self.name, row)


def remap(
    vocabularies: Sequence[Vocabulary],
    base: ModelRef | None,
    output: Tokenizer,
    tokens: Mapping[str, TokenSource],
    multiple: int,
) -> list[Remapped]:
    """For each model, how its leaf becomes one with the rows of `output`.

    A token that a model lacks is taken from where `tokens` says; else from the one
    model that has it, from the base if it has it, or it is the mean over the models
    that have it. What no model has is zero.

    Raises:
        CheckpointError: a model is to give a token that it has not got.
    """
    places: dict[str, list[int | None]] = {
        token: [each.row_of(token) for each in vocabularies] for token in output.ids
    }
    given: dict[int, list[Donor]] = {}
    forced = set()
    for token, number in output.ids.items():
        spec = tokens.get(token, TokenSource())
        if spec.force:
            forced.add(number)
        elif None not in places[token]:
            continue
        given[number] = _donors(token, spec, vocabularies, base)
    padding = -output.rows % multiple
    dtype = common_dtype(each.info.dtype for each in vocabularies)
    transforms = []
    for i in range(len(vocabularies)):
        own = np.full(output.rows, -1)
        for token, number in output.ids.items():
            row = places[token][i]
            if row is not None and number not in forced:
                own[number] = row
        transforms.append(Remapped(own, given, padding, dtype))
    return transforms


def _donors(
    token: str,
    spec: TokenSource,
    vocabularies: Sequence[Vocabulary],
    base: ModelRef | None,
) -> list[Donor]:
    by_model = {each.model: each for each in vocabularies}
    if spec.zero:
        return []
    if spec.model is not None:
        if spec.model not in by_model:
            raise CheckpointError(
                f"{spec.model} is to give the embedding of the token {token!r}, but is "
                "not merged here; name one of the models."
            )
        source = token if spec.token is None else spec.token
        return [by_model[spec.model].donor(source)]
    having = [v for v in vocabularies if v.row_of(token) is not None]
    having = [each for each in having if each.model == base] or having
    return [each.donor(token) for each in having]
