"""From a function of one leaf to a merge method of whole trees.

A method says what happens to one leaf: a list of float32 arrays, one per model.
Everything else happens here, once for all methods: the check that trees are alike,
stacked layers, dtypes, randomness, compilation (once per leaf shape) and whatever mesh
the arrays live on.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge import sharding
from jaxmerge.lazy import Deferred, any_lazy, as_shapes
from jaxmerge.options import Leaf, PerLeaf, per_leaf
from jaxmerge.tree import Params, check_alike, is_float, named_leaves, rebuild

Kernel = Callable[..., Any]
"""A function of the float32 arrays of one leaf, one array per model."""

Rows = Callable[[Leaf], tuple[int, ...]]
"""The axes of a leaf that number the rows of a matrix; none where it is no matrix."""

ABSENT: Any = object()
"""Stands for an argument that a method has not got, which None would not show."""


def merge_leaves(
    kernel: Kernel,
    models: Sequence[Params],
    options: Callable[[Leaf], dict[str, Any]],
    *,
    method: str,
    base: Params = ABSENT,
    stack_axes: PerLeaf = 0,
    rows: Rows | None = None,
    key: Any = ABSENT,
    names: Sequence[str] | None = None,
    **choices: Any,
) -> Params:
    """Merges trees leaf by leaf with `kernel`, in float32, back in the base's dtypes.

    Args:
        kernel: `kernel(deltas, **options, **choices)` maps the task vectors of one
            leaf to the merged task vector. Without a base it maps the leaves of the
            models to the merged leaf. With a `key` it also gets `keys`, one per model.
        models: one or more trees.
        options: the numbers that `kernel` takes for a leaf; asked for, and checked, for
            all leaves before any arithmetic.
        method: the caller's name, for messages.
        base: the start that task vectors are measured from.
        stack_axes: how many leading axes of a leaf stack independent layers.
        rows: further axes along which a leaf falls into independent parts.
        key: a `jax.random.key` or a seed. Every leaf and model draws from its own key,
            derived from the path and the model's name, so that neither order nor
            grouping of leaves changes a draw.
        names: the models' names, for `key`; by default "0", "1", ...
        choices: hashable arguments of `kernel` that are compiled in.

    Returns:
        A tree like `base`, or like the first model without one: same dtypes, same
        shardings. Leaves that hold no floating-point numbers are copied from there.
        NumPy leaves of float64 come back in float32, unless `jax_enable_x64` is on.

    Raises:
        ValueError: no models, trees that are not alike, or an invalid option.
    """
    calls = _leaf_calls(models, options, method, base, stack_axes, rows, key, names)
    chosen = tuple(sorted(choices.items()))
    merged = {path: _merge(call, kernel, chosen) for path, call in calls.items()}
    like = models[0] if base is ABSENT else base
    return rebuild(like, named_leaves(like) | merged)


def measure_leaves(
    kernel: Kernel,
    models: Sequence[Params],
    options: Callable[[Leaf], dict[str, Any]],
    *,
    method: str,
    base: Params = ABSENT,
    **choices: Any,
) -> dict[str, Any]:
    """What a method must know of the whole model before it merges the first leaf.

    Args:
        kernel: as for `merge_leaves`, except that it returns scalars in any structure.

    Returns:
        The results by path.
    """
    return _read_leaves(kernel, models, options, method, base, choices, shaped=False)


def map_leaves(
    kernel: Kernel,
    models: Sequence[Params],
    options: Callable[[Leaf], dict[str, Any]],
    *,
    method: str,
    base: Params = ABSENT,
    **choices: Any,
) -> dict[str, Any]:
    """What else can be made of the leaves of models, entry by entry: masks, say.

    Args:
        kernel: as for `merge_leaves`, except that it returns arrays in the shape of the
            leaf, in any structure and of any dtype.

    Returns:
        The results by path, in the shardings of the leaves.
    """
    return _read_leaves(kernel, models, options, method, base, choices, shaped=True)


def _read_leaves(
    kernel: Kernel,
    models: Sequence[Params],
    options: Callable[[Leaf], dict[str, Any]],
    method: str,
    base: Params,
    choices: dict[str, Any],
    shaped: bool,
) -> dict[str, Any]:
    calls = _leaf_calls(models, options, method, base)
    chosen = tuple(sorted(choices.items()))
    return {p: _look(call, kernel, chosen, shaped) for p, call in calls.items()}


def check_models(method: str, base: Params, models: Sequence[Params]) -> None:
    """Checks that there are models, and that they are like `base` or each other.

    Raises:
        ValueError: they are not; the message starts with `method`.
    """
    if not isinstance(models, Sequence):
        raise ValueError(
            f"{method}: models is a {type(models).__name__}; give a list of trees."
        )
    if not models:
        raise ValueError(f"{method}: needs at least one model.")
    if base is None:
        raise ValueError(f"{method}: needs a base, the start of all models, not None.")
    trees = {f"models[{i}]": model for i, model in enumerate(models)}
    check_trees(method, trees if base is ABSENT else {"base": base} | trees)


def check_trees(method: str, trees: Mapping[str, Params]) -> None:
    """Checks that named trees are like the first one.

    Raises:
        ValueError: they are not; the message starts with `method`.
    """
    first, *others = trees.values()
    try:
        check_alike(first, others, names=list(trees))
    except ValueError as error:
        raise ValueError(f"{method}: {error}") from None


def arrays_beside(
    method: str, base: Params, trees: Mapping[str, Params], dtype: Any
) -> dict[str, list[Any]]:
    """The leaves of trees that say something of every entry: masks, or task vectors.

    Args:
        method: the caller's name, for messages.
        base: the tree that they were made for.
        trees: by name; they have empty arrays where `base` holds no floats.
        dtype: bool, or a floating-point dtype that stands for all of them.

    Returns:
        By leaf path of `base`, those of all trees, on the devices of the leaf.

    Raises:
        ValueError: trees that do not fit.
    """
    leaves = named_leaves(base)
    shapes = {p: np.shape(x) if is_float(x) else (0,) for p, x in leaves.items()}
    like = {p: jax.ShapeDtypeStruct(shape, dtype) for p, shape in shapes.items()}
    check_trees(method, {"base": rebuild(base, like), **trees})
    arrays = {name: named_leaves(tree) for name, tree in trees.items()}
    for name, tree in arrays.items():
        for path, array in tree.items():
            found = jnp.result_type(array)
            if dtype is bool and found != jnp.bool_:
                raise ValueError(
                    f"{method}: {name} leaf {path!r} is {found}, not bool."
                )
    return {
        path: [sharding.join(tree[path], leaf) for tree in arrays.values()]
        for path, leaf in leaves.items()
    }


class _Call(NamedTuple):
    """What the compiled functions of one leaf are called with."""

    base: Any
    models: list[Any]
    keys: Array | None
    numbers: dict[str, Any]
    units: tuple[int, ...]
    target: Any

    @property
    def like(self) -> Any:
        """The leaf that the merged one is like."""
        return self.models[0] if self.base is None else self.base


def _leaf_calls(
    models: Sequence[Params],
    options: Callable[[Leaf], dict[str, Any]],
    method: str,
    base: Params,
    stack_axes: PerLeaf = 0,
    rows: Rows | None = None,
    key: Any = ABSENT,
    names: Sequence[str] | None = None,
) -> dict[str, _Call]:
    check_models(method, base, models)
    key = None if key is ABSENT else _as_key(method, key)
    names = names or [str(i) for i in range(len(models))]
    if isinstance(names, str) or len(set(names)) != len(models):
        raise ValueError(
            f"{method}: names are {list(names)} for {len(models)} models; "
            "give one distinct name per model."
        )
    by_model = [named_leaves(model) for model in models]
    calls = {}
    for path, like in named_leaves(models[0] if base is ABSENT else base).items():
        if not is_float(like):
            continue
        leaf = Leaf(method, path, np.shape(like), len(models))
        leaf = leaf._replace(units=units_of(leaf, stack_axes, rows))
        calls[path] = _Call(
            base=None if base is ABSENT else like,
            models=[sharding.join(model[path], like) for model in by_model],
            keys=None if key is None else leaf_keys(key, path, names),
            numbers=options(leaf),
            units=leaf.units,
            target=sharding.of(like),
        )
    return calls


def units_of(
    leaf: Leaf, stack_axes: PerLeaf, rows: Rows | None = None
) -> tuple[int, ...]:
    """The axes of a leaf along which independent parts lie."""
    within = f"[0, {len(leaf.shape)}]"
    stacked = per_leaf(leaf, "stack_axes", stack_axes, within, static=True)
    if stacked != int(stacked):
        raise ValueError(f"{leaf.method}: stack_axes is {stacked}, not a whole number.")
    units = tuple(range(int(stacked)))
    return units if rows is None else units + rows(leaf._replace(units=units))


def leaf_keys(key: Array, path: str, names: Sequence[str]) -> Array:
    """One random key per model for the leaf at `path`, (models,)."""
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    # One array: keys of many leaves and models take megabytes on their own.
    return jnp.stack(
        [jax.random.fold_in(key, zlib.crc32(name.encode())) for name in names]
    )


def _as_key(method: str, key: Any) -> Array:
    """A random key from a key, a key of the old kind (uint32[2]), or a seed."""
    if isinstance(key, jax.Array) and key.ndim <= 1:
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return key
        if jnp.issubdtype(key.dtype, jnp.integer):
            return jax.random.wrap_key_data(key) if key.ndim else jax.random.key(key)
    if isinstance(key, int | np.integer) and 0 <= key < 2**32:
        return jax.random.key(int(key))
    raise ValueError(
        f"{method}: key is {key!r}; give a jax.random.key, or a seed in [0, 2**32)."
    )


def _merge(call: _Call, kernel: Kernel, choices: tuple) -> Any:
    """The merged leaf; computed when it is asked for, if it comes from lazy leaves."""
    static = {"units": call.units, "kernel": kernel, "choices": choices}
    arguments = call.base, call.models, call.keys, call.numbers
    run = functools.partial(_merge_leaf, target=call.target, **static)
    if not any_lazy(arguments):
        return run(*arguments)
    function = functools.partial(_merged, **static)
    return Deferred(run, function, arguments, (_merged, *static.values()), call.like)


@functools.partial(jax.jit, static_argnames=("target", "units", "kernel", "choices"))
def _merge_leaf(base, models, keys, numbers, *, target, **static):
    merge = functools.partial(_merged, **static)
    like = models[0] if base is None else base
    merged = sharding.auto(merge, like=like)(base, models, keys, numbers)
    return sharding.keep(merged, target)


def _merged(base, models, keys, numbers, *, units, kernel, choices):
    like = models[0] if base is None else base
    dtype = wide(like.dtype)
    bound = functools.partial(kernel, **numbers, **dict(choices))
    merged = over_units(bound, units)(_arrays(base, models, dtype), keys)
    if base is not None:
        merged = base.astype(dtype) + merged
    return merged.astype(like.dtype)


def _look(call: _Call, kernel: Kernel, choices: tuple, shaped: bool) -> Any:
    """What a kernel sees in a leaf: numbers, or arrays that are lazy if leaves are."""
    static = {"kernel": kernel, "choices": choices}
    arguments = call.base, call.models, call.numbers
    run = functools.partial(_read_leaf, target=call.target, shaped=shaped, **static)
    if not any_lazy(arguments):
        return run(*arguments)
    function = functools.partial(_read, **static)
    types, structure = jax.tree.flatten(jax.eval_shape(function, *as_shapes(arguments)))
    seen = [
        Deferred(run, function, arguments, (_read, *static.values()), like, i)
        for i, like in enumerate(types)
    ]
    return jax.tree.unflatten(structure, seen if shaped else seen[0].all())


@functools.partial(jax.jit, static_argnames=("target", "shaped", "kernel", "choices"))
def _read_leaf(base, models, numbers, *, target, shaped, **static):
    read = functools.partial(_read, **static)
    if not shaped:
        return sharding.auto(read, like=jnp.zeros(()))(base, models, numbers)
    like = models[0] if base is None else base
    results = sharding.auto(read, like=like)(base, models, numbers)
    return jax.tree.map(lambda x: sharding.keep(x, target), results)


def _read(base, models, numbers, *, kernel, choices):
    like = models[0] if base is None else base
    return kernel(_arrays(base, models, wide(like.dtype)), **numbers, **dict(choices))


def wide(dtype: Any) -> Any:
    """The dtype to compute in: float32, or a wider one that leaves have."""
    return jnp.promote_types(jnp.float32, dtype)


def _arrays(base: Array | None, models: Sequence[Array], dtype: Any) -> list[Array]:
    arrays = [model.astype(dtype) for model in models]
    if base is None:
        return arrays
    # What follows in bfloat16 would be rounded to three digits, step by step.
    return [array - base.astype(dtype) for array in arrays]


def over_units(kernel: Kernel, units: tuple[int, ...]) -> Kernel:
    """Maps `kernel` over the axes `units` of its arrays, with its own keys for each."""

    def one(arrays, keys):
        return kernel(arrays) if keys is None else kernel(arrays, keys=list(keys))

    def mapped(arrays, keys):
        front = tuple(range(len(units)))
        arrays = [jnp.moveaxis(array, units, front) for array in arrays]
        if keys is not None:
            shape = arrays[0].shape[: len(units)]
            index = jnp.arange(int(np.prod(shape)), dtype=jnp.uint32)
            fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
            keys = [fold(key, index).reshape(shape) for key in keys]
        over_all = one
        for _ in units:
            over_all = jax.vmap(over_all)
        return jnp.moveaxis(over_all(arrays, keys), front, units)

    return mapped if units else one


def task_vector(base: Params, model: Params) -> Params:
    """`model - base`, in float32 or wider.

    Returns:
        A tree like `base`; leaves that hold no floating-point numbers come out as
        empty arrays, so that they count in no statistic.

    Raises:
        ValueError: the trees are not alike.

    Example:
        >>> task_vector({"w": jnp.ones(2)}, {"w": jnp.array([1.5, 1.0])})["w"].tolist()
        [0.5, 0.0]
    """
    check_alike(base, [model], names=["base", "model"])
    model = rebuild(base, named_leaves(model))
    return jax.tree.map(_difference, base, model)


def _difference(base: Any, model: Any) -> Any:
    if not is_float(base):
        return jnp.zeros((0,), jnp.float32)
    arguments = base, sharding.join(model, base)
    if not any_lazy(arguments):
        return _subtract_leaf(*arguments)
    like = jax.ShapeDtypeStruct(base.shape, wide(base.dtype))
    return Deferred(_subtract_leaf, _subtract, arguments, _subtract, like)


@jax.jit
def _subtract_leaf(base: Array, model: Array) -> Array:
    return sharding.auto(_subtract, like=base)(base, model)


def _subtract(base: Array, model: Array) -> Array:
    return _arrays(base, [model], wide(base.dtype))[0]
