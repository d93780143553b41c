"""Merges in which entries compete for weight by a score: PCB-Merging and SCE.

Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024,
arXiv:2410.02396.
Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv:2408.07990.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge.leafwise import check_models, map_leaves, merge_leaves, task_vector
from jaxmerge.methods.election import Election, merge_elected, weighted_sum
from jaxmerge.numerics import (
    Count,
    count,
    kth_largest,
    kth_magnitude,
    norms,
    safe_divide,
)
from jaxmerge.options import (
    Leaf,
    PerLeaf,
    Static,
    choice,
    number,
    per_leaf,
    without_effect,
)
from jaxmerge.registry import register
from jaxmerge.tree import Params


@register(
    paper="Du et al., Parameter Competition Balancing, NeurIPS 2024",
    link="https://arxiv.org/abs/2410.02396",
    identity=None,
    two_phases=False,
)
def pcb(
    base: Params,
    models: Sequence[Params],
    *,
    density: PerLeaf = 0.1,
    scale: PerLeaf = 1.0,
    scope: Literal["model", "leaf"] = "model",
    agreement: Literal["raw", "normalized"] = "raw",
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Weighs entries by magnitude and by agreement with the other task vectors.

    With $\hat\tau_t$ the task vector $\tau_t = \theta_t - \theta_0$, its outermost
    magnitudes cut off, and $\nu_t$ in [0, 1] the place of $|\hat\tau_t|$ between its
    smallest and largest, entries score $\exp(T \nu_t^2) \tanh(\tau_t \sum_u \tau_u)$.
    Their weight $\beta_t$ rises with the score, from 0 at the last of the `density`
    best to 1 at the best. The result is $\theta_0 + \lambda \sum_t \beta_t \hat\tau_t /
    \sum_t \beta_t$, entry by entry. That is the authors' code; the softmax formulas of
    the paper give other numbers.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        density: the share of entries of each task vector that count, in (0, 1]; the
            authors take 0.05 to 0.2. It sets a count and cannot be traced.
        scale: $\lambda$, dimensionless; the authors choose 0.8 to 2.2, 1.2 for vision.
            May be traced.
        scope: ranks the entries of the whole `"model"` (as the authors do), with one
            density for all leaves, or those of each `"leaf"`.
        agreement: `"raw"` as above, with 0.01 % of the magnitudes cut off at either end
            (the authors' tuned script); `"normalized"` agrees with the signs of
            $\tau_u$ times the places of their magnitudes, and cuts off 1 % (their
            untuned one).
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer is ranked alone, so it needs `scope="leaf"`.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.
        Even a single model does not come back as it is: its largest entry at least is
        cut off. Where the best scores of a task vector are all equal, positive ones
        weigh 1.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(5)}
        >>> a, b = jnp.array([3.0, 2, 1, 0, 1]), jnp.array([3.0, -1, 1, 0, 1])
        >>> print(pcb(base, [{"w": a}, {"w": b}], density=0.8)["w"])
        [1.5 2.  1.  0.  1. ]
    """
    choice("pcb", "scope", scope, ("model", "leaf"))
    choice("pcb", "agreement", agreement, tuple(_CUT_OFF))
    check_models("pcb", base, models)
    measured = None
    if scope == "model":
        without_effect("pcb", "stack_axes", stack_axes, 0, "scope='leaf'")
        share = number("pcb", "density", density, "(0, 1]", static=True)
        measured = _measure(base, models, share, agreement)

    def options(leaf: Leaf) -> dict[str, Any]:
        scaled = {"scale": per_leaf(leaf, "scale", scale)}
        if measured is not None:
            return scaled | measured(leaf)
        share = per_leaf(leaf, "density", density, "(0, 1]", static=True)
        ranks = _ranks(leaf.size, share, agreement)
        return scaled | {"ranks": ranks, "agreement": Static(agreement)}

    return merge_leaves(
        _balance if scope == "model" else _balance_alone,
        models,
        options,
        method="pcb",
        base=base,
        stack_axes=stack_axes,
    )


_CUT_OFF = {"raw": 1e-4, "normalized": 1e-2}
"""The share of magnitudes cut off at either end."""


class _Ranks(NamedTuple):
    """Ranks of entries, from 1 for the largest one.

    Attributes:
        smallest: of the smallest magnitude that is not cut off.
        largest: of the largest one.
        kept: of the largest score that counts as zero.
    """

    smallest: Count
    largest: Count
    kept: Count


def _ranks(size: int, density: float, agreement: str) -> _Ranks:
    cut = _CUT_OFF[agreement]
    # As indices, in rising order, of the authors: they round in their own way.
    indices = int(size * cut), int(size * (1 - cut) - 1), int(size * (1 - density))
    return _Ranks(*(Count.of(max(1, size - index)) for index in indices))


def _measure(
    base: Params, models: Sequence[Params], density: float, agreement: str
) -> Callable[[Leaf], dict[str, Any]]:
    """What `_balance` takes for a leaf, ranked in the whole model."""
    deltas = [task_vector(base, model) for model in models]
    size = sum(leaf.size for leaf in jax.tree.leaves(deltas[0]))
    ranks = _ranks(size, density, agreement)
    spans = [_model_span(delta, ranks) for delta in deltas]
    scores = map_leaves(
        _scores,
        models,
        lambda leaf: {"spans": spans, "agreement": Static(agreement)},
        method="pcb",
        base=base,
    )
    by_task = zip(*scores.values(), strict=True)
    contests = [_model_contest(list(task), ranks.kept) for task in by_task]
    return lambda leaf: {
        "spans": spans,
        "scores": scores[leaf.path],
        "contests": contests,
    }


def _balance_alone(
    deltas: Sequence[Array], *, ranks: _Ranks, agreement: Static, scale: Array
) -> Array:
    spans = [_span(delta, ranks) for delta in deltas]
    scores = _scores(deltas, spans=spans, agreement=agreement)
    contests = [_contest(score, ranks.kept) for score in scores]
    return _balance(deltas, spans=spans, scores=scores, contests=contests, scale=scale)


def _balance(
    deltas: Sequence[Array],
    *,
    spans: Sequence[tuple[Array, Array]],
    scores: Sequence[Array],
    contests: Sequence[tuple[Array, Array]],
    scale: Array,
) -> Array:
    shares = [_share(*pair) for pair in zip(scores, contests, strict=True)]
    clipped = [
        jnp.sign(delta) * jnp.clip(jnp.abs(delta), *span)
        for delta, span in zip(deltas, spans, strict=True)
    ]
    total: Array = sum(shares)  # type: ignore
    return scale * weighted_sum(clipped, shares) / jnp.maximum(total, 1e-12)


def _span(tree: Any, ranks: _Ranks) -> tuple[Array, Array]:
    return kth_magnitude(tree, ranks.smallest), kth_magnitude(tree, ranks.largest)


def _scores(
    deltas: Sequence[Array], *, spans: Sequence[tuple[Array, Array]], agreement: Static
) -> list[Array]:
    sizes = [
        safe_divide(jnp.clip(jnp.abs(delta), low, high) - low, high - low)
        for delta, (low, high) in zip(deltas, spans, strict=True)
    ]
    voices = deltas
    if agreement.value == "normalized":
        voices = [jnp.sign(d) * size for d, size in zip(deltas, sizes, strict=True)]
    total: Array = sum(voices)  # type: ignore
    # Only ratios of scores matter, and exp(T) overflows for 89 models.
    return [
        jnp.exp(len(deltas) * (size**2 - 1)) * jnp.tanh(delta * total)
        for delta, size in zip(deltas, sizes, strict=True)
    ]


def _contest(tree: Any, kept: Count) -> tuple[Array, Array]:
    leaves = jax.tree.leaves(tree)
    largest = jnp.stack([jnp.max(leaf, initial=-jnp.inf) for leaf in leaves])
    return kth_largest(tree, kept), jnp.max(largest)


def _share(score: Array, contest: tuple[Array, Array]) -> Array:
    low, high = contest
    alone = (score >= high) & (score > 0)
    return safe_divide(jnp.clip(score, low, high) - low, high - low, alone)


_model_span = jax.jit(_span)
_model_contest = jax.jit(_contest)


@register(
    paper="Wan et al., FuseChat, 2024",
    link="https://arxiv.org/abs/2408.07990",
)
def sce(
    base: Params,
    models: Sequence[Params],
    *,
    density: PerLeaf = 0.1,
    mask_values: bool = False,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Weighs models by their energy in the entries in which they differ most.

    Select: of the entries of a leaf that differ between task vectors, the `density`
    ones with the largest variance. Calculate: each task vector weighs $\eta_t$, its
    mean square over these. Erase: entries against the sign of $\sum_t \tau_t$ (positive
    where that is zero) are left out. The result is $\theta_0 + \sum_t \eta_t \tau_t /
    \sum_t \eta_t$ over what remains.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        density: the share of entries selected, in (0, 1], rounded down to a number of
            at least one; 1 selects all, also those that do not differ. The authors
            take 0.1, mergekit 1. May be traced.
        mask_values: whether entries that are not selected stay at the base (mergekit),
            or selection matters for the weights alone (the authors).
        stack_axes: how many leading axes of a leaf stack independent layers; a number
            or rules. Each layer has its own weights.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.
        Models weigh the same only in leaves where nothing is selected, because all are
        equal. (In mergekit, also wherever mean squares add up to less than $10^{-6}$,
        as those of small updates do.)

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(3)}
        >>> models = [{"w": jnp.array([1.0, 3, 2])}, {"w": jnp.array([-2.0, 1, 2])}]
        >>> print(sce(base, models, density=0.5)["w"])
        [-2.   1.4  2. ]
    """
    choice("sce", "mask_values", mask_values, (False, True))

    def options(leaf: Leaf) -> dict:
        return {"density": per_leaf(leaf, "density", density, "(0, 1]")}

    return merge_leaves(
        _fuse,
        models,
        options,
        method="sce",
        base=base,
        stack_axes=stack_axes,
        mask_values=mask_values,
    )


def _fuse(deltas: Sequence[Array], *, density: Array, mask_values: bool) -> Array:
    selected = _most_varying(deltas, density)
    masked = [jnp.where(selected, delta, 0) for delta in deltas]
    lengths = norms(masked)
    # Squares of small numbers are zero, those of their ratios are not.
    weights = jnp.square(safe_divide(lengths, jnp.max(lengths), 1.0))
    election = Election(vote="mass", tie="positive")
    return merge_elected(masked if mask_values else deltas, list(weights), election)


def _most_varying(deltas: Sequence[Array], density: Array) -> Array:
    # From the first on, so that equal entries have no variance, not even by rounding.
    moved = [delta - deltas[0] for delta in deltas]
    mean: Array = sum(moved) / len(moved)  # type: ignore
    variance: Array = sum(jnp.square(x - mean) for x in moved) / len(moved)  # type: ignore
    keep = count(variance > 0).share(density, least=1)
    largest = (variance >= kth_magnitude(variance, keep)) & (variance > 0)
    return largest | (density >= 1)
