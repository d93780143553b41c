"""What does it cost to collect statistics, against running the model?

    python benchmarks/collecting.py [time] [memory] [--widths 128 256 512] ...

`time`: `collect` on a transformer, in multiples of its forward passes, and of its
forward and backward passes, on the same batches. All sides run in turn in one process,
compiled before, and
count CPU seconds. `memory`: what each of them needs, as compiled. The tables go to
benchmarks/results/statistics_*.md.
"""

import argparse
import os
import time
from unittest import mock

# One thread for each product: ratios then hold beside other processes too.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, ratio, times_in_turn, write_table
from transformer import SYMBOLS, parameters, transformer

import jaxmerge
from jaxmerge.statistics import collecting


def negative_log_likelihood(logits, tokens):
    logits = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)
    return -jnp.sum(chosen, axis=(1, 2))


@jax.jit
def forward(params, tokens):
    return transformer(params, tokens)


@jax.jit
@jax.value_and_grad
def forward_and_back(params, tokens):
    return jnp.sum(negative_log_likelihood(transformer(params, tokens), tokens))


FACTORS = ("gram", "output_gradient")
EMPIRICAL = {"labels": "empirical", "loss": negative_log_likelihood}
SIDES = {
    "gram": {"what": "gram"},
    "gram, output_gradient; empirical": {"what": FACTORS, **EMPIRICAL},
    "gram, output_gradient; sample": {"what": FACTORS, "labels": "sample", "key": 0},
    "fisher; empirical": {"what": "fisher", **EMPIRICAL},
}


def model_and_batches(width, args):
    draw, *draws = jax.random.split(jax.random.key(0), args.batches + 1)
    params = parameters(draw, width, args.layers, args.tokens)
    shape = (args.examples, args.tokens)
    return params, [jax.random.randint(key, shape, 0, SYMBOLS) for key in draws]


def described(args):
    return (
        f"a transformer in float32 of {args.layers} layers, with MLPs of four times "
        f"its width and {SYMBOLS} symbols, {args.examples} x {args.tokens} tokens"
    )


def cost(args):
    header, seconds = [""], ["of these, CPU seconds"]
    rows = {name: [] for name in SIDES}
    for width in args.widths:
        params, batches = model_and_batches(width, args)
        calls = {
            name: lambda p=params, bs=batches, o=options: jaxmerge.collect(
                transformer, p, bs, **o
            )
            for name, options in SIDES.items()
        }
        calls["forward"] = lambda p=params, bs=batches: [forward(p, b) for b in bs]
        calls["both"] = lambda p=params, bs=batches: [
            forward_and_back(p, b) for b in bs
        ]
        times = times_in_turn(calls, args.repeats, clock=time.process_time)
        header += [f"{width}: forward passes", f"{width}: forward and backward passes"]
        for side in ("forward", "both"):
            seconds.append(f"{np.median(times[side]):.3f}")
            for name, values in rows.items():
                values.append(f"{ratio(times[name], times[side]):.2f}")
        print(width, {name: values[-2:] for name, values in rows.items()}, flush=True)
    write_table(
        "statistics_time",
        f"Collecting statistics of {described(args)} in each of {args.batches} batches",
        header,
        [seconds, *([name, *values] for name, values in rows.items())],
        "The forward pass itself is among what is collected: 1.00 of the forward "
        "passes is for it. By multiplications alone, the Grams of a layer, with all "
        "their entries computed, are 38/24 of its forward pass; weights with the same "
        "input share one. "
        f"{fixed(args)} Median of {args.repeats} runs in turn, "
        "ratios run by run, of CPU seconds of all threads, which other processes "
        f"disturb less than the clock on the wall. {machine()}",
    )


def fixed(args):
    """What a call costs that is not for its data."""
    params, batches = model_and_batches(args.widths[0], args)
    one = batches[0][:1]
    times = times_in_turn(
        {
            "collect": lambda: jaxmerge.collect(transformer, params, [one]),
            "forward": lambda: forward(params, one),
        },
        10 * args.repeats,
    )
    collect, forwards = (1e3 * np.median(t) for t in times.values())
    return (
        "Each call of `collect` traces the model, for all batches once: with a single "
        f"example, at width {args.widths[0]}, it takes {collect:.0f} ms, a forward "
        f"pass {forwards:.1f} ms."
    )


def memory(args):
    rows = {}
    for width in args.widths:
        params, batches = model_and_batches(width, args)
        used = {"the parameters": sum(x.nbytes for x in jax.tree.leaves(params))}
        for name, run in (
            ("forward pass", forward),
            ("forward and backward pass", forward_and_back),
        ):
            plan = run.lower(params, batches[0]).compile().memory_analysis()
            used[name] = plan.temp_size_in_bytes + plan.output_size_in_bytes
        for name, options in SIDES.items():
            if options.get("labels") == "sample":
                continue
            for groups in (1, 4):
                used[f"{name}; groups={groups}"] = largest_pass(
                    params, batches[:1], groups=groups, **options
                )
        for name, size in used.items():
            rows.setdefault(name, []).append(f"{size / 2**20:.1f}")
        print(width, {name: values[-1] for name, values in rows.items()}, flush=True)
    write_table(
        "statistics_memory",
        f"Memory beyond the parameters, in MiB: {described(args)} in a batch",
        ["", *(f"width {width}" for width in args.widths)],
        [[name, *values] for name, values in rows.items()],
        "What XLA plans for: working memory and results. Of statistics, there are the "
        "results twice: the sums so far, and those of a batch. With groups, the "
        f"largest of the passes. {machine()}",
    )


def largest_pass(params, batches, **options):
    """Bytes that the largest pass of `collect` needs; none is run."""
    sizes = []

    def planned(*args):
        plan = lower(*args).compile().memory_analysis()
        sizes.append(plan.temp_size_in_bytes + 2 * plan.output_size_in_bytes)
        return {}

    lower = collecting.measure.lower
    with mock.patch.object(collecting, "measure", planned):
        jaxmerge.collect(transformer, params, batches, **options)
    return max(sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["time", "memory"])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for part in args.parts:
        {"time": cost, "memory": memory}[part](args)


if __name__ == "__main__":
    main()
