"""The merges of the text benchmark: one result for each method, kept as it is found.

Coefficients are chosen on validation data. Other options are the methods' defaults,
which are those of their papers.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxmerge
from jaxmerge.demo.merges import can_merge
from jaxmerge.methods.masking import choose_thresholds
from jaxmerge.registry import methods
from jaxmerge.statistics import Statistics
from text_encoder import model
from text_encoder.experiment import Experiment
from text_encoder.tasks import Inputs, batches

LAYERS = r"layer/\d+"
PARTS = r"layer/\d+/(attention|intermediate|output)"
"""Submodules: whole layers, and what they consist of."""

REBUILT = ("tall_masks", "emr")
"""Rows of which each task has a model of its own, rebuilt from what all share."""

MATS = {
    "mats, gram, 1 step": {"steps": 1},
    "mats, gram, 10 steps": {"steps": 10},
    "mats, gram, 10 steps from regmean": {"steps": 10, "init": "regmean"},
    "mats, fisher, 10 steps": {"metric": "fisher", "steps": 10},
    "mats, kronecker, 1 step": {"metric": "kronecker", "steps": 1},
    "mats, kronecker, 10 steps": {"metric": "kronecker", "steps": 10},
    "mats, kronecker, 100 steps": {"metric": "kronecker", "steps": 100},
}
"""Options of MaTS, by the names of the rows; its defaults are `mats`: 100 steps from
the average, with Gram matrices."""

Merged = model.Params | list[model.Params]
"""One model for all tasks, or one for each."""


class Job(NamedTuple):
    """A row that is to be made.

    Attributes:
        merge: returns the merged model; at a scale of 1, if that is to be chosen.
        data: what it sees of each task, besides the models.
        scaled: whether a coefficient is to be chosen.
    """

    merge: Callable[[], Merged]
    data: str = ""
    scaled: bool = False


class Result(NamedTuple):
    """What is known of a row.

    Attributes:
        test: the accuracy on each task's test data.
        preserved: by task, the mean cosine between the features of the task's own model
            and those of this one, on validation data.
        data: what it saw of each task, besides the models.
        scale: the coefficient that was chosen.
        seconds: CPU time of merging, choosing and testing.
    """

    test: list[float]
    preserved: list[float]
    data: str
    scale: float | None
    seconds: float


def results(experiment: Experiment, file: Path) -> dict[str, Result]:
    """All rows; `file` keeps those that an earlier run has found."""
    known = json.loads(file.read_text()) if file.exists() else {}
    for name, job in jobs(experiment).items():
        if name not in known:
            known[name] = _result(experiment, job)._asdict()
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(known, indent=1))
            partial.replace(file)
            mean, seconds = np.mean(known[name]["test"]), known[name]["seconds"]
            print(f"{name}: {100 * mean:.1f}, {seconds:.0f} CPU s", flush=True)
    return {name: Result(**fields) for name, fields in known.items()}


def _result(experiment: Experiment, job: Job) -> Result:
    begun, scale = time.process_time(), None
    merged = job.merge()
    if job.scaled:
        scale = best_scale(experiment, merged)
        merged = along(experiment.setup.start, merged, scale)
    each = merged if isinstance(merged, list) else [merged] * len(experiment.tuned)
    test, kept = experiment.setup.test_apart(each), preserved(experiment, each)
    seconds = time.process_time() - begun
    return Result(test.tolist(), kept, job.data, scale, seconds)


@jax.jit
def along(start: model.Params, merged: model.Params, scale: Any) -> model.Params:
    """The merge at another scale: scales multiply what it adds to the start."""
    return jax.tree.map(lambda s, m: s + scale * (m - s), start, merged)


def best_scale(experiment: Experiment, merged: Any) -> float:
    """The scale with the best mean accuracy on validation data, of those to try."""
    scales = experiment.setup.settings.scales
    scores = [
        experiment.setup.validate(along(experiment.setup.start, merged, scale)).mean()
        for scale in scales
    ]
    return scales[int(np.argmax(scores))]


def features(params: model.Params, inputs: Inputs) -> Array:
    """The encoder without heads."""
    return model.features(params, inputs.embedded, inputs.mask)


def preserved(experiment: Experiment, models: list[model.Params]) -> list[float]:
    """By task, the mean cosine of features with those of the task's own model."""

    def of_task(own: model.Params, params: model.Params, inputs: Inputs) -> float:
        pair = inputs, _features(own, inputs)
        return float(jaxmerge.evaluate(features, params, pair, cosine))

    data = experiment.setup.validation.values()
    three = zip(experiment.models, models, data, strict=True)
    return [of_task(own, params, pairs[0][0]) for own, params, pairs in three]


_features = jax.jit(features)


def cosine(outputs: Array, targets: Array) -> Array:
    """Of vectors that both have the norm 1."""
    return jnp.sum(outputs * targets, axis=-1)


def jobs(experiment: Experiment) -> dict[str, Job]:
    """All rows by name; nothing is computed before a job's `merge` is called."""
    start, models = experiment.setup.start, experiment.models
    names = list(experiment.tuned)
    unlabelled = f"{experiment.setup.settings.unlabelled} inputs"
    known = functools.cache(lambda: statistics(experiment))
    thresholds = functools.cache(lambda kind: _thresholds(experiment, kind))

    def registered(name: str, options: dict[str, Any]) -> Merged:
        method = methods()[name]
        seen = known() if method.needs_statistics else ()
        return method.bind(options, experiment.seed, names, seen)(start, models)

    def consensus(kind: str) -> Merged:
        options = {"multi_task": kind, "scope": "model", "threshold": thresholds(kind)}
        return jaxmerge.consensus(start, models, **options)

    options = {"wudi": {"steps": experiment.setup.settings.wudi}}
    found = {"start": Job(lambda: start), "individual": Job(lambda: models)}
    for name, method in methods().items():
        if can_merge(method, len(models)) and name != "consensus":
            scaled = "scale" in method.options
            data = unlabelled if method.needs_statistics else ""
            merge = functools.partial(registered, name, options.get(name, {}))
            found[name] = Job(merge, data, scaled)
    for name, more in MATS.items():
        merge = functools.partial(registered, "mats", more)
        found[name] = Job(merge, unlabelled)
    for kind in ("task_arithmetic", "ties"):
        merge = functools.partial(consensus, kind)
        found[f"consensus of {kind}"] = Job(merge, scaled=True)
    return found | {
        "regmean_plus_plus": Job(lambda: _layer_by_layer(experiment), unlabelled),
        **{
            f"submodule_merge, {title}": Job(
                functools.partial(_submodules, experiment, patterns),
                f"{experiment.setup.settings.samples} inputs",
            )
            for title, patterns in {"layers": LAYERS, "parts": PARTS}.items()
        },
        **{
            f"adamerging, {granularity}": Job(
                functools.partial(_adapted, experiment, granularity),
                "validation inputs",
            )
            for granularity in ("task", "layer")
        },
        "tall_masks": Job(lambda: _masked(experiment, thresholds("task_arithmetic"))),
        "emr": Job(lambda: _unified(experiment)),
    }


def statistics(experiment: Experiment) -> list[Statistics]:
    """Second moments and Fisher information of each task's model on its sentences."""
    return [
        jaxmerge.collect(
            experiment.setup.apply,
            params,
            batches(
                experiment.setup.train_batch(i, experiment.setup.settings.unlabelled)[
                    0
                ],
                16,
            ),
            what=("gram", "output_gradient", "fisher"),
            labels="sample",
            key=experiment.seed,
            mask=lambda inputs: inputs.mask,
        )
        for i, params in enumerate(experiment.models)
    ]


def _samples(experiment: Experiment, count: int) -> list[Inputs]:
    places = range(len(experiment.tuned))
    return [experiment.setup.train_batch(i, count)[0] for i in places]


def _layer_by_layer(experiment: Experiment) -> Merged:
    return jaxmerge.regmean_plus_plus(
        features,
        experiment.models,
        [
            batches(x, 64)
            for x in _samples(experiment, experiment.setup.settings.unlabelled)
        ],
        layers=[f"layer/{i}/.*" for i in range(model.LAYERS)],
        mask=lambda inputs: inputs.mask,
    )


def _submodules(experiment: Experiment, patterns: str) -> Merged:
    return jaxmerge.submodule_merge(
        features,
        experiment.setup.start,
        experiment.models,
        _samples(experiment, experiment.setup.settings.samples),
        submodules=patterns,
        mask=lambda inputs: inputs.mask,
    )


def _adapted(experiment: Experiment, granularity: Any) -> Merged:
    inputs = {
        task: [part for pair in pairs for part in batches(pair[0], 16)]
        for task, pairs in experiment.setup.validation.items()
    }
    return jaxmerge.adamerging(
        experiment.setup.apply,
        experiment.setup.start,
        experiment.models,
        inputs,
        granularity=granularity,
        steps=experiment.setup.settings.adapting,
        learning_rate=0.02,  # Not 0.001 as in the paper, which takes 500 steps.
    ).params


def _thresholds(experiment: Experiment, kind: Any) -> list[float]:
    """The thresholds of TALL-masks that are best on each task's validation data."""
    return choose_thresholds(
        experiment.setup.start,
        experiment.models,
        experiment.setup.validate_on,
        multi_task=kind,
        scope="model",
    ).values


def _masked(experiment: Experiment, thresholds: list[float]) -> list[model.Params]:
    start, models = experiment.setup.start, experiment.models
    merged = jaxmerge.task_arithmetic(start, models)
    masks = jaxmerge.tall_masks(start, models, threshold=thresholds)
    return [jaxmerge.apply_mask(start, merged, mask) for mask in masks]


def _unified(experiment: Experiment) -> list[model.Params]:
    unified = jaxmerge.emr(experiment.setup.start, experiment.models)
    places = range(len(experiment.models))
    return [unified.params(experiment.setup.start, place) for place in places]


def linearity(experiment: Experiment, file: Path) -> dict[str, float]:
    """How nonlinear layers, their parts and the whole model are: means over tasks.

    `file` keeps what an earlier run has found.
    """
    if not file.exists():
        found: dict[str, list[float]] = {}
        samples = _samples(experiment, experiment.setup.settings.samples)
        for params, own in zip(experiment.models, samples, strict=True):
            for patterns in (LAYERS, PARTS):
                scores = jaxmerge.nonlinearity(
                    features,
                    experiment.setup.start,
                    params,
                    own,
                    submodules=patterns,
                    points=6,
                )
                for path, score in scores.items():
                    found.setdefault(path, []).append(float(score))
        means = {path: float(np.mean(scores)) for path, scores in found.items()}
        file.write_text(json.dumps(means, indent=1))
    return json.loads(file.read_text())
