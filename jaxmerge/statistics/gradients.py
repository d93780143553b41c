"""Gradients of log-likelihoods, example by example, over labels of three kinds.

The Fisher information is the second moment of the gradient of an example's
log-likelihood, with labels that the model itself predicts. The gradient of a sum over
examples, squared, is something else: products of different examples stay in it.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge import sharding
from jaxmerge.statistics.moments import token_weights
from jaxmerge.tree import Params, named_leaves, rebuild

LABELS = ("expectation", "sample", "empirical")

Sums = TypeVar("Sums")


class Scores(NamedTuple):
    """Cotangents of outputs; second moments are sums over all of them.

    Attributes:
        passes: how many there are.
        at: the one of a number.
    """

    passes: int
    at: Callable[[Array | int], Array]

    def sum(self, moment: Callable[[Array], Sums], zeros: Sums) -> Sums:
        """Adds up what `moment` makes of each cotangent, from zeros like it."""
        if self.passes == 1:
            return moment(self.at(0))

        def add(number: Array, total: Sums) -> Sums:
            return jax.tree.map(jnp.add, total, moment(self.at(number)))

        return jax.lax.fori_loop(0, self.passes, add, zeros)


def scores(
    outputs: Array, labels: str, keys: Array | None, mask: Array | None
) -> Scores:
    """The gradients of log-likelihoods by the outputs of a model.

    Args:
        outputs: logits, (examples, *positions, classes); the log-likelihoods of
            examples themselves, (examples,), for empirical labels.
        labels: "expectation" takes every class at every position in turn, times the
            square root of its probability; "sample" labels drawn from the model;
            "empirical" those in the data.
        keys: one random key per example, to draw labels.
        mask: which positions count, (examples, positions).
    """
    if labels == "empirical":
        return Scores(1, lambda _: jnp.ones_like(outputs))
    examples, *positions, classes = outputs.shape

    def likely(outputs: Array, mask: Array | None) -> tuple[Array, Array]:
        logits = outputs.astype(jnp.float32).reshape(examples, -1, classes)
        weights = token_weights(mask, (examples, *positions))
        weights = jnp.broadcast_to(weights, (examples, *positions))
        return logits, weights.reshape(examples, -1, 1)

    def sampled(outputs: Array, keys: Array, mask: Array | None) -> Array:
        logits, weights = likely(outputs, mask)
        drawn = jax.vmap(jax.random.categorical)(keys, logits)
        score = jax.nn.one_hot(drawn, classes, dtype=logits.dtype) - jax.nn.softmax(
            logits
        )
        return (score * weights).reshape(outputs.shape).astype(outputs.dtype)

    def expected(outputs: Array, mask: Array | None, number: Array) -> Array:
        logits, weights = likely(outputs, mask)
        position, label = number // classes, number % classes
        chance = jax.nn.softmax(logits[:, position])
        score = jax.nn.one_hot(label, classes, dtype=logits.dtype)[None] - chance
        score *= jnp.sqrt(chance[:, label, None]) * weights[:, position]
        score = jnp.zeros_like(logits).at[:, position].set(score)
        return score.reshape(outputs.shape).astype(outputs.dtype)

    if labels == "sample":
        draw = sharding.auto(sampled, like=outputs)
        return Scores(1, lambda _: draw(outputs, keys, mask))
    expect = sharding.auto(expected, like=outputs)
    passes = math.prod(outputs.shape[1:])
    return Scores(passes, lambda number: expect(outputs, mask, jnp.asarray(number)))


def example_keys(key: Array | None, index: Array) -> Array | None:
    """One random key per example, from its index in the batch."""
    if key is None:
        return None
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def squared_gradients(
    outputs_of: Callable[[Params, Any], Array],
    params: Params,
    batch: Any,
    labels: str,
    key: Array | None,
    mask: Array | None,
    *,
    leaves: Collection[str],
    blocks: Mapping[str, tuple[int, ...]],
    chunk: int,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sums second moments of the gradients of single examples.

    Args:
        outputs_of: makes of params and a batch what `scores` takes.
        params: a pytree of arrays.
        batch: a pytree of arrays with examples along their first axis.
        labels: as for `scores`,
        key: to draw them.
        mask: which positions count, (examples, positions).
        leaves: the paths of leaves to take squares of,
        blocks: and to take outer products of, with the axes of independent layers.
        chunk: how many examples have their gradients in memory at a time.

    Returns:
        The squares, of the shapes of the leaves, and the outer products, (*stack, size,
        size).
    """
    examples = len(jax.tree.leaves(batch)[0])
    chunk = min(chunk, examples)
    steps = -(-examples // chunk)

    def chunks(x: Array) -> Array:
        # Strided, so that a batch that is cut across devices stays so in each step.
        padding = [(0, chunk * steps - examples), *((0, 0) for _ in x.shape[1:])]
        x = jnp.pad(x, padding, mode="edge")
        return jnp.swapaxes(x.reshape(chunk, steps, *x.shape[1:]), 0, 1)

    def measure(params: Params, batch: Any, key: Any, mask: Any) -> Any:
        frozen = named_leaves(params)
        chosen = {path: frozen[path] for path in {*leaves, *blocks}}
        sums = {p: jnp.zeros(x.shape, jnp.float32) for p, x in chosen.items()}
        zeros = (
            {path: sums[path] for path in leaves},
            {path: _outer(sums[path], axes) for path, axes in blocks.items()},
        )

        def one(example: Any, mask: Any, index: Array) -> Any:
            example, mask = jax.tree.map(lambda x: x[None], (example, mask))
            outputs, pull = jax.vjp(
                lambda chosen: outputs_of(rebuild(params, frozen | chosen), example),
                chosen,
            )
            # Examples that only fill up the last chunk are no examples.
            counts = (index < examples).astype(outputs.dtype)
            keys = example_keys(key, index[None])

            def moments(score: Array) -> Any:
                (gradient,) = pull(score * counts)
                gradient = {p: g.astype(jnp.float32) for p, g in gradient.items()}
                squares = {path: jnp.square(gradient[path]) for path in leaves}
                outer = {p: _outer(gradient[p], axes) for p, axes in blocks.items()}
                return squares, outer

            return scores(outputs, labels, keys, mask).sum(moments, zeros)

        def step(total: Any, some: Any) -> Any:
            found = jax.vmap(one)(*some)
            return jax.tree.map(lambda t, x: t + jnp.sum(x, 0), total, found), None

        index = jnp.arange(chunk * steps).reshape(chunk, steps).T
        some = (*jax.tree.map(chunks, (batch, mask)), index)
        return jax.lax.scan(step, zeros, some)[0]

    return sharding.auto(measure, like=jnp.zeros(()))(params, batch, key, mask)


def _outer(gradient: Array, stack: tuple[int, ...]) -> Array:
    gradient = jnp.moveaxis(gradient, stack, range(len(stack)))
    gradient = gradient.reshape(*gradient.shape[: len(stack)], -1)
    return gradient[..., :, None] * gradient[..., None, :]
