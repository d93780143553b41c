"""Merges of LoRA factors, where the models share one of the two.

Salami et al., "Closed-form Merging of Parameter-Efficient Modules for Federated
Continual Learning" (LoRM), ICLR 2025, arXiv:2410.17961.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxmerge.leafwise import ABSENT
from jaxmerge.linalg import map_matrices, matmul
from jaxmerge.lowrank import LowRank
from jaxmerge.matrices import MatrixAxes, matrix_shape
from jaxmerge.matrixwise import merge_matrices
from jaxmerge.methods.curvature import Normalize, solve_fully, warn_of_indefinite
from jaxmerge.methods.evidence import (
    Evidence,
    by_layer,
    check_statistics,
    warn_of_few_samples,
)
from jaxmerge.methods.fisher import merge_weighted
from jaxmerge.options import Leaf, PerModel, choice, number, per_model
from jaxmerge.statistics.types import Statistics

Adapter = Mapping[str, LowRank | Array]


def lorm(
    adapters: Sequence[Adapter],
    statistics: Sequence[Statistics],
    *,
    shared: Literal["right", "left"] = "right",
    weights: PerModel = 1.0,
    shrinkage: float = 1.0,
    ridge: float = 1e-4,
    normalize: Normalize = "none",
) -> dict[str, LowRank | Array]:
    r"""Merges adapters that share one factor into an adapter of the same rank.

    With $A_t$ the sum of $x x^\top$ over the inputs of a leaf, the factor that is not
    shared becomes the minimum of $\sum_t w_t \|(L R - L_t R_t) x\|^2$:
    $L = (\sum_t w_t L_t R A_t R^\top) (\sum_t w_t R A_t R^\top)^{-1}$ where $R$ is
    shared, and $R = (\sum_t w_t R_t A_t) (\sum_t w_t A_t)^{-1}$ where $L$ is. If both
    differ, merge models instead, which `apply_adapter` makes of adapters.

    Args:
        adapters: dicts from leaf paths to `LowRank`s or to task vectors, all of the
            same paths and ranks.
        statistics: of the model that each adapter makes, with `gram`.
        shared: `"right"` (of LoRA, A) or `"left"` (B).
        weights: $w_t$, dimensionless. May be traced.
        shrinkage: what off-diagonal entries of $A_t$ are multiplied by; in the authors'
            runs clients share only the diagonal, which is 0.
        ridge: how much of its own diagonal is added to the sum of second moments, which
            holds directions without data at the average. Below $10^{-5}$, these fill
            with rounding errors.
        normalize: how tasks compare: `"none"` sums over tokens (the authors),
            `"count"` takes means, `"trace"` moments of mean diagonal one.

    Returns:
        An adapter: merged factors beside the shared ones, and the average of task
        vectors. Dtypes are those of the first adapter; arithmetic is in float32. Warns
        as `jaxmerge.mats` does.

    Raises:
        ValueError: no adapters, adapters that are not alike or do not share that
            factor, statistics without a Gram matrix of a leaf, or an invalid option.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmerge.statistics import collect
        >>> def apply(params, x):
        ...     return x @ params["kernel"]
        >>> right = jnp.array([[1.0, 0.0]])
        >>> lefts = jnp.full((2, 1), 1.0), jnp.full((2, 1), 4.0)
        >>> adapters = [{"kernel": LowRank(left, right)} for left in lefts]
        >>> model = {"kernel": jnp.zeros((2, 2))}
        >>> known = [collect(apply, model, [jnp.full((n, 2), 1.0)]) for n in (8, 4)]
        >>> print(lorm(adapters, known, ridge=0.0)["kernel"].left.T.round(4))
        [[2. 2.]]
    """
    method = "lorm"
    choice(method, "shared", shared, ("right", "left"))
    choice(method, "normalize", normalize, get_args(Normalize))
    _check(method, adapters, statistics, shared)
    free = "left" if shared == "right" else "right"
    first, *_ = adapters
    factored = [path for path, update in first.items() if isinstance(update, LowRank)]
    evidence = {
        path: _evidence(method, path, first[path], statistics, shared, weights)
        for path in factored
    }
    warn_of_few_samples(method, evidence, "gram")
    merged, told = merge_matrices(
        solve_fully,
        ABSENT,
        [{path: getattr(one[path], free) for path in factored} for one in adapters],
        method=method,
        axes={path: _axes(first[path]) for path in factored},
        beside=evidence,
        numbers={
            "shrinkage": number(method, "shrinkage", shrinkage, "[0, 1]"),
            "ridge": number(method, "ridge", ridge, "[0, inf)"),
        },
        normalize=normalize,
    )
    warn_of_indefinite(method, told)
    dense = merge_weighted(
        method,
        [{path: one[path] for path in one if path not in merged} for one in adapters],
        statistics,
        [{}] * len(adapters),
        weights=weights,
    )
    result: dict[str, Any] = {**merged, **dense}
    for path in factored:
        update: Any = first[path]
        result[path] = update._replace(**{free: merged[path]})
    return {path: result[path] for path in first}


def _axes(update: Any) -> MatrixAxes:
    *stack, outputs, inputs = range(np.ndim(update.left))
    return MatrixAxes(tuple(stack), (inputs,), (outputs,))


def _evidence(
    method: str,
    path: str,
    update: Any,
    statistics: Sequence[Statistics],
    shared: str,
    weights: PerModel,
) -> list[Evidence]:
    stack = np.shape(update.right)[:-2]
    leaf = Leaf(method, path, np.shape(update.left), len(statistics))
    evidence = []
    for known, weight in zip(
        statistics, per_model(leaf, "weights", weights), strict=True
    ):
        name = known.inputs[path]
        gram = known.gram[name]
        if shared == "right":
            gram = map_matrices(_through, update.right, gram)
        tokens = by_layer(known.tokens[name], stack)
        evidence.append(Evidence(gram, None, tokens, by_layer(weight, stack)))
    return evidence


def _through(right: Array, gram: Array) -> Array:
    """The second moments of what a factor makes of its inputs."""
    return matmul(matmul(right, gram), right.T)


def _check(
    method: str,
    adapters: Sequence[Adapter],
    statistics: Sequence[Statistics],
    shared: str,
) -> None:
    if isinstance(adapters, Mapping) or not adapters:
        what = f"a {type(adapters).__name__}" if adapters else "empty"
        raise ValueError(f"{method}: adapters is {what}; give a list of adapters.")
    # That they belong to the models that adapters make, shapes of factors tell.
    check_statistics(method, [{}] * len(adapters), statistics, ("gram",))
    for i, (adapter, known) in enumerate(zip(adapters, statistics, strict=True)):
        shapes = [jax.tree.map(np.shape, dict(one)) for one in (adapters[0], adapter)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{method}: adapters[{i}] has not the leaves and ranks of adapters[0]; "
                "merge the models that they make, with regmean, say."
            )
        for path, update in adapter.items():
            if not isinstance(update, LowRank):
                continue
            if known.inputs.get(path) not in known.gram:
                raise ValueError(
                    f"{method}: statistics[{i}] has no gram of leaf {path!r}; collect "
                    "it of the model that the adapter makes. If that was done, its "
                    "`unknown` says why there is none."
                )
            *stack, outputs, _ = np.shape(update.left)
            want = (*stack, np.shape(update.right)[-1], outputs)
            site = next(site for site in known.sites if site.path == path)
            if (got := matrix_shape(site.shape, known.axes[path])) != want:
                raise ValueError(
                    f"{method}: statistics[{i}] is of another model than adapters[{i}] "
                    f"makes: leaf {path!r} has matrices (inputs, outputs) of shape "
                    f"{got}, where the adapter has {want}."
                )
            pair = [getattr(one[path], shared) for one in (adapters[0], adapter)]
            if not any(isinstance(x, Tracer) for x in pair) and not np.array_equal(
                *pair
            ):
                raise ValueError(
                    f"{method}: the {shared} factor of leaf {path!r} in adapters[{i}] "
                    "is another than in adapters[0], so no adapter of this rank has "
                    "them all; merge the models that they make, with regmean, say."
                )
