"""Merging task vectors that are thinned out at random: DARE and DELLA.

Yu et al., "Language Models are Super Mario", ICML 2024, arXiv:2311.03099.
Deep et al., "DELLA-Merging", 2024, arXiv:2406.11617.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.dividing import ROWS_IN_NUMPY, OfRows
from jaxmerge.leafwise import merge_leaves
from jaxmerge.linalg import map_matrices
from jaxmerge.matrices import MatrixRules, rows_by_scope
from jaxmerge.methods.election import (
    Aggregate,
    Divisor,
    Election,
    Tie,
    Vote,
    match_l1,
    merge_thinned,
)
from jaxmerge.numerics import magnitude_bits, random_words
from jaxmerge.options import (
    Leaf,
    PerLeaf,
    PerModel,
    Static,
    choice,
    per_leaf,
    per_model,
)
from jaxmerge.registry import register
from jaxmerge.tree import Params

Rescale = Literal["inverse", "l1"] | None


@register(
    paper="Yu et al., Language Models are Super Mario (DARE), ICML 2024",
    link="https://arxiv.org/abs/2311.03099",
    identity={"density": 1.0},
    symmetric=False,
)
def dare(
    base: Params,
    models: Sequence[Params],
    *,
    key: Array | int,
    density: PerModel = 0.5,
    weights: PerModel = 1.0,
    scale: PerLeaf = 1.0,
    rescale: Rescale = "inverse",
    elect: bool = False,
    vote: Vote = "weighted",
    tie: Tie = "drop",
    aggregate: Aggregate = "sum",
    divisor: Divisor = "weights",
    names: Sequence[str] | None = None,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Drops entries of each task vector at random, rescales the others, adds up.

    $\hat\tau_t = m_t \odot \tau_t / \rho$ with $m_t \sim \mathrm{Bernoulli}(\rho)$
    (section 3, with drop rate $p = 1 - \rho$), then
    $\theta = \theta_0 + \lambda \sum_t w_t \hat\tau_t$, or signs elected as in `ties`.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        key: a `jax.random.key` or a seed. A draw depends on it, on the path of the
            leaf, on the name of the model and on the position in the leaf alone, never
            on sharding or on the order of leaves.
        density: $\rho$, the share of entries kept, in (0, 1]. May be traced.
        weights: $w_t$, dimensionless. May be traced.
        scale: $\lambda$, dimensionless. May be traced.
        rescale: `"inverse"` divides what is kept by $\rho$, so that its expectation is
            the task vector (the paper); `"l1"` gives each leaf its L1 norm back
            (mergekit; not unbiased entry by entry); None leaves it.
        elect: whether to elect signs as `ties` does, instead of adding everything.
        vote: with `elect`, as in `ties`.
        tie: with `elect`, as in `ties`.
        aggregate: as in `ties`; without `elect` of all entries. The default adds up, as
            mergekit does; with `elect` the authors take the mean, after a trim as in
            `ties`, which is not done here.
        divisor: what a mean divides by, as in `ties`.
        names: the names that the models are drawn by; by default "0", "1", ...
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer draws from its own key.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base, model = {"w": jnp.zeros(8)}, {"w": jnp.ones(8)}
        >>> sorted(set(dare(base, [model], key=0, density=0.5)["w"].tolist()))
        [0.0, 2.0]
    """
    choice("dare", "rescale", rescale, (None, "inverse", "l1"))
    election = Election(vote, tie, aggregate, divisor).checked("dare", elect)

    def options(leaf: Leaf) -> dict:
        return {
            "weights": per_model(leaf, "weights", weights),
            "scale": per_leaf(leaf, "scale", scale),
            "density": per_model(leaf, "density", density, "(0, 1]"),
        }

    return merge_leaves(
        _dare,
        models,
        options,
        method="dare",
        base=base,
        stack_axes=stack_axes,
        key=key,
        names=names,
        rescale=rescale,
        election=election,
        elect=elect,
    )


def _dare(
    deltas: Sequence[Array],
    *,
    keys: Sequence[Array],
    weights: Sequence,
    scale: Array,
    density: Sequence,
    rescale: Rescale,
    election: Election,
    elect: bool,
) -> Array:
    thinned = [
        drop(key, delta, share, rescale)
        for key, delta, share in zip(keys, deltas, density, strict=True)
    ]
    return scale * merge_thinned(thinned, weights, election, elect)


def drop(key: Array, delta: Array, keep: Array | float, rescale: Rescale) -> Array:
    """Keeps each entry with probability `keep`, a scalar or one per entry.

    Probabilities are rounded up to multiples of 2**-16.
    """
    count = jnp.ceil(jnp.asarray(keep, jnp.float32) * 2**16)
    chosen = random_words(key, delta).astype(jnp.float32) < count
    kept = jnp.where(chosen, delta, 0)
    if rescale == "inverse":
        return kept * (2**16 / count)
    return match_l1(kept, delta) if rescale == "l1" else kept


@register(
    paper="Deep et al., DELLA-Merging, 2024",
    link="https://arxiv.org/abs/2406.11617",
    identity={"density": 1.0},
    symmetric=False,
    gathers=True,
)
def della(
    base: Params,
    models: Sequence[Params],
    *,
    key: Array | int,
    density: PerModel = 0.7,
    half_width: PerModel = 0.07,
    weights: PerModel = 1.0,
    scale: PerLeaf = 1.0,
    scope: Literal["leaf", "row"] = "row",
    rescale: Rescale = "inverse",
    elect: bool = True,
    vote: Vote = "weighted",
    tie: Tie = "drop",
    aggregate: Aggregate = "mean",
    divisor: Divisor = "weights",
    names: Sequence[str] | None = None,
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Drops small entries of each task vector more often, then merges as TIES does.

    The entry of rank $r$ among the $n$ magnitudes of its row (0 the smallest) is kept
    with probability $p = \rho - \epsilon + 2 \epsilon r / (n - 1)$ (section 3), and
    divided by it; then signs are elected and agreeing entries averaged as in `ties`.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        key: a `jax.random.key` or a seed. A draw depends on it, on the path of the
            leaf, on the name of the model and on the position in the leaf alone, never
            on sharding or on the order of leaves.
        density: $\rho$, the mean share of entries kept, in (0, 1]; 1 keeps everything.
        half_width: $\epsilon$, half of the paper's window, in [0, 1); the interval
            density -/+ half_width must lie in (0, 1], unless density is 1.
        weights: $w_t$, dimensionless. May be traced.
        scale: $\lambda$, dimensionless. May be traced.
        scope: ranks entries by `"row"`: per output of a linear map, per row of an
            embedding, and per leaf for all others; or by `"leaf"`.
        rescale: `"inverse"` divides each entry kept by its probability (the paper);
            `"l1"` gives each leaf its L1 norm back (mergekit); None leaves it.
        elect: whether to elect signs as `ties` does, instead of adding everything.
        vote: with `elect`, as in `ties`.
        tie: with `elect`, as in `ties`.
        aggregate: as in `ties`; without `elect` of all entries.
        divisor: what a mean divides by, as in `ties`.
        names: the names that the models are drawn by; by default "0", "1", ...
        matrices: with `scope="row"`, axis patterns of leaves by path, or
            `trace(...).axes`, before the presets of `jaxmerge.matrices`.
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base, model = {"bias": jnp.zeros(3)}, {"bias": jnp.array([1.0, 2.0, 4.0])}
        >>> della(base, [model], key=1, density=1.0)["bias"].tolist()
        [1.0, 2.0, 4.0]
    """
    choice("della", "rescale", rescale, (None, "inverse", "l1"))
    election = Election(vote, tie, aggregate, divisor).checked("della", elect)
    rows_of = rows_by_scope("della", scope, matrices)

    def options(leaf: Leaf) -> dict:
        rows = rows_of(leaf) if rows_of else ()
        middles = per_model(leaf, "density", density, "(0, 1]", static=True)
        halves = per_model(leaf, "half_width", half_width, "[0, 1)", static=True)
        return {
            "weights": per_model(leaf, "weights", weights),
            "scale": per_leaf(leaf, "scale", scale),
            "ranges": [
                _range(leaf, middle, half)
                for middle, half in zip(middles, halves, strict=True)
            ],
            # Inside the kernel, stacked axes are gone.
            "rows": Static(tuple(axis - len(leaf.units) for axis in rows)),
        }

    return merge_leaves(
        _della,
        models,
        options,
        method="della",
        base=base,
        stack_axes=stack_axes,
        key=key,
        names=names,
        rescale=rescale,
        election=election,
        elect=elect,
    )


def _range(leaf: Leaf, density: float, half_width: float) -> tuple[float, float]:
    if density == 1:
        return 1.0, 1.0
    low, high = density - half_width, density + half_width
    if not (low > 0 and high <= 1):
        raise ValueError(
            f"{leaf.method}: density {density:g} -/+ half_width {half_width:g} of leaf "
            f"{leaf.path!r} leaves (0, 1]; choose a smaller half_width."
        )
    return low, high


def _della(
    deltas: Sequence[Array],
    *,
    keys: Sequence[Array],
    weights: Sequence,
    scale: Array,
    ranges: Sequence,
    rows: Static,
    rescale: Rescale,
    election: Election,
    elect: bool,
) -> Array:
    thinned = [
        drop(key, delta, keep_probabilities(delta, low, high, rows.value), rescale)
        for key, delta, (low, high) in zip(keys, deltas, ranges, strict=True)
    ]
    return scale * merge_thinned(thinned, weights, election, elect)


def keep_probabilities(
    delta: Array, low: Array, high: Array, rows: tuple[int, ...] = ()
) -> Array:
    """From `low` for the smallest magnitude to `high` for the largest, by rank.

    Args:
        delta: a task vector.
        low: probability of the smallest magnitude.
        high: probability of the largest.
        rows: the axes along which independently ranked parts of `delta` lie. Equal
            magnitudes rank in their order along the other axes, read row by row; a
            part of one entry gets the middle probability.
    """
    front = tuple(range(len(rows)))
    parts = jnp.moveaxis(jnp.abs(delta), rows, front)
    count = math.prod(parts.shape[: len(rows)])
    size = delta.size // count if count else 0
    if size == 1:
        return jnp.broadcast_to((low + high) / 2, delta.shape).astype(delta.dtype)
    # Parts as the rows of a stack of matrices: on a mesh, each is ranked in one place.
    ranks = map_matrices(_ranks, parts.reshape(count, 1, size)).reshape(parts.shape)
    share = jnp.moveaxis(ranks, front, rows).astype(delta.dtype) / (size - 1)
    return low + (high - low) * share


@jax.jit
def _ranks(row: Array) -> Array:
    """The place of each entry of (1, size) magnitudes in their order.

    XLA sorts plain integers ten times as fast as keys with values, at least on CPUs, so
    two sorts each order by half of the bits, with the place before in the other half.
    """
    bits, size = magnitude_bits(row)[0], row.shape[-1]
    if bits.dtype != jnp.uint32 or size > 2**16:
        return jnp.argsort(jnp.argsort(row, stable=True))
    places = jnp.arange(size, dtype=jnp.uint32)

    def order(half: Array) -> Array:
        return jnp.sort((half << 16) | places) & 0xFFFF

    by_low = order(bits & 0xFFFF)
    sorted_places = by_low[order((bits >> 16)[by_low])]
    ranks = jnp.zeros_like(places).at[sorted_places].set(places, unique_indices=True)
    return ranks[None].astype(jnp.uint16)


_BLOCK = 1 << 17  # Entries that NumPy ranks at a time.


def _ranks_with_numpy(rows: np.ndarray, ranks: np.ndarray) -> None:
    """`_ranks` of the last axis of `rows`, into `ranks`."""
    size = rows.shape[-1]
    rows, ranks = rows.reshape(-1, size), ranks.reshape(-1, size)
    step = min(len(rows), max(1, _BLOCK // size))
    places = np.tile(np.arange(size, dtype=ranks.dtype), step)
    starts = size * np.arange(step)[:, None]
    for start in range(0, len(rows), step):
        order = _order(rows[start : start + step])
        order += starts[: len(order)]
        some = ranks[start : start + step].reshape(-1)
        some[order.reshape(-1)] = places[: order.size]


def _order(magnitudes: np.ndarray) -> np.ndarray:
    """The places of the entries of each row in their order, those that tie as is."""
    size = magnitudes.shape[-1]
    if magnitudes.dtype != np.float32 or size > 2**16:
        return np.argsort(magnitudes, axis=-1, kind="stable")
    keys = magnitudes.view(np.uint32).astype(np.uint64)
    keys <<= np.uint64(16)
    keys |= np.arange(size, dtype=np.uint64)
    keys.sort(axis=-1)
    keys &= np.uint64(0xFFFF)
    return keys.view(np.int64)


ROWS_IN_NUMPY["_ranks"] = OfRows(_ranks_with_numpy, jax.jit(jax.vmap(_ranks)))
