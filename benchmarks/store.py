"""What does a store of models cost in time, against a plain copy of the same bytes?

    python benchmarks/store.py [--width 2048] [--layers 8] [--tasks 4] [--repeats 5]

Each model is `layers` float32 matrices (width, width), on disk. Creating reads base and
models, and is compared with copying these files; extracting a model with copying its
file, flushed to disk as an extracted checkpoint is. Both run in turn, on files that
are in the page cache. In memory, switching to another task is compared with placing its
parameters there again, and applying a packed mask with multiplying by one of float32.
The table is written to benchmarks/results/store.md.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, ratio, times_in_turn, write_table

import jaxmerge
from jaxmerge.compression import add_masked, create_store, open_store, pack


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as place:
        rows, extracting = on_disk(Path(place), args)
    rows += [in_memory(args)]
    entries = args.layers * args.width**2
    write_table(
        "store",
        f"A store of {args.tasks} models of {entries / 1e6:.0f} M float32 weights, as "
        "`tall`",
        ["step", "bytes", "s", "against", "s", "ratio"],
        rows,
        f"Median of {args.repeats} runs in turn, ratios run by run; all files in the "
        "page cache, and flushed to disk where a step writes. Every byte that a step "
        f"reads from the store is hashed. {machine()}",
    )
    sys.exit(0 if extracting <= 2 else f"extraction takes {extracting:.1f} copies")


def on_disk(place, args):
    paths = models(place, args)
    store = place / "store"
    create_store(store, paths.pop("base"), paths)
    opened = open_store(store)
    first, second, *_ = paths
    loaded = jaxmerge.load(paths[first])
    opened.params(first)
    opened.params(second)
    sizes = opened.sizes()

    def fresh(make):
        def run():
            target = place / "out"
            make(target)
            shutil.rmtree(target)

        return run

    def copy_models(target):
        target.mkdir()
        for path in (place / "base", *paths.values()):
            copy(path, target / path.name)

    steps = {
        "create": (
            sizes.apart + args.layers * args.width**2 * 4,
            fresh(lambda target: create_store(target, place / "base", paths)),
            "copying base and models",
            fresh(copy_models),
        ),
        "extract one model": (
            sizes.apart // args.tasks,
            fresh(lambda target: opened.extract(first, target)),
            "copying its file",
            fresh(lambda target: copy(paths[first], target)),
        ),
        "switch to a task in memory": (
            sizes.apart // args.tasks,
            lambda: opened.params(second),
            "placing its parameters again",
            lambda: jax.device_put(loaded, may_alias=False),
        ),
        "load masks of a task, and switch": (
            sizes.tasks[first],
            lambda: forget(opened).params(first),
            "loading its file",
            lambda: jax.device_put(jaxmerge.load(paths[first]), may_alias=False),
        ),
    }
    rows = []
    for step, (nbytes, ours, other, theirs) in steps.items():
        times = times_in_turn({"ours": ours, "theirs": theirs}, args.repeats)
        rows.append(row(step, nbytes, times, other))
        if step.startswith("extract"):
            extracting = ratio(times["ours"], times["theirs"])
    return rows, extracting


def forget(store):
    """The store, with the base in memory and no masks."""
    store._parts.clear()
    return store


def models(place, args):
    rng = np.random.default_rng(0)
    shape = (args.width, args.width)
    base = [rng.standard_normal(shape, np.float32) for _ in range(args.layers)]
    paths = {}
    for name in ("base", *(f"task {i}" for i in range(args.tasks))):
        scale = np.float32(0 if name == "base" else 0.01)
        leaves = {
            f"layers.{i}.weight": w + scale * rng.standard_normal(shape, np.float32)
            for i, w in enumerate(base)
        }
        paths[name] = place / name
        jaxmerge.save(paths[name], leaves)
    return paths


def copy(source, target):
    shutil.copytree(source, target)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def in_memory(args):
    key = jax.random.key(0)
    shape = (args.layers * args.width, args.width)
    base, vector = jax.random.normal(key, (2, *shape))
    mask = jax.random.bernoulli(key, 0.4, shape)
    bits, dense = pack(mask), mask.astype(jnp.float32)
    multiply = jax.jit(lambda base, vector, dense: base + dense * vector)
    assert jnp.allclose(add_masked(base, vector, bits), multiply(base, vector, dense))
    times = times_in_turn(
        {
            "ours": lambda: add_masked(base, vector, bits),
            "theirs": lambda: multiply(base, vector, dense),
        },
        4 * args.repeats,
    )
    return row("apply packed masks", bits.nbytes, times, "multiplying dense ones")


def row(step, nbytes, times, other):
    ours, theirs = (np.median(times[side]) for side in ("ours", "theirs"))
    quotient = ratio(times["ours"], times["theirs"])
    cells = [f"{nbytes / 1e6:.0f} M", f"{ours:.3f}", other, f"{theirs:.3f}"]
    return [step, *cells, f"{quotient:.2f}"]


if __name__ == "__main__":
    main()
