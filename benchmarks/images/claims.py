"""What papers say of such merges, measured again.

A claim "a is above b" is judged by the differences of mean test accuracies, seed by
seed, and by the standard error of an accuracy on so many test images. No more is said
than these can tell: see `verdict`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxmerge
from jaxmerge.compression import create_store, open_store
from jaxmerge.evaluation import ResultTable

from .experiment import Experiment
from .merges import best_scale, best_thresholds, collect_statistics

CONFIRMED = "confirmed"
NOT_CONFIRMED = "not confirmed"
NOT_TESTABLE = "not testable at this size"

STEPS = (1, 3, 10, 30, 100)


class Comparison(NamedTuple):
    """A claim that one row is above another, and where it comes from."""

    source: str
    above: str
    below: str


COMPARISONS = (
    Comparison("ordering", "average", "start"),
    Comparison("ordering", "task_arithmetic", "average"),
    Comparison("ordering", "ties", "task_arithmetic"),
    Comparison("ordering", "fisher_average", "task_arithmetic"),
    Comparison("ordering", "tsv_merge", "ties"),
    Comparison("ordering", "iso_c", "ties"),
    Comparison("ordering", "regmean", "ties"),
    Comparison("ordering", "regmean", "fisher_average"),
    Comparison("ordering", "regmean_plus_plus", "regmean"),
    Comparison("ordering", "wudi", "regmean"),
    Comparison("SFTM", "sftm", "task_arithmetic"),
    Comparison("SFTM", "sftm", "ties"),
    Comparison("SFTM", "sftm", "pcb"),
    Comparison("MaTS", "mats", "average"),
    Comparison("MaTS", "mats", "regmean"),
    Comparison("MaTS", "mats, kronecker", "regmean"),
    Comparison("MaTS", "mats, kronecker", "fisher_average"),
    Comparison("submodules", "submodule_merge", "task_arithmetic"),
    Comparison("Consensus", "consensus", "task_arithmetic"),
    Comparison("Consensus", "consensus, ties", "ties"),
    Comparison("AdaMerging", "adamerging, by layer", "task_arithmetic"),
    Comparison("AdaMerging", "adamerging, by layer", "adamerging, by task"),
)


class Judged(NamedTuple):
    """A comparison's differences, (seeds,), the resolution, and what follows."""

    comparison: Comparison
    differences: np.ndarray
    resolution: float
    verdict: str


def verdict(differences: Sequence[float] | np.ndarray, resolution: float) -> str:
    """What differences of several seeds say of "above", or of a threshold passed.

    Confirmed if all are positive and their mean is at least the resolution, not
    confirmed if all are negative and as large; else no answer.

    Example:
        >>> verdict([0.03, 0.02], 0.01), verdict([-0.03], 0.01), verdict([0.002], 0.01)
        ('confirmed', 'not confirmed', 'not testable at this size')
    """
    differences = np.asarray(differences)
    if abs(differences.mean()) >= resolution:
        if differences.min() > 0:
            return CONFIRMED
        if differences.max() < 0:
            return NOT_CONFIRMED
    return NOT_TESTABLE


def compare(table: ResultTable, images: int) -> list[Judged]:
    """All comparisons, on a table of so many test images per task."""
    judged = []
    for comparison in COMPARISONS:
        above = seen_runs(table, comparison.above)
        differences = (above - seen_runs(table, comparison.below)).mean(axis=1)
        resolution = standard_error(above.mean(axis=0), images)
        said = verdict(differences, resolution)
        judged.append(Judged(comparison, differences, resolution, said))
    return judged


def seen_runs(table: ResultTable, name: str) -> np.ndarray:
    """The accuracies of a row on the tasks that were merged, (seeds, tasks)."""
    columns = [table.tasks.index(task) for task in table.seen]
    return table.runs(name)[:, columns]


def standard_error(accuracies: np.ndarray, images: int) -> float:
    """That of the mean of accuracies on tasks of so many test images each."""
    return float(np.sqrt(np.sum(accuracies * (1 - accuracies) / images))) / len(
        accuracies
    )


def correlation(missed: np.ndarray, accuracies: np.ndarray) -> float:
    """Spearman's, of ranks, which extreme merges do not dominate.

    Example:
        >>> round(correlation(np.array([1.0, 2, 90]), np.array([9.0, 8, 7])), 6)
        -1.0
    """
    ranks = [np.argsort(np.argsort(values)) for values in (missed, accuracies)]
    return float(np.corrcoef(*ranks)[0, 1])


def match(experiment: Experiment) -> dict[str, Any]:
    """MaTS after several numbers of steps from several starts, by metric and start.

    Returns:
        Under "metric, start", the mean test accuracy after each of `STEPS`; under
        "start", that of each start.
    """
    known, tuned = collect_statistics(experiment), experiment.tuned
    arithmetic = jaxmerge.task_arithmetic(experiment.start, tuned)
    starts = {
        "average": jaxmerge.average(tuned),
        "task arithmetic": best_scale(experiment, arithmetic)[0],
        "RegMean": jaxmerge.regmean(tuned, known),
    }
    found: dict[str, Any] = {
        "start": {name: _mean(experiment, init) for name, init in starts.items()}
    }
    for metric in ("gram", "kronecker"):
        for name, init in starts.items():
            found[f"{metric}, {name}"] = [
                _mean(
                    experiment,
                    jaxmerge.mats(
                        tuned,
                        known,
                        metric=metric,
                        init=init,
                        steps=steps,
                        stop="steps",
                    ),
                )
                for steps in STEPS
            ]
    return found


def linearity(experiment: Experiment) -> dict[str, list[float]]:
    """The nonlinearity of the whole model and of its parts, the mean over each kind.

    Returns:
        For each task a number, by kind: "model", "block", "attention".
    """
    kinds = {"block": r"block_\d+", "attention": r"block_\d+/attention"}
    samples = experiment.images("train", experiment.sizes.samples)
    found: dict[str, list[float]] = {"model": [], **{kind: [] for kind in kinds}}
    for model, images in zip(experiment.tuned, samples, strict=True):
        for kind, pattern in kinds.items():
            scores = jaxmerge.nonlinearity(
                experiment.network.features,
                experiment.start,
                model,
                images,
                submodules=pattern,
            )
            whole = float(scores.pop(""))
            found[kind].append(float(np.mean(list(scores.values()))))
        found["model"].append(whole)
    return found


def masks(experiment: Experiment) -> dict[str, Any]:
    """What a store of TALL-masks keeps of each task, and its bytes on disk.

    Returns:
        The test accuracies of the tasks taken from the store, its bytes and those of
        the start alone.
    """
    thresholds = best_thresholds(experiment, "task_arithmetic").values
    names = [task.name for task in experiment.tasks]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "store"
        create_store(
            path,
            experiment.start,
            dict(zip(names, experiment.tuned, strict=True)),
            threshold=dict(zip(names, thresholds, strict=True)),
        )
        store = open_store(path)
        accuracies = [
            experiment.test(store.params(name))[i] for i, name in enumerate(names)
        ]
        used = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    start = sum(leaf.nbytes for leaf in jax.tree.leaves(experiment.start))
    return {"accuracies": accuracies, "bytes": used, "start": start}


def _mean(experiment: Experiment, params: Any) -> float:
    return float(np.mean(experiment.test(params)))
