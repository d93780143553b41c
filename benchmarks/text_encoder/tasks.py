"""The text tasks: sentences as ids, a frozen head for each task, batches for the model.

All heads together are one matrix, whose columns are the classes of all tasks. Each
example brings along which task it is of, so that one compiled function serves them all;
the classes of other tasks are never the largest.
"""

import csv
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from text_encoder import model

MAX_LENGTH = 32
SCALE = 20.0
"""Of the cosines that heads score classes with, as in the encoder's own training."""


class Sentences(NamedTuple):
    """Token ids (n, length), filled up with 0, and the task's labels (n,)."""

    ids: np.ndarray
    labels: np.ndarray

    def first(self, count: int) -> "Sentences":
        return Sentences(self.ids[:count], self.labels[:count])


class Task(NamedTuple):
    name: str
    classes: int
    train: Sentences
    validation: Sentences
    test: Sentences


class Inputs(NamedTuple):
    """What the model sees: (n, length, width), (n, length) and (n,)."""

    embedded: Array
    mask: Array
    task: Array


Batch = tuple[Inputs, Array]
"""Inputs, and labels among the classes of all tasks."""

Apply = Callable[[model.Params, Inputs], Array]


def read(data: Path, seed: int = 0) -> list[Task]:
    """All tasks in `data/text`, in the order of their names.

    Sentences come in an order that the seed fixes, cut to the task's length: a multiple
    of 8 that holds three quarters of the training sentences, at most `MAX_LENGTH`.

    Raises:
        FileNotFoundError: there are none.
    """
    from tokenizers import Tokenizer

    files = sorted((data / "text").glob("*.csv.gz"))
    if not files:
        raise FileNotFoundError(
            f"{data / 'text'} has no *.csv.gz; see benchmarks/README.md for the format."
        )
    tokenizer = Tokenizer.from_file(str(model.directory() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)
    return [_read_task(path, tokenizer.encode_batch, seed) for path in files]


def _read_task(path: Path, encode: Callable, seed: int) -> Task:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(seed).permutation(len(rows))
    rows = [rows[i] for i in order]
    by_split = {}
    for split in ("train", "val", "test"):
        own = [row for row in rows if row["split"] == split]
        ids = [encoded.ids for encoded in encode([row["text"] for row in own])]
        by_split[split] = ids, np.array([int(row["label"]) for row in own], np.int32)
    length = length_of([len(ids) for ids in by_split["train"][0]])
    train, validation, test = (
        Sentences(pad(ids, length), labels) for ids, labels in by_split.values()
    )
    classes = 1 + int(train.labels.max())
    return Task(path.name.partition(".")[0], classes, train, validation, test)


def length_of(lengths: Sequence[int]) -> int:
    """The multiple of 8 that holds three quarters of them, at most `MAX_LENGTH`."""
    return min(MAX_LENGTH, 8 * int(np.ceil(np.quantile(lengths, 0.75) / 8)))


def pad(ids: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Ids (n, length): longer rows keep their last one, 0 fills others."""
    filled = np.zeros((len(ids), length), np.int32)
    for row, own in zip(filled, ids, strict=True):
        own = own if len(own) <= length else [*own[: length - 1], own[-1]]
        row[: len(own)] = own
    return filled


def make_heads(
    embeddings: model.Params, start: model.Params, tasks: Sequence[Task], examples: int
) -> Array:
    """A column for each class of all tasks, (width, classes), from the start.

    It points to the mean feature of the first training examples of the class, as the
    text embeddings of CLIP point to names. Its length is `SCALE`.
    """
    features = jax.jit(model.features)
    columns = []
    for task in tasks:
        chosen = [
            np.flatnonzero(task.train.labels == label)[:examples]
            for label in range(task.classes)
        ]
        ids = task.train.ids[np.concatenate(chosen)]
        found = features(start, model.embed(embeddings, ids), ids != 0)
        ends = np.cumsum([len(of_class) for of_class in chosen])[:-1]
        columns += [of_class.mean(axis=0) for of_class in jnp.split(found, ends)]
    heads = jnp.stack(columns, axis=1)
    return SCALE * heads / jnp.linalg.norm(heads, axis=0, keepdims=True)


def task_of_class(tasks: Sequence[Task]) -> np.ndarray:
    """The number of the task of each class, (classes,)."""
    return np.repeat(np.arange(len(tasks)), [task.classes for task in tasks])


def apply_with(heads: Array, owners: np.ndarray) -> Apply:
    """The model with frozen heads; `owners` is `task_of_class`."""

    def apply(params: model.Params, inputs: Inputs) -> Array:
        scores = model.features(params, inputs.embedded, inputs.mask) @ heads
        return jnp.where(owners[None] == inputs.task[:, None], scores, -1e9)

    return apply


def batch(
    embeddings: model.Params, tasks: Sequence[Task], place: int, sentences: Sentences
) -> Batch:
    """Sentences of the task at `place` as inputs and labels."""
    ids, labels = sentences
    before = sum(task.classes for task in tasks[:place])
    of_task = np.full(len(ids), place, np.int32)
    inputs = Inputs(model.embed(embeddings, ids), jnp.asarray(ids != 0), of_task)
    return inputs, jnp.asarray(labels + before)


def batches(made: Any, size: int) -> list[Any]:
    """A batch, or its inputs alone, cut into some of at most `size` examples."""
    count = len(jax.tree.leaves(made)[0])
    return [
        jax.tree.map(lambda x: x[i : i + size], made)  # noqa: B023
        for i in range(0, count, size)
    ]
