"""Do plans say what merges then take, and what would merges of 70B models take?

    python benchmarks/plan.py [measured] [large]

`measured`: merges of a model of 50 million parameters at two limits of memory, in
processes of their own. A process merges twice: when the second merge begins, everything
is compiled and freed memory is returned to the system, so what it adds at its peak are
values. That is what a plan calls memory for values; what is there before, memory
without any. After each merge, all that is known so far is written to results/plan.md.

`large`: plans for models of the shapes of Llama 3 70B, whose files have a header and no
values: they take no space on the disk. Writes results/plan_large.md.
"""

import argparse
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from common import machine, write_table

from jaxmerge import save
from jaxmerge.checkpoints import LeafInfo, Writer
from jaxmerge.checkpoints.safetensors import SafetensorsFile, lay_out
from jaxmerge.forecast import plan_merge
from jaxmerge.heap import anonymous_memory, give_back
from jaxmerge.machines import MACHINES
from jaxmerge.merging import merge_checkpoints
from jaxmerge.recipes import Recipe
from jaxmerge.registry import methods

METHODS = (
    *("average", "task_arithmetic", "ties", "dare"),
    *("slerp", "sce", "tsv_merge", "sftm"),
)
LARGE_METHODS = ("average", "task_arithmetic", "ties", "dare", "sce", "tsv_merge")
LIMITS = (200_000_000, 2_000_000_000)
# The first steps of a solver take what all others take.
OPTIONS = {"sftm": {"max_steps": 5}}
SECONDS = 600
"""After which a merge that is measured is given up."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def llama(width, inner, keys, words, layers):
    """The shapes of a Llama, by name."""
    shapes = {"model.embed_tokens.weight": (words, width)}
    for i in range(layers):
        layer = {
            "self_attn.q_proj.weight": (width, width),
            "self_attn.k_proj.weight": (keys, width),
            "self_attn.v_proj.weight": (keys, width),
            "self_attn.o_proj.weight": (width, width),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (width,)}


SMALL = llama(width=512, inner=2048, keys=128, words=90_000, layers=1)
LARGE = llama(width=8192, inner=28_672, keys=1024, words=128_256, layers=80)
LARGE["lm_head.weight"] = (128_256, 8192)


def write_small(root, models):
    """A start and models near to it, with values."""
    rng = np.random.default_rng(0)
    start = {k: 0.02 * rng.standard_normal(s, np.float32) for k, s in SMALL.items()}
    save(root / "base", {k: x.astype(BFLOAT16) for k, x in start.items()})
    for i in range(models):
        moved = {
            k: (x + 0.002 * rng.standard_normal(x.shape, np.float32)).astype(BFLOAT16)
            for k, x in start.items()
        }
        save(root / f"m{i}", moved)


def write_large(root, models):
    """Files that have a header, and a size, but no values."""
    layout = lay_out({k: LeafInfo(s, BFLOAT16) for k, s in LARGE.items()}, {})
    for name in ["base", *(f"m{i}" for i in range(models))]:
        (root / name).mkdir()
        with (root / name / "model.safetensors").open("wb") as file:
            file.write(layout.head)
            file.truncate(layout.nbytes)


def recipe_of(root, method, models, **fields):
    known = methods()[method]
    models = min(models, known.max_models or models)
    base = root / "base" if known.needs_base else None
    paths = {f"m{i}": root / f"m{i}" for i in range(models)}
    options = OPTIONS.get(method, {})
    return Recipe(method, paths, base=base, options=options, **fields)


def merge_twice(root, method, limit):
    """What the second merge of a process reads, writes and takes."""
    recipe, moved, peak, done = recipe_of(root, method, 4), [0, 0], [0], []
    out = root / "out"
    merge_checkpoints(recipe, out, memory=limit)
    shutil.rmtree(out)
    gc.collect()
    give_back()
    before = anonymous_memory()
    read, write = SafetensorsFile.read, Writer.write

    def counted_read(self, *where):
        array = read(self, *where)
        moved[0] += array.nbytes
        return array

    def counted_write(self, name, array, *where):
        moved[1] += array.nbytes
        write(self, name, array, *where)

    def watch():
        while not done:
            peak[0] = max(peak[0], anonymous_memory())
            time.sleep(0.001)

    SafetensorsFile.read, Writer.write = counted_read, counted_write
    watching = threading.Thread(target=watch)
    watching.start()
    merge_checkpoints(recipe, out, memory=limit)
    done.append(True)
    shutil.rmtree(out)
    watching.join()
    return {"process": before, "host": peak[0] - before, "moved": moved}


def plan_once(root, method, limit):
    totals = plan_merge(recipe_of(root, method, 4), memory=limit).totals
    moved = [totals.read, totals.written]
    return {"process": totals.process, "host": totals.host, "moved": moved}


def in_a_process(*words):
    """What one step prints, in a process of its own."""
    command = [sys.executable, __file__, *map(str, words)]
    # Threads of LAPACK that wait for each other are slow beside another busy process.
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, capture_output=True, check=True, timeout=SECONDS, env=env
    )
    return json.loads(ended.stdout)


def check(root):
    """Rows of what was planned beside what happened."""
    for limit in LIMITS:
        for method in METHODS:
            try:
                planned = in_a_process("--step", "plan", root, method, limit)
                found = in_a_process("--step", "merge", root, method, limit)
            except subprocess.TimeoutExpired:
                yield [f"`{method}`", f"{limit / 1e6:.0f}", "too slow", *[""] * 7]
                continue
            planned_read, read = planned["moved"][0] / 1e6, found["moved"][0] / 1e6
            same = planned["moved"] == found["moved"]
            print(method, limit, planned, found, file=sys.stderr, flush=True)
            yield [
                f"`{method}`",
                f"{limit / 1e6:.0f}",
                *_beside(planned["host"], found["host"]),
                *_beside(planned["process"], found["process"]),
                *_beside(sum_of(planned), sum_of(found)),
                f"{read:.0f} / {found['moved'][1] / 1e6:.0f}",
                "the same" if same else f"{planned_read:.0f} read",
            ]


def sum_of(taken):
    return taken["host"] + taken["process"]


def _beside(planned, found):
    """Megabytes that were planned and found, and their ratio."""
    return f"{planned / 1e6:.0f} / {found / 1e6:.0f}", f"{planned / found:.2f}"


CLUSTERS = {
    "v5e-256": ({"data": 16, "model": 16}, 32, "v5e", 64_000_000_000),
    "16 x H100": ({"data": 2, "model": 8}, 2, "h100", 320_000_000_000),
}
"""Mesh, hosts, machine, and the memory of each host that values may take."""


def duration(seconds):
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def cells(plan):
    totals, seconds = plan.totals, plan.totals.seconds
    parts = seconds.read, seconds.compute, seconds.send, seconds.write
    return [
        f"{totals.operations.flops:.2g}",
        f"{totals.operations.factorising:.2g}",
        f"{totals.sent / 1e9:.3g}",
        f"{totals.device / 1e9:.2f}",
        *map(duration, parts),
    ]


def plans(root, chosen, counts, clusters, **fields):
    for method in chosen:
        for count in counts:
            # What is compiled for one mesh serves all.
            for name, (mesh, hosts, kind, memory) in clusters.items():
                plan = plan_merge(
                    recipe_of(root, method, count, **fields),
                    mesh=mesh,
                    hosts=hosts,
                    machine=MACHINES[kind],
                    memory=memory,
                )
                without = f" without {', '.join(fields['take'])}" if fields else ""
                yield [f"`{method}`{without}", str(plan.models), name, *cells(plan)]
                print(method, count, name, file=sys.stderr, flush=True)


def measured():
    rows = []
    with tempfile.TemporaryDirectory() as root:
        write_small(Path(root), 4)
        for row in check(Path(root)):
            rows.append(row)
            write_measured(rows)


def write_measured(rows):
    write_table(
        "plan",
        "Planned and measured memory and traffic of merges",
        (
            *("method", "limit", "values", "ratio", "without values", "ratio"),
            *("together", "ratio", "read / written", "planned"),
        ),
        rows,
        "Planned / measured memory of the process in MB, for four models (two for "
        f"`slerp`) of {entries_of(SMALL) / 1e6:.0f} million parameters in "
        "bfloat16, and the MB that were read and written. `sftm` takes 5 steps."
        f"\n\n{machine()}",
    )


def large():
    with tempfile.TemporaryDirectory() as root:
        write_large(Path(root), 32)
        each = plans(Path(root), LARGE_METHODS, (8,), CLUSTERS)
        head = {"lm_head.weight": "base"}
        alone = plans(Path(root), ("tsv_merge",), (8,), CLUSTERS, take=head)
        small = {"data": 4, "model": 4}, 2, "v5e", 64_000_000_000
        few = {"16 x v5e": small, "v5e-256": CLUSTERS["v5e-256"]}
        grown = plans(Path(root), ("average", "ties"), (2, 8, 32), few)
        write_table(
            "plan_large",
            "Plans of merges of 70B models",
            (
                *("method", "models", "devices", "flops", "of them factorising"),
                *("sent, GB", "memory, GB", "read", "compute", "send", "write"),
            ),
            [*each, *alone, *grown],
            f"Of models with the shapes of Llama 3 70B, {entries_of(LARGE) / 1e9:.1f} "
            "billion parameters in bfloat16. What a device sends, and values in the "
            "memory of one. On v5e values may take 64 GB of a host's memory, on H100 "
            "320 GB. Estimates, not measurements."
            f"\n\n{machine()}",
        )


def entries_of(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("what", nargs="*", default=["measured", "large"])
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step is not None:
        name, root, method, limit = arguments.step
        run = {"plan": plan_once, "merge": merge_twice}[name]
        print(json.dumps(run(Path(root), method, int(limit))))
        return
    for what in arguments.what:
        {"measured": measured, "large": large}[what]()


if __name__ == "__main__":
    main()
