"""The figures of the result files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.evaluation import ResultTable
from jaxmerge.plots import accuracy_against_bytes, accuracy_against_tasks, heat_map
from jaxmerge.plots.canvas import COLOURS, INK, axes_of, grid, line_style, picture

from .claims import CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE, STEPS, Judged, seen_runs
from .pages import ENDS, Runs, path_of, paths_of

DRAWN = (
    "average",
    "task_arithmetic",
    "ties",
    "consensus",
    "fisher_average",
    "sftm",
    "tsv_merge",
    "iso_c",
    "regmean",
    "mats",
)
"""The methods in the picture of accuracies against the number of tasks."""


def save_figures(
    directory: Path,
    tables: Sequence[ResultTable],
    judged: Sequence[Judged],
    runs: Runs,
    deep: Sequence[Mapping[str, Any]],
) -> None:
    """Writes all pictures; the last of `tables` is that of all tasks."""
    whole = tables[-1]
    figures = {
        "methods": heat_map(whole),
        "tasks": accuracy_against_tasks(tables, DRAWN),
        "comparisons": _draw_comparisons(judged),
        "preservation": _draw_preservation(runs),
        "matching": _draw_matching(deep),
        "linearity": _draw_linearity(deep, whole.seen),
        "masks": _draw_masks(deep, whole),
    }
    for name, figure in figures.items():
        path = directory / f"vision_{name}.png"
        figure.savefig(path, dpi=150, facecolor="white")


def _draw_comparisons(judged: Sequence[Judged]) -> Any:
    colours = dict(zip((CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE), COLOURS, strict=False))
    figure = picture(7.2, 0.26 * len(judged) + 0.8)
    axes = axes_of(figure)
    grid(axes, "x")
    axes.axvline(0, color=INK, lw=1)
    for row, one in enumerate(judged):
        error, points = 100 * one.resolution, 100 * one.differences
        axes.plot([-error, error], [row, row], color=INK, lw=5, alpha=0.25)
        style = {"color": colours[one.verdict], "marker": "o", "ls": ""}
        axes.plot(points, [row] * len(points), markersize=5, **style)
    for said, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=said, markersize=5)
    names = [f"{one.comparison.above} above {one.comparison.below}" for one in judged]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.plot([], [], color=INK, lw=5, alpha=0.25, label="± standard error")
    axes.set_xlabel("difference of mean test accuracies, points")
    _key(figure)
    return figure


def _draw_preservation(runs: Runs) -> Any:
    figure = picture(6.4, 4.2)
    axes = axes_of(figure)
    grid(axes)
    for seed, run in enumerate(runs):
        individual = np.array(run["individual"]["accuracies"])
        rows = [row for name, row in run.items() if name not in ENDS]
        missed = [np.mean(row["missed"]) for row in rows]
        relative = [100 * np.mean(row["accuracies"] / individual) for row in rows]
        style = line_style(seed, linestyle="", label=f"seed {seed}")
        axes.plot(missed, relative, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("missed of the change of features (0: all preserved, 1: start)")
    axes.set_ylabel("accuracy, % of individual models (mean of tasks)")
    _key(figure)
    return figure


def _draw_matching(deep: Sequence[Mapping[str, Any]]) -> Any:
    figure = picture(6.4, 4.0)
    axes = axes_of(figure)
    grid(axes)
    for i, name in enumerate(paths_of(deep)):
        means = 100 * path_of(deep, name).mean(axis=0)
        metric, _, start = name.partition(", ")
        style = line_style(i % 3, label=f"{metric}, from {start}")
        if metric == "kronecker":
            style["linestyle"] = (0, (4, 1.5))
        axes.plot([0, *STEPS], means, **style)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks([0, *STEPS], [str(step) for step in (0, *STEPS)])
    axes.set_xlabel("steps of conjugate gradients")
    axes.set_ylabel("mean test accuracy, %")
    _key(figure)
    return figure


def _draw_linearity(deep: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> Any:
    figure = picture(7.2, 3.4)
    axes = axes_of(figure)
    grid(axes, "y")
    kinds = list(deep[0]["linearity"])
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        means = np.mean([one["linearity"][kind] for one in deep], axis=0)
        places = np.arange(len(tasks)) + (i - (len(kinds) - 1) / 2) * width
        axes.bar(places, means, width, color=COLOURS[i], label=kind)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("nonlinearity")
    _key(figure)
    return figure


def _draw_masks(deep: Sequence[Mapping[str, Any]], table: ResultTable) -> Any:
    """What is kept against bytes; a merge is as large as the start."""
    start = deep[0]["masks"]["start"]
    stored = [one["masks"]["accuracies"] for one in deep]
    names = ("start", "task_arithmetic", "regmean")
    shown = {name: seen_runs(table, name) for name in names}
    individual = seen_runs(table, "individual")
    rows = ResultTable(table.seen, individual, {**shown, "TALL-masks": stored})
    nbytes = dict.fromkeys(shown, start)
    nbytes["TALL-masks"] = deep[0]["masks"]["bytes"]
    nbytes["individual"] = len(table.seen) * start
    return accuracy_against_bytes(rows, nbytes)


def _key(figure: Any) -> None:
    """What colours mean, above the axes, where it hides nothing."""
    style = {"frameon": False, "fontsize": 8, "labelcolor": INK}
    figure.legend(loc="outside upper center", ncols=3, **style)
