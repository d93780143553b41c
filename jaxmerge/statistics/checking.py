"""Checks what `collect` is given, before anything is compiled."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge.options import choice, whole_number, without_effect
from jaxmerge.statistics.gradients import LABELS
from jaxmerge.statistics.measuring import Request
from jaxmerge.statistics.plan import Plan, fits
from jaxmerge.tree import Params

KINDS = ("gram", "output_gradient", "fisher", "fisher_block")

_MOST_PASSES = 1 << 16


def start(batches: Iterable[Any], groups: int) -> tuple[Iterable[Any], Any]:
    """The batches of the first pass, and the first of them."""
    if isinstance(batches, Mapping | str) or hasattr(batches, "shape"):
        raise ValueError(
            f"collect: batches is a {type(batches).__name__}, which looks like a "
            "single batch; give an iterable of batches, such as [batch]."
        )
    stream = iter(batches)
    if groups > 1 and stream is batches:
        raise ValueError(
            f"collect: groups={groups} passes over the batches need batches that can "
            "be iterated again; give a list, or groups=1."
        )
    for first in stream:
        return itertools.chain([first], stream), first
    raise ValueError("collect: batches is empty; give at least one batch.")


def count_examples(batch: Any) -> int:
    """The number of examples of a batch."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"collect: a batch has arrays of shapes {shapes}; all must have the "
            "examples along their first axis. What is not per example belongs into "
            "`apply`, for example by functools.partial."
        )
    if not shapes[0][0]:
        raise ValueError(
            f"collect: a batch has no examples, its arrays are of shapes {shapes}; "
            "leave it out."
        )
    return shapes[0][0]


def check_options(
    request: Request, what: Sequence[str], key: Any, groups: int, max_size: int
) -> None:
    if not what:
        raise ValueError(f"collect: what is empty; choose from {', '.join(KINDS)}.")
    for kind in what:
        choice("collect", "what", kind, KINDS)
    choice("collect", "labels", request.labels, LABELS)
    whole_number("collect", "groups", groups, least=1)
    whole_number("collect", "chunk", request.chunk, least=1)
    whole_number("collect", "max_size", max_size, least=1)
    for name, function in [
        ("apply", request.apply),
        ("loss", request.loss),
        ("mask", request.mask),
    ]:
        try:
            hash(function)
        except TypeError:
            raise ValueError(
                f"collect: {name} is a {type(function).__name__}, which Python cannot "
                "hash, so that what is compiled for it is not found again; give a "
                "function that calls it."
            ) from None
    if not _needs_labels(what):
        needs = "'output_gradient', 'fisher' or 'fisher_block' in what"
        without_effect("collect", "labels", request.labels, "expectation", needs)
        without_effect("collect", "loss", request.loss, None, needs)
        without_effect("collect", "key", key is not None, False, needs)
        return
    if (request.labels == "empirical") != (request.loss is not None):
        raise ValueError(
            f"collect: labels={request.labels!r} and loss={request.loss!r} do not go "
            "together: labels='empirical' needs a loss, which knows the labels of the "
            "data, and the other kinds of labels take none."
        )
    if (request.labels == "sample") != (key is not None):
        raise ValueError(
            "collect: labels='sample' needs a key to draw them, a jax.random.key or a "
            "seed, and the other kinds of labels take none."
        )


def _needs_labels(what: Sequence[str]) -> bool:
    return set(what) != {"gram"}


def check_mask(request: Request, batch: Any) -> tuple[int, ...] | None:
    """The shape of the mask of a batch, of shapes alone: (examples, tokens)."""
    examples = count_examples(batch)
    if request.mask is None:
        return None
    shape = jax.eval_shape(request.mask_of, batch).shape
    if len(shape) != 2 or shape[0] != examples:
        raise ValueError(
            f"collect: the mask has shape {shape} in a batch of {examples} examples; "
            "it must be (examples, tokens) or (examples,)."
        )
    return shape


def check_results(
    request: Request,
    what: Sequence[str],
    plan: Plan,
    params: Params,
    batch: Any,
    mask: tuple[int, ...] | None,
) -> None:
    """Checks results of `apply` and `loss`, and that a mask fits, from shapes alone."""
    examples = count_examples(batch)
    if _needs_labels(what):
        results = jax.eval_shape(request.apply, params, batch)
        if request.loss is None:
            _check_logits(request.labels, results, examples, mask)
            return
        _check_loss(jax.eval_shape(request.loss, results, batch), examples)
    if mask and not plan.actions:
        raise ValueError(
            f"collect: no use of a leaf has tokens of the mask's shape {mask}. "
            "Examples and tokens must be the first two axes of the data in the model."
        )


def _check_logits(
    labels: str, results: Any, examples: int, mask: tuple[int, ...] | None
) -> None:
    shape = getattr(results, "shape", None)
    if shape is None or len(shape) < 2 or shape[0] != examples:
        raise ValueError(
            f"collect: apply returns {results}, but labels={labels!r} needs logits, "
            f"one array ({examples}, classes) or ({examples}, tokens, classes). Return "
            "them alone, or give labels='empirical' and a loss."
        )
    if shape[-1] == 1:
        raise ValueError(
            f"collect: apply returns {results}, logits of one class, of which any "
            "model is sure: all gradients would be zero. Give two logits, or "
            "labels='empirical' and a loss."
        )
    if mask and not fits(mask, shape[:-1]):
        raise ValueError(
            f"collect: the mask has shape {mask}, which does not fit logits of shape "
            f"{shape}; give labels='empirical' and a loss that leaves padding out."
        )
    passes = math.prod(shape[1:])
    if labels == "expectation" and passes > _MOST_PASSES:
        raise ValueError(
            f"collect: labels='expectation' would take {passes:,} passes back through "
            f"the model for each batch, one for each of the logits {shape[1:]} of an "
            "example; labels='sample' takes one."
        )


def _check_loss(losses: Any, examples: int) -> None:
    shape = getattr(losses, "shape", None)
    if shape == (examples,):
        return
    hint = ""
    if shape == ():
        hint = (
            " A scalar is a sum or a mean over examples, and gradients of a mean are "
            "too small by their number."
        )
    raise ValueError(
        f"collect: loss returns {losses}, but must return the negative log-likelihood "
        f"of each of the {examples} examples, ({examples},).{hint} Leave out the "
        "mean over examples, and sum over the tokens of an example."
    )
