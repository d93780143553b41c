"""Tokenizers as files: which tokens a model knows, and one that knows those of several.

Only `tokenizer.json` is understood, which every fast tokenizer of Hugging Face has. It
is read and written as JSON, so the libraries that made it are not needed.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxmerge.checkpoints import CheckpointError

TOKENIZER_NAME = "tokenizer.json"
OUTDATED_NAMES = (
    *("added_tokens.json", "merges.txt", "special_tokens_map.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt"),
)
"""Files beside a tokenizer.json that repeat its tokens, wrongly once it has more."""


class Tokenizer(NamedTuple):
    """A tokenizer.

    Attributes:
        path: the directory that it is in.
        ids: the number of each token, which is that of its embedding.
        document: its tokenizer.json.
    """

    path: Path
    ids: Mapping[str, int]
    document: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """How many embeddings it needs."""
        return max(self.ids.values()) + 1

    @property
    def added(self) -> dict[str, dict[str, Any]]:
        """The tokens that were added to its model, with how they are recognised."""
        return {token["content"]: token for token in self.document["added_tokens"]}


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer in the directory of a model, or None if there is none.

    Raises:
        CheckpointError: one without a tokenizer.json, or a damaged one.
    """
    file = path / TOKENIZER_NAME
    if not file.is_file():
        slow = [name for name in OUTDATED_NAMES if (path / name).is_file()]
        if slow:
            raise CheckpointError(
                f"{path} has {', '.join(slow)}, but no {TOKENIZER_NAME}, which the "
                "tokenizer of a recipe is made from. Save it as a fast tokenizer: "
                "AutoTokenizer.from_pretrained(path, use_fast=True)"
                ".save_pretrained(path)."
            )
        return None
    try:
        document = json.loads(file.read_bytes())
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # Of Unigram models: pairs of token and score.
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in document["added_tokens"]}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is no tokenizer of the library tokenizers ({error!r}); download "
            "it again."
        ) from error
    return Tokenizer(path, {**vocabulary, **added}, document)


def united(first: Tokenizer, others: Iterable[Tokenizer]) -> Tokenizer:
    """`first`, with the tokens of `others` that it lacks added in their order."""
    more: dict[str, dict[str, Any]] = {}
    for other in others:
        for token in sorted(other.ids, key=other.ids.__getitem__):
            more.setdefault(token, other.added.get(token) or _plain(token))
    return with_tokens(first, more.values())


def with_tokens(
    tokenizer: Tokenizer, tokens: Iterable[str | Mapping[str, Any]]
) -> Tokenizer:
    """A tokenizer with further tokens, numbered after all others.

    Args:
        tokenizer: what they are added to; those that it has are skipped.
        tokens: their text, or entries of `added_tokens`.
    """
    ids, added = dict(tokenizer.ids), list(tokenizer.document["added_tokens"])
    for token in tokens:
        entry = _plain(token) if isinstance(token, str) else token
        if entry["content"] not in ids:
            number = max(ids.values()) + 1
            ids[entry["content"]] = number
            added.append({**entry, "id": number})
    return Tokenizer(tokenizer.path, ids, {**tokenizer.document, "added_tokens": added})


def _plain(token: str) -> dict[str, Any]:
    """A token that is found wherever its text is."""
    flags = ("single_word", "lstrip", "rstrip", "special")
    return {"content": token, **dict.fromkeys(flags, False), "normalized": True}
