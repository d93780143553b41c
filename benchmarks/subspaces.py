"""What do the matrix methods cost beyond the SVDs of the task matrices?

    python benchmarks/subspaces.py [cost] [layers] [--sizes 256 512 1024] ...

`cost`: time and memory of each method against the number of tasks and the size of the
matrices, in multiples of the SVDs of the T task matrices alone. `layers`: all layers of
a model in one call, one layer at a time, and spread over eight simulated devices, with
the collectives in the compiled text. All sides run in turn in one process, on the same
data. The tables go to benchmarks/results/subspaces_*.md.
"""

import argparse
import functools
import os
import re

# Simulated devices that wait for each other must not use up all threads.
os.environ.setdefault("NPROC", "32")
# One thread for LAPACK and for all else: ratios then hold beside other processes too.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, ratio, times_in_turn, write_table

import jaxmerge
from jaxmerge.registry import methods


@jax.jit
def svds(base, models):
    deltas = jnp.stack([model["kernel"] - base["kernel"] for model in models])
    return jnp.linalg.svd(deltas, full_matrices=False)


def summed_and_calibrated(base, models):
    merged = jaxmerge.task_arithmetic(base, models)
    return jaxmerge.calibrate(base, models, merged)


def matrix_methods():
    """Functions of base and models by name: each method, and what is not registered."""
    sides = {n: m.function for n, m in methods().items() if "fused" in m.parameters}
    return sides | {
        "wudi, closed form": functools.partial(jaxmerge.wudi, solver="closed_form"),
        "calibrate": summed_and_calibrated,
        "tsv_compress": jaxmerge.tsv_compress,
    }


def cost(args):
    sides = {"SVDs": svds} | matrix_methods()
    for share in (4, 16):
        sides[f"sftm, rank 1/{share}"] = lambda b, ms, share=share: jaxmerge.sftm(
            b, ms, rank=len(b["kernel"]) // share
        )
    columns, seconds = [], {name: [] for name in sides}
    memory = {name: [] for name in sides}
    for size in args.sizes:
        for tasks in args.tasks:
            columns.append(f"{size}², T={tasks}")
            keys = jax.random.split(jax.random.key(0), tasks + 1)
            trees = [{"kernel": jax.random.normal(k, (size, size))} for k in keys]
            base, models = trees[0], trees[1:]
            calls = {n: lambda s=s: s(base, models) for n, s in sides.items()}  # noqa: B023
            times = times_in_turn(calls, args.repeats)
            for name, side in sides.items():
                told = ratio(times[name], times["SVDs"])
                if name == "SVDs":
                    told = np.median(times[name])
                seconds[name].append(f"{told:.2f}")
                compiled = jax.jit(side).lower(base, models).compile()
                used = compiled.memory_analysis().temp_size_in_bytes
                memory[name].append(f"{used / (4 * tasks * size * size):.1f}")
            print(columns[-1], {name: values[-1] for name, values in seconds.items()})
    note = f"Median of {args.repeats} runs in turn, ratios run by run. {machine()}"
    write_table(
        "subspaces_time",
        "Matrix methods on random square float32 matrices: seconds of the SVDs of T "
        "task matrices alone, and multiples of that",
        ["", *columns],
        [[name, *values] for name, values in seconds.items()],
        note,
    )
    write_table(
        "subspaces_memory",
        "Working memory that XLA plans for, in multiples of the T task matrices",
        ["", *columns],
        [[name, *values] for name, values in memory.items()],
        machine(),
    )


def layers(args):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    rules = {".*": jax.sharding.PartitionSpec("data", "model")}
    shape = tuple(args.shape)
    rows = []
    for name, method in matrix_methods().items():
        trees = []
        for key in jax.random.split(jax.random.key(0), args.tasks[0] + 1):
            keys = jax.random.split(key, args.layers)
            trees.append(
                {f"{i}/kernel": jax.random.normal(k, shape) for i, k in enumerate(keys)}
            )
        placed = [jaxmerge.place(tree, mesh, rules) for tree in trees]

        def one_by_one(method=method, trees=trees):
            return [
                method({path: trees[0][path]}, [{path: t[path]} for t in trees[1:]])
                for path in trees[0]
            ]

        times = times_in_turn(
            {
                "together": lambda m=method, t=trees: m(t[0], t[1:]),
                "one by one": one_by_one,
                "eight": lambda m=method, p=placed: m(p[0], p[1:]),
            },
            args.repeats,
        )
        with jax.set_mesh(mesh):
            whole = jax.jit(lambda b, ms, m=method: m(b, ms))
            text = whole.lower(placed[0], placed[1:]).compile().as_text()
        kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
        found = re.findall(rf" ({kinds})(?:-start)?\(", text)
        factored = re.findall(r"= \(f32\[([\d,]+)\]\S* .*lapack_sge", text)
        rows.append(
            [
                name,
                f"{np.median(times['together']):.2f}",
                f"{ratio(times['one by one'], times['together']):.2f}",
                f"{ratio(times['eight'], times['together']):.2f}",
                ", ".join(f"{found.count(k)} {k}" for k in sorted(set(found)))
                or "none",
                "; ".join(sorted(set(factored))) or "none",
            ]
        )
        print(*rows[-1])
    write_table(
        "subspaces_layers",
        f"{args.layers} layers of {shape[0]} x {shape[1]}, {args.tasks[0]} tasks",
        [
            "method",
            "all layers, s",
            "one by one",
            "8 simulated devices",
            "collectives on 8 devices",
            "shapes that a device factors",
        ],
        rows,
        "The middle columns are multiples of the first. Eight simulated devices share "
        "the cores of one machine: the last columns say what a real mesh would do. "
        f"Median of {args.repeats} runs in turn. {machine()}",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["cost", "layers"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shape", type=int, nargs=2, default=[128, 512])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if "layers" in args.parts and jax.config.jax_platforms in (None, "cpu"):
        jax.config.update("jax_num_cpu_devices", 8)
    for part in args.parts:
        {"cost": cost, "layers": layers}[part](args)


if __name__ == "__main__":
    main()
