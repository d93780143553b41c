"""The fine-tuned models of a seed, their heads and data: what merges start from."""

import hashlib
import time
from collections.abc import Sequence
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
    Sentences,
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
    steps: int = 100
    batch: int = 32
    rate: float = 5e-5
    validation: int = 48
    test: int = 200
    unlabelled: int = 64
    samples: int = 30
    adapting: int = 40
    wudi: int = 300
    scales: tuple[float, ...] = (0.2, 0.4, 0.7, 1.0, 1.6, 3.0)


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


class Setup(NamedTuple):
    """What all seeds have in common.

    Attributes:
        settings: as above.
        embeddings: of tokens; frozen.
        start: the pretrained encoder.
        tasks: their sentences.
        heads: of all tasks, (width, classes); frozen.
        apply: the model with these heads.
        validation: by task, the batches that coefficients are chosen on.
        test: by task, those that are tested.
    """

    settings: Settings
    embeddings: model.Params
    start: model.Params
    tasks: Sequence[Task]
    heads: Array
    apply: Apply
    validation: dict[str, list[Batch]]
    test: dict[str, list[Batch]]

    def train_batch(self, number: int, count: int) -> Batch:
        """The first training sentences of a task; those behind heads are among them."""
        sentences = self.tasks[number].train.first(count)
        return batch(self.embeddings, self.tasks, number, sentences)

    def validate(self, params: model.Params) -> np.ndarray:
        """The accuracy on each task's validation data, (tasks,)."""
        return self._accuracies(params, self.validation)

    def validate_on(self, params: model.Params, number: int) -> float:
        """The accuracy on the validation data of one task."""
        task = self.tasks[number].name
        return self._accuracies(params, {task: self.validation[task]}).item()

    def test_apart(self, models: Sequence[model.Params]) -> np.ndarray:
        """The accuracy of each task's own model on its test data, (tasks,)."""
        pairs = zip(models, self.test.items(), strict=True)
        return np.concatenate(
            [self._accuracies(m, {task: data}) for m, (task, data) in pairs]
        )

    def _accuracies(
        self, params: model.Params, data: dict[str, list[Batch]]
    ) -> np.ndarray:
        found = jaxmerge.evaluate(self.apply, params, data, "accuracy")
        return np.array([float(value) for value in found.values()])

    def train(self, directory: Path, seed: int) -> "Experiment":
        """Fine-tunes on every task, or takes what an earlier run left."""
        tuned = {}
        for number, task in enumerate(self.tasks):
            place = directory / task.name
            if not place.exists():
                begun = time.process_time()
                checkpoints.save(place, fine_tune(self, number, seed))
                seconds = time.process_time() - begun
                print(f"fine-tuned on {task.name}: {seconds:.0f} CPU s", flush=True)
            tuned[task.name] = jax.tree.map(jnp.asarray, checkpoints.load(place))
        return Experiment(self, seed, tuned)


class Experiment(NamedTuple):
    """What is merged and compared.

    Attributes:
        setup: as above.
        seed: of fine-tuning and of random methods.
        tuned: the encoder fine-tuned on each task.
    """

    setup: Setup
    seed: int
    tuned: dict[str, model.Params]

    @property
    def models(self) -> list[model.Params]:
        return list(self.tuned.values())


def prepare(data: Path, settings: Settings) -> Setup:
    """The pretrained encoder and the tasks in `data/text`."""
    return assemble(*model.load(), read(data)[: settings.tasks], settings)


def assemble(
    embeddings: model.Params,
    start: model.Params,
    tasks: Sequence[Task],
    settings: Settings,
) -> Setup:
    """Makes heads, and batches of what is evaluated."""
    heads = make_heads(embeddings, start, tasks, settings.head_examples)
    apply = apply_with(heads, task_of_class(tasks))

    def cut(split: str, count: int) -> dict[str, list[Batch]]:
        return {
            task.name: batches(
                batch(embeddings, tasks, number, getattr(task, split).first(count)),
                EVALUATED,
            )
            for number, task in enumerate(tasks)
        }

    validation = cut("validation", settings.validation)
    test = cut("test", settings.test)
    return Setup(settings, embeddings, start, tasks, heads, apply, validation, test)


def directory_of(place: Path, settings: Settings, seed: int) -> Path:
    """Where the models and results of a seed are; other settings have other places."""
    known = hashlib.sha256(f"{settings}".encode()).hexdigest()[:8]
    return place / f"seed{seed}-{known}"


def fine_tune(setup: Setup, number: int, seed: int) -> model.Params:
    """Fine-tunes the encoder on one task; embeddings and heads stay as they are."""
    settings, train = setup.settings, setup.tasks[number].train
    optimiser = _optimiser(settings.rate, settings.steps)
    params, memory = setup.start, optimiser.init(setup.start)
    draw = np.random.default_rng([seed, number])
    for _ in range(settings.steps):
        chosen = draw.choice(len(train.labels), settings.batch, replace=False)
        sentences = Sentences(train.ids[chosen], train.labels[chosen])
        inputs, labels = batch(setup.embeddings, setup.tasks, number, sentences)
        params, memory = _step(
            params, memory, inputs, labels, apply=setup.apply, optimiser=optimiser
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
