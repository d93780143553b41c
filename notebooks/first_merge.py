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
# # First merge in five minutes
#
# Four networks each read handwritten digits in one way: as they are, as negatives, in a
# mirror, turned by 90 degrees. None reads what the others read. Here they become one
# network of the same size, without any training, and we measure what that costs.
#
# Needs `pip install 'jaxmerge[notebooks]'`; nothing is downloaded, the scans come with
# scikit-learn.

# %%
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import jaxmerge
from jaxmerge import plots
from jaxmerge.cli import main
from jaxmerge.plots.canvas import axes_of, picture
from jaxmerge.tuning import grid

pixels, digits = load_digits(return_X_y=True)
images = (pixels.reshape(-1, 8, 8) / 8 - 1).astype(np.float32)
order = np.random.default_rng(0).permutation(len(images))
parts = dict(
    zip(("train", "choose", "test"), np.split(order, [900, 1260]), strict=True)
)
views = {
    "upright": lambda x: x,
    "negative": lambda x: -x,
    "mirrored": lambda x: x[:, :, ::-1],
    "turned": lambda x: np.rot90(x, axes=(1, 2)),
}
data = {
    part: {
        view: (jnp.array(show(images[i])), digits[i]) for view, show in views.items()
    }
    for part, i in parts.items()
}


def draw_views(examples=12):
    figure = picture(0.55 * examples, 2.4)
    for i, (view, (shown, _)) in enumerate(data["test"].items()):
        for k in range(examples):
            axes = axes_of(figure, len(views), examples, i * examples + k + 1)
            axes.imshow(shown[k], cmap="gray_r")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_ylabel("" if k else view, rotation=0, ha="right", va="center")
    return figure


draw_views()

# %% [markdown]
# ## Five networks
#
# A plain MLP. The start has seen 40 scans in each of the four ways, with their digits.
# From this *common start* each of the four models is fine-tuned on 900 scans, in its
# own way only. All that follows rests on the common start: models trained from
# different random values have nothing to do with each other weight by weight.


# %%
class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(10)(x)


network = Network()


def apply(params, x):
    return network.apply({"params": params}, x)


@functools.partial(jax.jit, static_argnames="optimiser")
def train(params, x, y, optimiser):
    def loss(params, x, y):
        logits = apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(state, key):
        params, memory = state
        batch = jax.random.randint(key, (64,), 0, len(x))
        gradient = jax.grad(loss)(params, x[batch], y[batch])
        update, memory = optimiser.update(gradient, memory)
        return (optax.apply_updates(params, update), memory), None

    keys = jax.random.split(jax.random.key(0), 300)
    return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]


few = [
    jnp.concatenate(x)
    for x in zip(*((x[:40], y[:40]) for x, y in data["train"].values()), strict=True)
]
random = jax.jit(network.init)(jax.random.key(0), images[:1])["params"]
base = train(random, *few, optax.adam(1e-3))
sgd = optax.sgd(optax.cosine_decay_schedule(0.02, 300), momentum=0.9)
models = [train(base, *data["train"][view], sgd) for view in views]


# %%
def score(params, part="choose"):
    """The accuracy on each view, by its name."""
    return jaxmerge.evaluate(apply, params, data[part], "accuracy")


def measure(params):
    """The same on test data, as a row of a table."""
    return np.array(list(score(params, "test").values()))


alone = np.array([measure(model) for model in models])
rows = {
    "start": measure(base),
    **{f"fine-tuned on {v}": row for v, row in zip(views, alone, strict=True)},
}
individual = alone.diagonal()
plots.heat_map(jaxmerge.ResultTable(list(views), individual, rows))

# %% [markdown]
# Fine-tuning on one view raises it to more than 97 %, and *lowers* most of what the
# start could do with the others. The last row, "individual", takes each task's own
# model: four networks, and somebody has to say which one to ask.
#
# ## The merge
#
# A method is a function of the start and the models, pytrees all of them, and returns a
# pytree. Some have a coefficient, `scale`, to be chosen on data that are not the test
# data: `sweep` tries all its values in one compiled call, and what counts is the mean
# over the views.

# %%
scales = grid(scale=np.linspace(0, 1.2, 13).tolist())
merged = {"average": jaxmerge.average(models)}
courses, chosen = {}, {}
for method in (jaxmerge.task_arithmetic, jaxmerge.ties):
    merge = functools.partial(method, base, models)
    found = jaxmerge.sweep(merge, scales, score)
    chosen[method.__name__] = found.best
    merged[method.__name__] = merge(**found.best)
    courses[method.__name__] = 100 * found.scores.mean(axis=1)
plots.sweep_curves([s["scale"] for s in scales], courses, score="mean accuracy, %")

# %%
rows = {name: measure(model) for name, model in {"start": base, **merged}.items()}
table = jaxmerge.ResultTable(list(views), individual, rows, references=["start"])
plots.heat_map(table)

# %%
print(table.markdown(marks=False))

# %% [markdown]
# One network reads all four views with about nine tenths of the accuracy of four
# specialists, and it took no training to get there. TIES, which trims task vectors and
# lets them vote on signs, needs a larger coefficient than the plain sum, and gains most
# where the average is worst.
#
# ## From checkpoints to a checkpoint
#
# The same from files, as one does with models that do not fit into memory: a recipe,
# and one command. What it writes is an ordinary checkpoint, with a report of how it was
# made.

# %%
folder = Path(tempfile.mkdtemp())
for name, params in {"start": base, **dict(zip(views, models, strict=True))}.items():
    jaxmerge.save(folder / name, params)
recipe = f"""\
method: ties
base: start
models: [{", ".join(views)}]
options:
  scale: {chosen["ties"]["scale"]:.2f}
"""
(folder / "recipe.yaml").write_text(recipe)
print(recipe)
status = main(["merge", str(folder / "recipe.yaml"), str(folder / "merged")])

# %%
again = jaxmerge.load(folder / "merged")
print(sorted(path.name for path in (folder / "merged").iterdir()))
print(f"mean accuracy of the checkpoint: {measure(again).mean():.1%}")

# %% [markdown]
# ## What to read next
#
# - [Anatomy of task vectors](task_vectors.py): why this works, and when it will not.
# - [Choosing coefficients](coefficients.py): more than one number for all.
# - [Four papers on a laptop](four_papers.py): merges that look at data or at features.
# - [Merging on a mesh](mesh.py): the same functions on many devices.
# - The [table of methods](../README.md#methods), each with its paper.
