"""The result files: tables of accuracies, and claims."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge.evaluation import ResultTable

from .claims import (
    CONFIRMED,
    NOT_CONFIRMED,
    NOT_TESTABLE,
    STEPS,
    Judged,
    correlation,
    seen_runs,
    verdict,
)

ENDS = ("start", "individual")
"""The rows that are no merges."""

Runs = Sequence[Mapping[str, Mapping[str, Any]]]
"""By seed, what was measured of each row."""


def table_of(
    tasks: Sequence[str], count: int, own: Sequence[str], runs: Runs
) -> ResultTable:
    """The table of all rows, worst first by their mean.

    Args:
        tasks: all tasks; the first `count` of them were merged.
        count: how many that are.
        own: the tasks of the start.
        runs: what was measured, by seed.
    """

    def mean(name: str) -> float:
        return float(np.mean([run[name]["accuracies"] for run in runs]))

    rows = {
        name: [run[name]["accuracies"] + run[name]["others"] for run in runs]
        for name in runs[0]
    }
    individual = rows.pop("individual")
    names = ["start", *sorted(set(rows) - {"start"}, key=mean)]
    scales = {name: _scales(runs, name) for name in names}
    return ResultTable(
        [*tasks, *own],
        individual,
        {name: rows[name] for name in names},
        notes={"scale": {name: text for name, text in scales.items() if text}},
        data={name: text for name in names if (text := runs[0][name]["data"])},
        held_out=tasks[count:],
        own=own,
        references=["start"],
    )


def table_page(table: ResultTable, note: str) -> str:
    """The page of one number of tasks."""
    title = f"# {len(table.seen)} fine-tuned vision transformers, merged"
    return "\n\n".join([title, table.markdown(), note]) + "\n"


def claims_page(
    judged: Sequence[Judged],
    runs: Runs,
    deep: Sequence[Mapping[str, Any]],
    table: ResultTable,
    note: str,
) -> str:
    """The page of all claims; `deep` has, by seed, what `claims` measured."""
    parts = ["# Claims of papers, measured again on merged vision transformers"]
    parts += [
        _comparisons(judged),
        _preservation(runs),
        _matching(deep, judged[0].resolution),
    ]
    parts += [_linearity(deep), _masks(deep, table), note]
    return "\n\n".join(parts) + "\n"


def preservation(runs: Runs) -> list[float]:
    """By seed, the correlation of missed features with relative accuracies.

    Over all merges and tasks; both relative to the individual model of the task.
    """
    found = []
    for run in runs:
        individual = np.array(run["individual"]["accuracies"])
        merged = [row for name, row in run.items() if name not in ENDS]
        missed = np.array([row["missed"] for row in merged])
        relative = np.array([row["accuracies"] for row in merged]) / individual
        found.append(correlation(missed.mean(axis=1), relative.mean(axis=1)))
    return found


def _scales(runs: Runs, name: str) -> str:
    scales = sorted({run[name]["scale"] for run in runs} - {None})
    return " to ".join(f"{scale:g}" for scale in (scales[:1] + scales[1:][-1:]))


def _points(values: Any) -> str:
    return ", ".join(f"{100 * value:+.1f}" for value in np.atleast_1d(values))


def _comparisons(judged: Sequence[Judged]) -> str:
    lines = [
        "## One method above another",
        "Differences of mean test accuracies with all tasks, in points, by seed. A "
        f"claim is {CONFIRMED} if every seed agrees and the mean is at least the "
        f"standard error of an accuracy on this test, {NOT_CONFIRMED} if every seed "
        f"contradicts it by as much, and else {NOT_TESTABLE}.",
        "| paper | claim | differences | standard error | verdict |\n"
        + "|---|---|---|---|---|"
        + "".join(
            f"\n| {one.comparison.source} | `{one.comparison.above}` above "
            f"`{one.comparison.below}` | {_points(one.differences)} | "
            f"{100 * one.resolution:.1f} | {one.verdict} |"
            for one in judged
        ),
        "![](vision_comparisons.png)",
    ]
    return "\n\n".join(lines)


def _preservation(runs: Runs) -> str:
    found = preservation(runs)
    said = verdict([-value for value in found], 0.3)
    return "\n\n".join(
        [
            "## Feature preservation goes with accuracy (SFTM)",
            "Spearman's correlation, over all merges, of what is missed of the "
            "features of the individual models, the mean over tasks, with accuracy "
            f"relative to these: {', '.join(f'{x:.2f}' for x in found)} by seed. "
            f"**{said}** (negative in every seed, -0.3 or less in the mean). What is "
            "missed is our measure, `Measured.missed`.",
            "![](vision_preservation.png)",
        ]
    )


def _matching(deep: Sequence[Mapping[str, Any]], resolution: float) -> str:
    paths = {name: path_of(deep, name) for name in paths_of(deep)}
    rows = [
        f"| {name} | {' | '.join(f'{100 * x:.1f}' for x in path.mean(axis=0))} |"
        for name, path in paths.items()
    ]
    ends = [
        np.ptp([path[:, -1] for name, path in paths.items() if name.startswith(m)], 0)
        for m in ("gram", "kronecker")
    ]
    by_seed = np.mean(ends, axis=0)
    said = verdict(by_seed, resolution)
    steps = " | ".join(map(str, (0, *STEPS)))
    return "\n\n".join(
        [
            "## MaTS depends on where it starts and how many steps it takes",
            "Mean test accuracy, %, the mean over seeds, by metric and start, after so "
            "many steps.",
            f"| metric, start | {steps} |\n|---|{'---|' * (1 + len(STEPS))}\n"
            + "\n".join(rows),
            f"After {STEPS[-1]} steps, the ends from different starts are "
            f"{', '.join(f'{100 * value:.1f}' for value in by_seed)} points apart, by "
            f"seed, in the mean of both metrics; the standard error of an accuracy is "
            f"{100 * resolution:.1f}. **{said}**.",
            "![](vision_matching.png)",
        ]
    )


def _linearity(deep: Sequence[Mapping[str, Any]]) -> str:
    kinds = list(deep[0]["linearity"])
    means = {k: np.array([d["linearity"][k] for d in deep]) for k in kinds}
    wins = {
        kind: float(np.mean(means[kind] < means["model"]))
        for kind in kinds
        if kind != "model"
    }
    said = ", ".join(
        f"{kind}s are more linear than the model for {100 * share:.0f} % of task models"
        for kind, share in wins.items()
    )
    overall = verdict([share - 0.5 for share in wins.values()], 0.25)
    rows = "\n".join(f"| {kind} | {means[kind].mean():.1e} |" for kind in kinds)
    return "\n\n".join(
        [
            "## Submodules are more linear than the whole model",
            "Nonlinearity (`jaxmerge.nonlinearity`, 0 for a linear function), the mean "
            "over tasks and seeds.",
            f"| part | nonlinearity |\n|---|---|\n{rows}",
            f"{said[0].upper()}{said[1:]}. **{overall}** (three quarters or more, of "
            "each kind).",
            "![](vision_linearity.png)",
        ]
    )


def _masks(deep: Sequence[Mapping[str, Any]], table: ResultTable) -> str:
    kept = _kept(deep, table)
    ratio = [one["masks"]["bytes"] / one["masks"]["start"] for one in deep]
    said = verdict(kept - 0.99, 0.0)
    return "\n\n".join(
        [
            "## TALL-masks keep more than 99 % for the price of two models and bits",
            "Normalised accuracy of tasks taken from a store, by seed: "
            f"{', '.join(f'{100 * value:.1f} %' for value in kept)}, in "
            f"{np.mean(ratio):.2f} times the bytes of one model, where "
            f"{len(table.seen)} models take {len(table.seen)}. **{said}**.",
            "![](vision_masks.png)",
        ]
    )


def _kept(deep: Sequence[Mapping[str, Any]], table: ResultTable) -> np.ndarray:
    stored = np.array([one["masks"]["accuracies"] for one in deep])
    return (stored / seen_runs(table, "individual")).mean(axis=1)


def paths_of(deep: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics and starts that MaTS was measured with."""
    return [name for name in deep[0]["matching"] if name != "start"]


def path_of(deep: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """The accuracies at the start and after each of `STEPS`, (seeds, 1 + steps)."""
    found = [one["matching"] for one in deep]
    start = name.partition(", ")[2]
    return np.array([[one["start"][start], *one[name]] for one in found])
