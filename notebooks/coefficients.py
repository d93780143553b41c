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
# # Choosing coefficients: sweep, gradient, evolution
#
# How much of each task vector? One number for all, one for each task, or one for each
# task and layer; found by trying, by gradient, or by evolution; with labels or without.
# Six fine-tuned models, and for every way of choosing the same question: how good is
# the merge on test images that the choice has not seen?
#
# The models are those of `jaxmerge demo`. If an earlier run has not left them in
# `jaxmerge-demo`, they are trained here, which takes about a minute.

# %%
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

import jaxmerge
from jaxmerge import plots
from jaxmerge.demo.experiment import accuracies, train
from jaxmerge.demo.model import Head, logits
from jaxmerge.tuning import grid

with Progress(disable=True) as progress:
    demo = train(Path("jaxmerge-demo/trained"), seed=0, progress=progress)
base, tasks, models = demo.start, list(demo.tuned), list(demo.tuned.values())
# Of each task, 120 images to choose by.
validation = jax.tree.map(lambda x: x[:, :120], demo.data.validation)


def score(params):
    """The accuracy on each task's validation images."""
    return accuracies(params, demo.heads, validation)


# %% [markdown]
# ## Trying: a sweep
#
# A hundred values of one coefficient are a hundred merges and evaluations, all of them
# candidates of one vmapped, compiled call. TIES trims and elects signs once for all of
# them.

# %%
scales = np.linspace(0, 2, 100)
sweeps = {}
for method in (jaxmerge.task_arithmetic, jaxmerge.ties):
    merge = functools.partial(method, base, models)
    sweeps[method.__name__] = jaxmerge.sweep(merge, grid(scale=scales.tolist()), score)
plots.sweep_curves(
    scales,
    {name: 100 * found.scores.mean(axis=1) for name, found in sweeps.items()},
    score="mean accuracy on validation images, %",
)

# %% [markdown]
# What the mean hides: every task has its own best coefficient. Here is task arithmetic
# again, task by task.

# %%
by_task = sweeps["task_arithmetic"].scores
plots.sweep_curves(
    scales,
    {task: 100 * by_task[:, i] for i, task in enumerate(tasks)},
    score="accuracy on validation images, %",
)

# %% [markdown]
# `odd` would like about 0.2, `large` more than twice as much; past 0.75 `odd` answers
# the same whatever it sees.
#
# ## By gradient, with and without labels
#
# A merge is differentiable in its coefficients. `few_shot_coefficients` descends the
# loss of a few labelled images, here 32 of each task. `adamerging` needs no labels: it
# makes predictions certain, by lowering their entropy, here on all 120 images. Both
# learn a coefficient for each task, or for each task and leaf.

# %%
heads = {
    task: Head(demo.heads.kernel[i], demo.heads.bias[i]) for i, task in enumerate(tasks)
}
apply = {
    task: functools.partial(lambda head, params, x: logits(params, head, x), head)
    for task, head in heads.items()
}
images = {task: jnp.asarray(validation.images[i]) for i, task in enumerate(tasks)}
labels = {task: jnp.asarray(validation.labels[i]) for i, task in enumerate(tasks)}
few = {task: (images[task][:32], labels[task][:32]) for task in tasks}

learned = {}
for granularity in ("task", "layer"):
    options = {"granularity": granularity, "steps": 60, "learning_rate": 0.02}
    learned[f"few-shot, {granularity}"] = jaxmerge.few_shot_coefficients(
        apply, base, models, few, **options
    )
    learned[f"AdaMerging, {granularity}"] = jaxmerge.adamerging(
        apply, base, models, images, **options
    )
for name, found in learned.items():
    numbers = sum(np.size(c) for c in found.coefficients.values())
    first, last = found.losses[[0, -1]]
    print(f"{name:>17}: {numbers:3} numbers, loss {first:.3f} -> {last:.3f}")

# %%
plots.coefficients_per_layer(learned["AdaMerging, layer"].coefficients, tasks)

# %% [markdown]
# Two rows stay where they began, at 0.30: a bias of keys adds the same number to all
# attention scores of a query, and the softmax takes it away again. And there is one
# column in which nearly everything has gone to zero: `large`.
#
# ## By evolution
#
# `evolve` needs nothing but scores: CMA-ES draws generations of candidates, here of six
# weights, and moves to where the accuracy on validation images is higher.

# %%
found = jaxmerge.evolve(
    functools.partial(jaxmerge.task_arithmetic, base, models),
    score,
    {"weights": [(0.0, 1.0)] * len(models)},
    generations=16,
    population=12,
)
best_so_far = np.maximum.accumulate(found.scores.max(axis=1))
for generation in (0, 1, 3, 7, 15):
    if generation < len(best_so_far):
        print(
            f"generation {generation + 1:2}: best so far {best_so_far[generation]:.1%}"
        )
print(
    "weights:",
    ", ".join(
        f"{t} {w:.2f}" for t, w in zip(tasks, found.best["weights"], strict=True)
    ),
)

# %% [markdown]
# ## Side by side

# %%
merged = {
    "start": base,
    "average": jaxmerge.average(models),
    "sweep": jaxmerge.task_arithmetic(base, models, **sweeps["task_arithmetic"].best),
    "evolution": jaxmerge.task_arithmetic(base, models, **found.best),
    **{name: of.params for name, of in learned.items()},
}
n = validation.images.shape[1]
data = {
    "sweep": f"{n} labelled",
    "evolution": f"{n} labelled",
    "few-shot, task": "32 labelled",
    "few-shot, layer": "32 labelled",
    "AdaMerging, task": f"{n} images",
    "AdaMerging, layer": f"{n} images",
}
table = jaxmerge.ResultTable(
    tasks,
    demo.test_apart(models),
    {name: demo.test(params) for name, params in merged.items()},
    data=data,
    references=["start"],
    summaries=("mean", "norm."),
)
print(table.markdown(marks=False))

# %% [markdown]
# The best merge has the most coefficients and the fewest images: 222 numbers, learned
# from 32 labelled images of each task. Six coefficients, whether evolved or learned,
# are no better on test images than the one of the sweep, although evolution found a
# higher score on the images it was allowed to see: the difference is the price of
# choosing by 120 images. And entropy can be lowered in ways that nobody wants.
# AdaMerging gives `large` up, as the column of zeros showed, and leaves it where the
# start was, certain and wrong, to be certain of the rest.
#
# ## What to read next
#
# - [Four papers on a laptop](four_papers.py): submodules have coefficients in closed
#   form.
# - *AdaMerging*, [ICLR 2024](https://arxiv.org/abs/2310.02575), and *Evolutionary
#   Optimization of Model Merging Recipes*, [2024](https://arxiv.org/abs/2403.13187).
# - The docstrings of `jaxmerge.tuning`: resuming an evolution, scores that JAX cannot
#   trace, soups.
