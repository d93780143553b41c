"""Coefficients of task vectors per submodule, in closed form from a few samples.

Dai et al., "Leveraging Submodule Linearity Enhances Task Arithmetic Performance in
LLMs", ICLR 2025, arXiv:2504.10902.

A layer, an attention block or an MLP changes almost linearly with its parameters, much
more so than a whole model. Its outputs then tell, without a search, by how much each of
its task vectors is to be added.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge import sharding
from jaxmerge.leafwise import check_models, merge_leaves
from jaxmerge.linalg import matmul
from jaxmerge.matrixwise import Others
from jaxmerge.options import Leaf, PerLeaf, choice, per_leaf
from jaxmerge.submodules.calls import Call, Submodule, find_submodules, visit_calls
from jaxmerge.submodules.heads import HeadRules, Heads, find_heads, with_head
from jaxmerge.tree import Params, is_float, named_leaves, rebuild

Apply = Callable[[Params, Any], Any]
"""A model's forward pass, from parameters and a batch to outputs."""


class _Plan(NamedTuple):
    """The submodules to merge, by path, and the heads of those that are split up."""

    submodules: dict[str, Submodule]
    heads: dict[str, Heads]


def submodule_merge(
    apply: Apply,
    base: Params,
    models: Sequence[Params],
    samples: Sequence[Any],
    *,
    submodules: str | Sequence[str],
    heads: HeadRules | None = None,
    normalize: bool = False,
    mask: Callable[[Any], Array] | None = None,
    others: Others = "average",
    scale: PerLeaf = 1.0,
    info: bool = False,
) -> Any:
    r"""Merges submodules with the coefficients that fit their outputs best.

    All parameters of submodule $i$ become $\theta_0^i + \sum_k \alpha_k^i (\theta_k^i -
    \theta_0^i)$ with the $\alpha^i$ of `submodule_coefficients` (Algorithm 1). Nothing
    keeps these between 0 and 1.

    Args:
        apply: as in `submodule_coefficients`, and so are `base`, `models`, `samples`,
            `submodules`, `heads`, `normalize` and `mask`.
        others: what becomes of leaves outside of all submodules, such as embeddings:
            `"average"` adds the mean of their task vectors, `"task_arithmetic"` the
            sum; `"base"` leaves them.
        scale: multiplies the changes of these other leaves.
        info: whether to return the coefficients as well.

    Returns:
        A pytree like `base`, in its dtypes and shardings; arithmetic is in float32.
        With `info` a pair of it and of what `submodule_coefficients` returns. Leaves
        of a submodule without a rule in `heads`, such as the bias behind attention,
        get the mean of the coefficients of its heads.

    Raises:
        ValueError: as `submodule_coefficients`, or an invalid option.

    Example:
        >>> from jaxmerge import submodule
        >>> up = submodule("up", lambda params, x: x @ params["kernel"])
        >>> apply = lambda params, x: up(params["up"], x)
        >>> base = {"up": {"kernel": jnp.zeros((2, 2))}}
        >>> models = [{"up": {"kernel": jnp.diag(d)}} for d in np.eye(2)]
        >>> samples = [np.ones((4, 2)) * d[None] for d in np.eye(2)]
        >>> merged = submodule_merge(apply, base, models, samples, submodules="up")
        >>> print(merged["up"]["kernel"])
        [[1. 0.]
         [0. 1.]]
    """
    method = "submodule_merge"
    choice(method, "others", others, ("average", "task_arithmetic", "base"))
    choice(method, "info", info, (False, True))
    plan = _plan(method, apply, base, models, samples, submodules, heads)
    share = {"average": 1 / len(models), "task_arithmetic": 1.0, "base": 0.0}[others]
    inside = {leaf for found in plan.submodules.values() for leaf in found.shapes}
    factors: dict[str, Sequence[Any]] = {}
    for path, leaf in named_leaves(base).items():
        if path not in inside and is_float(leaf):
            of_leaf = Leaf(method, path, np.shape(leaf), len(models))
            factors[path] = [share * per_leaf(of_leaf, "scale", scale)] * len(models)
    coefficients = _coefficients(
        method, apply, base, models, samples, plan, normalize, mask
    )
    for path, found in plan.submodules.items():
        for leaf, shape in found.shapes.items():
            factors[leaf] = _factors(
                coefficients[path], plan.heads.get(path), leaf, shape
            )
    merged = merge_leaves(
        _combine,
        models,
        lambda leaf: {"factors": factors[leaf.path]},
        method=method,
        base=base,
    )
    return (merged, coefficients) if info else merged


def _factors(
    coefficients: np.ndarray, heads: Heads | None, path: str, shape: tuple[int, ...]
) -> list[np.ndarray]:
    """What each task vector of a leaf is multiplied with, in the rank of the leaf."""
    axis = heads.axes.get(path) if heads else None
    if heads and axis is None:
        coefficients = coefficients.mean(axis=-2)
    by_model = np.moveaxis(coefficients, -1, 0)
    layers = by_model.ndim - 1
    if heads and axis is not None:
        by_model = np.repeat(by_model, shape[axis] // heads.number, axis=-1)
        layers -= 1
    sizes = [n if i < layers or i == axis else 1 for i, n in enumerate(shape)]
    return list(by_model.reshape(-1, *sizes))


def _combine(deltas: Sequence[Array], *, factors: Sequence[Array]) -> Array:
    scaled = [f * delta for f, delta in zip(factors, deltas, strict=True)]
    return functools.reduce(jnp.add, scaled)


def submodule_coefficients(
    apply: Apply,
    base: Params,
    models: Sequence[Params],
    samples: Sequence[Any],
    *,
    submodules: str | Sequence[str],
    heads: HeadRules | None = None,
    normalize: bool = False,
    mask: Callable[[Any], Array] | None = None,
) -> dict[str, np.ndarray]:
    r"""The coefficients of task vectors with which each submodule is best merged.

    With $D_k(x) = f_i(x; \theta_k^i) - f_i(x; \theta_0^i)$, how model k changes the
    outputs of submodule i, and if $f_i$ is linear in its parameters, the outputs of the
    merged submodule are closest to those of the models where $A \alpha = b$, with
    $A_{kl} = \sum_t \langle D_k, D_l \rangle_t$ and $b_k = \sum_t \langle D_k, D_t
    \rangle_t$ (equation 12). The products are summed over the samples of task t and
    over all floating-point outputs. The inputs of a submodule are those that it has in
    the base model.

    The solution is $\alpha = A^+ b$, with the $D_k$ scaled to the same norm first:
    eigenvalues up to 1e-6 times the largest count as zero, and models that change a
    submodule in the same way share what it needs.

    Args:
        apply: `apply(params, batch)` runs the model, in the mode in which it is used.
            Modules of linen and nnx are found while JAX traces it, by calls of their
            public methods, which count together; parts of plain functions must be
            declared with `jaxmerge.submodule`. Modules that are called inside of
            branches, while loops and `jax.shard_map` are not found.
        base: $\theta_0$, the shared starting point, a pytree of arrays of any shape.
        models: $\theta_k$, pytrees with the structure and shapes of `base`.
        samples: for each model, examples of its task without labels: a batch, any
            pytree of arrays that `apply` takes, or a list of batches. The authors take
            30 examples of each task; tasks with more weigh more. Batches of one shape
            are compiled once.
        submodules: one or several regular expressions, which must match the whole path
            of a submodule: where its parameters are in the tree, as in
            `r"encoder/block_\d+"` or `r".*/(attention|mlp)"`.
        heads: gives each head of a submodule coefficients of its own. Rules from leaf
            paths to the axis that counts heads, such as
            `{r".*(query|key|value)/kernel": 1, r".*(query|key|value)/bias": 0,
            r".*out/kernel": 0}`; or to `(axis, heads)` where heads lie side by side
            along an axis, as groups of queries do that share a key.
        normalize: divides what is summed over task t by $\langle D_t, D_t \rangle_t$,
            so that a task does not weigh more because its activations are larger. Not
            in the paper.
        mask: `mask(batch)` tells which positions count, for example
            `lambda batch: batch["tokens"] != 0`. It applies to outputs whose leading
            axes are of its shape. All count by default.

    Returns:
        By submodule path, the coefficients in float64, of shape (models,), or (heads,
        models). Layers of a scan come first: (layers, models).

    Raises:
        ValueError: trees that are not alike, not one entry of samples per model, a
            pattern that no path matches, submodules that share leaves, because they are
            nested, say, or outputs that are not finite.

    Example:
        >>> from jaxmerge import submodule
        >>> up = submodule("up", lambda params, x: x @ params["kernel"])
        >>> apply = lambda params, x: up(params["up"], x)
        >>> base = {"up": {"kernel": jnp.zeros((2, 2))}}
        >>> model = {"up": {"kernel": jnp.eye(2)}}
        >>> samples = [np.ones((4, 2))] * 2
        >>> found = submodule_coefficients(
        ...     apply, base, [model, model], samples, submodules="up"
        ... )
        >>> print(found["up"].round(3))
        [0.5 0.5]
    """
    method = "submodule_coefficients"
    plan = _plan(method, apply, base, models, samples, submodules, heads)
    return _coefficients(method, apply, base, models, samples, plan, normalize, mask)


def _plan(
    method: str,
    apply: Apply,
    base: Params,
    models: Sequence[Params],
    samples: Sequence[Any],
    submodules: str | Sequence[str],
    heads: HeadRules | None,
) -> _Plan:
    check_models(method, base, models)
    batches = batches_of(method, models, samples)
    found = find_submodules(method, apply, base, batches[0][0], submodules)
    return _Plan(found, find_heads(method, found, heads))


def batches_of(
    method: str, models: Sequence[Params], samples: Sequence[Any]
) -> list[list[Any]]:
    """The batches of each model; its entry of `samples` may be a single one.

    Raises:
        ValueError: not one entry per model, or one without batches.
    """
    if not isinstance(samples, list | tuple) or len(samples) != len(models):
        raise ValueError(
            f"{method}: samples must be a list with an entry for each model, a batch "
            f"or a list of batches: {len(models)} entries."
        )
    batches = [entry if isinstance(entry, list) else [entry] for entry in samples]
    if not all(batches):
        raise ValueError(f"{method}: an entry of samples is a list without batches.")
    return batches


def _coefficients(
    method: str,
    apply: Apply,
    base: Params,
    models: Sequence[Params],
    samples: Sequence[Any],
    plan: _Plan,
    normalize: bool,
    mask: Callable[[Any], Array] | None,
) -> dict[str, np.ndarray]:
    choice(method, "normalize", normalize, (False, True))
    joined = [
        jax.tree.map(sharding.join, rebuild(base, named_leaves(model)), base)
        for model in models
    ]

    @jax.jit
    def measure(base: Params, models: list[Params], batch: Any) -> dict[str, Array]:
        counted = None if mask is None else jnp.asarray(mask(batch))

        def visit(call: Call) -> tuple[list[Array], Array] | None:
            if call.path not in plan.submodules:
                return None
            return _measure(method, call, plan.heads.get(call.path), counted)

        sums = visit_calls(apply, base, models, batch, visit)
        return {path: gram for (path, _), gram in sums.items()}

    by_task = [
        [measure(base, joined, batch) for batch in batches]
        for batches in batches_of(method, models, samples)
    ]
    coefficients = {}
    for path in plan.submodules:
        grams = np.stack(
            [
                np.sum([np.asarray(g[path], np.float64) for g in grams], axis=0)
                for grams in by_task
            ]
        )
        if not np.isfinite(grams).all():
            task = int(np.argmin([np.isfinite(gram).all() for gram in grams]))
            raise ValueError(
                f"{method}: submodule {path!r} has outputs on samples[{task}], of the "
                "base or of a model, that are not finite."
            )
        coefficients[path] = _solve(grams, normalize)
    return coefficients


def _measure(
    method: str, call: Call, heads: Heads | None, mask: Array | None
) -> tuple[list[Array], Array]:
    """The results of a call, and the products of what models change in its outputs."""
    results = call.run(call.base)
    outputs = call.features(results)
    counted = [
        mask if mask is not None and _fits(mask, out) else None for out in outputs
    ]
    if mask is not None and all(each is None for each in counted):
        raise ValueError(
            f"{method}: the mask has shape {mask.shape}, with which no output of "
            f"submodule {call.path!r} begins: {[out.shape for out in outputs]}."
        )
    versions = {path: jnp.stack([m[path] for m in call.models]) for path in call.base}
    zero = jnp.zeros((len(call.models),) * 2)

    def changes(params: dict[str, Array]) -> list[Array]:
        new = call.features(call.run(params))
        return [n - old for n, old in zip(new, outputs, strict=True)]

    def gram(versions: dict[str, Array]) -> Array:
        total = zero
        for change, kept in zip(jax.lax.map(changes, versions), counted, strict=True):
            total += sharding.auto(_products, like=zero)(change, kept)
        return total

    if heads is None:
        return results, gram(versions)

    def of_head(head: Array) -> Array:
        return gram(with_head(head, call, versions, heads))

    return results, jax.lax.map(of_head, jnp.arange(heads.number))


def _fits(mask: Array, output: Array) -> bool:
    return output.shape[: mask.ndim] == mask.shape


def _products(changes: Array, mask: Array | None) -> Array:
    if mask is not None:
        mask = jnp.expand_dims(mask, range(mask.ndim, changes.ndim - 1))
        changes = jnp.where(mask[None], changes, 0)
    rows = changes.reshape(len(changes), -1)
    return matmul(rows, rows.T)


def _solve(grams: np.ndarray, normalize: bool) -> np.ndarray:
    """The coefficients, from products on each task, (tasks, ..., models, models)."""
    own = np.stack([gram[..., task] for task, gram in enumerate(grams)])
    if normalize:
        squares = np.stack([row[..., task] for task, row in enumerate(own)])[..., None]
        weights = np.divide(1, squares, out=np.zeros_like(squares), where=squares > 0)
        grams, own = weights[..., None] * grams, weights * own
    a, b = grams.sum(axis=0), own.sum(axis=0)
    norms = np.sqrt(np.diagonal(a, axis1=-2, axis2=-1))
    unit = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    cosines = unit[..., None] * a * unit[..., None, :]
    inverse = np.linalg.pinv(cosines, rtol=1e-6, hermitian=True)
    return unit * np.squeeze(inverse @ (unit * b)[..., None], axis=-1)
