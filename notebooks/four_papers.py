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
# # Four papers on a laptop
#
# Four ideas about merging, each with its central claim, each claim measured on six
# fine-tuned models that one can train in a minute: singular features that keep their
# strength (SFTM), matching models where their data lie (MaTS), submodules that are more
# linear than models (SLTA), and masks that find each task in the sum of all (TALL-masks
# and Consensus).
#
# Six small models and six questions about digits are not the benchmarks of the papers.
# What does not show here may well show there, and the other way round; what we get is
# each claim as a few lines of code and a number.

# %%
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

import jaxmerge
from jaxmerge import plots
from jaxmerge.demo import merges
from jaxmerge.demo.experiment import train
from jaxmerge.demo.model import ENCODER, features
from jaxmerge.plots.canvas import INK, SIZE, axes_of, grid, line_style, picture

with Progress(disable=True) as progress:
    demo = train(Path("jaxmerge-demo/trained"), seed=0, progress=progress)
base, tasks, models = demo.start, list(demo.tuned), list(demo.tuned.values())
individual = demo.test_apart(models)


def best(merged):
    """Scales what a merge adds to the start as validation images like it best."""
    return jaxmerge.task_arithmetic(
        base, [merged], scale=merges.best_scale(demo, merged)
    )


def table(rows):
    found = {name: demo.test(params) for name, params in rows.items()}
    return jaxmerge.ResultTable(tasks, individual, found, summaries=("mean", "norm."))


# %% [markdown]
# ## 1. Singular features (SFTM)
#
# *Superpose Singular Features for Model Merging*, EMNLP 2025. The task matrix of a
# weight is $\sum_a \sigma_a u_a v_a^\top$: it answers an input along $v_a$ with
# $\sigma_a u_a$. Adding up tasks distorts these answers, as the $v_a$ of different
# tasks are not at right angles. SFTM solves for the matrix $M$ that gives every one its
# strength back, $u_a^\top M v_a = \sigma_a$. Claims: better than task arithmetic, TIES
# and PCB; and the better a merge preserves features, the better its accuracy.

# %%
by_models = {
    "average": jaxmerge.average(models),
    "task_arithmetic": best(jaxmerge.task_arithmetic(base, models)),
    "ties": best(jaxmerge.ties(base, models)),
    "pcb": best(jaxmerge.pcb(base, models)),
    "sftm": best(jaxmerge.sftm(base, models)),
}
print(table(by_models).markdown(marks=False))

# %%


def preserved(params):
    """Cosine of a merge's features and the task's own model's, less the mean image."""
    cosines = []
    for model, images in zip(models, demo.data.test.images, strict=True):
        own, merged = features(model, images), features(params, images)
        own, merged = own - own.mean(0), merged - merged.mean(0)
        product = (own * merged).sum() / jnp.linalg.norm(own) / jnp.linalg.norm(merged)
        cosines.append(float(product))
    return np.array(cosines)


kept = {
    name: preserved(params) for name, params in {"start": base, **by_models}.items()
}
reached = {
    name: demo.test(p) / individual for name, p in {"start": base, **by_models}.items()
}


def draw_features():
    figure = picture(5.8, 3.8)
    axes = axes_of(figure)
    grid(axes)
    for i, name in enumerate(kept):
        style = line_style(i, linestyle="", label=name, markersize=6)
        axes.plot(kept[name], 100 * reached[name], **style)
    axes.set_xlabel("features preserved (cosine)")
    axes.set_ylabel("accuracy, % of the task's own model")
    figure.legend(
        loc="outside right upper", frameon=False, labelcolor=INK, fontsize=SIZE
    )
    return figure


pairs = np.ravel(list(kept.values())), np.ravel(list(reached.values()))
print(f"correlation over methods and tasks: {np.corrcoef(*pairs)[0, 1]:.2f}")
draw_features()

# %% [markdown]
# The first claim is not confirmed by these six models: all methods but the average come
# out within about a point of each other, and SFTM is not the first of them. The second
# is: where a merge keeps a task's features, it keeps the task.
#
# ## 2. Matching where the data lie (MaTS)
#
# *Matching Models in Task Parameter Subspaces*, TMLR 2024. Each model is to be matched
# where its own data need it: $\sum_t C_t \theta = \sum_t C_t \theta_t$, with $C_t$ the
# curvature that data show, here K-FAC's, from 256 unlabelled images of each task. There
# is no closed form; conjugate gradients solve it step by step. Claims: better than the
# closed forms of the same statistics, Fisher averaging and RegMean; and it matters
# where the steps start and how many there are.

# %%
known = merges.collect_statistics(demo)
closed = {
    "fisher_average": jaxmerge.fisher_average(models, known),
    "regmean": jaxmerge.regmean(models, known),
}
steps = (1, 3, 10, 30)
starts = {
    "average": by_models["average"],
    "task_arithmetic": by_models["task_arithmetic"],
}
paths = {
    f"from {name}": [
        jaxmerge.mats(
            models, known, metric="kronecker", init=init, steps=n, stop="steps"
        )
        for n in steps
    ]
    for name, init in starts.items()
}
by_steps = {
    name: [100 * demo.test(params).mean() for params in [starts[name[5:]], *path]]
    for name, path in paths.items()
}
for name, params in closed.items():
    print(f"{name}: {demo.test(params).mean():.1%}")


def draw_steps():
    # Step 0 has no logarithm; it is drawn at a third of a step.
    figure = plots.sweep_curves(
        (1 / 3, *steps), by_steps, value="steps", score="mean test accuracy, %"
    )
    figure.axes[0].set_xscale("log")
    figure.axes[0].set_xticks((1 / 3, *steps), (0, *steps))
    figure.axes[0].minorticks_off()
    return figure


draw_steps()

# %% [markdown]
# Three steps pass both closed forms, thirty end several points above: the first claim
# is confirmed. So is the second, for the first ten steps: who starts at task arithmetic
# is ahead, and the other catches up.
#
# ## 3. Linear submodules (SLTA)
#
# *Leveraging Submodule Linearity Enhances Task Arithmetic Performance in LLMs*, ICLR
# 2025. Between start and model, the outputs of a whole network move along a crooked
# path; those of its parts, each with its inputs held fixed, move almost straight. For
# straight ones, the best coefficients of all task vectors have a closed form, from
# about thirty images without labels. Claims: parts are more linear, and their own
# coefficients beat a global one.

# %%


def apply(params, images):
    return ENCODER.apply({"params": params}, images)


patterns = [r"block_\d/attention", r"block_\d/mlp_(in|out)"]
images = [jnp.asarray(x[: merges.SAMPLES]) for x in demo.data.train.images]
crooked = [
    jaxmerge.nonlinearity(apply, base, model, x, submodules=patterns, points=7)
    for model, x in zip(models, images, strict=True)
]
for path in crooked[0]:
    mean = np.mean([scores[path] for scores in crooked])
    print(f"{path or 'whole model':>20}: {mean:.1e}")

# %%
merged, coefficients = jaxmerge.submodule_merge(
    apply, base, models, images, submodules=patterns, info=True
)
slta = {
    "average": by_models["average"],
    "task_arithmetic": by_models["task_arithmetic"],
    "submodule_merge": merged,
}
print(table(slta).markdown(marks=False))
plots.coefficients_per_layer(coefficients, tasks)

# %% [markdown]
# Dense layers *are* linear, up to rounding, and attention is straighter than the whole
# model by two orders of magnitude: the first claim is confirmed. The second only in
# part. Without a single label, the coefficients beat the average, which is one global
# coefficient of a sixth; they do not beat the best global one, which was chosen by
# labelled images. They do tell that the end of the model wants more of `turned` and
# `negative`.
#
# ## 4. One task in the sum of all (TALL-masks and Consensus)
#
# *Localizing Task Information for Improved Model Merging and Compression*, ICML 2024.
# The sum of all task vectors is a poor model, but it holds all the good ones: one bit
# for each parameter and task, whether the sum speaks for the task there, brings a
# task's model back. And parameters that matter to one task only, or to none, had better
# stay as they were. Claims: masked models keep more than 99 % of the accuracy, for the
# price of two models and the bits; Consensus improves task arithmetic and TIES.

# %%
thresholds = merges.best_thresholds(demo)
rows, masks = {}, {}
for vector, chosen in thresholds.items():
    options = {"multi_task": vector, "scope": "model", "threshold": chosen}
    masks[vector] = jaxmerge.tall_masks(base, models, **options)
    whole = jaxmerge.consensus(base, models, agreement=0, **options)
    rebuilt = [jaxmerge.apply_mask(base, whole, mask) for mask in masks[vector]]
    rows[f"{vector}, masked"] = demo.test_apart(rebuilt)
    rows[vector] = demo.test(best(whole))
    rows[f"{vector}, consensus"] = demo.test(
        best(jaxmerge.consensus(base, models, **options))
    )
print(
    jaxmerge.ResultTable(tasks, individual, rows, summaries=("mean", "norm.")).markdown(
        marks=False
    )
)
bits = {"one model each": 32 * len(tasks), "start, sum, masks": 32 * 2 + len(tasks)}
print("bits per parameter:", ", ".join(f"{n} for {what}" for what, n in bits.items()))

# %%
plots.mask_overlap(masks["task_arithmetic"], base=base, models=models)

# %% [markdown]
# Masks of TIES keep 99 %, those of the plain sum a little less, and both come from a
# vector that alone would be a poor model. Consensus improves both vectors by about a
# point: confirmed. (TIES ranks the whole model here, as in the paper; in section 1 it
# ranks each leaf, which these models like better.) About a third of all parameters
# serve one task only, very few serve none.
#
# ## What to read next
#
# - The papers: [SFTM](https://arxiv.org/abs/2502.10698),
#   [MaTS](https://arxiv.org/abs/2312.04339), [SLTA](https://arxiv.org/abs/2504.10902),
#   [TALL-masks and Consensus](https://arxiv.org/abs/2405.07813).
# - [What becomes of MaTS step by step](../benchmarks/results/steps.md), over three
#   seeds.
# - Twenty task models at the price of two: stores, in the
#   [README](../README.md#every-task-model-at-the-price-of-two).
# - [Choosing coefficients](coefficients.py): the scales that were taken for granted
#   here.
