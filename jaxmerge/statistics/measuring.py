"""Measures one batch: what is compiled, once for each shape of batch."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge import sharding
from jaxmerge.statistics import interpreter, tracing
from jaxmerge.statistics.gradients import example_keys, scores, squared_gradients
from jaxmerge.statistics.interpreter import Sums, Taps
from jaxmerge.statistics.plan import Plan, Term
from jaxmerge.statistics.views import arrange
from jaxmerge.tree import Params

Found = dict[str, dict[str, Array]]
"""Statistics by kind, a field of `Statistics`, and by name."""


class Part(NamedTuple):
    """One array of statistics.

    Attributes:
        kind: the field of `Statistics`.
        name: its name there.
        size: its number of entries.
    """

    kind: str
    name: str
    size: int


class Request(NamedTuple):
    """What to measure; most of it are options of `collect`.

    Attributes:
        parts: the statistics that are wanted.
        uses: how leaves are used in batches of any shape, `Plan.uses`.
        auto: whether the compiler chooses the shardings inside the model, also along
            `Explicit` axes of a mesh.
    """

    apply: Callable[[Params, Any], Any]
    loss: Callable[[Any, Any], Array] | None
    labels: str
    mask: str | Callable[[Any], Array] | None
    chunk: int
    parts: tuple[Part, ...] = ()
    uses: tuple[Any, ...] = ()
    auto: bool = False

    def names(self, kind: str) -> list[str]:
        """The names of the parts of a kind."""
        return [part.name for part in self.parts if part.kind == kind]

    def scored(self, results: Any, batch: Any) -> Array:
        """What labels are about: logits, or the log-likelihoods of examples."""
        return results if self.loss is None else -self.loss(results, batch)

    def mask_of(self, batch: Any) -> Array | None:
        """Which tokens of a batch count, (examples, tokens)."""
        if self.mask is None:
            return None
        mask = batch[self.mask] if isinstance(self.mask, str) else self.mask(batch)
        return mask[:, None] if mask.ndim == 1 else mask


@functools.partial(jax.jit, static_argnums=0)
def measure(request: Request, params: Params, batch: Any, key: Array | None) -> Found:
    """Measures the parts of a request on one batch."""
    if request.auto:
        everywhere = sharding.auto(functools.partial(_measure, request), jnp.zeros(()))
        return everywhere(params, batch, key)
    return _measure(request, params, batch, key)


def _measure(request: Request, params: Params, batch: Any, key: Array | None) -> Found:
    mask = request.mask_of(batch)
    plan = tracing.plan(
        request.apply, params, batch, None if mask is None else mask.shape
    )
    for first, here in zip(request.uses, plan.uses, strict=True):
        if first != here:
            shapes = [leaf.shape for leaf in jax.tree.leaves(batch)]
            raise ValueError(
                f"collect: in a batch of shapes {shapes}, the model uses leaf "
                f"{here[0].path!r} in another way than in the first batch; pad batches "
                "to the same shapes, and leave padding out by a mask."
            )
    found = _moments(request, plan, params, batch, key, mask)
    stacks = {site.path: site.stack for site in plan.sites}
    squares, blocks = request.names("fisher"), request.names("fisher_block")
    if squares or blocks:
        found["fisher"], found["fisher_block"] = squared_gradients(
            lambda params, batch: request.scored(request.apply(params, batch), batch),
            params,
            batch,
            request.labels,
            key,
            mask,
            leaves=squares,
            blocks={path: stacks[path] for path in blocks},
            chunk=request.chunk,
        )
    return found


def needs_auto(apply: Callable[[Params, Any], Any], params: Params, batch: Any) -> bool:
    """Whether a model does not run on the `Explicit` axes that its arguments are on.

    Such axes ask a model to say how it wants its data where that is not clear, as in
    most look-ups of embeddings. Most models do not.
    """
    mesh = sharding.mesh_of(*jax.tree.leaves((params, batch)))
    if mesh is None or not mesh.explicit_axes:
        return False
    try:
        jax.eval_shape(apply, params, batch)
    except Exception:
        return True
    return False


def _moments(
    request: Request,
    plan: Plan,
    params: Params,
    batch: Any,
    key: Array | None,
    mask: Array | None,
) -> Found:
    """What is taken on the way through the model, and on the way back."""
    terms: dict[str, Mapping[str, tuple[Term, ...]]] = {
        "gram": plan.grams,
        "tokens": plan.grams,
        "diagonal": plan.diagonals,
        "output_gradient": plan.gradients,
    }
    keys = {
        kind: [term.key for name in request.names(kind) for term in named[name]]
        for kind, named in terms.items()
    }
    wanted = frozenset(keys["gram"] + keys["tokens"] + keys["diagonal"])
    taps = {
        tap: jnp.zeros(plan.shapes_inside(tap, ())[0], jnp.float32)
        for tap in keys["output_gradient"]
    }

    def forward(taps: Taps) -> tuple[Any, Sums]:
        args = jax.tree.leaves((params, batch))
        flat, sums = interpreter.run(plan, args, wanted, taps, mask)
        return jax.tree.unflatten(plan.results, flat), sums

    def scored(taps: Taps) -> tuple[Array, Sums]:
        results, sums = forward(taps)
        return request.scored(results, batch), sums

    back: Taps = {}
    if taps:
        outputs, pull, sums = jax.vjp(scored, taps, has_aux=True)
        draws = example_keys(key, jnp.arange(len(outputs)))
        cotangents = scores(outputs, request.labels, draws, mask)
        back = cotangents.sum(lambda score: pull(score)[0], zeros=taps)
    elif wanted:
        _, sums = forward(taps)
    else:
        return {}

    def fit(kind: str, term: Term) -> Array:
        if kind == "output_gradient":
            return _fit(back[term.key], term, 2)
        gram_or_diagonal, *tokens = sums[term.key]
        if kind == "tokens":
            return _fit(tokens[0], term, 0)
        return term.scale * _fit(gram_or_diagonal, term, 2 if kind == "gram" else 0)

    return {
        kind: {
            name: functools.reduce(jnp.add, [fit(kind, term) for term in named[name]])
            for name in request.names(kind)
        }
        for kind, named in terms.items()
    }


def _fit(x: Array, term: Term, behind: int) -> Array:
    """Brings the leading axes of a sum, all but those behind, to the leaf's order."""
    end = x.ndim - behind
    x = x.reshape(math.prod(x.shape[:end]), *x.shape[end:])
    return arrange(x, 0, term.layout).reshape(*term.shape, *x.shape[1:])
