"""What do merges do to vision transformers that were fine-tuned on real images?

    python benchmarks/vision.py [--seeds N] [--data ../shared/data] [--place DIRECTORY]

One transformer is pretrained on a broad set of images and fine-tuned on every task in
DATA, each with a frozen head of its own. Every registered method that can merges the
first four, the first six, and all of them, in the order of their names; coefficients
are chosen on validation images. Then claims of papers are measured again. Whatever has
been trained and measured is kept in PLACE: an interrupted run goes on from there.
Writes results/vision*.md and their pictures; with --quick, which only shows that all
works, into PLACE.
"""

import argparse
import functools
import hashlib
import tempfile
import time
from pathlib import Path

import jax
from common import RESULTS, machine
from images import claims, data, experiment, figures, merges, pages
from images.model import Network
from images.training import Course, Settings

COUNTS = (4, 6)
QUICK = Settings(Network(16, 1), Course(3, 8, 1e-3), Course(3, 8, 1e-3))
QUICK_SIZES = experiment.Sizes(20, 8, 16, 8, 1)
DEEP = {
    "matching": claims.match,
    "linearity": claims.linearity,
    "masks": claims.masks,
}


def measure_rows(place, trained):
    """What is known of the start, the individual models and all merges."""
    name = f"seed{trained.seed}-tasks{len(trained.tasks)}"

    def of_end(accuracies, others):
        return {"accuracies": accuracies, "others": others, "scale": None, "data": ""}

    def of_start():
        return of_end(trained.test(trained.start), trained.test_others(trained.start))

    rows = {
        "start": experiment.measured(place, f"{name}/start", of_start),
        "individual": experiment.measured(
            place, f"{name}/individual", lambda: of_end(*trained.test_apart())
        ),
    }
    moved = merges.moved_features(trained)
    for merge in merges.merges(trained):
        measure = functools.partial(merges.measure, merge, trained, moved)
        row = experiment.measured(
            place, f"{name}/{merge.name}", lambda m=measure: m()._asdict()
        )
        rows[merge.name] = {**row, "data": merge.data}
    return rows


def key_of(settings):
    return hashlib.sha256(f"{settings}".encode()).hexdigest()[:8]


def describe(settings, sizes, seeds, directory):
    pretraining, tuning = settings.pretraining, settings.tuning
    return (
        f"Seeds of fine-tuning: {', '.join(map(str, range(seeds)))}; one start. "
        f"Width {settings.network.width}, {settings.network.blocks} blocks, pretrained "
        f"for {pretraining.steps} steps of {pretraining.batch} images, fine-tuned "
        f"for {tuning.steps} steps of {tuning.batch} at a rate of {tuning.rate:g}, "
        "all but the stem and the embedding of positions; "
        "frozen heads made from ten images of each class. "
        f"{sizes.test} test images and {sizes.validation} validation images per task; "
        'the latter chose the coefficients in the column "scale". Numbers are in per '
        "cent, with the standard deviation of a single seed beside the mean if there "
        f"are several.\n\nData: {data.describe(directory)}.\n\n{machine()}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--place",
        type=Path,
        default=Path(tempfile.gettempdir()) / "jaxmerge-vision",
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    settings, sizes = Settings(), experiment.Sizes()
    if args.quick:
        settings, sizes = QUICK, QUICK_SIZES
    # What was trained or measured otherwise must not be taken for this.
    models = args.place / key_of(settings)
    place = models / key_of(sizes)
    results = place / "results" if args.quick else RESULTS
    results.mkdir(parents=True, exist_ok=True)

    runs, deep, names, own = {}, [], [], []
    for trained in experiment.prepare(args.data, models, settings, sizes, args.seeds):
        names = [task.name for task in trained.tasks]
        own = [task.name for task in trained.own]
        for count in (*(c for c in COUNTS if c < len(names)), len(names)):
            rows = measure_rows(place, trained.first(count))
            runs.setdefault(count, []).append(rows)
            # The system limits how many pieces of code a process has in memory.
            jax.clear_caches()
        deep.append(
            {
                name: experiment.measured(
                    place,
                    f"seed{trained.seed}/{name}",
                    functools.partial(measure, trained),
                )
                for name, measure in DEEP.items()
            }
        )
        used = time.process_time()
        print(f"seed {trained.seed} done after {used:.0f} s of processors", flush=True)
    note = describe(settings, sizes, args.seeds, args.data)
    tables = [
        pages.table_of(names, count, own, of_count) for count, of_count in runs.items()
    ]
    for table in tables:
        page = pages.table_page(table, note)
        (results / f"vision_{len(table.seen)}.md").write_text(page)
    whole, judged = tables[-1], claims.compare(tables[-1], sizes.test)
    page = pages.claims_page(judged, runs[len(names)], deep, whole, note)
    (results / "vision_claims.md").write_text(page)
    figures.save_figures(results, tables, judged, runs[len(names)], deep)
    print(whole.markdown(), page, sep="\n\n")


if __name__ == "__main__":
    main()
