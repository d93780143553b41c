"""How task vectors relate: their lengths, angles and sign conflicts.

What is measured here says much about a merge before it is made: task vectors that are
orthogonal add up without harm, those that point apart or disagree in sign do not.
"""

import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge import sharding
from jaxmerge.checkpoints import Checkpoint, CheckpointError
from jaxmerge.tree import Params, check_alike, is_float, named_leaves


class Statistics(NamedTuple):
    """Measures of the task vectors of some leaves, in float64.

    Attributes:
        entries: how many entries the leaves have.
        base_norm: Euclidean norm of the base.
        norms: Euclidean norms of the task vectors, shape (models,).
        relative_norms: `norms / base_norm`; 0 where the base is zero.
        cosines: between the task vectors, shape (models, models); 0 for a task vector
            that is zero.
        sign_conflict: of the entries that two or more models have changed, the share
            that some have increased and others decreased; 0 if there are none.
    """

    entries: int
    base_norm: float
    norms: np.ndarray
    relative_norms: np.ndarray
    cosines: np.ndarray
    sign_conflict: float


class Comparison(NamedTuple):
    """The task vectors of several models, in whole and in parts.

    Attributes:
        names: of the models.
        total: of all floating-point leaves.
        layers: by layer, see `layer_of`.
        leaves: by leaf path.
        left_out: leaves that not all models have, in one shape: not compared.
    """

    names: tuple[str, ...]
    total: Statistics
    layers: dict[str, Statistics]
    leaves: dict[str, Statistics]
    left_out: tuple[str, ...] = ()


class _Sums(NamedTuple):
    """Sums over entries; those of several leaves add up."""

    entries: int
    base_square: float
    gram: np.ndarray
    changed: int
    conflicting: int


def compare(
    base: Params, models: Sequence[Params], *, names: Sequence[str] | None = None
) -> Comparison:
    """Measures how the task vectors of `models` relate.

    Args:
        base: the shared starting point, a pytree of arrays of any shape.
        models: one or more pytrees with the structure and shapes of `base`.
        names: of the models; by default "0", "1", ...

    Returns:
        Statistics of the whole, of each layer and of each leaf. Leaves that hold no
        floating-point numbers are ignored. Differences and products are in float32,
        sums over the leading axis and over leaves in float64.

    Raises:
        ValueError: no models, trees that are not alike, or no floating-point leaves.

    Example:
        >>> base = {"w": jnp.zeros(2)}
        >>> models = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([-1.0, 1.0])}]
        >>> total = compare(base, models).total
        >>> total.norms.round(2).tolist(), total.cosines[0, 1].round(2).item()
        ([1.0, 1.41], -0.71)
        >>> total.sign_conflict
        1.0
    """
    if not models:
        raise ValueError("compare: needs at least one model.")
    labels = [f"models[{i}]" for i in range(len(models))]
    try:
        check_alike(base, models, names=["base", *labels])
    except ValueError as error:
        raise ValueError(f"compare: {error}") from None
    start, *others = [named_leaves(tree) for tree in (base, *models)]
    paths = [path for path, leaf in start.items() if is_float(leaf)]
    if not paths:
        raise ValueError("compare: base has no floating-point leaves.")

    def read(path: str) -> list[Any]:
        like = start[path]
        return [like, *(sharding.join(other[path], like) for other in others)]

    return _compare(paths, read, names or [str(i) for i in range(len(models))])


def compare_checkpoints(
    base: Checkpoint, models: Mapping[str, Checkpoint]
) -> Comparison:
    """As `compare`, for checkpoints: one leaf is in memory at a time.

    Args:
        base: the shared starting point, opened.
        models: the models by name, opened. Leaves that do not occur in all of them in
            the shape of the base are left out and listed in the result.

    Raises:
        CheckpointError: no floating-point leaf is in all checkpoints.
    """
    everyone = [base, *models.values()]
    names = dict.fromkeys(name for each in everyone for name in each.leaves)
    paths, left_out = [], []
    for name in names:
        infos = [each.leaves.get(name) for each in everyone]
        shapes = {info.shape if info else None for info in infos}
        kinds = {info is not None and is_float(info) for info in infos}
        if len(shapes) > 1 or len(kinds) > 1:
            left_out.append(name)
        elif kinds == {True}:
            paths.append(name)
    if not paths:
        raise CheckpointError(
            f"{base.path} shares no floating-point leaf with all models: it has "
            f"{_some(base)}, models have {'; '.join(map(_some, models.values()))}."
        )

    def read(path: str) -> list[np.ndarray]:
        return [each.read(path) for each in everyone]

    return _compare(paths, read, list(models))._replace(left_out=tuple(left_out))


def layer_of(path: str) -> str:
    """The layer of a leaf: its path up to the first part that ends in a number.

    Outside numbered layers it is the path without its last part.

    Example:
        >>> layer_of("model.layers.3.mlp.up_proj.weight")
        'model.layers.3'
        >>> layer_of("block_3/attention/kernel"), layer_of("embed/kernel")
        ('block_3', 'embed')
    """
    numbered = re.match(r"(?:[^./]*[./])*?[^./]*\d(?=[./])", path)
    return numbered[0] if numbered else re.sub(r"[./][^./]*$", "", path)


def _some(checkpoint: Checkpoint) -> str:
    return ", ".join([*itertools.islice(checkpoint.leaves, 3), "..."])


def _compare(
    paths: Sequence[str], read: Callable[[str], list[Any]], names: Sequence[str]
) -> Comparison:
    """Measures the leaves at `paths`; `read` gives that of the base and each model."""
    leaves: dict[str, _Sums] = {}
    layers: dict[str, list[_Sums]] = {}
    for path in paths:
        base, *models = read(path)
        sums = _leaf_sums(base, models)
        leaves[path] = _on_host(np.size(base), len(models), sums)
        layers.setdefault(layer_of(path), []).append(leaves[path])
    return Comparison(
        tuple(names),
        _statistics(leaves.values()),
        {layer: _statistics(parts) for layer, parts in layers.items()},
        {path: _statistics([sums]) for path, sums in leaves.items()},
    )


@jax.jit
def _leaf_sums(base: Array, models: list[Array]) -> tuple[Array, ...]:
    """Sums over all axes but the first, which float64 on the host adds up."""
    axes = tuple(range(1, base.ndim)) or None

    def measure(base: Array, models: list[Array]) -> tuple[Array, ...]:
        base = base.astype(jnp.float32)
        deltas = [model.astype(jnp.float32) - base for model in models]
        pairs = itertools.combinations_with_replacement(deltas, 2)
        increased = jnp.sum(jnp.stack([delta > 0 for delta in deltas]), 0)
        decreased = jnp.sum(jnp.stack([delta < 0 for delta in deltas]), 0)
        return (
            jnp.sum(base * base, axes),
            jnp.stack([jnp.sum(a * b, axes) for a, b in pairs]),
            jnp.sum(increased + decreased > 1, axes),
            jnp.sum((increased > 0) & (decreased > 0), axes),
        )

    return sharding.auto(measure, like=jnp.zeros(()))(base, models)


def _on_host(entries: int, models: int, sums: Sequence[Array]) -> _Sums:
    base_square, products, changed, conflicting = map(np.asarray, sums)
    gram = np.zeros((models, models))
    gram[np.triu_indices(models)] = products.reshape(len(products), -1).sum(
        axis=1, dtype=np.float64
    )
    return _Sums(
        entries,
        base_square.sum(dtype=np.float64).item(),
        gram + np.triu(gram, 1).T,
        changed.sum(dtype=np.int64).item(),
        conflicting.sum(dtype=np.int64).item(),
    )


def _statistics(parts: Collection[_Sums]) -> Statistics:
    gram = sum((part.gram for part in parts), np.zeros(()))
    norms = np.sqrt(np.diag(gram))
    base_norm = math.sqrt(sum(part.base_square for part in parts))
    changed = sum(part.changed for part in parts)
    conflicting = sum(part.conflicting for part in parts)
    return Statistics(
        sum(part.entries for part in parts),
        base_norm,
        norms,
        _ratio(norms, np.full_like(norms, base_norm)),
        np.clip(_ratio(gram, np.outer(norms, norms)), -1, 1),
        conflicting / changed if changed else 0.0,
    )


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient; 0 where the denominator is."""
    zeros = np.zeros_like(numerator)
    return np.divide(numerator, denominator, out=zeros, where=denominator != 0)
