# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Merging on a mesh
#
# A merge of large models is a program for many devices, and its price is what they send
# each other. Here eight devices are simulated on the CPU, merges are compiled for them,
# and we read in the compiled program what would go over the wires. The same code runs
# on TPUs and GPUs.

# %%
import math
import os
import re
from functools import partial

# Simulated devices that wait for each other must not use up all threads, and those of
# LAPACK must not wait for each other.
os.environ |= {"NPROC": "32", "OPENBLAS_NUM_THREADS": "1"}

import jax

jax.config.update("jax_num_cpu_devices", 8)  # Before the first array is made.

import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.patches import Rectangle

import jaxmerge
from jaxmerge import sharding
from jaxmerge.plots.canvas import COLOURS, INK, axes_of, picture

mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)

# %% [markdown]
# ## Placing
#
# A stack of eight layers, as `nn.scan` makes it, cut along its rows and its columns as
# transformers usually are: no device holds any matrix as a whole. The numbers are
# random; what is compiled depends on shapes alone.

# %%
LAYERS, INPUTS, OUTPUTS = 8, 128, 512
rules = {".*/kernel": P(None, "data", "model"), ".*": P()}


def draw(seed, base=None):
    random = np.random.default_rng(seed)
    shapes = {"up": {"kernel": (LAYERS, INPUTS, OUTPUTS), "bias": (LAYERS, OUTPUTS)}}
    values = jax.tree.map(
        lambda shape: random.standard_normal(shape, np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return (
        values
        if base is None
        else jax.tree.map(lambda b, v: b + 0.02 * v, base, values)
    )


on_host = draw(0)
models_on_host = [draw(seed, on_host) for seed in (1, 2, 3)]
base, *models = (jaxmerge.place(p, mesh, rules) for p in (on_host, *models_on_host))
print(base["up"]["kernel"].sharding.spec)


def draw_places(steps):
    """Who has what: all layers after each step, in the colours of the devices."""
    figure = picture(7.2, 1.4 * len(steps))
    for i, spec in enumerate(steps):
        axes = axes_of(figure, len(steps), 1, i + 1)
        places = NamedSharding(mesh, spec).devices_indices_map(
            (LAYERS, INPUTS, OUTPUTS)
        )
        for device, (layers, rows, columns) in places.items():
            top, bottom, _ = rows.indices(INPUTS)
            left, right, _ = columns.indices(OUTPUTS)
            for layer in range(LAYERS)[layers]:
                x, y = 1.12 * OUTPUTS * (layer % 4), 1.35 * INPUTS * (layer // 4)
                part = (x + left, y + top), right - left, bottom - top
                axes.add_patch(
                    Rectangle(*part, color=PALETTE[device.id], alpha=0.85, lw=0)
                )
        axes.set(xlim=(0, 4.4 * OUTPUTS), ylim=(2.4 * INPUTS, 0))
        axes.set_title(f"{f'after all-to-all {i}' if i else 'as it lies'}: {spec}")
        axes.axis("off")
    return figure


PALETTE = (*COLOURS, "#F0E442", INK)
draw_places(sharding.plan_spread(base["up"]["kernel"], mesh).path)

# %% [markdown]
# Singular values need whole matrices. The stack has eight layers, there are eight
# devices: in two steps each device swaps parts with some others until it holds one
# whole layer, and the factorisations need no communication at all. Nothing is ever held
# twice.
#
# ## Reading the compiled program
#
# Four merges, and two written as one would for a single device: TIES that sorts, and an
# SVD of the stack as it lies. For each of them we count in the compiled text what
# devices exchange, in bytes of results on one device, and the memory that it needs
# beside inputs and result.

# %%
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
BYTES = {
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "bf16": 2,
    "s8": 1,
    "u8": 1,
    "pred": 1,
}


def collectives(text):
    """The bytes of all results of collectives, by kind; loops as often as they run."""
    parts = dict(re.findall(r"^(ENTRY|%\S+) .*?\{\n(.*?)^\}", text, re.M | re.S))

    def count(part):
        found = {}
        for line in parts[part].splitlines():
            if loop := re.search(r' while\(.*body=(%[^,\s]+).*?"n":"(\d+)"', line):
                more = {k: int(loop[2]) * n for k, n in count(loop[1]).items()}
            elif sent := re.search(rf" = (.*?) ({KINDS})(?:-start)?\(", line):
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", sent[1])
                more = {sent[2]: sum(BYTES[kind] * entries(n) for kind, n in shapes)}
            else:
                continue
            found = {k: found.get(k, 0) + more.get(k, 0) for k in found | more}
        return found

    return count("ENTRY")


def entries(shape):
    return math.prod(int(n) for n in shape.split(",") if n)


def sorted_ties(base, models):
    """What TIES trims, by sorting."""

    def trim(b, m):
        delta = m - b
        ranked = jnp.sort(jnp.abs(delta).reshape(LAYERS, -1), axis=1)
        least = ranked[:, int(0.8 * ranked.shape[1])].reshape(
            LAYERS, *[1] * (b.ndim - 1)
        )
        return jnp.where(jnp.abs(delta) >= least, delta, 0)

    return jax.tree.map(lambda b, *ms: b + sum(trim(b, m) for m in ms), base, *models)


def plain_svd(base, models):
    """What TSV merging factorises, where it lies."""
    deltas = jnp.stack([m["up"]["kernel"] - base["up"]["kernel"] for m in models])
    u, s, v = jnp.linalg.svd(deltas, full_matrices=False)
    return jnp.sum((u * s[..., None, :]) @ v, axis=0)


merges = {
    "average": lambda base, models: jaxmerge.average(models),
    "task_arithmetic": jaxmerge.task_arithmetic,
    "ties": partial(jaxmerge.ties, stack_axes=1),
    "ties, by sorting": sorted_ties,
    "tsv_merge": partial(jaxmerge.tsv_merge, stack_axes=1),
    "SVD as it lies": plain_svd,
}
programs = {
    name: jax.jit(run).lower(base, models).compile() for name, run in merges.items()
}
own = base["up"]["kernel"].nbytes // mesh.size
print(f"one device's part of one model: {own:,} bytes")
for name, program in programs.items():
    sent = collectives(program.as_text())
    memory = program.memory_analysis().temp_size_in_bytes
    said = ", ".join(f"{kind} {size:,}" for kind, size in sent.items()) or "nothing"
    print(f"{name:>17}: {said}; {memory:,} of memory")

# %% [markdown]
# Sums and averages send nothing: what belongs together lies together. TIES needs the
# size that a fifth of all changes exceed, and finds it by counting, two bits of the
# floating-point number at a time; counts are all that devices tell each other. Sorting
# moves the changes themselves. For singular values, parts of matrices have to move:
# `tsv_merge` sends each part to the one device that needs it, while the plain SVD lets
# every device gather all matrices, and needs eight times the memory.
#
# ## The same numbers
#
# Called outside of `jax.jit`, a merge of arrays on a mesh lies on the mesh as its
# inputs did; and it is, to the last bit or nearly so, the merge of one device.

# %%
for name in ("ties", "tsv_merge"):
    on_mesh, alone = merges[name](base, models), merges[name](on_host, models_on_host)
    apart = jax.tree.map(
        lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), on_mesh, alone
    )
    lies = on_mesh["up"]["kernel"].sharding.spec
    print(f"{name:>9}: {lies}, apart by at most {max(jax.tree.leaves(apart)):.1e}")

# %% [markdown]
# ## A model that is not here
#
# Compiling needs shapes, not numbers. So the compiler can say what a merge of three
# models of seventy billion parameters costs, on a laptop: here their largest leaf, the
# MLP's rising matrices of 80 layers, 75 GB for each model in float32.

# %%
where = NamedSharding(mesh, P(None, "data", "model"))
leaf = {
    "up": {
        "kernel": jax.ShapeDtypeStruct((80, 8192, 28672), jnp.float32, sharding=where)
    }
}
print(f"{math.prod(leaf['up']['kernel'].shape) * 4 / 1e9:.0f} GB per model")
for name in ("task_arithmetic", "ties"):
    program = jax.jit(merges[name]).lower(leaf, [leaf] * 3).compile()
    sent = collectives(program.as_text())
    said = ", ".join(f"{kind} {size:,}" for kind, size in sent.items()) or "nothing"
    print(f"{name:>15}: {said}")

# %% [markdown]
# In each of 80 layers and each of three models, TIES finds the exact size that a fifth
# of 235 million changes exceed. What its devices send each other for that is less than
# a tenth of a megabyte.
#
# ## What to read next
#
# - [What merges cost](../docs/costs.md): `jaxmerge plan` says it of a recipe, before
#   any work.
# - `jaxmerge merge recipe.yaml merged --mesh data=2,model=4` merges checkpoints on a
#   mesh, and `--distributed` on several hosts; see the
#   [README](../README.md#from-checkpoints-to-a-checkpoint).
# - [Anatomy of task vectors](task_vectors.py): why matrix methods want singular values
#   at all.
