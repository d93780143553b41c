"""How much faster is a sweep than the same merges and evaluations one by one?

    python benchmarks/sweep.py [--points 200] [--models 8] [--repeats 3]

A small stack of MLP blocks, its fine-tuned models and some validation data; one
scale is swept. The other sides are what one would write without `sweep`: a jitted merge
and a jitted evaluation; both in one jitted function; and the merge as it is called in a
notebook, then a jitted evaluation. All sides are timed when they are compiled, and what
they take to compile stands beside: a single sweep is worth it where it saves more. All
scores are checked to be equal. Writes results/sweep.md.
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
from jaxmerge.tuning.sweeping import compile_scores

CASES = (
    ("task_arithmetic", 64),
    ("ties", 64),
    ("task_arithmetic", 1024),
    ("ties", 1024),
)
"""Methods, and how many examples each of their merges is evaluated on."""


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


def sides(merge, score):
    """By name, functions from scales to their scores; `sweep` is compiled here."""
    compiled = compile_scores("sweep", merge, score, {"scale": 0.5}, (), 10**9)
    merged, scored = jax.jit(lambda s: merge(scale=s)), jax.jit(score)
    both = jax.jit(lambda s: score(merge(scale=s)))

    def loop(function):
        return lambda scales: np.array([float(function(s)) for s in scales])

    return {
        "sweep": lambda scales: np.asarray(compiled.run(jnp.float32(scales)[:, None])),
        "jitted merge, jitted evaluation": loop(lambda s: scored(merged(s))),
        "one jitted function": loop(both),
        "merge, jitted evaluation": loop(lambda s: scored(merge(scale=s))),
    }


def measure(merge, scales, score, repeats):
    """By side, the median seconds when compiled, and those of the whole first call."""
    start = time.perf_counter()
    found = jaxmerge.sweep(merge, grid(scale=scales), score).scores
    first = {"sweep": time.perf_counter() - start}
    functions = sides(merge, score)
    for name, side in functions.items():
        start = time.perf_counter()
        np.testing.assert_allclose(side(scales), found, rtol=1e-4, err_msg=name)
        first.setdefault(name, time.perf_counter() - start)
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, side in functions.items():
            start = time.perf_counter()
            side(scales)
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(of)) for name, of in times.items()}, first


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    base, models = make(args.width, args.blocks, args.models)
    scales = np.linspace(0.0, 1.0, args.points)
    rows = []
    for name, examples in CASES:
        draw = np.random.default_rng(1)
        x = jnp.float32(draw.standard_normal((examples, args.width)))
        y = jnp.asarray(draw.integers(0, 10, examples))

        def score(params, x=x, y=y):
            return -jaxmerge.evaluate(apply, params, (x, y), "cross_entropy")

        merge = functools.partial(getattr(jaxmerge, name), base, models)
        times, first = measure(merge, scales, score, args.repeats)
        rows += [
            [
                name,
                f"{examples}",
                side,
                f"{times[side]:.3f}",
                f"{times[side] / times['sweep']:.1f}",
                f"{first[side]:.1f}",
                f"{first[side] / first['sweep']:.1f}",
            ]
            for side in times
        ]
    entries = sum(leaf.size for leaf in jax.tree.leaves(base))
    write_table(
        "sweep",
        f"A sweep of {args.points} scales over {args.models} models of {entries:,} "
        "entries",
        ["method", "examples", "side", "s", "/ sweep", "first, s", "/ sweep, first"],
        rows,
        "Seconds for all scales when compiled, and of the first call, compilation "
        "included. Examples are those that each merge is evaluated on. Medians of "
        f"{args.repeats} runs in turn; one first call. {machine()}",
    )


if __name__ == "__main__":
    main()
