"""The fine-tuned models of a seed, their heads and data: what merges start from."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jaxmerge
from jaxmerge import checkpoints
from jaxmerge.evaluation import cross_entropy
from text_encoder import model
from text_encoder.tasks import (
    Apply,
    Batch,
    Inputs,
    Task,
    apply_with,
    batch,
    batches,
    make_heads,
    read,
    task_of_class,
)

EVALUATED = 64
"""How many examples are evaluated at a time."""


class Settings(NamedTuple):
    """What results depend on.

    Attributes:
        tasks: how many, the first in the order of names.
        head_examples: training examples per class behind a frozen head.
        steps: of fine-tuning, with batches of `batch` and a peak learning rate `rate`.
        validation: examples per task that coefficients are chosen on.
        test: examples per task that are tested.
        unlabelled: training examples per task, without labels, behind statistics.
        samples: the same behind coefficients of submodules; 30 in the paper.
        adapting: steps of AdaMerging.
        wudi: steps of WUDI; 300 in the paper.
        scales: the coefficients tried for methods that have one.
    """

    tasks: int = 7
    head_examples: int = 5
    steps: int = 200
    batch: int = 32
    rate: float = 5e-5
    validation: int = 96
    test: int = 400
    unlabelled: int = 128
    samples: int = 30
    adapting: int = 60
    wudi: int = 300
    scales: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0)


QUICK = Settings(
    tasks=2,
    steps=2,
    batch=8,
    validation=8,
    test=16,
    unlabelled=16,
    samples=8,
    adapting=2,
    wudi=2,
    scales=(0.3, 1.0),
)


class Experiment(NamedTuple):
    """What is merged and compared.

    Attributes:
        settings: as above.
        seed: of fine-tuning and of random methods.
        embeddings: of tokens; frozen.
        start: the pretrained encoder.
        tuned: the encoder fine-tuned on each task.
        apply: the model with all heads.
        tasks: their sentences.
        validation: by task, the batches that coefficients are chosen on.
        test: by task, those that are tested.
    """

    settings: Settings
    seed: int
    embeddings: model.Params
    start: model.Params
    tuned: dict[str, model.Params]
    apply: Apply
    tasks: Sequence[Task]
    validation: dict[str, list[Batch]]
    test: dict[str, list[Batch]]

    @property
    def models(self) -> list[model.Params]:
        return list(self.tuned.values())

    def train_batch(self, place: int, count: int) -> Batch:
        """The first training sentences of a task; those behind heads are among them."""
        sentences = self.tasks[place].train.first(count)
        return batch(self.embeddings, self.tasks, place, sentences)

    def validate(self, params: model.Params) -> np.ndarray:
        """The accuracy on each task's validation data, (tasks,)."""
        return accuracies(self.apply, params, self.validation)

    def accuracy_on(self, params: model.Params, place: int) -> float:
        """The accuracy on the validation data of one task."""
        task = self.tasks[place].name
        return accuracies(self.apply, params, {task: self.validation[task]}).item()

    def test_apart(self, models: Sequence[model.Params]) -> np.ndarray:
        """The accuracy of each task's own model on its test data, (tasks,)."""
        pairs = zip(models, self.test.items(), strict=True)
        return np.concatenate(
            [accuracies(self.apply, m, {task: data}) for m, (task, data) in pairs]
        )


def accuracies(
    apply: Apply, params: model.Params, data: dict[str, list[Batch]]
) -> np.ndarray:
    """The accuracy on each task, (tasks,)."""
    found = jaxmerge.evaluate(apply, params, data, "accuracy")
    return np.array([float(value) for value in found.values()])


def prepare(data: Path, settings: Settings) -> Callable[[Path, int], Experiment]:
    """Reads the data; returns what trains the models of a seed in a directory."""
    tasks = read(data)[: settings.tasks]
    embeddings, start = model.load()
    heads = make_heads(embeddings, start, tasks, settings.head_examples)
    apply = apply_with(heads, task_of_class(tasks))

    def cut(split: str, count: int) -> dict[str, list[Batch]]:
        return {
            task.name: batches(
                batch(embeddings, tasks, place, getattr(task, split).first(count)),
                EVALUATED,
            )
            for place, task in enumerate(tasks)
        }

    validation, test = (
        cut("validation", settings.validation),
        cut("test", settings.test),
    )

    def train(place: Path, seed: int) -> Experiment:
        tuned = {
            task.name: _tuned(
                place / task.name, apply, embeddings, start, tasks, i, seed, settings
            )
            for i, task in enumerate(tasks)
        }
        return Experiment(
            settings, seed, embeddings, start, tuned, apply, tasks, validation, test
        )

    return train


def directory_of(place: Path, settings: Settings, seed: int) -> Path:
    """Where the models and results of a seed are; other settings have other places."""
    known = hashlib.sha256(f"{settings}".encode()).hexdigest()[:8]
    return place / f"seed{seed}-{known}"


def _tuned(
    place: Path,
    apply: Apply,
    embeddings: model.Params,
    start: model.Params,
    tasks: Sequence[Task],
    number: int,
    seed: int,
    settings: Settings,
) -> model.Params:
    """The encoder fine-tuned on a task, or what an earlier run left."""
    if not place.exists():
        begun = time.process_time()
        tuned = fine_tune(apply, embeddings, start, tasks, number, seed, settings)
        checkpoints.save(place, tuned)
        seconds = time.process_time() - begun
        print(f"fine-tuned on {tasks[number].name}: {seconds:.0f} CPU s", flush=True)
        (place / "seconds.json").write_text(json.dumps(seconds))
    return jax.tree.map(jnp.asarray, checkpoints.load(place))


def fine_tune(
    apply: Apply,
    embeddings: model.Params,
    start: model.Params,
    tasks: Sequence[Task],
    number: int,
    seed: int,
    settings: Settings,
) -> model.Params:
    """Fine-tunes the encoder on one task; embeddings and heads stay as they are."""
    train, optimiser = tasks[number].train, _optimiser(settings.rate, settings.steps)
    params, memory = start, optimiser.init(start)
    draw = np.random.default_rng([seed, number])
    for _ in range(settings.steps):
        chosen = draw.choice(len(train.labels), settings.batch, replace=False)
        sentences = type(train)(train.ids[chosen], train.labels[chosen])
        inputs, labels = batch(embeddings, tasks, number, sentences)
        params, memory = _step(
            params, memory, inputs, labels, apply=apply, optimiser=optimiser
        )
    return params


@partial(jax.jit, static_argnames=("apply", "optimiser"))
def _step(
    params: model.Params,
    memory: optax.OptState,
    inputs: Inputs,
    labels: Array,
    *,
    apply: Apply,
    optimiser: optax.GradientTransformation,
) -> tuple[Any, optax.OptState]:
    def loss(params: model.Params) -> Array:
        return cross_entropy(apply(params, inputs), labels).mean()

    update, memory = optimiser.update(jax.grad(loss)(params), memory, params)
    return optax.apply_updates(params, update), memory


# Cached, because `_step` is compiled anew for every optimiser object.
@cache
def _optimiser(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps))
