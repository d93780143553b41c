"""Combining task vectors entry by entry: plain sums, or those that agree on a sign.

The steps that TIES introduced and that DARE, DELLA and breadcrumbs reuse.
"""

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import Array

from jaxmerge.numerics import Count, count, safe_divide, totals
from jaxmerge.options import choice, without_effect

Vote = Literal["weighted", "mass", "count"]
Tie = Literal["drop", "positive", "negative", "majority"]
Aggregate = Literal["mean", "sum", "max"]
Divisor = Literal["weights", "signed_weights", "count"]


class Election(NamedTuple):
    """How an entry's sign is elected and its agreeing task vectors are combined.

    Implementations of TIES disagree on each of these points.

    Attributes:
        vote: what is summed to elect a sign: `"weighted"` sums `w_t * delta_t`
            (mergekit), `"mass"` sums `delta_t` (the paper), `"count"` sums signs. In a
            weighted vote a task vector agrees by the sign of `w_t * delta_t`, else by
            that of `delta_t`.
        tie: the sign where the sum is exactly zero: `"drop"` none, the entry stays at
            the base; `"positive"` (mergekit); `"negative"`; `"majority"`, the sign that
            more of the other entries elected, negative if equally many did (the
            authors' code).
        aggregate: `"mean"`, `"sum"` or `"max"` (by magnitude) of the agreeing
            `w_t * delta_t`.
        divisor: what a mean divides by: `"weights"`, the agreeing `abs(w_t)` summed;
            `"signed_weights"`, without `abs` (mergekit; negative weights then flip the
            merged sign); `"count"`, how many agree (the paper).
    """

    vote: Vote = "weighted"
    tie: Tie = "drop"
    aggregate: Aggregate = "mean"
    divisor: Divisor = "weights"

    def checked(self, method: str, elect: bool = True) -> "Election":
        """Itself.

        Raises:
            ValueError: a choice is unknown, or has no effect as nothing is elected;
                the message starts with `method`.
        """
        choice(method, "elect", elect, (False, True))
        for name, known in self.__annotations__.items():
            choice(method, name, getattr(self, name), get_args(known))
        if not elect:
            for name, default in (("vote", "weighted"), ("tie", "drop")):
                without_effect(method, name, getattr(self, name), default, "elect=True")
            choice(method, "aggregate without elect", self.aggregate, ("mean", "sum"))
        return self


def weighted_sum(deltas: Sequence[Array], weights: Sequence[Array]) -> Array:
    """The sum of `weights[t] * deltas[t]`."""
    return sum(w * d for w, d in zip(weights, deltas, strict=True))  # type: ignore


def merge_elected(
    deltas: Sequence[Array],
    weights: Sequence[Array],
    election: Election,
    majority: Array | None = None,
) -> Array:
    """Elects one sign per entry and combines the task vectors that have it.

    Args:
        deltas: task vectors of one shape.
        weights: one scalar per task vector.
        election: the conventions.
        majority: for `tie="majority"`, the sign that most entries of the whole model
            elected; by default that of these entries.

    Returns:
        An array in the shape of a delta; 0 where no task vector agrees.
    """
    sums = votes(deltas, weights, election)
    if election.tie == "majority" and majority is None:
        majority = majority_sign([sign_counts(sums)])
    by_tie = {"drop": 0, "positive": 1, "negative": -1, "majority": majority}
    signs = jnp.where(sums == 0, by_tie[election.tie], jnp.sign(sums))

    scaled = [w * d for w, d in zip(weights, deltas, strict=True)]
    voters = scaled if election.vote == "weighted" else deltas
    agree = [(jnp.sign(v) == signs) & (v != 0) for v in voters]
    kept = [jnp.where(a, s, 0) for a, s in zip(agree, scaled, strict=True)]
    if election.aggregate == "max":
        return functools.reduce(larger, kept)
    return _aggregate(kept, agree, weights, election)


def larger(a: Array, b: Array) -> Array:
    """The entry of larger magnitude; of equal ones that of `b`."""
    return jnp.where(jnp.abs(b) >= jnp.abs(a), b, a)


def _aggregate(
    kept: Sequence[Array],
    counted: Sequence[Array],
    weights: Sequence[Array],
    election: Election,
) -> Array:
    """The sum of weighted deltas, or their mean over the ones that are counted."""
    total: Array = sum(kept)  # type: ignore
    if election.aggregate == "sum":
        return total
    of = {"weights": jnp.abs, "signed_weights": jnp.asarray, "count": jnp.ones_like}
    share = of[election.divisor]
    divisor = sum(c * share(w) for c, w in zip(counted, weights, strict=True))
    return safe_divide(total, divisor, total)  # type: ignore


def votes(
    deltas: Sequence[Array], weights: Sequence[Array], election: Election
) -> Array:
    """What the sign of every entry is read off: a sum over task vectors.

    Weighted ones that cancel out up to rounding count as a tie: whether a product is
    rounded before it is added is up to the compiler.
    """
    if election.vote == "weighted":
        scaled = [w * d for w, d in zip(weights, deltas, strict=True)]
        total: Array = sum(scaled)  # type: ignore
        sizes: Array = sum(jnp.abs(x) for x in scaled)  # type: ignore
        return jnp.where(jnp.abs(total) <= jnp.finfo(total.dtype).eps * sizes, 0, total)
    if election.vote == "mass":
        return sum(deltas)  # type: ignore
    return sum(jnp.sign(d) for d in deltas)  # type: ignore


def sign_counts(sums: Array) -> tuple[Count, Count]:
    """How many entries are positive, and how many negative."""
    return count(sums > 0), count(sums < 0)


def majority_sign(counts: Iterable[tuple[Count, Count]]) -> Array:
    """1 if more entries, of all that were counted, are positive than negative, else -1.

    Args:
        counts: as `sign_counts` returns them, of each part.
    """
    none = (Count.of(0), Count.of(0))
    positive, negative = (
        functools.reduce(operator.add, parts)
        for parts in zip(none, *counts, strict=True)
    )
    return jnp.where(negative >= positive, -1, 1)


def merge_thinned(
    deltas: Sequence[Array], weights: Sequence[Array], election: Election, elect: bool
) -> Array:
    """Combines task vectors of which entries were dropped: elected, or all of them."""
    if elect:
        return merge_elected(deltas, weights, election)
    scaled = [w * d for w, d in zip(weights, deltas, strict=True)]
    return _aggregate(scaled, [jnp.ones(())] * len(deltas), weights, election)


def match_l1(thinned: Array, delta: Array) -> Array:
    """Scales `thinned` to the L1 norm of `delta`, which it was made from.

    As mergekit does, nothing is scaled where either norm is below 1e-7.
    """
    before, after = totals([jnp.abs(delta), jnp.abs(thinned)])
    too_small = (before < 1e-7) | (after < 1e-7)
    return thinned * jnp.where(too_small, 1, safe_divide(before, after))
