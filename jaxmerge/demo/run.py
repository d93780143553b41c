"""`jaxmerge demo`: fine-tunes small models on real tasks, merges them, compares.

The merges go the way of every user's merge: checkpoints on disk, a recipe file,
`merge_checkpoints`. Every registered method gets a row, except those that cannot merge
as many models as there are tasks.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from threadpoolctl import threadpool_limits

from jaxmerge import checkpoints
from jaxmerge.calibration import calibrate, subspace_boost
from jaxmerge.demo import training
from jaxmerge.demo.model import ENCODER, Head, Params
from jaxmerge.demo.tasks import TASKS, Labelled, Splits, load_digits, task_data
from jaxmerge.evaluation import ResultTable
from jaxmerge.merging import merge_checkpoints
from jaxmerge.recipes import load_recipe
from jaxmerge.registry import Method, methods

SCALES = tuple(round(0.1 * i, 1) for i in range(1, 21))
"""The coefficients tried, on validation images, for methods that have one."""

STEPS = {
    "calibrated": calibrate,
    "boosted": lambda start, models, merged: subspace_boost(start, merged),
}
"""What may follow a merge, as functions of start, models and merged parameters."""

FOLLOWED = ("task_arithmetic", "tsv_merge")
"""The methods that are also shown with each of `STEPS` after them."""


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


def main(out: str | os.PathLike[str], *, seed: int = 0) -> ResultTable:
    """Trains what is not there yet, merges, prints a table and writes it.

    Args:
        out: directory for checkpoints, recipes, merged models, `table.md` and
            `table.png`. Trained models found there are used again.
        seed: fixes the split of the images, the training and random methods.

    Returns:
        Accuracies on test images, which no training and no choice has seen.

    Raises:
        FileExistsError: `out` holds something else than an earlier run.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()) and not (out / "trained").is_dir():
        raise FileExistsError(
            f"{out} holds something else than an earlier run of the demo; "
            "choose a new directory."
        )
    console = Console()
    with Progress(console=console) as progress:
        experiment = _train(out / "trained", seed, progress)
        table = _merge_all(out, experiment, progress)
    (out / "table.md").write_text(table.markdown() + "\n")
    _draw(table, out / "table.png")
    _show(console, table)
    console.print(f"Models, recipes, table and picture are in {out}/")
    return table


def _train(directory: Path, seed: int, progress: Progress) -> Experiment:
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


def _merge_all(out: Path, experiment: Experiment, progress: Progress) -> ResultTable:
    tuned = experiment.tuned
    able = [method for method in methods().values() if _can_merge(method, len(tuned))]
    bar = progress.add_task("merging", total=len(able))
    rows, notes = {"start": _test(experiment, experiment.start)}, {}

    def add_rows(method: Method) -> None:
        merged, scale = _merge(out, method, experiment)
        rows[method.name] = _test(experiment, merged)
        if scale is not None:
            notes[method.name] = f"{scale:g}"
        for step in STEPS if method.name in FOLLOWED else ():
            name = f"{method.name}, {step}"
            whole = STEPS[step](experiment.start, list(tuned.values()), merged)
            scale = _best_scale(experiment, whole)
            rows[name] = _test(experiment, _scale(experiment.start, whole, scale))
            notes[name] = f"{scale:g}"
        progress.advance(bar)

    # Compilation, where most of the time goes, occupies one core at a time. Threads of
    # BLAS beside it would wait for each other more than they compute.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(add_rows, able))
    individual = [
        float(_test(experiment, model)[i]) for i, model in enumerate(tuned.values())
    ]
    rank = lambda row: (row[0] != "start", row[1].mean(), row[0])  # noqa: E731
    ranked = sorted(rows.items(), key=rank)
    return ResultTable(list(tuned), individual, dict(ranked), notes)


def _can_merge(method: Method, models: int) -> bool:
    """Whether a method merges that many models with nothing but what is known here."""
    asks_more = method.needs_statistics or any(
        option.required for option in method.options.values()
    )
    return (method.max_models or models) >= models and not asks_more


def _test(experiment: Experiment, params: Params) -> np.ndarray:
    """The accuracy on each task's test images."""
    return np.asarray(_accuracies(params, experiment.heads, experiment.data.test))


def _merge(
    out: Path, method: Method, experiment: Experiment
) -> tuple[Params, float | None]:
    """Merges with the best scale, if the method has one, which is returned too."""
    if "scale" not in method.options:
        return _merge_as_recipe(out, method, experiment, {}), None
    whole = _merge_as_recipe(out, method, experiment, {"scale": 1.0})
    scale = _best_scale(experiment, whole)
    return _merge_as_recipe(out, method, experiment, {"scale": scale}), scale


def _best_scale(experiment: Experiment, merged: Params) -> float:
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
        return _accuracies(_scale(start, merged, scale), heads, data).mean()

    return jax.lax.map(with_scale, jnp.array(SCALES))


def _scale(start: Params, merged: Params, scale: Any) -> Params:
    return jax.tree.map(lambda s, m: s + scale * (m - s), start, merged)


@jax.jit
def _accuracies(params: Params, heads: Head, data: Labelled) -> jax.Array:
    """The accuracy on each task, whose heads and images are stacked."""

    def on_task(task: tuple[Head, Labelled]) -> jax.Array:
        head, (images, labels) = task
        return training.accuracy(params, head, images, labels)

    return jax.lax.map(on_task, (heads, data))


def _merge_as_recipe(
    out: Path, method: Method, experiment: Experiment, options: dict[str, Any]
) -> Params:
    """Merges the checkpoints with a recipe file, as a user would."""
    recipes, merged = out / "recipes", out / "merged" / method.name
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
    path = recipes / f"{method.name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    if (merged / checkpoints.REPORT_NAME).exists():
        shutil.rmtree(merged)  # From an earlier run; it is about to be made again.
    merge_checkpoints(load_recipe(path), merged)
    return jax.tree.map(jnp.asarray, checkpoints.load(merged))


def _show(console: Console, table: ResultTable) -> None:
    header, *rows = table.cells()
    shown = Table(
        title="Accuracy on test images, %",
        box=box.SIMPLE_HEAD,
        padding=0,  # So that it fits into eighty columns.
        pad_edge=False,
    )
    for i, title in enumerate(header):
        shown.add_column(title, justify="right" if i else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row, style="dim" if row[0] in ("start", "individual") else "")
    console.print(shown)


def _draw(table: ResultTable, path: Path) -> None:
    rows = {**table.rows, "individual": table.individual}
    everything = table._replace(rows=rows)
    figure = Figure(figsize=(7, 0.8 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    means = [100 * everything.mean(name) for name in rows]
    axes.barh(places, means, color="#9ecae1", height=0.7)
    for i, task in enumerate(table.tasks):
        values = [100 * row[i] for row in rows.values()]
        axes.plot(values, places, "osD^vP*X"[i % 8], ms=4.5, label=task, alpha=0.85)
    for place, mean in enumerate(means):
        axes.text(1, place, f"{mean:.1f}", va="center", fontsize=9)
    axes.set_yticks(places, list(rows))
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy on test images, % (bar: mean)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    FigureCanvasAgg(figure).print_png(str(path))
