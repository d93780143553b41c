"""The demo's merges: each method gives one row of the table, or several.

Methods that know of nothing but models go the way of every user's merge: checkpoints on
disk, a recipe file, `merge_checkpoints`. Those that look at data take it from the
training images, without their labels.
"""

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import yaml

from jaxmerge import checkpoints
from jaxmerge.calibration import calibrate, subspace_boost
from jaxmerge.demo import training
from jaxmerge.demo.experiment import Experiment, accuracies
from jaxmerge.demo.model import ENCODER, Head, Params
from jaxmerge.demo.tasks import Labelled
from jaxmerge.merging import merge_checkpoints
from jaxmerge.methods.masking import choose_thresholds
from jaxmerge.recipe_files import load_recipe
from jaxmerge.registry import Method, methods
from jaxmerge.statistics import Statistics, collect
from jaxmerge.submodules.coefficients import submodule_merge
from jaxmerge.submodules.progressive import regmean_plus_plus

SCALES = tuple(round(0.1 * i, 1) for i in range(1, 21))
"""The coefficients tried, on validation images, for methods that have one."""

STEPS = {
    "calibrated": calibrate,
    "boosted": lambda start, models, merged: subspace_boost(start, merged),
}
"""What may follow a merge, as functions of start, models and merged parameters."""

FOLLOWED = ("task_arithmetic", "tsv_merge")
"""The methods that are also shown with each of `STEPS` after them."""

METRICS = {"mats, kronecker": ("mats", {"metric": "kronecker"})}
"""Methods of statistics that are also shown with other options."""

MULTI_TASK = {"task_arithmetic": "", "ties": ", ties"}
"""What consensus is taken of, and what that adds to the name of its row."""

IMAGES = 256
"""Images per task, without labels, behind the statistics."""

SAMPLES = 30
"""Images per task, without labels, for the coefficients of submodules."""


class Row(NamedTuple):
    """A merged model in the table.

    Attributes:
        name: the method, and what followed it.
        params: the merged parameters.
        scale: the coefficient chosen on validation images, if it has one.
        images: how many training images per task the method saw, without labels.
    """

    name: str
    params: Params
    scale: float | None = None
    images: int = 0


Job = Callable[[], list[Row]]


Thresholds = Mapping[str, list[float]]
"""By multi-task vector, the threshold of each task's TALL-mask."""


def jobs(out: Path, experiment: Experiment, thresholds: Thresholds) -> list[Job]:
    """What is to be merged, as functions that may run in any order.

    Every registered method that `can_merge` as many models as there are tasks is among
    them.
    """
    models = len(experiment.tuned)
    able = [method for method in methods().values() if can_merge(method, models)]
    by_models = [m for m in able if not m.needs_statistics]
    by_data = [m for m in able if m.needs_statistics]
    return [
        functools.partial(_merge_by_data, experiment, by_data),
        functools.partial(_merge_submodules, experiment),
        functools.partial(_merge_layers, experiment),
        *(
            functools.partial(_merge_consensus, out, experiment, *chosen)
            for chosen in thresholds.items()
        ),
        *(
            functools.partial(_merge, out, method, experiment)
            for method in by_models
            if method.name != "consensus"
        ),
    ]


def can_merge(method: Method, models: int) -> bool:
    """Whether a method merges that many models with no options of the user's choice."""
    required = any(option.required for option in method.options.values())
    return (method.max_models or models) >= models and not required


def _merge(
    out: Path,
    method: Method,
    experiment: Experiment,
    options: Mapping[str, Any] = MappingProxyType({}),
    suffix: str = "",
) -> list[Row]:
    """Merges with the best scale, if the method has one, and with what may follow."""
    name, start = method.name + suffix, experiment.start

    def merge(**more: Any) -> Params:
        return _merge_as_recipe(out, name, method, experiment, {**options, **more})

    if "scale" not in method.options:
        return [Row(name, merge())]
    scale = best_scale(experiment, merge(scale=1.0))
    merged = merge(scale=scale)
    rows = [Row(name, merged, scale)]
    for step in STEPS if name in FOLLOWED else ():
        whole = STEPS[step](start, list(experiment.tuned.values()), merged)
        scale = best_scale(experiment, whole)
        rows.append(Row(f"{name}, {step}", _scale(start, whole, scale), scale))
    return rows


def _merge_consensus(
    out: Path, experiment: Experiment, multi_task: str, thresholds: list[float]
) -> list[Row]:
    options = {"multi_task": multi_task, "threshold": thresholds, "scope": "model"}
    suffix = MULTI_TASK[multi_task]
    return _merge(out, methods()["consensus"], experiment, options, suffix)


def best_thresholds(experiment: Experiment) -> Thresholds:
    """The thresholds of TALL-masks that are best on each task's validation images.

    TIES ranks the whole model, as in the paper's experiments; a sum ranks nothing.
    """
    models, heads = list(experiment.tuned.values()), experiment.heads

    def score(params: Params, task: int) -> jax.Array:
        of_task = lambda tree: jax.tree.map(lambda x: x[task], tree)  # noqa: E731
        images, labels = of_task(experiment.data.validation)
        return training.accuracy(params, of_task(heads), images, labels)

    return {
        multi_task: choose_thresholds(
            experiment.start, models, score, multi_task=multi_task, scope="model"
        ).values
        for multi_task in MULTI_TASK
    }


def _merge_by_data(experiment: Experiment, able: list[Method]) -> list[Row]:
    statistics = collect_statistics(experiment)
    models = list(experiment.tuned.values())
    shown: Mapping[str, tuple[str, dict[str, Any]]] = {
        method.name: (method.name, {}) for method in able
    }
    rows = []
    for row, (name, options) in {**shown, **METRICS}.items():
        merge = methods()[name].bind(options, experiment.seed, (), statistics)
        rows.append(Row(row, merge(experiment.start, models), images=IMAGES))
    return rows


def collect_statistics(experiment: Experiment) -> list[Statistics]:
    """Second moments and Fisher information of each task's model on its images."""
    known = []
    for task, params in enumerate(experiment.tuned.values()):
        images = experiment.data.train.images[task][:IMAGES]
        # Each image brings the head of its task along: one function serves all tasks.
        with_head = lambda x: jnp.broadcast_to(x[task], (IMAGES, *x.shape[1:]))  # noqa: B023, E731
        batch = (images, jax.tree.map(with_head, experiment.heads))
        what = ("gram", "output_gradient", "fisher")
        known.append(collect(_logits, params, [batch], what=what))
    return known


def _logits(params: Params, batch: tuple[jax.Array, Head]) -> jax.Array:
    images, head = batch
    return jnp.einsum("nw,nwc->nc", _features(params, images), head.kernel) + head.bias


def _features(params: Params, images: jax.Array) -> jax.Array:
    return ENCODER.apply({"params": params}, images)  # pyright: ignore


def _merge_submodules(experiment: Experiment) -> list[Row]:
    samples = list(experiment.data.train.images[:, :SAMPLES])
    models = list(experiment.tuned.values())
    merged = submodule_merge(
        _features, experiment.start, models, samples, submodules=r"block_\d+"
    )
    return [Row("submodule_merge", merged, images=SAMPLES)]


def _merge_layers(experiment: Experiment) -> list[Row]:
    samples = list(experiment.data.train.images[:, :IMAGES])
    models = list(experiment.tuned.values())
    layers = ["patch_embedding/.*", "block_0/.*", "block_1/.*"]
    merged = regmean_plus_plus(_features, models, samples, layers=layers)
    return [Row("regmean_plus_plus", merged, images=IMAGES)]


def best_scale(experiment: Experiment, merged: Params) -> float:
    """The scale with the best mean accuracy on validation images, out of `SCALES`.

    Scales multiply what a merge adds to the start, so `merged` at 1 shows all others.
    """
    start, heads, data = experiment.start, experiment.heads, experiment.data.validation
    return SCALES[int(_mean_accuracies(start, merged, heads, data).argmax())]


@jax.jit
def _mean_accuracies(
    start: Params, merged: Params, heads: Head, data: Labelled
) -> jax.Array:
    """The mean accuracy over tasks with each of `SCALES`."""

    def with_scale(scale: jax.Array) -> jax.Array:
        return accuracies(_scale(start, merged, scale), heads, data).mean()

    return jax.lax.map(with_scale, jnp.array(SCALES))


def _scale(start: Params, merged: Params, scale: Any) -> Params:
    return jax.tree.map(lambda s, m: s + scale * (m - s), start, merged)


def _merge_as_recipe(
    out: Path,
    name: str,
    method: Method,
    experiment: Experiment,
    options: dict[str, Any],
) -> Params:
    """Merges the checkpoints with a recipe file, as a user would."""
    name = name.replace(", ", "_")
    recipes, merged = out / "recipes", out / "merged" / name
    recipes.mkdir(parents=True, exist_ok=True)
    trained = Path(os.path.relpath(experiment.trained, recipes))
    recipe: dict[str, Any] = {"method": method.name}
    if method.needs_base:
        recipe["base"] = str(trained / "start")
    recipe["models"] = [str(trained / name) for name in experiment.tuned]
    if options:
        recipe["options"] = options
    if method.needs_key:
        recipe["seed"] = experiment.seed
    path = recipes / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    if (merged / checkpoints.REPORT_NAME).exists():
        shutil.rmtree(merged)  # From an earlier run; it is about to be made again.
    merge_checkpoints(load_recipe(path), merged)
    return jax.tree.map(jnp.asarray, checkpoints.load(merged))
