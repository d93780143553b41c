"""The demo's trained models and their tests: everything that merges start from."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from jaxmerge import checkpoints
from jaxmerge.demo import training
from jaxmerge.demo.model import ENCODER, Head, Params
from jaxmerge.demo.tasks import TASKS, Labelled, Splits, load_digits, task_data


class Experiment(NamedTuple):
    """What is merged and compared.

    Attributes:
        trained: the directory of the checkpoints.
        seed: of the split, the training and random methods.
        start: the shared, pretrained parameters.
        tuned: the parameters fine-tuned on each task.
        heads: the frozen heads of all tasks, stacked.
        data: the images of all tasks, stacked.
    """

    trained: Path
    seed: int
    start: Params
    tuned: dict[str, Params]
    heads: Head
    data: Splits

    def test(self, params: Params) -> np.ndarray:
        """The accuracy on each task's test images, (tasks,)."""
        return np.asarray(accuracies(params, self.heads, self.data.test))

    def test_apart(self, models: Iterable[Params]) -> list[float]:
        """The accuracy of each task's own model on its test images."""
        return [float(self.test(model)[i]) for i, model in enumerate(models)]


def train(directory: Path, seed: int, progress: Progress) -> Experiment:
    """Trains all models, or takes those that an earlier run left in `directory`."""
    # Models of other settings must not be taken for these.
    settings = f"{training.SETTINGS}{ENCODER}".encode()
    trained = directory / f"seed{seed}-{hashlib.sha256(settings).hexdigest()[:8]}"

    def load(name: str, title: str, train: Callable[[training.Progress], Params]):
        bar = progress.add_task(title, total=1.0)
        if not (trained / name).exists():
            params = train(lambda done, _: progress.update(bar, completed=done))
            checkpoints.save(trained / name, params)
        progress.update(bar, completed=1.0)
        return jax.tree.map(jnp.asarray, checkpoints.load(trained / name))

    digits = load_digits(seed)
    start = load(
        "start",
        "pretraining",
        lambda report: training.pretrain(
            digits.train.images, seed=seed, progress=report
        ),
    )
    tuned, heads, data = {}, [], []
    for task in TASKS:
        images = task_data(task, digits)
        head = training.make_head(start, images.train, task.classes)
        heads.append(head)
        data.append(images)
        tuned[task.name] = load(
            task.name,
            f"fine-tuning: {task.description}",
            lambda report, images=images, head=head: training.fine_tune(
                start, head, images.train, seed=seed, progress=report
            ),
        )
    stack = lambda *arrays: jnp.stack(arrays)  # noqa: E731
    heads, data = jax.tree.map(stack, *heads), jax.tree.map(stack, *data)
    return Experiment(trained, seed, start, tuned, heads, data)


@jax.jit
def accuracies(params: Params, heads: Head, data: Labelled) -> jax.Array:
    """The accuracy on each task, whose heads and images are stacked, (tasks,)."""

    def on_task(task: tuple[Head, Labelled]) -> jax.Array:
        head, (images, labels) = task
        return training.accuracy(params, head, images, labels)

    return jax.lax.map(on_task, (heads, data))
