"""What do the matrix methods cost beyond the SVDs of the task matrices?

    python benchmarks/subspaces.py [--sizes 256 512 1024] [--tasks 2 4 8] [--repeats 3]

All sides are compiled and run in turn in one process, on the same data. A ratio is the
time of a method over that of the SVDs of its T task matrices alone. The table goes
to benchmarks/results/subspaces.md.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from common import machine, write_table

import jaxmerge


@jax.jit
def svds(base, models):
    deltas = jnp.stack([model["kernel"] - base["kernel"] for model in models])
    return jnp.linalg.svd(deltas, full_matrices=False)


SIDES = {
    "SVDs": svds,
    "sftm": jaxmerge.sftm,
    "sftm, rank 1/4": lambda b, ms: jaxmerge.sftm(b, ms, rank=len(b["kernel"]) // 4),
    "tsv_merge": jaxmerge.tsv_merge,
    "iso_c": jaxmerge.iso_c,
    "iso_cts": jaxmerge.iso_cts,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    rows = []
    for size in args.sizes:
        for tasks in args.tasks:
            keys = jax.random.split(jax.random.key(0), tasks + 1)
            trees = [{"kernel": jax.random.normal(k, (size, size))} for k in keys]
            times = {name: [] for name in SIDES}
            for repeat in range(args.repeats + 1):
                for name, side in SIDES.items():
                    start = time.perf_counter()
                    jax.block_until_ready(side(trees[0], trees[1:]))
                    if repeat:  # The first run compiles.
                        times[name].append(time.perf_counter() - start)
            ratios = [
                statistics.median(
                    a / b for a, b in zip(times[name], times["SVDs"], strict=True)
                )
                for name in SIDES
            ]
            info = jaxmerge.sftm(trees[0], trees[1:], info=True)[1]["kernel"]
            seconds = statistics.median(times["SVDs"])
            rows.append(
                [str(size), str(tasks), f"{seconds:.2f}"]
                + [f"{ratio:.2f}" for ratio in ratios[1:]]
                + [str(info.steps)]
            )
            print(*rows[-1])
    header = ["size", "tasks", "SVDs, s", *list(SIDES)[1:], "steps of sftm"]
    write_table(
        "subspaces",
        "Matrix methods on square float32 task matrices, as multiples of their SVDs",
        header,
        rows,
        f"Median of {args.repeats} runs in turn, ratios run by run. {machine()}",
    )


if __name__ == "__main__":
    main()
