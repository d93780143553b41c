"""Collects statistics of any JAX function over batches of data."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.matrices import matrix_shape
from jaxmerge.statistics import tracing
from jaxmerge.statistics.checking import (
    check_mask,
    check_options,
    check_results,
    count_examples,
    start,
)
from jaxmerge.statistics.measuring import Found, Part, Request, measure, needs_auto
from jaxmerge.statistics.plan import Plan
from jaxmerge.statistics.types import Site, Statistics, Trace, Unknown
from jaxmerge.tree import Params

Apply = Callable[[Params, Any], Any]


def trace(apply: Apply, params: Params, batch: Any) -> Trace:
    """Finds out how a model uses each of its leaves, without running it.

    Args:
        apply: `apply(params, batch)`, any function that JAX can trace.
        params: a pytree of arrays or of `jax.ShapeDtypeStruct`s.
        batch: the same, for one batch of data.

    Returns:
        The leaves, with the axes of those that are matrices, and what is not known.

    Example:
        >>> def apply(params, x):
        ...     heads = jnp.einsum("td,dhk->thk", x, params["query"])
        ...     return jnp.tanh(heads) * params["scale"][None, None]
        >>> params = {"query": jnp.ones((8, 2, 4)), "scale": jnp.ones(4)}
        >>> trace(apply, params, jnp.ones((5, 8))).axes
        {'query': MatrixAxes(stack=(), inputs=(0,), outputs=(1, 2))}
    """
    plan = tracing.plan(apply, *_shapes_of((params, batch)))
    return Trace(plan.sites, plan.unknown)


def collect(
    apply: Apply,
    params: Params,
    batches: Iterable[Any],
    *,
    what: str | Sequence[str] = ("gram",),
    labels: str = "expectation",
    loss: Callable[[Any, Any], Array] | None = None,
    key: Array | int | None = None,
    mask: str | Callable[[Any], Array] | None = None,
    groups: int = 1,
    chunk: int = 8,
    max_size: int = 16384,
    dtype: Any = jnp.float32,
) -> Statistics:
    """Collects second moments of the inputs and gradients of a model on data.

    Works from the jaxpr of `apply`, so the model may be written in any library, or in
    none. Scans over layers, rematerialisation, experts under `jax.vmap`, tied weights,
    convolutions, branches and loops are understood; uses of a leaf that are not are
    listed in the result's `unknown`. Batches of equal shapes are compiled once.

    Kinds of statistics:

    - "gram": for each weight the sum over tokens of x x^T, with x its input. Weights
      with the same input share one. For leaves that are no matrices, the diagonal of
      the same quadratic form: counts of rows that are looked up, and so on.
    - "output_gradient": for each weight the sum over tokens of g g^T, with g the
      gradient of the example's log-likelihood by the weight's output. With the Gram,
      these are the two factors of K-FAC. Derivative rules of its own
      (`jax.custom_vjp`) hold for functions of data alone; those that take weights are
      differentiated as they are written.
    - "fisher": for each leaf the sum over examples of the squared gradient of the
      example's log-likelihood: exact, from the gradients of single examples.
    - "fisher_block": the same with outer products, for leaves that are no matrices.

    What is not understood, and so is listed:

    - weights that are computed from leaves, as by WeightNorm, by quantisation or from
      factors of LoRA, `w + a @ b`; but a number that the model multiplies a leaf with
      counts as a part of its input,
    - parts of leaves: `w[:, :3]`, `layers[i]` in a Python loop, and matrices that data
      choose, `experts[i]`,
    - convolutions with groups that are neither depthwise nor an axis of the leaf,
    - `jax.shard_map`, `jax.lax.ragged_dot`, Pallas, and `jax.vmap` of branches.

    Inputs of stacked weights that are all zero do not count as tokens: a router left
    these slots of experts empty. Factors of LoRA that are leaves of their own have
    statistics, but merges refuse such trees.

    The last three kinds need labels. By default these are all labels, weighted as the
    model predicts them, which is exact and takes one pass back for every class at every
    position.

    Args:
        apply: `apply(params, batch)`. It must treat examples independently, and be
            free of randomness. For labels that the model predicts it returns logits,
            (examples, classes) or (examples, tokens, classes). Pass one and the same
            function for several models, and it is compiled once for all.
        params: a pytree of arrays.
        batches: an iterable of batches, pytrees of arrays that all have examples along
            their first axis.
        what: one or more of the kinds above.
        labels: "expectation": all labels, as above. "sample": labels drawn from the
            model's predictions, one pass back, unbiased. "empirical": the labels in the
            data, by `loss`.
        loss: `loss(outputs, batch)`, the negative log-likelihood of each example,
            (examples,), summed over its tokens.
        key: a random key or a seed, to draw labels.
        mask: which tokens count, booleans or zeros and ones, (examples, tokens) or
            (examples,): a key of the batch, or a function of it. Applied to uses of
            leaves and to logits, but not to `loss`. In the model, examples and tokens
            must be the leading axes, in this order or in one; where time comes first,
            and is as long as there are examples, the wrong tokens count. An example
            that has one token, as behind a pooling, counts if any of its tokens does.
            Uses that the mask does not fit are left out, and listed as unknown: those
            in a scan over tokens, or of experts that get tokens in slots.
        groups: how many passes over the batches to take, each with a part of the
            statistics in memory of the devices. With more than one, results are NumPy
            arrays.
        chunk: how many examples have their gradients in memory at a time.
        max_size: the most rows of a matrix of moments. Larger ones are left out, and
            listed as unknown.
        dtype: what to store Gram matrices and output gradients in. Sums are taken in
            float32.

    Returns:
        The statistics; sums over all devices where batches are on a mesh.

    Raises:
        ValueError: an option that is out of range or has no effect, batches that have
            no examples, or of which some use leaves in another way, a loss that is not
            one number per example, or a mask that fits no use of a leaf.

    Example:
        >>> params = {"up": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> def apply(params, x):
        ...     return x @ params["up"] + params["bias"][None]
        >>> batches = [jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[3.0, 0.0]])]
        >>> statistics = collect(apply, params, batches)
        >>> print(statistics.gram["up"])
        [[10.  2.]
         [ 2.  5.]]
        >>> statistics.tokens["up"].item(), statistics.diagonal["bias"].tolist()
        (3.0, [3.0, 3.0, 3.0])
    """
    what = (what,) if isinstance(what, str) else tuple(what)
    request = Request(apply, loss, labels, mask, chunk)
    check_options(request, what, key, groups, max_size)
    stream, first = start(batches, groups)
    request = request._replace(auto=needs_auto(apply, params, first))
    leaves, batch = _shapes_of((params, first))
    tokens = check_mask(request, batch)
    plan = tracing.plan(apply, leaves, batch, tokens)
    check_results(request, what, plan, leaves, batch, tokens)
    request = request._replace(uses=plan.uses)
    parts, too_large = _parts(plan, what, max_size)
    draws = _random_key(key)
    found: Found = {kind: {} for kind in _FIELDS}
    examples = 0
    for group in _grouped(parts, groups):
        total, examples = _sum(request._replace(parts=group), params, stream, draws)
        for kind, arrays in total.items():
            if kind in _STORED:
                arrays = {name: x.astype(dtype) for name, x in arrays.items()}
            found[kind] |= jax.device_get(arrays) if groups > 1 else arrays
        stream = batches
    return Statistics(
        **found,
        examples=jnp.float32(examples),
        sites=plan.sites,
        unknown=(*plan.unknown, *too_large),
    )


_FIELDS = ("gram", "tokens", "output_gradient", "fisher", "fisher_block", "diagonal")
_STORED = ("gram", "output_gradient")


def _shapes_of(tree: Any) -> Any:
    """Shapes and dtypes alone: there is more than one mesh that these may be on."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree
    )


def _random_key(key: Any) -> Any:
    """The random key of a seed; keys and None are what they are."""
    try:
        return jax.random.key(operator.index(key))
    except TypeError:
        return key


def _sum(
    request: Request, params: Params, batches: Iterable[Any], key: Array | None
) -> tuple[Found, int]:
    """The sums over batches, and the number of examples."""
    total: Found = {}
    examples = 0
    for number, batch in enumerate(batches):
        examples += count_examples(batch)
        draws = None if key is None else jax.random.fold_in(key, number)
        try:
            found = measure(request, params, batch, draws)
        except ValueError as error:
            if "Reverse-mode differentiation" not in str(error):
                raise
            raise ValueError(
                "collect: gradients do not go back through a while loop of the model; "
                "write it as jax.lax.scan, or as jax.lax.fori_loop with bounds that "
                "are plain numbers, or ask for what='gram' alone."
            ) from error
        total = _add(total, found) if number else found
    return total, examples


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Found, found: Found) -> Found:
    return jax.tree.map(jnp.add, total, found)


def _parts(
    plan: Plan, what: Sequence[str], max_size: int
) -> tuple[list[Part], list[Unknown]]:
    """Lists what is to be collected, and what is too large for that."""
    parts: list[Part] = []
    too_large: list[Unknown] = []

    def add(kind: str, site: Site, rows: int, stack: int) -> None:
        if rows > max_size:
            reason = f"it would have {rows} rows, more than max_size={max_size}"
            too_large.append(Unknown(site.path, kind, reason))
        elif kind != "gram" or site.input == site.path:
            parts.append(Part(kind, site.path, stack * rows * rows))

    for site in plan.sites:
        size = math.prod(site.shape)
        stack = math.prod(site.shape[axis] for axis in site.stack)
        if site.axes is not None:
            *_, inputs, outputs = matrix_shape(site.shape, site.axes)
            if "gram" in what:
                add("gram", site, inputs, stack)
            if "output_gradient" in what:
                add("output_gradient", site, outputs, stack)
            if site.input == site.path and set(what) & set(_STORED):
                parts.append(Part("tokens", site.path, 1))
        elif "fisher_block" in what:
            add("fisher_block", site, size // stack, stack)
        if "gram" in what and site.path in plan.diagonals:
            parts.append(Part("diagonal", site.path, size))
        if "fisher" in what:
            parts.append(Part("fisher", site.path, size))
    return parts, too_large


def _grouped(parts: Sequence[Part], groups: int) -> list[tuple[Part, ...]]:
    """Cuts parts into groups of about equal size."""
    total = sum(part.size for part in parts)
    before, grouped = 0, [[] for _ in range(groups)]
    for part in parts:
        grouped[before * groups // max(total, 1)].append(part)
        before += part.size
    return [tuple(group) for group in grouped if group] or [()]
