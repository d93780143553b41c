"""How much faster is a sweep than the same merges and evaluations one by one?

    python benchmarks/sweep.py [--points 200] [--models 8] [--repeats 3]

A small transformer-like stack of MLP blocks, its fine-tuned models, and validation data
of some size; one scale is swept. `sweep` is timed as a whole, compilation included, and
again with it. The other sides are what one would write without it, everything compiled
beforehand: a jitted merge and a jitted evaluation; both in one jitted function; and the
merge as it is called in a notebook, then a jitted evaluation. All scores are checked to
be equal. Writes results/sweep.md.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, write_table

import jaxmerge
from jaxmerge.tuning import grid


def make(width, blocks, models, seed=0):
    """A base and models near it, as nested dicts."""
    draw = np.random.default_rng(seed).standard_normal

    def tree(scale):
        def block():
            return {
                "up": {"kernel": draw((width, 2 * width)), "bias": draw(2 * width)},
                "down": {"kernel": draw((2 * width, width)), "bias": draw(width)},
            }

        params = {f"block_{i}": block() for i in range(blocks)}
        return jax.tree.map(lambda x: jnp.float32(scale * x / width**0.5), params)

    base = tree(1.0)
    moved = [tree(0.05) for _ in range(models)]
    return base, [jax.tree.map(jnp.add, base, m) for m in moved]


def apply(params, x):
    for block in params.values():
        up = x @ block["up"]["kernel"] + block["up"]["bias"]
        x = x + jax.nn.relu(up) @ block["down"]["kernel"] + block["down"]["bias"]
    return x[:, :10]


def sides(merge, scales, score):
    """By name, functions that return the scores of all scales."""
    merged, scored = jax.jit(lambda s: merge(scale=s)), jax.jit(score)
    both = jax.jit(lambda s: score(merge(scale=s)))
    loop = lambda f: np.array([float(f(s)) for s in scales])  # noqa: E731
    return {
        "sweep": lambda: jaxmerge.sweep(merge, grid(scale=scales), score).scores,
        "jitted merge, jitted evaluation": lambda: loop(lambda s: scored(merged(s))),
        "one jitted function": lambda: loop(both),
        "merge, jitted evaluation": lambda: loop(lambda s: scored(merge(scale=s))),
    }


def measure(merge, scales, score, repeats):
    """The median seconds of each side; what is compiled once is left out of the loops.

    A sweep compiles each time that it is called, so its time has that in it.
    """
    functions = sides(merge, scales, score)
    times = {name: [] for name in functions}
    scores = {}
    for repeat in range(repeats + 1):
        for name, side in functions.items():
            start = time.perf_counter()
            scores[name] = side()
            if repeat:
                times[name].append(time.perf_counter() - start)
    for name, found in scores.items():
        np.testing.assert_allclose(found, scores["sweep"], rtol=1e-4, err_msg=name)
    return {name: float(np.median(of)) for name, of in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    base, models = make(args.width, args.blocks, args.models)
    scales = np.linspace(0.0, 1.0, args.points)
    rows = []
    for examples in (64, 1024):
        draw = np.random.default_rng(1)
        x = jnp.float32(draw.standard_normal((examples, args.width)))
        y = jnp.asarray(draw.integers(0, 10, examples))

        def score(params, x=x, y=y):
            return -jaxmerge.evaluate(apply, params, (x, y), "cross_entropy")

        for name in ("task_arithmetic", "ties", "tsv_merge"):
            merge = functools.partial(getattr(jaxmerge, name), base, models)
            found = measure(merge, scales, score, args.repeats)
            ratios = [found[other] / found["sweep"] for other in list(found)[1:]]
            rows.append(
                [
                    name,
                    f"{examples}",
                    *(f"{seconds:.2f}" for seconds in found.values()),
                    *(f"{ratio:.1f}" for ratio in ratios),
                ]
            )
    entries = sum(leaf.size for leaf in jax.tree.leaves(base))
    others = ["jitted merge + evaluation", "one jitted function", "merge + evaluation"]
    write_table(
        "sweep",
        f"A sweep of {args.points} scales over {args.models} models of {entries:,} "
        "entries",
        [
            "method",
            "examples",
            "sweep, s",
            *(f"{name}, s" for name in others),
            *(f"{name} / sweep" for name in others),
        ],
        rows,
        "Examples are those that each of the merges is evaluated on. The sweep's "
        "seconds include its compilation, those of the loops do not. Medians of "
        f"{args.repeats} runs in turn. {machine()}",
    )


if __name__ == "__main__":
    main()
