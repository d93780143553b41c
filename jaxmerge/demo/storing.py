"""The demo's stores: all fine-tuned models together, and what is left of each."""

import shutil
from pathlib import Path

from rich.progress import Progress

from jaxmerge.compression import create_store, open_store
from jaxmerge.demo.experiment import Experiment
from jaxmerge.demo.merges import Thresholds
from jaxmerge.evaluation import ResultTable

KINDS = {
    "tall": {"multi_task": "task_arithmetic"},
    "tall, ties": {"multi_task": "ties", "scope": "model"},
    "emr": {},
    "tsv": {},
    "tvq": {},
    "rtvq": {},
    "bitdelta": {},
}
"""The kinds of store that are compared, and their options, by what they are called."""


def store_all(
    out: Path, experiment: Experiment, thresholds: Thresholds, progress: Progress
) -> ResultTable:
    """Writes stores of all kinds; accuracy of each task's model rebuilt from them."""
    trained = experiment.trained
    models = {task: trained / task for task in experiment.tuned}
    rows, sizes = {}, {}
    for name, options in progress.track(KINDS.items(), description="storing"):
        path = out / "stores" / name.replace(", ", "_")
        if path.exists():
            shutil.rmtree(path)  # From an earlier run; it is about to be made again.
        path.parent.mkdir(exist_ok=True)
        if "multi_task" in options:
            chosen = thresholds[options["multi_task"]]
            options = options | {"threshold": dict(zip(models, chosen, strict=True))}
        kind = name.partition(",")[0]
        create_store(path, trained / "start", models, kind=kind, **options)
        store = open_store(path)
        rows[name] = experiment.test_apart(map(store.params, models))
        sizes[name] = f"{store.sizes().store / 1000:.0f}"
    whole = sum(
        file.stat().st_size for model in models.values() for file in model.iterdir()
    )
    sizes["individual"] = f"{whole / 1000:.0f}"
    own = experiment.test_apart(experiment.tuned.values())
    return ResultTable(
        list(models), own, rows, {"kB": sizes}, summaries=("mean", "norm.")
    )
