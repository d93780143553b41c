"""What papers say of merges, and what the results say of that.

A claim that one number is above another is confirmed where it is so by more than the
noise: one standard error of the difference of two means over independent test
sentences, and of that over seeds. Both rows see the same sentences, which makes this
a cautious bound.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxmerge.evaluation import ResultTable
from jaxmerge.tree import first_match
from text_encoder.merges import LAYERS, PARTS, REBUILT, Result

CLOSED = {
    "Gram matrices": ("mats", "regmean"),
    "Fisher information": ("mats, fisher, 10 steps", "fisher_average"),
}
"""Rows of MaTS, and of the closed forms of the same statistics."""

ORDER = ("start", "average", "task_arithmetic", "regmean", "individual")
"""The order that is the same for all backbones in published tables of eight tasks."""


class Claim(NamedTuple):
    """A claim, the figures that belong to it, and the verdict on it."""

    text: str
    figures: str
    verdict: str


Runs = Sequence[Mapping[str, Result]]
"""The rows of each seed."""


def noise(table: ResultTable, above: str, below: str, examples: int) -> float:
    """The standard error of the difference of two rows' means.

    Args:
        table: with both rows.
        above: one of them.
        below: the other.
        examples: test sentences per task.
    """
    variance = 0.0
    for name in (above, below):
        p = table.runs(name).mean(axis=0)
        variance += np.sum(p * (1 - p)) / examples / len(p) ** 2
    runs = (table.runs(above) - table.runs(below)).mean(axis=1)
    if len(runs) > 1:
        variance += np.var(runs, ddof=1) / len(runs)
    return float(np.sqrt(variance))


def is_above(
    table: ResultTable, text: str, name: str, others: Sequence[str], examples: int
) -> Claim:
    """The claim that a row's mean accuracy is above that of all others."""
    figures, verdicts = [f"{name} {100 * table.mean(name):.1f}"], []
    for other in others:
        error = noise(table, name, other, examples)
        difference = table.mean(name) - table.mean(other)
        figures.append(f"{other} {100 * table.mean(other):.1f} (± {100 * error:.1f})")
        verdicts.append(verdict(difference, error))
    for worst in ("not confirmed", "within noise"):
        if worst in verdicts:
            return Claim(text, ", ".join(figures), worst)
    return Claim(text, ", ".join(figures), "confirmed")


def verdict(difference: float, error: float) -> str:
    """What a difference says of the claim that it is positive."""
    if abs(difference) <= error:
        return "within noise"
    return "confirmed" if difference > 0 else "not confirmed"


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, the mean of those that equal values share.

    Example:
        >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
        [2.5, 1.0, 2.5]
    """
    below = (values[None] < values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    return below + (equal + 1) / 2


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of ranks; NaN where all values are equal."""
    a, b = (ranks(np.asarray(x, float)) for x in (a, b))
    a, b = a - a.mean(), b - b.mean()
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms else float("nan")


def preservation(runs: Runs) -> Claim:
    """That models which keep the features of the tasks' own models are more accurate.

    By the correlation over merged models, task by task. Above 0.5 in the mean over
    tasks and seeds confirms it.
    """
    apart, found = ("start", "individual", *REBUILT), []
    for rows in runs:
        merged = [rows[name] for name in rows if name not in apart]
        kept = np.array([row.preserved for row in merged])
        test = np.array([row.test for row in merged])
        pairs = zip(kept.T, test.T, strict=True)
        found += [rank_correlation(a, b) for a, b in pairs]
    mean, least = float(np.nanmean(found)), float(np.nanmin(found))
    return Claim(
        "SFTM: the better features are preserved, the higher the accuracy",
        f"Spearman's correlation {mean:.2f} in the mean over tasks, {least:.2f} at "
        f"least, over {len(runs[0].keys() - apart)} merged models",
        "confirmed" if mean > 0.5 else "not confirmed",
    )


def linear_parts(scores: Mapping[str, float]) -> Claim:
    """That submodules are more linear than the whole model."""
    whole = scores[""]
    by_kind = {
        kind: [score for path, score in scores.items() if path and _kind(path) == kind]
        for kind in ("layers", "parts")
    }
    below = [score < whole for path, score in scores.items() if path]
    figures = [f"whole model {whole:.2g}"] + [
        f"{kind} {np.mean(found):.2g} (at most {max(found):.2g})"
        for kind, found in by_kind.items()
    ]
    return Claim(
        "Submodules are more linear than the whole model",
        f"nonlinearity: {', '.join(figures)}; {sum(below)} of {len(below)} submodules "
        "are below the model",
        "confirmed" if all(below) else "not confirmed",
    )


def _kind(path: str) -> str:
    return first_match({LAYERS: "layers", PARTS: "parts"}, path)


def kept_by_masks(table: ResultTable, tasks: int) -> Claim:
    """That TALL-masks keep more than 99 % at the price of two models plus bits."""
    kept = table.normalised("tall_masks")
    models = 2 + tasks / 32
    return Claim(
        "TALL-masks keep more than 99 % of the individual models",
        f"{100 * kept:.1f} % kept in {models:.2f} models' bytes instead of {1 + tasks} "
        "(the start included)",
        "confirmed" if kept > 0.99 else "not confirmed",
    )


def in_order(table: ResultTable, examples: int) -> Claim:
    """That methods are in the order of the literature."""
    steps = [
        is_above(table, "", name, [before], examples).verdict
        for before, name in itertools.pairwise(ORDER)
    ]
    figures = [f"{name} {100 * table.mean(name):.1f}" for name in ORDER]
    worst = "not confirmed" if "not confirmed" in steps else "within noise"
    return Claim(
        "The order of the literature: " + " < ".join(ORDER),
        ", ".join(figures),
        "confirmed" if set(steps) == {"confirmed"} else worst,
    )


def dependence(table: ResultTable) -> Claim:
    """How much the start and the steps of MaTS matter."""
    found = {name: table.mean(name) for name in table.rows if name.startswith("mats")}
    spread = max(found.values()) - min(found.values())
    return Claim(
        "MaTS depends on its start and its steps",
        ", ".join(f"{name} {100 * mean:.1f}" for name, mean in found.items()),
        f"{100 * spread:.1f} points between the best and the worst",
    )


def claims(
    table: ResultTable, runs: Runs, scores: Mapping[str, float], examples: int
) -> list[Claim]:
    """All claims that these results can test.

    Args:
        table: of all rows.
        runs: the same by seed.
        scores: how nonlinear submodules are, from `merges.linearity`.
        examples: test sentences per task.
    """
    pairs = (
        (
            "SFTM is above task arithmetic, TIES and PCB",
            "sftm",
            ["task_arithmetic", "ties", "pcb"],
        ),
        *(
            (f"MaTS is above the closed form of the same {what}", name, [closed])
            for what, (name, closed) in CLOSED.items()
        ),
        (
            "MaTS with Kronecker factors is above closed forms",
            "mats, kronecker, 10 steps",
            ["regmean", "fisher_average"],
        ),
        (
            "Coefficients of submodules are above one global coefficient",
            "submodule_merge, layers",
            ["task_arithmetic"],
        ),
        (
            "Consensus improves task arithmetic",
            "consensus of task_arithmetic",
            ["task_arithmetic"],
        ),
        ("Consensus improves TIES", "consensus of ties", ["ties"]),
        (
            "AdaMerging by layer is above the best global coefficient",
            "adamerging, layer",
            ["task_arithmetic"],
        ),
        (
            "The benchmark tells methods apart: task arithmetic is above the average",
            "task_arithmetic",
            ["average", "start"],
        ),
    )
    return [
        *(is_above(table, *pair, examples) for pair in pairs),
        in_order(table, examples),
        preservation(runs),
        dependence(table),
        linear_parts(scores),
        kept_by_masks(table, len(table.tasks)),
    ]


def result_table(tasks: Sequence[str], runs: Runs) -> ResultTable:
    """The table of all rows, in the order of their mean accuracy."""
    rows = {
        name: np.array([rows[name].test for rows in runs])
        for name in runs[0]
        if name != "individual"
    }
    order = sorted(rows, key=lambda name: (name != "start", rows[name].mean()))
    chosen = {
        name: ", ".join(f"{rows[name].scale:g}" for rows in runs)
        for name in order
        if runs[0][name].scale is not None
    }
    return ResultTable(
        tasks,
        np.array([rows["individual"].test for rows in runs]),
        {name: rows[name] for name in order},
        notes={"scale": chosen},
        data={name: runs[0][name].data for name in order},
        references=["start", *REBUILT],
    )
