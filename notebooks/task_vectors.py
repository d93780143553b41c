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
# # Anatomy of task vectors
#
# A task vector is what fine-tuning has added to the start: $\tau = \theta - \theta_0$.
# Whether models can be merged is written in these vectors before anything is merged. We
# look at how long they are, at which angles they stand, where they disagree, in how
# many directions they go, how much of them can be thrown away, and what happens when
# they are subtracted.
#
# The models are those of `jaxmerge demo`: one small vision transformer, pretrained
# without labels on scans of digits, and fine-tuned on six questions about them. If an
# earlier run has not left them in `jaxmerge-demo`, they are trained here, which takes
# about a minute.

# %%
import functools
from pathlib import Path

import jax
import numpy as np
from rich.progress import Progress

import jaxmerge
from jaxmerge import plots
from jaxmerge.demo.experiment import accuracies, train
from jaxmerge.tuning import grid

with Progress(disable=True) as progress:
    demo = train(Path("jaxmerge-demo/trained"), seed=0, progress=progress)
base, tasks, models = demo.start, list(demo.tuned), list(demo.tuned.values())

# %% [markdown]
# ## Lengths and angles

# %%
total = jaxmerge.compare(base, models).total
for task, length in zip(tasks, total.relative_norms, strict=True):
    print(f"{task:>9}: {length:6.2%} of the length of the start")
pairs = total.cosines[np.triu_indices(len(tasks), k=1)]
print(f"cosines of different tasks: {pairs.min():.2f} to {pairs.max():.2f}")

# %%
plots.cosine_matrix(base, models, tasks)

# %% [markdown]
# Fine-tuning has moved every model by less than a twentieth of the length of the start.
# Random vectors of a hundred thousand dimensions would have cosines of about 0.003;
# these have up to a hundred times that. `digits` and `negative` ask the same question,
# and lean towards each other although they never show the same image. `turned` asks it,
# too, and stands at right angles to everything. The closest two are `loop` and `large`,
# which give the same answer to seven of ten digits.
#
# ## Signs

# %%
plots.sign_conflict(base, models)

# %% [markdown]
# Six random signs would disagree on 97 % of all parameters. Six trained models disagree
# on nearly as many, for all their positive cosines: there is hardly a parameter that
# all of them move the same way. Methods that elect signs, such as TIES, decide
# something almost everywhere.
#
# ## Directions
#
# The task vector of a weight matrix is a matrix, too. How many of its directions count?
# We keep the `rank` strongest of every matrix (`tsv_merge` of a single model does just
# that), and ask each model its own task.


# %%
def own_task(changed):
    """The mean accuracy of models, each on its own task."""
    return np.mean(demo.test_apart(changed))


vectors_only = {".*kernel": 0.0, ".*": 1.0}
print(f"start:   {demo.test(base).mean():6.1%}")
nothing = [jaxmerge.task_arithmetic(base, [m], scale=vectors_only) for m in models]
print(f"rank  0: {own_task(nothing):6.1%}   (biases, norms and embeddings alone)")
for rank in (1, 4, 16):
    options = {"rank": rank, "others": "task_arithmetic"}
    truncated = [jaxmerge.tsv_merge(base, [m], **options) for m in models]
    print(f"rank {rank:2}: {own_task(truncated):6.1%}")
print(f"models:  {own_task(models):6.1%}")

# %% [markdown]
# One direction of every matrix closes half of the way from the start to the models,
# sixteen nearly all of it. What adding up the task vectors does to these directions,
# and what methods on subspaces make of it:

# %%
merges = {
    "sum": jaxmerge.task_arithmetic(base, models),
    "tsv_merge": jaxmerge.tsv_merge(base, models),
    "iso_c": jaxmerge.iso_c(base, models),
}
plots.singular_spectra(base, models, merges, only=r"block_\d/mlp.*")

# %% [markdown]
# The sum piles up in its strongest directions. `tsv_merge` turns them apart before it
# adds them, and `iso_c` makes all of them equally strong.
#
# ## Thinning
#
# Of each task vector we keep a share of the entries: the largest ones, or random ones
# that are scaled up to make good for the rest (DARE).

# %%
shares = (0.02, 0.05, 0.1, 0.2, 0.5)
kept = {"largest": [], "random, rescaled": []}
for share in shares:
    largest = [jaxmerge.ties(base, [m], density=share) for m in models]
    drawn = [jaxmerge.dare(base, [m], key=0, density=share) for m in models]
    kept["largest"].append(own_task(largest))
    kept["random, rescaled"].append(own_task(drawn))
plots.sweep_curves(
    100 * np.array(shares),
    {how: 100 * np.array(values) for how, values in kept.items()},
    value="entries kept, %",
    score="accuracy on own task, %",
)

# %% [markdown]
# Half of the entries go without a trace, four fifths for about two points, and it
# hardly matters which: random ones will do. Of a twentieth and less, the largest are
# the better choice.
#
# ## Backwards and beyond
#
# A task vector can be added more than once, and it can be subtracted. Here is that of
# `turned`, with coefficients from -1.5 (unlearning) over 0 (the start) and 1 (the
# model) to 2.5.

# %%
coefficients = np.linspace(-1.5, 2.5, 25)
turned = tasks.index("turned")
merge = functools.partial(jaxmerge.task_arithmetic, base, [models[turned]])
found = jaxmerge.sweep(
    merge,
    grid(scale=coefficients.tolist()),
    lambda params: accuracies(params, demo.heads, demo.data.test),
)
plots.sweep_curves(
    coefficients,
    {task: 100 * found.scores[:, i] for i, task in enumerate(tasks)},
    value="coefficient of the task vector of 'turned'",
    score="accuracy, %",
)

# %% [markdown]
# The best coefficient is near 1, where fine-tuning stopped; and subtracting the vector
# unlearns the task. `digits`, the same question about upright scans, loses on both
# sides, the others care less.
#
# ## The landscape between two models
#
# A plane through the start and two models, true to lengths and angles, with the mean
# accuracy on these two tasks. Merges of the two lie on the plane or near it.

# %%
a, b = tasks.index("digits"), turned


shown = np.array([a, b])
heads, images = jax.tree.map(lambda x: x[shown], (demo.heads, demo.data.test))


def score(params):
    return 100 * accuracies(params, heads, images).mean()


two = [models[a], models[b]]
plots.landscape(
    score,
    base,
    *two,
    {"average": jaxmerge.average(two), "sum": jaxmerge.task_arithmetic(base, two)},
    names=("start", "digits", "turned"),
    points=17,
    label="mean accuracy on both tasks, %",
)

# %% [markdown]
# The best models on this plane are neither the start nor the two that were trained:
# they lie between the average and the sum, where nobody has been.
#
# ## What to read next
#
# - [Choosing coefficients](coefficients.py): how much of each task vector.
# - [Four papers on a laptop](four_papers.py): methods built on what was measured here.
# - *Editing Models with Task Arithmetic*, [ICLR
#   2023](https://arxiv.org/abs/2212.04089), where task vectors come from; and *Task
#   Singular Vectors*, [CVPR 2025](https://arxiv.org/abs/2412.00081), for their
#   directions.
# - `jaxmerge compare START MODEL MODEL ...` prints lengths, cosines and conflicts of
#   checkpoints of any size.
