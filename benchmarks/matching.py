"""How many steps, and how much time, does MaTS take with each precondition?

    python benchmarks/matching.py [--size 256] [--tasks 4] [--width 128] ...

Both metrics of second moments, until what is left of the equations is 1e-3 and 1e-4, on
a weight with inputs and gradients of a given spread, and on all weights of perturbed
transformers with statistics collected from them. Beside them RegMean, which solves the
first of the two with a factorisation. All sides run in turn in one process, compiled
before. The table goes to benchmarks/results/matching.md.
"""

import argparse
import os

# Several programs at a time can wait for each other forever if they use up all threads.
os.environ.setdefault("NPROC", "32")
# One thread for LAPACK and for all else: ratios then hold beside other processes too.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, times_in_turn, write_table
from transformer import SYMBOLS, parameters, transformer

import jaxmerge

PRECONDITIONS = ("none", "jacobi", "kronecker")
KINDS = ("gram", "output_gradient")


def linear(params, batch):
    return batch["inputs"] @ params["kernel"]


def pulled_by_gradients(outputs, batch):
    return jnp.sum(outputs * batch["gradients"], axis=-1)


def spread_weights(spread, args):
    """Weights of each task, and statistics of inputs and gradients of a given spread.

    Variances fall from 1 to 1 / spread along directions that all tasks have in common.
    """

    def samples(key, basis):
        draw, mix = jax.random.split(key)
        samples = jax.random.normal(draw, (8 * args.size, args.size))
        mixing = jax.random.normal(mix, (args.size, args.size)) / args.size**0.5
        scales = jnp.logspace(0, -jnp.log10(spread) / 2, args.size)
        return (samples + 0.5 * samples @ mixing) * scales[None] @ basis

    keys = jax.random.split(jax.random.key(0), 2)
    bases = [jax.random.orthogonal(key, args.size) for key in keys]
    models, known = [], []
    for key in jax.random.split(jax.random.key(1), args.tasks):
        weight, *keys = jax.random.split(key, 3)
        models.append({"kernel": jax.random.normal(weight, (args.size, args.size))})
        inputs, gradients = map(samples, keys, bases)
        batch = {"inputs": inputs, "gradients": gradients}
        known.append(
            jaxmerge.collect(
                linear,
                models[-1],
                [batch],
                what=KINDS,
                labels="empirical",
                loss=pulled_by_gradients,
            )
        )
    return models, known


def transformers(args):
    """Perturbed transformers, and statistics on symbols of different frequencies."""
    base = parameters(jax.random.key(0), args.width, layers=2, length=64)
    models, known = [], []
    for key in jax.random.split(jax.random.key(1), args.tasks):
        move, often, *draws = jax.random.split(key, 6)
        moved = parameters(move, args.width, layers=2, length=64)
        models.append(jax.tree.map(lambda x, y: x + 0.1 * y, base, moved))
        chances = 2 * jax.random.normal(often, (SYMBOLS,))
        batches = [
            jax.random.categorical(draw, chances, shape=(32, 64)) for draw in draws
        ]
        options = {"what": KINDS, "labels": "sample", "key": 0}
        known.append(jaxmerge.collect(transformer, models[-1], batches, **options))
    return models, known


def table_rows(name, models, known, args):
    for metric in ("gram", "kronecker"):
        for rtol in (1e-3, 1e-4):
            sides, told = {}, {}
            for precondition in PRECONDITIONS:

                def run(precondition=precondition, metric=metric, rtol=rtol):
                    merged, told[precondition] = jaxmerge.mats(  # noqa: B023
                        models,
                        known,
                        metric=metric,
                        precondition=precondition,
                        rtol=rtol,
                        steps=args.steps,
                        info=True,
                    )
                    return merged

                sides[precondition] = run
            if metric == "gram":
                sides["regmean"] = lambda: jaxmerge.regmean(models, known)
            times = times_in_turn(sides, args.repeats)
            cells = []
            for side in (*PRECONDITIONS, "regmean"):
                if side in told:
                    infos = told[side].values()
                    steps = max(int(jnp.max(info.steps)) for info in infos)
                    there = all(jnp.all(info.residual <= rtol) for info in infos)
                    cells.append(f"{steps}" if there else f"> {steps}")
                cells.append(f"{np.median(times[side]):.3f}" if side in times else "")
            yield [name, metric, f"{rtol:.0e}", *cells]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    problems = {
        "spread of 1e2": spread_weights(1e2, args),
        "spread of 1e4": spread_weights(1e4, args),
        "transformers": transformers(args),
    }
    rows = []
    for name, (models, known) in problems.items():
        for row in table_rows(name, models, known, args):
            rows.append(row)
            print(*row, flush=True)
    sides = [f"{side}, {unit}" for side in PRECONDITIONS for unit in ("steps", "s")]
    write_table(
        "matching",
        f"MaTS of {args.tasks} tasks, by precondition",
        ["problem", "metric", "rtol", *sides, "regmean, s"],
        rows,
        f"One weight of {args.size} x {args.size} whose inputs and gradients have "
        "variances that fall by the spread, along directions with no regard to the "
        f"axes; or transformers of 2 layers and width {args.width}, where steps are "
        "those of the weight that takes the most. `regmean` is at its defaults. "
        f"Median of {args.repeats} runs in turn. {machine()}",
    )


if __name__ == "__main__":
    main()
