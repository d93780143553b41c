"""How the masks of several tasks overlap: which weights serve one task, many or none.

Wang et al., "Localizing Task Information for Improved Model Merging and Compression",
ICML 2024, arXiv:2405.07813.
"""

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge import sharding
from jaxmerge.analysis import layer_of
from jaxmerge.leafwise import arrays_beside, check_models, wide
from jaxmerge.methods.masking import named_masks
from jaxmerge.numerics import LOW_BITS, Count, count
from jaxmerge.options import Leaf, PerModel, per_model
from jaxmerge.tree import Params, is_float, named_leaves


class MaskStatistics(NamedTuple):
    """Measures of the masks of some leaves; shares of the entries that are counted.

    Attributes:
        entries: how many entries are counted.
        densities: the share that each mask holds, shape (tasks,).
        predicted: what `densities` would be if task vectors were Gaussian noise, shape
            (tasks,); NaN without a threshold.
        agreement: the share that exactly 0, 1, ... of the masks hold, shape
            (tasks + 1,).
        jaccard: of each two masks, the entries that both hold divided by those that
            either does, shape (tasks, tasks); 0 where both are empty.
    """

    entries: int
    densities: np.ndarray
    predicted: np.ndarray
    agreement: np.ndarray
    jaccard: np.ndarray

    @property
    def catastrophic(self) -> float:
        """The share that no mask holds: entries that serve no task."""
        return float(self.agreement[0])

    @property
    def selfish(self) -> float:
        """The share that a single mask holds."""
        return float(self.agreement[1])

    @property
    def universal(self) -> float:
        """The share that all masks hold."""
        return float(self.agreement[-1])


class Overlap(NamedTuple):
    """The masks of several tasks, in whole and in parts.

    Attributes:
        total: of all leaves.
        layers: by layer, see `jaxmerge.analysis.layer_of`.
        leaves: by leaf path, without those that are empty.
    """

    total: MaskStatistics
    layers: dict[str, MaskStatistics]
    leaves: dict[str, MaskStatistics]


def mask_statistics(
    masks: Sequence[Params],
    *,
    base: Params | None = None,
    models: Sequence[Params] | None = None,
    threshold: PerModel | None = None,
) -> Overlap:
    r"""Measures how the masks of several tasks overlap.

    Weights that no model has moved, such as those of frozen layers, are in no mask of
    `tall_masks`, and would pass for catastrophic ones. Masks alone cannot tell; give
    `base` and `models` to leave these weights out.

    Args:
        masks: one pytree of boolean arrays per task, as `tall_masks` and `emr` make
            them, on any sharding.
        base: where the models started. With it, only entries are counted in which some
            model differs from it; else all are.
        models: the models, or a merge of them: trees like `base`.
        threshold: $\lambda$ of `tall_masks`, to predict densities by: one number, one
            per task, or rules. If task vectors were independent Gaussian noise of equal
            variance, masks from a sum of $T$ of them would hold the share
            $\frac{2}{\pi} \arctan(1 / (\lambda \sqrt{T - 1}))$.

    Returns:
        Statistics of the whole, of each layer and of each leaf, from exact counts.

    Raises:
        ValueError: no masks, trees that are not alike, masks that are not boolean, or
            only one of `base` and `models`.

    Example:
        >>> masks = [{"w": np.array([True, True, False, False])}]
        >>> masks += [{"w": np.array([True, False, True, False])}]
        >>> total = mask_statistics(masks).total
        >>> total.catastrophic, total.selfish, total.universal
        (0.25, 0.5, 0.25)
        >>> total.jaccard[0, 1].round(2).item()
        0.33
    """
    method = "mask_statistics"
    named = named_masks(method, masks)
    if (base is None) != (models is None):
        raise ValueError(f"{method}: base and models belong together; give both.")
    if base is None or models is None:
        # Stand-ins for leaves, all of them of the kind that has masks.
        of_mask = lambda m: jax.ShapeDtypeStruct(np.shape(m), jnp.float32)  # noqa: E731
        base, models = jax.tree.map(of_mask, masks[0]), []
    else:
        check_models(method, base, models)
    of_leaves = arrays_beside(method, base, named, bool)
    by_model = [named_leaves(model) for model in models]
    leaves, layers = {}, {}
    for path, like in named_leaves(base).items():
        if not is_float(like) or not np.size(like):
            continue
        others = [sharding.join(model[path], like) for model in by_model]
        counts = _count(of_leaves[path], like if others else None, others)
        leaf = Leaf(method, path, np.shape(like), len(masks))
        leaves[path] = _on_host(counts, leaf, threshold)
        layers.setdefault(layer_of(path), []).append(leaves[path])
    if not leaves:
        raise ValueError(f"{method}: the masks have no entries.")
    return Overlap(
        _statistics(leaves.values()),
        {layer: _statistics(parts) for layer, parts in layers.items()},
        {path: _statistics([sums]) for path, sums in leaves.items()},
    )


def gaussian_density(threshold: float | np.ndarray, tasks: int) -> np.ndarray:
    """The density of TALL-masks in a sum of `tasks` Gaussian task vectors.

    Example:
        >>> gaussian_density(0.4, 8).round(3).item()
        0.482
    """
    return 2 / np.pi * np.arctan2(1, np.float64(threshold) * np.sqrt(tasks - 1))


class _Sums(NamedTuple):
    """Numbers of entries; those of several leaves add up."""

    entries: int
    predicted: np.ndarray
    agreement: np.ndarray
    shared: np.ndarray


@jax.jit
def _count(
    masks: list[Array], base: Array | None, models: list[Array]
) -> tuple[Count, Count, Count]:
    """Counts entries: all, those that 0, 1, ... masks hold, those that each two do."""

    def measure(masks, base, models):
        counted = jnp.ones(masks[0].shape, bool)
        if models:
            start = base.astype(wide(base.dtype))
            moved = [model.astype(start.dtype) != start for model in models]
            counted = functools.reduce(jnp.logical_or, moved)
        held = jnp.stack(masks) & counted[None]
        times = jnp.sum(held, axis=0, dtype=jnp.int32)

        def exactly(k: Array) -> Count:
            return count((times == k) & counted)

        def shared(mask: Array) -> Count:
            return jax.vmap(count)(held & mask[None])

        numbers = jnp.arange(len(masks) + 1, dtype=jnp.int32)
        # One pass after the other, as a pass makes arrays of the size of all masks.
        agreement = jax.lax.map(exactly, numbers)
        return count(counted), agreement, jax.lax.map(shared, held)

    return sharding.auto(measure, like=jnp.zeros(()))(masks, base, models)


def _on_host(
    counts: tuple[Count, Count, Count], leaf: Leaf, threshold: PerModel | None
) -> _Sums:
    entries, agreement, shared = (
        (np.asarray(c.high, np.int64) << LOW_BITS) + np.asarray(c.low, np.int64)
        for c in counts
    )
    predicted = np.full(leaf.models, np.nan)
    if threshold is not None:
        thresholds = per_model(leaf, "threshold", threshold, "[0, inf)", static=True)
        predicted = gaussian_density(np.array(thresholds), leaf.models)
    return _Sums(int(entries), predicted * int(entries), agreement, shared)


def _statistics(parts: Collection[_Sums]) -> MaskStatistics:
    entries, *sums = (sum(n, np.zeros(())) for n in zip(*parts, strict=True))
    predicted, agreement, shared = (n / max(entries, 1) for n in sums)
    densities = np.diag(shared)
    either = densities[:, None] + densities[None, :] - shared
    jaccard = np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)
    return MaskStatistics(int(entries), densities, predicted, agreement, jaccard)
