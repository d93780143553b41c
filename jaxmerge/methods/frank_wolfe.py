"""Merging as constrained optimisation: Frank-Wolfe steps from one model to another.

Chen et al., "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization", 2025,
arXiv:2503.12649.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge import sharding
from jaxmerge.leafwise import check_models, measure_leaves, merge_leaves, wide
from jaxmerge.numerics import norm, safe_divide
from jaxmerge.options import choice, number, whole_number
from jaxmerge.tree import Params, is_float, named_leaves, rebuild

Loss = Callable[[Params, Any], Array]
"""A differentiable function of parameters and a batch, with one number as its value."""

Alignment = Literal["inner", "cosine"]


class FWInfo(NamedTuple):
    r"""The course of `fw_merge`, step by step.

    Attributes:
        losses: before each step, (steps,), in float64.
        gaps: $\langle g, \theta - s \rangle$, (steps,), in float64. Where the loss is
            convex, no mixture of start and models is better by more.
        chosen: by leaf path, which model the leaf was moved to, (steps,): its number,
            that of all models for the start, or -1 if the leaf stayed where it was.
    """

    losses: np.ndarray
    gaps: np.ndarray
    chosen: dict[str, np.ndarray]


def fw_merge(
    start: Params,
    models: Sequence[Params],
    loss: Loss,
    batches: Sequence[Any],
    *,
    steps: int = 10,
    step_size: float = 0.1,
    scope: Literal["model", "leaf"] = "model",
    alignment: Alignment = "inner",
    info: bool = False,
) -> Any:
    r"""Moves `start` step by step to those of `models` that its gradient points to.

    With $g = \nabla L(\theta_k)$, the gradient of the mean loss over the batches, a
    step chooses from the pool of all models and the start the one with the smallest
    $\langle g, s \rangle$ and moves towards it: $\theta_{k+1} = \theta_k + \gamma_k (s
    - \theta_k)$, $\gamma_k = \frac{2}{k + 2}\,\eta$. Each leaf of the result is a
    convex combination of the pool. Models that do not help are not chosen.

    Args:
        start: $\theta_0$, where to begin, a pytree of arrays of any shape: the base, or
            better, a merge of the models by another method.
        models: pytrees with the structure and shapes of `start`.
        loss: `loss(params, batch)`, a number that JAX can differentiate: cross-entropy,
            or of batches without labels the entropy of what is predicted. It gets
            parameters in the dtypes of `start`. Batches of one shape are compiled once.
        batches: a list of what `loss` takes besides parameters. The authors take 100
            examples of each task.
        steps: how many steps; 10 in the authors' code.
        step_size: $\eta$, in (0, 1]; 1 is the rule that convergence is proved for,
            whose first step arrives at a model. The authors' code takes 0.1.
        scope: chooses one model for all of the `"model"`, or one for each `"leaf"`.
        alignment: what is smallest for the model that is chosen: the `"inner"` product
            of Frank-Wolfe, or the `"cosine"` of gradient and parameters (the authors'
            code), summed over leaves with `scope="model"`.
        info: whether to return how it went as well.

    Returns:
        A pytree like `start`, in its dtypes and shardings; steps are in float32. With
        `info` a pair of it and of a `FWInfo`. Where the gradient is zero, in the scope,
        nothing moves; leaves that hold no floating-point numbers never do. It reads
        losses, so it does not run under `jax.jit`.

    Raises:
        ValueError: no models or batches, trees that are not alike, an invalid option,
            a loss that is no number, or a loss or gradient that is not finite.

    Example:
        >>> def loss(params, target):
        ...     return jnp.sum((params["w"] - target) ** 2)
        >>> models = [{"w": jnp.array([4.0, 0])}, {"w": jnp.array([0.0, 4])}]
        >>> target = jnp.array([4.0, 0])
        >>> merged, course = fw_merge(
        ...     {"w": jnp.zeros(2)}, models, loss, [target], step_size=1.0, info=True
        ... )
        >>> merged["w"].tolist(), course.chosen["w"].tolist()[:2]
        ([4.0, 0.0], [0, -1])
    """
    method = "fw_merge"
    check_models(method, start, models)
    choice(method, "scope", scope, ("model", "leaf"))
    choice(method, "alignment", alignment, get_args(Alignment))
    choice(method, "info", info, (False, True))
    whole_number(method, "steps", steps, least=0)
    step_size = number(method, "step_size", step_size, "(0, 1]", static=True)
    if not isinstance(batches, Sequence) or not batches:
        raise ValueError(f"{method}: batches must be a list of at least one batch.")

    pool = [_floats(start, tree) for tree in (*models, start)]
    point = {path: leaf.astype(wide(leaf.dtype)) for path, leaf in pool[-1].items()}
    losses, gaps, chosen = [], [], []
    for step in range(steps):
        value, slope = _mean_slope(loss, point, start, batches, step)
        found = _align(slope, point, pool, alignment, step)
        chosen.append(_choose(found, scope))
        target = {
            path: point[path] if model < 0 else pool[model][path]
            for path, model in chosen[-1].items()
        }
        point = _move(point, target, 2 / (step + 2) * step_size)
        losses.append(value)
        gaps.append(-sum(found[p].inner[m] for p, m in chosen[-1].items() if m >= 0))
    merged = rebuild(start, {**named_leaves(start), **_rounded(point, pool[-1])})
    if not info:
        return merged
    by_leaf = {path: np.array([c[path] for c in chosen], int) for path in point}
    return merged, FWInfo(np.array(losses), np.array(gaps, float), by_leaf)


class _Aligned(NamedTuple):
    """How a leaf of each model in the pool lies to the gradient, (pool,).

    Attributes:
        inner: the product with what leads from here to the model.
        score: what is smallest for the model that is chosen.
    """

    inner: np.ndarray
    score: np.ndarray


def _floats(start: Params, tree: Params) -> dict[str, Array]:
    """The floating-point leaves of a tree by path, on the devices of those of start."""
    likes = named_leaves(start)
    return {
        path: jnp.asarray(sharding.join(leaf, likes[path]))
        for path, leaf in named_leaves(tree).items()
        if is_float(likes[path])
    }


def _mean_slope(
    loss: Loss,
    point: Mapping[str, Array],
    start: Params,
    batches: Sequence[Any],
    step: int,
) -> tuple[float, dict[str, Array]]:
    """The mean loss over all batches, and its gradient."""
    total, slope = 0.0, None
    for i, batch in enumerate(batches):
        value, slope = _add_slope(slope, point, start, batch, loss=loss)
        total += float(value)
        if not np.isfinite(total):
            raise ValueError(
                f"fw_merge: the loss on batches[{i}] is {float(value)} at step {step}; "
                "check the batch and the models, or take a smaller step_size."
            )
    share = 1 / len(batches)
    assert slope is not None
    return share * total, jax.tree.map(lambda x: share * x, slope)


@functools.partial(jax.jit, static_argnames="loss")
def _add_slope(
    slope: Any, point: Mapping[str, Array], start: Params, batch: Any, *, loss: Loss
) -> tuple[Array, Any]:
    """The loss of one batch, and its gradient added to that of others."""
    leaves = named_leaves(start)

    def at(point: Mapping[str, Array]) -> Array:
        value = loss(rebuild(start, {**leaves, **_rounded(point, leaves)}), batch)
        if jnp.shape(value) != ():
            raise ValueError(
                f"fw_merge: loss returns an array of shape {jnp.shape(value)}; let it "
                "return one number, such as the mean over the batch."
            )
        return value

    value, own = jax.value_and_grad(at)(point)
    return value, own if slope is None else jax.tree.map(jnp.add, slope, own)


def _rounded(
    point: Mapping[str, Array], likes: Mapping[str, Array]
) -> dict[str, Array]:
    return {path: leaf.astype(likes[path].dtype) for path, leaf in point.items()}


def _align(
    slope: Mapping[str, Array],
    point: Mapping[str, Array],
    pool: Sequence[Mapping[str, Array]],
    alignment: Alignment,
    step: int,
) -> dict[str, _Aligned]:
    found = measure_leaves(
        _alignments,
        [slope, point, *pool],
        lambda leaf: {},
        method="fw_merge",
        alignment=alignment,
    )
    read = {p: _Aligned(*np.asarray(both, float)) for p, both in found.items()}
    for path, aligned in read.items():
        if not np.isfinite(aligned).all():
            raise ValueError(
                f"fw_merge: leaf {path!r} has a gradient at step {step}, or a model, "
                "that is not finite; check the loss where it is not smooth."
            )
    return read


def _alignments(leaves: Sequence[Array], *, alignment: Alignment) -> Array:
    slope, point, *pool = leaves
    # Models differ little from each other: products with their differences tell more.
    inner = jnp.stack([jnp.sum(slope * (model - point)) for model in pool])
    if alignment == "inner":
        return jnp.stack([inner, inner])
    lengths = jnp.stack([norm(slope) * norm(model) for model in pool])
    products = jnp.stack([jnp.sum(slope * model) for model in pool])
    return jnp.stack([inner, safe_divide(products, lengths)])


def _choose(found: Mapping[str, _Aligned], scope: str) -> dict[str, int]:
    """Which model of the pool each leaf moves to; -1 where no model is any better."""
    scores = {path: aligned.score for path, aligned in found.items()}
    if scope == "model":
        scores = dict.fromkeys(scores, sum(scores.values(), np.zeros(())))
    return {
        path: int(score.argmin()) if np.any(score != 0) else -1
        for path, score in scores.items()
    }


def _move(
    point: Mapping[str, Array], target: Mapping[str, Array], share: float
) -> dict[str, Array]:
    return merge_leaves(
        _towards,
        [point, target],
        lambda leaf: {"share": share},
        method="fw_merge",
    )


def _towards(leaves: Sequence[Array], *, share: Array) -> Array:
    point, target = leaves
    # So that a full step arrives exactly, and one to where it is does not even round.
    return target - (1 - share) * (target - point)
