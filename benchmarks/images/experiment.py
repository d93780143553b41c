"""The models that are merged, and how good parameters are at their tasks."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.demo.model import Head
from jaxmerge.evaluation import evaluate

from .data import Labelled, Task, load_broad, load_own, load_tasks
from .model import Network, Params, make_head
from .training import Settings, fine_tune, kept, pretrain

Batch = tuple[tuple[np.ndarray, np.ndarray], np.ndarray]
"""Images with the number of their task, and their classes."""


class Sizes(NamedTuple):
    """How many images of each task are used for what.

    Attributes:
        test: images of the test.
        validation: labelled, to choose coefficients.
        statistics: of training, without labels, for methods that need to know data.
        samples: of training, without labels, for the coefficients of submodules.
        adaptation: steps of AdaMerging, with 16 unlabelled images of training each.
    """

    test: int = 500
    validation: int = 100
    statistics: int = 256
    samples: int = 30
    adaptation: int = 60


class Experiment(NamedTuple):
    """Models of several tasks, fine-tuned with one seed.

    Attributes:
        network: what all are parameters of.
        start: the shared, pretrained parameters.
        tasks: the tasks that are merged.
        tuned: the parameters fine-tuned on each.
        held_out: further tasks, that show how merges generalise.
        held_out_tuned: the parameters fine-tuned on each of these.
        own: tasks of the start, that show what merges forget.
        apply: the logits of images that say which task they are of, by its number.
        sizes: how many images are used for what.
        seed: of fine-tuning, and of methods that draw at random.
    """

    network: Network
    start: Params
    tasks: list[Task]
    tuned: list[Params]
    held_out: list[Task]
    held_out_tuned: list[Params]
    own: list[Task]
    apply: Callable[[Params, tuple[Any, Any]], jax.Array]
    sizes: Sizes
    seed: int

    def first(self, count: int) -> "Experiment":
        """The same with the first `count` tasks; the others are held out."""
        return self._replace(
            tasks=self.tasks[:count],
            tuned=self.tuned[:count],
            held_out=self.tasks[count:],
            held_out_tuned=self.tuned[count:],
        )

    def test(self, params: Params) -> list[float]:
        """The accuracy on each task's test images."""
        return self._accuracies(params, self.tasks, "test", self.sizes.test)

    def test_others(self, params: Params) -> list[float]:
        """The accuracy on the test images of tasks held out, and of the start's own."""
        others = [*self.held_out, *self.own]
        return self._accuracies(params, others, "test", self.sizes.test)

    def validate(self, params: Params) -> list[float]:
        """The accuracy on each task's validation images."""
        size = self.sizes.validation
        return self._accuracies(params, self.tasks, "validation", size)

    def test_apart(self) -> tuple[list[float], list[float]]:
        """The accuracy of each task's own model, and of the start on its own tasks.

        In the order of `test`, and of `test_others`.
        """
        merged = [self.test(model)[i] for i, model in enumerate(self.tuned)]
        held_out = [
            self.test_others(model)[i] for i, model in enumerate(self.held_out_tuned)
        ]
        return merged, held_out + self.test_others(self.start)[len(held_out) :]

    def images(self, split: str, count: int) -> list[np.ndarray]:
        """Some images of each task, without labels."""
        return [getattr(task, split).some(count).images for task in self.tasks]

    def features(self, params: Params, index: int) -> jax.Array:
        """The features of a task's validation images."""
        images = self.tasks[index].validation.some(self.sizes.validation).images
        return _features(self.network, params, images)

    def _accuracies(
        self, params: Params, tasks: list[Task], split: str, count: int
    ) -> list[float]:
        # The numbers of their heads, which are in this order.
        numbers = [t.name for t in (*self.tasks, *self.held_out, *self.own)]
        batches = {
            task.name: list(
                batches_of(numbers.index(task.name), getattr(task, split).some(count))
            )
            for task in tasks
        }
        found = evaluate(self.apply, params, batches, "accuracy")
        return [float(found[task.name]) for task in tasks]


def batches_of(task: int, labelled: Labelled, size: int = 250) -> Iterator[Batch]:
    """Images of a task in batches, with its number beside each of them."""
    for first in range(0, len(labelled.labels), size):
        images, labels = (part[first : first + size] for part in labelled)
        yield (images, np.full(len(labels), task)), labels


def prepare(
    data: Path, place: Path, settings: Settings, sizes: Sizes, seeds: int
) -> Iterator[Experiment]:
    """The experiments of all seeds; what is not in `place` is trained and kept there.

    Raises:
        SystemExit: there is no data.
    """
    tasks, own, broad = load_tasks(data), load_own(data), load_broad(data)
    start = kept(place, "start", lambda file: pretrain(settings, broad, file))
    network, outputs = settings.network, max(task.classes for task in (*tasks, *own))
    heads = [make_head(network, start, task, outputs) for task in (*tasks, *own)]
    apply = _with_heads(network, jax.tree.map(lambda *x: jnp.stack(x), *heads))
    for seed in range(seeds):
        tuned = [
            kept(
                place,
                f"{task.name}-seed{seed}",
                functools.partial(_fine_tune, settings, start, head, task, seed),
            )
            for task, head in zip(tasks, heads, strict=False)
        ]
        yield Experiment(network, start, tasks, tuned, [], [], own, apply, sizes, seed)


def measured(
    place: Path, name: str, measure: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """What was measured, from `place` if it has been kept there."""
    path = place / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = measure()
        print(f"measured {name}", flush=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(path)
    return json.loads(path.read_text())


def _fine_tune(
    settings: Settings, start: Params, head: Head, task: Task, seed: int, file: Path
) -> Params:
    return fine_tune(settings, start, head, task.train, seed, file)


def _with_heads(network: Network, heads: Head) -> Callable[..., jax.Array]:
    """One function for all tasks, compiled once."""

    def apply(params: Params, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, task = inputs
        return network.logits(params, (images, jax.tree.map(lambda x: x[task], heads)))

    return apply


@functools.partial(jax.jit, static_argnames="network")
def _features(network: Network, params: Params, images: jax.Array) -> jax.Array:
    return network.features(params, images)
