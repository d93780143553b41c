"""Statistics without a model to collect them from."""

import jax
import numpy as np

from jaxmerge.matrices import matrix_axes
from jaxmerge.statistics.types import Site, Statistics
from jaxmerge.tree import is_float, named_leaves


def statistics_of(
    model, inputs=None, gradients=None, *, stacked=0, axes=None, **fields
):
    """The statistics of a model that gets these inputs and gradients.

    Args:
        model: a tree of arrays, or of what has their shapes and dtypes.
        inputs: by path, what enters a weight, (*stack, tokens, inputs).
        gradients: by path, those of what comes out, (*stack, tokens, outputs).
        stacked: how many leading axes of all leaves stack layers.
        axes: by path, where names do not tell them.
        fields: further fields of `Statistics`.
    """
    inputs, gradients = inputs or {}, gradients or {}
    axes = axes or matrix_axes(model, stack_axes=stacked)
    sites = []
    for path, leaf in named_leaves(model).items():
        how = (axes[path], path) if path in inputs else (None, None)
        stack = tuple(range(stacked))
        sites.append(Site(path, np.shape(leaf), str(leaf.dtype), *how, stack))
    known = {
        "gram": jax.tree.map(moments, inputs),
        "tokens": {p: np.full(x.shape[:-2], x.shape[-2]) for p, x in inputs.items()},
        "output_gradient": jax.tree.map(moments, gradients),
        "fisher": {},
        "fisher_block": {},
        "diagonal": {},
        "examples": np.array(10),
    }
    known = jax.tree.map(np.float32, known | fields)
    return Statistics(**known, sites=tuple(sites))


def moments(x):
    """The sum of the outer products of the rows of x, (*stack, rows, n)."""
    return np.swapaxes(x, -2, -1) @ x


def random_statistics(models, stacked=0):
    """One for each model, with all that a method may ask for."""
    return [_random(i, model, stacked) for i, model in enumerate(models)]


def _random(seed, model, stacked):
    draw = np.random.default_rng(seed).standard_normal
    shapes = {p: np.shape(x) for p, x in named_leaves(model).items() if is_float(x)}
    inputs, gradients, blocks, diagonal = {}, {}, {}, {}
    for path, shape in shapes.items():
        stack, rest = shape[:stacked], shape[stacked:]
        if len(rest) == 2:
            inputs[path], gradients[path] = (draw((*stack, 64, n)) for n in rest)
        else:
            diagonal[path] = draw(shape) ** 2
        if len(rest) == 1:
            blocks[path] = moments(draw((*stack, 64, *rest)))
    return statistics_of(
        model,
        inputs,
        gradients,
        stacked=stacked,
        fisher={path: draw(shape) ** 2 for path, shape in shapes.items()},
        fisher_block=blocks,
        diagonal=diagonal,
    )


def layer_of(statistics, model, i):
    """Those of layer i, where all leaves stack layers; `model` is that layer."""
    kinds = ("gram", "tokens", "output_gradient", "fisher", "fisher_block", "diagonal")
    fields = {
        kind: jax.tree.map(lambda x: x[i], getattr(statistics, kind)) for kind in kinds
    }
    inputs = dict.fromkeys(statistics.inputs, np.ones((1, 1)))
    return statistics_of(model, inputs, **fields)
