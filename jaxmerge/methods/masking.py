"""Finding each task in the sum of all: TALL-masks, and the weights that they agree on.

Wang et al., "Localizing Task Information for Improved Model Merging and Compression",
ICML 2024, arXiv:2405.07813.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.leafwise import arrays_beside, check_trees, map_leaves, merge_leaves
from jaxmerge.methods.multitask import MultiTask, multi_task_vector
from jaxmerge.options import (
    Leaf,
    PerLeaf,
    PerModel,
    choice,
    number,
    per_leaf,
    per_model,
    whole_number,
    without_effect,
)
from jaxmerge.registry import register
from jaxmerge.tree import Params, leaf_paths, rebuild

GRID = (0.2, 0.3, 0.4, 0.5, 0.6)
"""The thresholds that the paper chooses from."""


def tall_masks(
    base: Params,
    models: Sequence[Params],
    *,
    threshold: PerModel = 0.4,
    multi_task: MultiTask = "task_arithmetic",
    scope: Literal["leaf", "model"] = "leaf",
    strict: bool = True,
    stack_axes: PerLeaf = 0,
) -> list[Params]:
    r"""Marks, for each of `models`, the merged weights that speak for its task.

    With $\tau_t = \theta_t - \theta_0$ and the multi-task vector $\tau_{MTL}$, the mask
    of a task is $m_t = [|\tau_t| > \lambda_t |\tau_{MTL} - \tau_t|]$, entry by entry.
    Then $\theta_0 + m_t \tau_{MTL}$, which `apply_mask` returns, is close to
    $\theta_t$; at $\lambda_t = 1$ as close as any mask brings it.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        threshold: $\lambda_t$, at least 0, dimensionless; larger ones give sparser
            masks. The paper chooses one per task on validation data, as
            `choose_thresholds` does. May be traced.
        multi_task: $\tau_{MTL}$: `"task_arithmetic"` adds up all $\tau_t$, unscaled;
            `"ties"` is TIES as the authors have it: the largest 20 % of each $\tau_t$,
            signs by mass, the sum of what agrees. Or a pytree of merged parameters
            $\theta_0 + \tau_{MTL}$, of any other method.
        scope: what TIES ranks entries within, each `"leaf"`, or the `"model"` as the
            authors do. A sum ranks nothing.
        strict: whether $|\tau_t|$ must exceed the right side, as in the authors' code,
            or may equal it, as in the paper. Where no model has moved from the base,
            both sides are zero: strict masks are False there, others True.
        stack_axes: how many leading axes of a leaf stack independent layers, which TIES
            trims alone; a number or rules.

    Returns:
        One pytree like `base` per model, of boolean arrays in the shapes and shardings
        of its leaves. Leaves that hold no floating-point numbers come out as empty
        arrays, as in `task_vector`. Masks of a part of the leaves are the same as of
        all, except with `scope="model"`. Equal models mask each other: at
        $\lambda(T-1) \geq 1$ the masks of $T$ of them are empty.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(3)}
        >>> a, b = {"w": jnp.array([4.0, 1, 0])}, {"w": jnp.array([-1.0, 1, 2])}
        >>> [mask["w"].tolist() for mask in tall_masks(base, [a, b])]
        [[True, True, False], [False, True, True]]
    """
    choice("tall_masks", "strict", strict, (False, True))
    vector = multi_task_vector(
        "tall_masks", base, models, multi_task, scope, stack_axes
    )

    def options(leaf: Leaf) -> dict:
        thresholds = per_model(leaf, "threshold", threshold, "[0, inf)")
        return {"thresholds": thresholds, "of_vector": vector.numbers(leaf)}

    masks = map_leaves(
        _masks,
        models,
        options,
        method="tall_masks",
        base=base,
        vector=vector.kernel,
        strict=strict,
    )
    none = [jnp.zeros((0,), bool)] * len(models)
    by_path = {path: masks.get(path, none) for path in leaf_paths(base)}
    return [
        rebuild(base, {path: of_tasks[i] for path, of_tasks in by_path.items()})
        for i in range(len(models))
    ]


def apply_mask(base: Params, merged: Params, mask: Params) -> Params:
    r"""The weights of `merged` where `mask` is True, those of `base` elsewhere.

    With a mask of `tall_masks`, this is the model of one task, $\theta_0 + m_t
    \tau_{MTL}$.

    Args:
        base: $\theta_0$, a pytree of arrays of any shape.
        merged: $\theta_0 + \tau_{MTL}$, a pytree with the structure and shapes of
            `base`.
        mask: a pytree of boolean arrays, as `tall_masks` returns.

    Returns:
        A pytree like `base`, in its dtypes and shardings. Leaves that hold no
        floating-point numbers are copied from there.

    Raises:
        ValueError: trees that are not alike, or a mask that is not boolean.

    Example:
        >>> base, model = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}
        >>> apply_mask(base, model, {"w": jnp.array([True, False])})["w"].tolist()
        [1.0, 0.0]
    """
    check_trees("apply_mask", {"base": base, "merged": merged})
    masks = arrays_beside("apply_mask", base, {"mask": mask}, bool)
    return merge_leaves(
        _select,
        [base, merged],
        lambda leaf: {"mask": masks[leaf.path][0]},
        method="apply_mask",
    )


class Thresholds(NamedTuple):
    """The best thresholds of tasks.

    Attributes:
        values: one per task, as `threshold` of `tall_masks` and `consensus` takes them.
        scores: of every task at every threshold of the grid, (tasks, grid), in float64.
    """

    values: list[float]
    scores: np.ndarray


def choose_thresholds(
    base: Params,
    models: Sequence[Params],
    score: Callable[[Params, int], Any],
    *,
    grid: Sequence[float] = GRID,
    multi_task: MultiTask = "task_arithmetic",
    scope: Literal["leaf", "model"] = "leaf",
    strict: bool = True,
    stack_axes: PerLeaf = 0,
) -> Thresholds:
    r"""Tries thresholds of TALL-masks and keeps the best one of each task.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        score: `score(params, task)` says how good `params`, which are $\theta_0 + m_t
            \tau_{MTL}$, are at the task of `models[task]`: the accuracy on its
            validation data, say. Higher is better.
        grid: the thresholds tried; of equally good ones, the first is kept.
        multi_task: as in `tall_masks`.
        scope: as in `tall_masks`.
        strict: as in `tall_masks`.
        stack_axes: as in `tall_masks`.

    Returns:
        The thresholds and all scores. Compiled once for all tasks and thresholds; it
        reads scores, so it does not run under `jax.jit`.

    Raises:
        ValueError: no models, trees that are not alike, an invalid option, or a score
            that is NaN.

    Example:
        >>> base = {"w": jnp.zeros(2)}
        >>> models = [{"w": jnp.array([4.0, 1])}, {"w": jnp.array([2.0, 4])}]
        >>> def score(params, task):
        ...     return -jnp.abs(params["w"] - models[task]["w"]).sum()
        >>> choose_thresholds(base, models, score).values
        [0.3, 0.5]
    """
    method = "choose_thresholds"
    choice(method, "strict", strict, (False, True))
    if not grid:
        raise ValueError(f"{method}: grid is empty; give at least one threshold.")
    for i, threshold in enumerate(grid):
        number(method, f"grid[{i}]", threshold, "[0, inf)")
    vector = multi_task_vector(method, base, models, multi_task, scope, stack_axes)
    merged = map_leaves(vector.kernel, models, vector.numbers, method=method, base=base)

    def rebuilt(model: Params, threshold: float) -> Params:
        return merge_leaves(
            _localised,
            [model],
            lambda leaf: {"threshold": threshold, "merged": merged[leaf.path]},
            method=method,
            base=base,
            strict=strict,
        )

    scores = np.zeros((len(models), len(grid)))
    for task, model in enumerate(models):
        for i, threshold in enumerate(grid):
            scores[task, i] = score(rebuilt(model, float(threshold)), task)
            if math.isnan(scores[task, i]):
                raise ValueError(
                    f"{method}: the score of task {task} at threshold {threshold:g} "
                    "is NaN; give a number for every model, -inf for useless ones."
                )
    return Thresholds([float(grid[i]) for i in scores.argmax(axis=1)], scores)


@register(
    paper="Wang et al., Localizing Task Information, ICML 2024",
    link="https://arxiv.org/abs/2405.07813",
    identity={"agreement": 1},
)
def consensus(
    base: Params,
    models: Sequence[Params],
    *,
    masks: Sequence[Params] | None = None,
    threshold: PerModel = 0.4,
    agreement: int = 2,
    scale: PerLeaf = 1.0,
    multi_task: MultiTask = "task_arithmetic",
    scope: Literal["leaf", "model"] = "leaf",
    strict: bool = True,
    stack_axes: PerLeaf = 0,
) -> Params:
    r"""Keeps those entries of a merge that the masks of several tasks have in common.

    With the TALL-masks $m_t$, $\theta = \theta_0 + \lambda\,[\sum_t m_t \geq k]\,
    \tau_{MTL}$. Entries in no mask are *catastrophic*, they serve no task; those in one
    mask are *selfish*; the paper removes both.

    Args:
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_t$, pytrees with the structure and shapes of `base`.
        masks: trees of masks that `tall_masks` or another method made; by default
            `tall_masks` with the options below.
        threshold: of `tall_masks`: one number, one per model, or rules. May be traced.
        agreement: $k$, how many masks must hold an entry for it to stay; 1 removes what
            is catastrophic, 2 also what is selfish. 0 keeps everything, more than there
            are masks nothing.
        scale: $\lambda$, dimensionless; chosen on validation data, up to 1 in the
            paper. May be traced.
        multi_task: $\tau_{MTL}$: `"task_arithmetic"` adds up all task vectors, `"ties"`
            trims to 20 %, elects signs by mass and adds up what agrees, both unscaled;
            or a pytree of merged parameters.
        scope: what TIES ranks entries within, each `"leaf"`, or the `"model"` as the
            authors do. A sum ranks nothing.
        strict: whether masks leave out entries at the threshold, as in `tall_masks`.
        stack_axes: how many leading axes of a leaf stack independent layers, which TIES
            trims alone; a number or rules.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.
        Tasks that share no entry have no consensus: they give the base.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(3)}
        >>> models = [{"w": jnp.array([4.0, 1, 0])}, {"w": jnp.array([-1.0, 1, 2])}]
        >>> consensus(base, models)["w"].tolist()
        [0.0, 2.0, 0.0]
    """
    choice("consensus", "strict", strict, (False, True))
    whole_number("consensus", "agreement", agreement, least=0)
    vector = multi_task_vector("consensus", base, models, multi_task, scope, stack_axes)
    given = None
    if masks is not None:
        without_effect("consensus", "threshold", threshold, 0.4, "masks=None")
        without_effect("consensus", "strict", strict, True, "masks=None")
        named = named_masks("consensus", masks)
        given = arrays_beside("consensus", base, named, bool)

    def options(leaf: Leaf) -> dict:
        numbers = {
            "of_vector": vector.numbers(leaf),
            "agreement": agreement,
            "scale": per_leaf(leaf, "scale", scale),
        }
        if given is not None:
            return numbers | {"masks": given[leaf.path]}
        thresholds = per_model(leaf, "threshold", threshold, "[0, inf)")
        return numbers | {"thresholds": thresholds}

    return merge_leaves(
        _consensus,
        models,
        options,
        method="consensus",
        base=base,
        vector=vector.kernel,
        strict=strict,
    )


def named_masks(method: str, masks: Sequence[Params]) -> dict[str, Params]:
    """A list of masks by what messages call them.

    Raises:
        ValueError: it is no list, or empty.
    """
    if not isinstance(masks, Sequence) or not masks:
        raise ValueError(f"{method}: masks must be a list of one tree or more.")
    return {f"masks[{i}]": mask for i, mask in enumerate(masks)}


def localise(delta: Array, merged: Array, threshold: Any, strict: bool) -> Array:
    """The TALL-mask of a task vector in a multi-task vector."""
    own, others = jnp.abs(delta), threshold * jnp.abs(merged - delta)
    return own > others if strict else own >= others


def _masks(
    deltas: Sequence[Array],
    *,
    thresholds: Sequence,
    of_vector: dict[str, Any],
    vector: Callable[..., Array],
    strict: bool,
) -> list[Array]:
    return _localise_all(deltas, vector(deltas, **of_vector), thresholds, strict)


def _consensus(
    deltas: Sequence[Array],
    *,
    of_vector: dict[str, Any],
    agreement: Array,
    scale: Array,
    vector: Callable[..., Array],
    strict: bool,
    thresholds: Sequence = (),
    masks: Sequence[Array] | None = None,
) -> Array:
    merged = vector(deltas, **of_vector)
    if masks is None:
        masks = _localise_all(deltas, merged, thresholds, strict)
    return scale * jnp.where(sum(masks) >= agreement, merged, 0)


def _localise_all(
    deltas: Sequence[Array], merged: Array, thresholds: Sequence, strict: bool
) -> list[Array]:
    pairs = zip(deltas, thresholds, strict=True)
    return [localise(delta, merged, threshold, strict) for delta, threshold in pairs]


def _localised(
    deltas: Sequence[Array], *, threshold: Array, merged: Array, strict: bool
) -> Array:
    return jnp.where(localise(deltas[0], merged, threshold, strict), merged, 0)


def _select(leaves: Sequence[Array], *, mask: Array) -> Array:
    base, merged = leaves
    return jnp.where(mask, merged, base)
