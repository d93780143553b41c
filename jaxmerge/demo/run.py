"""`jaxmerge demo`: fine-tunes small models on real tasks, merges them, compares.

Ends in a table of accuracies, with a row or more for every method.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from threadpoolctl import threadpool_limits

from jaxmerge.demo import merges
from jaxmerge.demo.experiment import Experiment, train
from jaxmerge.demo.storing import store_all
from jaxmerge.evaluation import ResultTable


def main(out: str | os.PathLike[str], *, seed: int = 0) -> ResultTable:
    """Trains what is not there yet, merges, prints a table and writes it.

    Args:
        out: directory for checkpoints, recipes, merged models, `table.md`, `table.png`,
            stores and `stored.md`. Trained models found there are used again.
        seed: fixes the split of the images, the training and random methods.

    Returns:
        Accuracies of merges on test images, which no training and no choice has seen.

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
        models = train(out / "trained", seed, progress)
        thresholds = merges.best_thresholds(models)
        table = _merge_all(out, models, thresholds, progress)
        stored = store_all(out, models, thresholds, progress)
    (out / "table.md").write_text(table.markdown(marks=False) + "\n")
    (out / "stored.md").write_text(stored.markdown(marks=False) + "\n")
    _draw(table, out / "table.png")
    _show(console, table, "One model for all tasks: accuracy on test images, %")
    _show(console, stored, "A model for each task, from a store of all: the same")
    console.print(f"Models, recipes, stores, tables and picture are in {out}/")
    return table


def _merge_all(
    out: Path,
    experiment: Experiment,
    thresholds: merges.Thresholds,
    progress: Progress,
) -> ResultTable:
    jobs = merges.jobs(out, experiment, thresholds)
    bar = progress.add_task("merging", total=len(jobs))

    def rows_of(job: merges.Job) -> list[merges.Row]:
        rows = job()
        progress.advance(bar)
        return rows

    # Compilation, where most of the time goes, occupies one core at a time. Threads of
    # BLAS beside it would wait for each other more than they compute.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for rows in pool.map(rows_of, jobs) for row in rows]
    accuracies = {row.name: experiment.test(row.params) for row in rows}
    by_rank = lambda name: (accuracies[name].mean(), name)  # noqa: E731
    ranked = {"start": experiment.test(experiment.start)}
    ranked |= {name: accuracies[name] for name in sorted(accuracies, key=by_rank)}
    individual = experiment.test_apart(experiment.tuned.values())
    notes = {
        "scale": {r.name: f"{r.scale:g}" for r in rows if r.scale is not None},
        "images": {r.name: f"{r.images}" for r in rows if r.images},
    }
    return ResultTable(
        list(experiment.tuned), individual, ranked, notes, summaries=("mean", "norm.")
    )


def _show(console: Console, table: ResultTable, title: str) -> None:
    header, *rows = table.cells()
    shown = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        padding=0,  # So that it fits into eighty columns.
        pad_edge=False,
    )
    for i, name in enumerate(header):
        shown.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row, style="dim" if row[0] in ("start", "individual") else "")
    console.print(shown)


def _draw(table: ResultTable, path: Path) -> None:
    rows = [*table.rows, "individual"]
    figure = Figure(figsize=(7, 0.8 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    means = [100 * table.mean(name) for name in rows]
    axes.barh(places, means, color="#9ecae1", height=0.7)
    for i, task in enumerate(table.tasks):
        values = [100 * table.runs(name)[0, i] for name in rows]
        axes.plot(values, places, "osD^vP*X"[i % 8], ms=4.5, label=task, alpha=0.85)
    for place, mean in enumerate(means):
        axes.text(1, place, f"{mean:.1f}", va="center", fontsize=9)
    axes.set_yticks(places, rows)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy on test images, % (bar: mean)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    FigureCanvasAgg(figure).print_png(str(path))
