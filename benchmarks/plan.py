"""Do plans say what merges then take, and what would merges of 70B models take?

    python benchmarks/plan.py

First, merges of a model of 54 million parameters at two limits of memory, in processes
of their own. A process merges twice: when the second merge begins, everything is
compiled and freed memory is returned to the system, so what it adds at its peak are
values. That is what a plan calls memory for values; what is there before, memory
without any. Then, plans for models of the shapes of Llama 3 70B, whose files have a
header and no values: they take no space on the disk. Writes results/plan.md.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from common import RESULTS, machine

from jaxmerge import save
from jaxmerge.checkpoints import LeafInfo, Writer
from jaxmerge.checkpoints.safetensors import SafetensorsFile, lay_out
from jaxmerge.forecast import anonymous_memory, plan_merge
from jaxmerge.machines import MACHINES
from jaxmerge.merging import merge_checkpoints
from jaxmerge.recipes import Recipe
from jaxmerge.registry import methods

METHODS = (
    *("average", "task_arithmetic", "ties", "dare"),
    *("slerp", "sce", "tsv_merge", "sftm"),
)
LIMITS = (100_000_000, 1_000_000_000)
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
    head = {"model.norm.weight": (width,), "lm_head.weight": (words, width)}
    return shapes | head


SMALL = llama(width=512, inner=2048, keys=128, words=36_000, layers=4)
LARGE = llama(width=8192, inner=28_672, keys=1024, words=128_256, layers=80)


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


def recipe_of(root, method, models):
    known = methods()[method]
    models = min(models, known.max_models or models)
    base = root / "base" if known.needs_base else None
    return Recipe(method, {f"m{i}": root / f"m{i}" for i in range(models)}, base=base)


def merge_twice(root, method, limit):
    """What the second merge of a process reads, writes and takes."""
    recipe, moved, peak, done = recipe_of(root, method, 4), [0, 0], [0], []
    merge_checkpoints(recipe, root / f"out_{method}_1", memory=limit)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = anonymous_memory()
    read, write = SafetensorsFile.read, Writer.write

    def counted_read(self, name, index=...):
        array = read(self, name, index)
        moved[0] += array.nbytes
        return array

    def counted_write(self, name, array, start=0):
        moved[1] += array.nbytes
        write(self, name, array, start)

    def watch():
        while not done:
            peak[0] = max(peak[0], anonymous_memory())
            time.sleep(0.001)

    SafetensorsFile.read, Writer.write = counted_read, counted_write
    watching = threading.Thread(target=watch)
    watching.start()
    merge_checkpoints(recipe, root / f"out_{method}_2", memory=limit)
    done.append(True)
    watching.join()
    return {"process": before, "host": peak[0] - before, "moved": moved}


def plan_once(root, method, limit):
    totals = plan_merge(recipe_of(root, method, 4), memory=limit).totals
    moved = [totals.read, totals.written]
    return {"process": totals.process, "host": totals.host, "moved": moved}


def in_a_process(*words):
    """What one step prints, in a process of its own."""
    command = [sys.executable, __file__, *map(str, words)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def check(root):
    """Rows of what was planned beside what happened."""
    write_small(root, 4)
    for method in METHODS:
        for limit in LIMITS:
            planned = in_a_process("--step", "plan", root, method, limit)
            found = in_a_process("--step", "merge", root, method, limit)
            ratios = [planned[key] / found[key] for key in ("host", "process")]
            same = planned["moved"] == found["moved"]
            yield [
                f"`{method}`",
                f"{limit / 1e6:.0f}",
                *(f"{each['host'] / 1e6:.0f}" for each in (planned, found)),
                f"{ratios[0]:.2f}",
                *(f"{each['process'] / 1e6:.0f}" for each in (planned, found)),
                f"{sum(p[k] for p in (planned,) for k in ('host', 'process')) / sum(found[k] for k in ('host', 'process')):.2f}",
                f"{found['moved'][0] / 1e6:.0f} / {found['moved'][1] / 1e6:.0f}",
                "the same" if same else f"{planned['moved'][0] / 1e6:.0f} planned",
            ]


CLUSTERS = {
    "v5e-256": ({"data": 16, "model": 16}, 32, "v5e"),
    "16 x H100": ({"data": 2, "model": 8}, 2, "h100"),
}


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


def large(root, chosen, counts, clusters):
    for method in chosen:
        for count in counts:
            for name, (mesh, hosts, kind) in clusters.items():
                recipe = recipe_of(root, method, count)
                plan = plan_merge(
                    recipe, mesh=mesh, hosts=hosts, machine=MACHINES[kind]
                )
                yield [f"`{method}`", str(plan.models), name, *cells(plan)]
                print(method, count, name, file=sys.stderr, flush=True)


def table(header, rows):
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


HEADER = (
    *("method", "models", "devices", "flops", "of them factorising", "sent, GB"),
    *("per device, GB", "read", "compute", "send", "write"),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    step = parser.parse_args().step
    if step is not None:
        run = {"plan": plan_once, "merge": merge_twice}[step[0]]
        print(json.dumps(run(Path(step[1]), step[2], int(step[3]))))
        return
    with tempfile.TemporaryDirectory() as root:
        checked = table(
            (
                *("method", "limit, MB", "values: planned", "measured", "ratio"),
                *("without values: planned", "measured", "both, ratio"),
                *("values read / written, MB", "bytes planned"),
            ),
            check(Path(root)),
        )
    print(checked, flush=True)
    with tempfile.TemporaryDirectory() as root:
        write_large(Path(root), 32)
        each = table(HEADER, large(Path(root), METHODS, (8,), CLUSTERS))
        print(each, flush=True)
        few = {
            f"{k * k} v5e": ({"data": k, "model": k}, max(1, k * k // 8), "v5e")
            for k in (4, 16)
        }
        grown = table(
            HEADER,
            large(Path(root), ("average", "ties", "tsv_merge"), (2, 8, 32), few),
        )
    text = f"""# Plans of merges

## Planned and measured

Memory in MB, of four models (two for `slerp`) of 54 million parameters in bfloat16.

{checked}

## Eight models of the shapes of Llama 3 70B

{each}

## Growth with models and devices

{grown}

{machine()}
"""
    (RESULTS / "plan.md").write_text(text)


if __name__ == "__main__":
    main()
