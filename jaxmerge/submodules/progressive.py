"""RegMean layer by layer, on the features that merged layers give the next one.

Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean
for Model Merging", TMLR 2026, arXiv:2508.03121.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from jaxmerge import sharding
from jaxmerge.leafwise import ABSENT, check_models
from jaxmerge.methods.averaging import average
from jaxmerge.methods.curvature import Normalize, solve_fully
from jaxmerge.methods.matching import Others, match
from jaxmerge.options import Leaf, PerModel, choice, number, per_model
from jaxmerge.statistics.collecting import collect, trace
from jaxmerge.statistics.types import Site, Statistics
from jaxmerge.submodules.coefficients import Apply, batches_of
from jaxmerge.tree import Params, is_float, named_leaves, rebuild


class _Layer(NamedTuple):
    """The leaves of a layer.

    Attributes:
        stacks: by path, the axis that counts the layers of a scan, None for others.
        number: which of these it is; 0 for others.
    """

    stacks: dict[str, int | None]
    number: int


def regmean_plus_plus(
    apply: Apply,
    models: Sequence[Params],
    samples: Sequence[Any],
    *,
    layers: str | Sequence[str],
    weights: PerModel = 1.0,
    shrinkage: float = 0.9,
    ridge: float = 1e-4,
    normalize: Normalize = "count",
    mask: str | Callable[[Any], Array] | None = None,
    others: Others = "average",
) -> Params:
    r"""Merges layers with RegMean, each on the features of the merged layers before it.

    RegMean has every model's weights meet the inputs that they have in that model. In
    the merged model they meet others. Here, the Gram matrices of a layer of model t are
    those of its data passed through all earlier layers as merged, and then through the
    layer as it is in model t (RegMean++, arXiv:2508.03121).

    It takes a forward pass with the statistics of `collect` per layer and model: about
    as many times the cost of `regmean` as there are layers. The model is compiled once.

    Args:
        apply: `apply(params, batch)`, as for `collect`: any function that JAX can trace
            and that treats examples independently.
        models: pytrees of one structure, of arrays of any shape.
        samples: for each model, examples of its task without labels: a batch, any
            pytree of arrays that `apply` takes, or a list of batches. The authors take
            256 examples.
        layers: regular expressions, in the order in which the layers run, each of which
            matches the paths of all leaves of a layer: `["block_0/.*", "block_1/.*"]`.
            If all leaves that one matches are stacked by a scan (forwards), it stands
            for the layers along that axis: `"blocks/.*"`.
        weights: as for `regmean`, and so are `shrinkage`, `ridge` and `normalize`.
        mask: which tokens count, as for `collect`.
        others: as for `regmean`, for leaves of layers. Leaves outside of all layers,
            such as embeddings, are averaged before the first layer.

    Returns:
        A pytree like the first model, in its dtypes and shardings; arithmetic is in
        float32.

    Raises:
        ValueError: no models, trees that are not alike, not one entry of samples per
            model, a pattern that matches no leaf, a leaf in two layers or that a scan
            does not stack as it does the others, or an invalid option.

    Example:
        >>> def apply(params, x):
        ...     return jnp.tanh(x @ params["up"]) @ params["down"]
        >>> models = [{"up": i * jnp.eye(2), "down": jnp.eye(2)} for i in (1.0, 3.0)]
        >>> samples = [jnp.diag(jnp.array([2.0, 1.0])), jnp.eye(2)]
        >>> merged = regmean_plus_plus(apply, models, samples, layers=["up", "down"])
        >>> print(merged["up"].round(2))
        [[1.4 0. ]
         [0.  2. ]]
    """
    method = "regmean_plus_plus"
    check_models(method, ABSENT, models)
    batches = batches_of(method, models, samples)
    choice(method, "normalize", normalize, get_args(Normalize))
    choice(method, "others", others, get_args(Others))
    numbers = {
        "shrinkage": number(method, "shrinkage", shrinkage, "[0, 1]"),
        "ridge": number(method, "ridge", ridge, "[0, inf)"),
    }
    mixed = [jax.tree.map(jnp.asarray, named_leaves(model)) for model in models]
    floats = {path: leaf for path, leaf in mixed[0].items() if is_float(leaf)}
    for path, leaf in floats.items():
        per_model(Leaf(method, path, leaf.shape, len(models)), "weights", weights)
    sites = trace(apply, models[0], batches[0][0]).sites
    patterns = [layers] if isinstance(layers, str) else layers
    found = list(_find_layers(method, floats, patterns, sites))
    inside = {path for layer in found for path in layer.stacks}
    outside = _Layer(dict.fromkeys(path for path in floats if path not in inside), 0)
    _put(
        mixed, average([_take(own, outside) for own in mixed], weights=weights), outside
    )
    for layer in found:
        known = [
            _only(collect(apply, rebuild(model, own), data, mask=mask), layer)
            for model, own, data in zip(models, mixed, batches, strict=True)
        ]
        parts = [_take(own, layer) for own in mixed]
        merged, _ = match(
            solve_fully,
            method,
            parts,
            known,
            metric="gram",
            weights=weights,
            normalize=normalize,
            others=others,
            numbers=numbers,
        )
        _put(mixed, merged, layer)
    return rebuild(models[0], mixed[0])


def _find_layers(
    method: str,
    leaves: dict[str, Array],
    patterns: Sequence[str],
    sites: Sequence[Site],
) -> Iterator[_Layer]:
    """The layers that patterns stand for, in their order."""
    stacks = {site.path: site.stack for site in sites}
    # Only scans stack leaves that are no matrices; other stacks may be of experts.
    scanned = {site.path for site in sites if site.stack and site.axes is None}
    owners: dict[str, str] = {}
    for pattern in patterns:
        paths = _matching(method, pattern, leaves)
        for path in paths:
            if path in owners:
                raise ValueError(
                    f"{method}: leaf {path!r} is in two of layers, {owners[path]!r} "
                    f"and {pattern!r}; it can be merged only once."
                )
            owners[path] = pattern
        axes = {path: stacks[path][0] for path in paths if stacks[path]}
        sizes = {leaves[path].shape[axis] for path, axis in axes.items()}
        if len(axes) == len(paths) and len(sizes) == 1:
            yield from (_Layer(dict(axes), n) for n in range(*sizes))
        elif scanned.isdisjoint(paths):
            yield _Layer(dict.fromkeys(paths), 0)
        else:
            odd = [path for path in paths if path not in axes] or paths
            raise ValueError(
                f"{method}: layers {pattern!r} are those of a scan, which does not "
                f"stack leaf {odd[0]!r} as it does the others; give a pattern that "
                "leaves it out."
            )


def _matching(method: str, pattern: str, leaves: dict[str, Array]) -> list[str]:
    try:
        paths = [path for path in leaves if re.fullmatch(pattern, path)]
    except re.error as error:
        raise ValueError(
            f"{method}: {pattern!r} is no valid regular expression: {error}"
        ) from None
    if not paths:
        raise ValueError(
            f"{method}: no leaf has a path that {pattern!r} of layers matches. A "
            f"pattern must match the whole path, such as {next(iter(leaves), '')!r}."
        )
    return paths


def _only(statistics: Statistics, layer: _Layer) -> Statistics:
    """The statistics of one layer; those of a stack keep an axis of size one."""
    matrices, inputs = statistics.axes, statistics.inputs
    axes: dict[str, int | None] = {}
    for path, axis in layer.stacks.items():
        if path in inputs:
            stack = matrices[path].stack
            axes[inputs[path]] = None if axis is None else stack.index(axis)

    def cut(arrays: dict[str, Array], axes: dict[str, int | None]) -> dict[str, Array]:
        here = {name: axes[name] for name in arrays if name in axes}
        return _take(arrays, _Layer(here, layer.number))

    return replace(
        statistics,
        # A layer without weights has none, but there are some.
        gram=cut(statistics.gram, axes) or statistics.gram,
        tokens=cut(statistics.tokens, axes),
        diagonal=cut(statistics.diagonal, layer.stacks),
        sites=tuple(
            _site(site, layer.stacks.get(site.path)) for site in statistics.sites
        ),
    )


def _site(site: Site, axis: int | None) -> Site:
    if axis is None:
        return site
    return site._replace(shape=(*site.shape[:axis], 1, *site.shape[axis + 1 :]))


def _take(leaves: dict[str, Array], layer: _Layer) -> dict[str, Array]:
    return {
        path: leaves[path] if axis is None else _slice(leaves[path], layer.number, axis)
        for path, axis in layer.stacks.items()
    }


def _put(
    mixed: Sequence[dict[str, Array]], merged: dict[str, Array], layer: _Layer
) -> None:
    """Puts a merged layer into all models, in place."""
    for own in mixed:
        for path, axis in layer.stacks.items():
            leaf = own[path]
            part = sharding.join(merged[path], leaf).astype(leaf.dtype)
            if axis is not None:
                part = _set(leaf, part, layer.number, axis, sharding.of(leaf))
            own[path] = part


@functools.partial(jax.jit, static_argnums=2)
def _slice(leaf: Array, index: int, axis: int) -> Array:
    def cut(leaf: Array, index: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(leaf, index, 1, axis)

    return sharding.auto(cut, like=jnp.zeros(()))(leaf, index)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _set(leaf: Array, part: Array, index: int, axis: int, target: Any) -> Array:
    def put(leaf: Array, part: Array, index: int) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, part, index, axis)

    return sharding.keep(sharding.auto(put, like=leaf)(leaf, part, index), target)
