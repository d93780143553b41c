"""How far the outputs of a model's parts are from being linear in their parameters.

Dai et al., "Leveraging Submodule Linearity Enhances Task Arithmetic Performance in
LLMs", ICLR 2025, arXiv:2504.10902.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge import sharding
from jaxmerge.leafwise import check_models, wide
from jaxmerge.numerics import safe_divide
from jaxmerge.options import whole_number
from jaxmerge.submodules.calls import Call, find_submodules, visit_calls
from jaxmerge.tree import Params, named_leaves, rebuild


def nonlinearity(
    apply: Callable[[Params, Any], Any],
    base: Params,
    model: Params,
    samples: Any,
    *,
    submodules: str | Sequence[str],
    points: int = 11,
) -> dict[str, np.ndarray]:
    r"""Scores how nonlinear submodules, and the whole model, are on the way to a model.

    $\int_0^1 \int_0^1 \left( \frac{d(a, b)}{d(1, 0)} - |a - b| \right)^2 da\, db$, with
    $d(a, b)$ the Euclidean distance of the outputs $f(x; \theta_0 + a \tau)$ and $f(x;
    \theta_0 + b \tau)$: 0 where outputs move in a straight line and at one speed, as
    those of a linear function do. The mean over examples, which number the first axis
    of outputs; those that the task vector $\tau$ does not move are left out, and a
    submodule that it moves on none has the score 0. A submodule gets its inputs from
    the base model.

    Args:
        apply: `apply(params, batch)` runs the model; as in `submodule_coefficients`.
        base: $\theta_0$, a pytree of arrays of any shape. In bfloat16 the models
            between `base` and `model` are rounded, which counts as nonlinear.
        model: $\theta_0 + \tau$, a pytree like `base`.
        samples: examples: a batch, or a list of batches.
        submodules: regular expressions, as in `submodule_coefficients`.
        points: how many values of a and b there are on [0, 1], for the trapezoidal
            rule; at least 2. One forward pass each.

    Returns:
        The scores, in float64, by submodule path, and that of the whole model under
        "". Arrays without axes, or with one for the layers of a scan.

    Raises:
        ValueError: trees that are not alike, a pattern that no path matches, or
            submodules that share leaves.

    Example:
        >>> apply = lambda params, x: jnp.exp(x @ params["kernel"])
        >>> base, model = ({"kernel": jnp.full((2, 1), end)} for end in (0.0, 1.0))
        >>> scores = nonlinearity(apply, base, model, jnp.ones((5, 2)), submodules=[])
        >>> print(scores[""].round(3))
        0.011
    """
    method = "nonlinearity"
    check_models(method, base, [model])
    whole_number(method, "points", points, least=2)
    batches = samples if isinstance(samples, list) else [samples]
    if not batches:
        raise ValueError(f"{method}: samples is a list without batches.")
    found = find_submodules(method, apply, base, batches[0], submodules)
    model = jax.tree.map(sharding.join, rebuild(base, named_leaves(model)), base)

    @jax.jit
    def measure(base: Params, model: Params, batch: Any) -> dict[str, Array]:
        def visit_whole(call: Call) -> tuple[list[Array], Array]:
            return _score(call, points)

        def visit(call: Call) -> tuple[list[Array], Array] | None:
            return _score(call, points) if call.path in found else None

        sums = visit_calls(apply, base, [model], batch, visit_whole)
        sums |= visit_calls(apply, base, [model], batch, visit)
        return {path: score for (path, _), score in sums.items()}

    measured = [measure(base, model, batch) for batch in batches]
    scores = {}
    for path in ["", *found]:
        sums = np.sum([np.asarray(m[path], np.float64) for m in measured], axis=0)
        scores[path] = sums[..., 0] / np.maximum(sums[..., 1], 1)
    return scores


def _score(call: Call, points: int) -> tuple[list[Array], Array]:
    """The results of a call, and the sum of the scores of examples and their number."""
    results = call.run(call.base)
    grid = jnp.linspace(0, 1, points)

    def outputs(share: Array) -> list[Array]:
        return call.features(call.run(_between(share, call.base, call.models[0])))

    paths = jax.lax.map(outputs, grid)
    return results, sharding.auto(_sum_scores, like=jnp.zeros(2))(paths, grid)


def _between(
    share: Array, base: dict[str, Array], model: dict[str, Array]
) -> dict[str, Array]:
    def point(start: Array, end: Array) -> Array:
        dtype = wide(start.dtype)
        way = end.astype(dtype) - start.astype(dtype)
        return (start.astype(dtype) + share.astype(dtype) * way).astype(start.dtype)

    return {path: point(base[path], model[path]) for path in base}


def _sum_scores(paths: list[Array], grid: Array) -> Array:
    examples = {path.shape[1:2] for path in paths}
    together = len(examples) > 1 or examples == {()}
    paths = [p[:, None] if together else p for p in paths]

    def distances(index: Array) -> Array:
        """From one point of the grid to all, for each example."""
        steps = [p - p[index][None] for p in paths]
        squares = [jnp.sum(step * step, axis=range(2, step.ndim)) for step in steps]
        return jnp.sqrt(sum(squares))

    between = jax.lax.map(distances, jnp.arange(len(grid)))
    whole = between[-1, 0]
    share = safe_divide(between, jnp.broadcast_to(whole[None, None], between.shape))
    apart = jnp.abs(grid[:, None] - grid[None, :])
    errors = jnp.square(share - apart[..., None])
    rule = jnp.full(len(grid), grid[1]).at[jnp.array([0, -1])].divide(2)
    scores = jnp.einsum("a,b,abn->n", rule, rule, errors, precision="highest")
    moved = whole > 0
    return jnp.stack([jnp.sum(jnp.where(moved, scores, 0)), jnp.sum(moved)])
