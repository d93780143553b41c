"""EMR-Merging: one elected task vector, and a mask and a scale for every task.

Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging", NeurIPS 2024,
arXiv:2405.17461.
"""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.leafwise import arrays_beside, map_leaves, measure_leaves, merge_leaves
from jaxmerge.methods.election import Election, merge_elected
from jaxmerge.numerics import safe_divide
from jaxmerge.options import Leaf, choice
from jaxmerge.tree import Params, leaf_paths, named_leaves, rebuild

Rescale = Literal["sums", "means"]


class EMR(NamedTuple):
    """The models of several tasks, in little more than the space of one.

    Leaves of `vector` and `masks` are empty where the base holds no floating-point
    numbers.

    Attributes:
        vector: the unified task vector, a pytree like the base, in float32 or wider.
        masks: one pytree of boolean arrays per task, in the shapes of the base.
        scales: one number per task, shape (tasks,).
    """

    vector: Params
    masks: list[Params]
    scales: Array

    def params(self, base: Params, task: int) -> Params:
        r"""The model of one task: $\theta_0 + \lambda_t M_t \odot \tau_{uni}$.

        Args:
            base: $\theta_0$, which the vector is measured from.
            task: the number of the task, from 0.

        Returns:
            A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.

        Raises:
            ValueError: there is no such task, or `base` is another tree.
        """
        if not 0 <= task < len(self.masks):
            raise ValueError(
                f"EMR.params: task is {task}; there are {len(self.masks)}, from 0 on."
            )
        name = "EMR.params"
        vectors = arrays_beside(name, base, {"vector": self.vector}, jnp.float32)
        masks = arrays_beside(name, base, {f"masks[{task}]": self.masks[task]}, bool)

        def options(leaf: Leaf) -> dict:
            (vector,), (mask,) = vectors[leaf.path], masks[leaf.path]
            return {"vector": vector, "mask": mask, "scale": self.scales[task]}

        return merge_leaves(_modulated, [base], options, method=name)


def emr(base: Params, models: Sequence[Params], *, rescale: Rescale = "sums") -> EMR:
    r"""Elects one task vector for all models, and keeps a mask and a scale of each.

    With $\tau_t = \theta_t - \theta_0$, an entry of the unified vector $\tau_{uni}$ has
    the sign of $\sum_t \tau_t$ and the largest magnitude of the $\tau_t$ that have this
    sign. The mask of a task is $M_t = [\tau_t \odot \tau_{uni} > 0]$ and its scale
    $\lambda_t = \sum |\tau_t| / \sum |M_t \odot \tau_{uni}|$ over all entries.
    `EMR.params` rebuilds the model of a task, with the L1 norm of its task
    vector. Needs no data.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        rescale: both sums of $\lambda_t$: `"sums"` over all entries of the model (the
            paper), or `"means"`, over leaves of the mean over entries (the authors'
            main script), in which small leaves weigh as much as large ones.

    Returns:
        Unified vector, masks and scales, in the shardings of `base`. Vector and masks
        of a part of the leaves are the same as of all. Where task vectors cancel
        exactly the sign is negative, as in the authors' code; the paper leaves it open.
        An empty mask, for which the formula divides by zero, has scale 1.

    Raises:
        ValueError: no models, trees that are not alike, no floating-point leaves, or an
            invalid option.

    Example:
        >>> base = {"w": jnp.zeros(3)}
        >>> models = [{"w": jnp.array([4.0, 1, 0])}, {"w": jnp.array([-1.0, 2, 2])}]
        >>> merged = emr(base, models)
        >>> merged.vector["w"].tolist(), merged.scales.round(2).tolist()
        ([4.0, 2.0, 2.0], [0.8299999833106995, 1.25])
        >>> merged.params(base, 1)["w"].tolist()
        [0.0, 2.5, 2.5]
    """
    choice("emr", "rescale", rescale, ("sums", "means"))
    norms = l1_norms(base, models)
    if not norms:
        raise ValueError("emr: base has no floating-point leaves.")
    parts = map_leaves(_elect, models, _no_options, method="emr", base=base)
    none = (jnp.zeros(0), [jnp.zeros(0, bool)] * len(models))
    by_path = {path: parts.get(path, none) for path in leaf_paths(base)}
    return EMR(
        rebuild(base, {path: vector for path, (vector, _) in by_path.items()}),
        [
            rebuild(base, {path: masks[i] for path, (_, masks) in by_path.items()})
            for i in range(len(models))
        ],
        scales_of(list(norms.values()), rescale),
    )


class L1(NamedTuple):
    """L1 norms within one leaf, or sums of several, which scales are made of.

    Attributes:
        deltas: of the task vectors, shape (tasks,).
        kept: of the unified vector within the mask of each task, shape (tasks,).
        entries: how many entries the leaf has.
    """

    deltas: Array
    kept: Array
    entries: int


def l1_norms(base: Params, models: Sequence[Params]) -> dict[str, L1]:
    """The norms that `scales_of` needs, by path of the floating-point leaves."""
    sizes = {path: np.size(leaf) for path, leaf in named_leaves(base).items()}
    norms = measure_leaves(_norms, models, _no_options, method="emr", base=base)
    return {
        path: L1(deltas, kept, sizes[path]) for path, (deltas, kept) in norms.items()
    }


def scales_of(norms: Collection[L1], rescale: Rescale = "sums") -> Array:
    """The scale of each task, (tasks,), from the norms within all leaves of a model."""
    weights = [1 / max(n.entries, 1) if rescale == "means" else 1 for n in norms]
    weighted = list(zip(weights, norms, strict=True))
    deltas = sum(w * n.deltas for w, n in weighted)
    kept = sum(w * n.kept for w, n in weighted)
    return safe_divide(deltas, kept, 1.0)  # type: ignore[arg-type]


_LARGEST_OF_SIGN = Election(vote="mass", tie="negative", aggregate="max")


def _no_options(leaf: Leaf) -> dict:
    return {}


def unify(deltas: Sequence[Array]) -> Array:
    """The unified vector of the task vectors of one leaf."""
    weights = [jnp.ones(())] * len(deltas)
    return merge_elected(deltas, weights, _LARGEST_OF_SIGN)


def agreeing(delta: Array, vector: Array) -> Array:
    """The mask of a task vector in the unified one."""
    # The product of two small numbers may round to zero; that of signs does not.
    return jnp.sign(delta) * jnp.sign(vector) > 0


def _elect(deltas: Sequence[Array]) -> tuple[Array, list[Array]]:
    vector = unify(deltas)
    return vector, [agreeing(delta, vector) for delta in deltas]


def _norms(deltas: Sequence[Array]) -> tuple[Array, Array]:
    vector, masks = _elect(deltas)
    kept = [jnp.sum(jnp.where(mask, jnp.abs(vector), 0)) for mask in masks]
    return jnp.stack([jnp.sum(jnp.abs(d)) for d in deltas]), jnp.stack(kept)


def _modulated(
    leaves: Sequence[Array], *, vector: Array, mask: Array, scale: Array
) -> Array:
    return leaves[0] + scale * jnp.where(mask, vector, 0)
