"""The merges that are compared: every registered method, and what else merges."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge
from jaxmerge.demo.merges import can_merge
from jaxmerge.methods.masking import Thresholds
from jaxmerge.registry import Method, methods
from jaxmerge.statistics import Statistics

from .experiment import Experiment
from .model import Params

SCALES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2)
"""The coefficients tried, on validation images, for methods that have one."""

MULTI_TASK = {"task_arithmetic": "consensus", "ties": "consensus, ties"}
"""What consensus is taken of, and the names of these rows."""


class Merge(NamedTuple):
    """A row of the table.

    Attributes:
        name: the method, and its variant.
        merge: makes the parameters.
        scaled: whether a coefficient is chosen for what the merge adds to the start.
        data: which images it saw, apart from those that chose the coefficient.
    """

    name: str
    merge: Callable[[], Params]
    scaled: bool = False
    data: str = ""


class Measured(NamedTuple):
    """What is known of a merge.

    Attributes:
        accuracies: on the test images of each task.
        others: on those of tasks held out, and of the start's own.
        scale: the coefficient chosen, None if there is none.
        missed: how much of what fine-tuning did to the features of each task's
            validation images is missed, in the mean over images: the distance of the
            merge's features from those of the task's model, divided by the distance of
            the start's from these. 0 if all is preserved, 1 at the start.
        seconds: of processors, to merge and to choose the coefficient.
    """

    accuracies: list[float]
    others: list[float]
    scale: float | None
    missed: list[float]
    seconds: float


def merges(experiment: Experiment) -> Iterator[Merge]:
    """All merges of an experiment's models; nothing is computed before it is asked for.

    Methods for fewer models, and those with an option that only a user can choose, are
    not among them.
    """
    known = functools.cache(functools.partial(collect_statistics, experiment))
    for method in methods().values():
        if method.name != "consensus" and can_merge(method, len(experiment.tuned)):
            yield _registered(method, experiment, known)
    seen = f"{experiment.sizes.statistics} unlabelled per task"
    yield Merge(
        "mats, kronecker",
        lambda: jaxmerge.mats(experiment.tuned, known(), metric="kronecker"),
        data=seen,
    )
    for multi_task, name in MULTI_TASK.items():
        merge = functools.partial(_consensus, experiment, multi_task)
        data = f"{experiment.sizes.validation} validation per task"
        yield Merge(name, merge, scaled=True, data=data)
    start, tuned = experiment.start, experiment.tuned
    arithmetic = functools.partial(jaxmerge.task_arithmetic, start, tuned)
    yield Merge(
        "task_arithmetic, calibrated",
        lambda: jaxmerge.calibrate(start, tuned, arithmetic()),
        scaled=True,
    )
    yield Merge(
        "task_arithmetic, boosted",
        lambda: jaxmerge.subspace_boost(start, arithmetic()),
        scaled=True,
    )
    features = experiment.network.features
    yield Merge(
        "regmean_plus_plus",
        lambda: jaxmerge.regmean_plus_plus(
            features,
            tuned,
            experiment.images("train", experiment.sizes.statistics),
            layers=["stem_in/.*", "stem_out/.*", *_blocks(start)],
        ),
        data=seen,
    )
    yield Merge(
        "submodule_merge",
        lambda: jaxmerge.submodule_merge(
            features,
            start,
            tuned,
            experiment.images("train", experiment.sizes.samples),
            submodules=r"block_\d+",
        ),
        data=f"{experiment.sizes.samples} unlabelled per task",
    )
    for granularity in ("task", "layer"):
        merge = functools.partial(_adapt, experiment, granularity)
        seen = f"{16 * experiment.sizes.adaptation} unlabelled per task"
        yield Merge(f"adamerging, by {granularity}", merge, data=seen)


class Moved(NamedTuple):
    """What fine-tuning on a task did to the features of its validation images.

    Attributes:
        features: those of the task's model, (images, width).
        distance: of the start's from them, the mean over images.
    """

    features: jax.Array
    distance: jax.Array


def moved_features(experiment: Experiment) -> list[Moved]:
    """What fine-tuning did, for each task."""
    moved = []
    for i, model in enumerate(experiment.tuned):
        features = experiment.features(model, i)
        before = experiment.features(experiment.start, i)
        moved.append(Moved(features, _distance(before, features)))
    return moved


def measure(merge: Merge, experiment: Experiment, moved: list[Moved]) -> Measured:
    """Merges, chooses the coefficient on validation images, and tests."""
    before = time.process_time()
    merged, scale = merge.merge(), None
    if merge.scaled:
        merged, scale = best_scale(experiment, merged)
    seconds = time.process_time() - before
    accuracies, others = experiment.test(merged), experiment.test_others(merged)
    missed = missed_features(experiment, merged, moved)
    return Measured(accuracies, others, scale, missed, seconds)


def best_scale(experiment: Experiment, merged: Params) -> tuple[Params, float]:
    """The parameters and the scale that are best on validation images, in the mean.

    Scales multiply what a merge adds to the start, so `merged` at 1 shows all others.
    """

    def scaled(scale: float) -> Params:
        return jaxmerge.task_arithmetic(experiment.start, [merged], scale=scale)

    scores = [np.mean(experiment.validate(scaled(scale))) for scale in SCALES]
    best = SCALES[int(np.argmax(scores))]
    return scaled(best), best


def missed_features(
    experiment: Experiment, params: Params, moved: list[Moved]
) -> list[float]:
    """How much of the change of features is missed on each task: `Measured.missed`."""
    return [
        float(_distance(experiment.features(params, i), wanted) / distance)
        for i, (wanted, distance) in enumerate(moved)
    ]


def _distance(features: jax.Array, others: jax.Array) -> jax.Array:
    return jnp.mean(jnp.linalg.norm(features - others, axis=-1))


def collect_statistics(experiment: Experiment) -> list[Statistics]:
    """Second moments and Fisher information of each task's model on its images."""
    images = experiment.images("train", experiment.sizes.statistics)
    return [
        jaxmerge.collect(
            experiment.apply,
            model,
            [(some, np.full(len(some), task))],
            what=("gram", "output_gradient", "fisher"),
            # All labels would take a pass back for each of up to 43 classes.
            labels="sample",
            key=experiment.seed,
        )
        for task, (model, some) in enumerate(zip(experiment.tuned, images, strict=True))
    ]


def best_thresholds(experiment: Experiment, multi_task: Any) -> Thresholds:
    """The thresholds of TALL-masks that are best on each task's validation images.

    TIES ranks the whole model, as in the paper's experiments; a sum ranks nothing.
    """
    some = [
        task.validation.some(experiment.sizes.validation) for task in experiment.tasks
    ]
    images, labels = (jnp.stack(part) for part in zip(*some, strict=True))

    def score(params: Params, task: Any) -> Any:
        numbers = jnp.full(labels.shape[1], task)
        logits = experiment.apply(params, (images[task], numbers))
        return (logits.argmax(axis=-1) == labels[task]).mean()

    return jaxmerge.choose_thresholds(
        experiment.start,
        experiment.tuned,
        score,
        multi_task=multi_task,
        scope="model",
    )


def _registered(
    method: Method, experiment: Experiment, known: Callable[[], list[Statistics]]
) -> Merge:
    names = [task.name for task in experiment.tasks]

    def merge() -> Params:
        statistics = known() if method.needs_statistics else ()
        bound = method.bind({}, experiment.seed, names, statistics)
        return bound(experiment.start, experiment.tuned)

    seen = f"{experiment.sizes.statistics} unlabelled per task"
    data = seen if method.needs_statistics else ""
    return Merge(method.name, merge, "scale" in method.options, data)


def _consensus(experiment: Experiment, multi_task: Any) -> Params:
    return jaxmerge.consensus(
        experiment.start,
        experiment.tuned,
        threshold=best_thresholds(experiment, multi_task).values,
        multi_task=multi_task,
        scope="model",
    )


def _adapt(experiment: Experiment, granularity: Any) -> Params:
    steps = experiment.sizes.adaptation
    inputs = {
        task.name: [
            (images, np.full(len(images), i))
            for images in np.split(task.train.some(16 * steps).images, steps)
        ]
        for i, task in enumerate(experiment.tasks)
    }
    return jaxmerge.adamerging(
        experiment.apply,
        experiment.start,
        experiment.tuned,
        inputs,
        granularity=granularity,
        steps=steps,
        # Ten times the paper's, for an eighth of its steps.
        learning_rate=1e-2,
    ).params


def _blocks(params: Params) -> list[str]:
    """A pattern for the leaves of each block, in the order in which they run."""
    return sorted(f"{name}/.*" for name in params if name.startswith("block_"))
