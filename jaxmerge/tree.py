"""Parameter trees: the paths of their leaves, whether trees are alike, rules on paths.

A path joins the keys that lead to a leaf with slashes: `"layers/3/mlp/up/kernel"`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Params = Any
"""A pytree of arrays: nested dicts, lists, dataclasses, an `nnx.State`, ..."""

T = TypeVar("T")


def named_leaves(tree: Params) -> dict[str, Any]:
    """The leaves of `tree` by path, in the order of `jax.tree.leaves`.

    Raises:
        ValueError: two leaves share a path, as in `{"a/b": x, "a": {"b": y}}`.

    Example:
        >>> list(named_leaves({"mlp": [{"kernel": 1.0}, {"kernel": 2.0}]}))
        ['mlp/0/kernel', 'mlp/1/kernel']
    """
    leaves = {}
    for keys, leaf in jax.tree.leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path in leaves:
            raise ValueError(
                f"Two leaves have the path {path!r}; rename a key that contains '/'."
            )
        leaves[path] = leaf
    return leaves


def leaf_paths(tree: Params) -> list[str]:
    """The paths of all leaves, in the order of `jax.tree.leaves`."""
    return list(named_leaves(tree))


def rebuild(like: Params, leaves: Mapping[str, Any]) -> Params:
    """The tree of the structure of `like` that holds `leaves`, given by path."""
    return jax.tree.unflatten(
        jax.tree.structure(like), [leaves[path] for path in leaf_paths(like)]
    )


def first_match(rules: Mapping[str, T], path: str) -> T:
    """The value of the first rule whose regular expression matches all of `path`.

    Raises:
        KeyError: no rule matches.
        ValueError: a rule before that is no regular expression.

    Example:
        >>> first_match({".*/bias": 0, ".*": 1}, "mlp/bias")
        0
    """
    for pattern, value in rules.items():
        try:
            matches = re.fullmatch(pattern, path)
        except re.error as error:
            raise ValueError(
                f"{pattern!r} is no valid regular expression: {error}"
            ) from None
        if matches:
            return value
    raise KeyError(path)


def is_float(leaf: Any) -> bool:
    """Whether a leaf holds floating-point numbers: the kind that is merged."""
    return jnp.issubdtype(_dtype(leaf), jnp.floating)


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds the numbers of all `dtypes`.

    Example:
        >>> common_dtype(map(np.dtype, ("float16", "bfloat16"))).name
        'float32'
    """
    found, halves = set(dtypes), {np.dtype("float16"), np.dtype(jnp.bfloat16)}
    # Neither holds the other, and NumPy does not look for a third one.
    return np.result_type(
        *(found - halves | {np.float32} if halves <= found else found)
    )


def is_factor(path: str) -> bool:
    """Whether a leaf is, by its name, one of the two factors of a LoRA update.

    The mean of products is not the product of means, so they cannot be merged apart.

    Example:
        >>> is_factor("model.layers.0.q_proj.lora_A.weight"), is_factor("lora/kernel")
        (True, False)
    """
    return bool(re.fullmatch(r"(.*[/.])?lora_(embedding_)?[ABab]([/.].*)?", path))


def check_alike(
    first: Params, others: Sequence[Params], *, names: Sequence[str]
) -> None:
    """Checks that all trees have the leaves, shapes and kinds of numbers of `first`.

    `names` says how messages call `first` and then each of `others`. Only metadata
    is looked at, so `jax.ShapeDtypeStruct` leaves and tracers are as good as arrays.

    Raises:
        ValueError: lists every leaf that differs.
    """
    for name, tree in zip(names, (first, *others), strict=True):
        _check_arrays(name, tree)
    want = named_leaves(first)
    problems = [
        f"{names[0]} leaf {path!r} is {_dtype(leaf)}, {_UNFIT[kind]}"
        for path, leaf in want.items()
        if (kind := _unfit_kind(_dtype(leaf)))
    ]
    if factors := [path for path in want if is_factor(path)]:
        problems.append(
            f"{names[0]} leaf {factors[0]!r} is one of {len(factors)} factors of LoRA "
            "updates, of which only products can be merged: make models of adapters "
            "with jaxmerge.apply_adapter(base, adapter)"
        )
    for name, other in zip(names[1:], others, strict=True):
        got = named_leaves(other)
        problems += [
            f"only {names[0]} has leaf {p!r}, {name} has not"
            for p in want.keys() - got.keys()
        ]
        problems += [
            f"only {name} has leaf {p!r}, {names[0]} has not"
            for p in got.keys() - want.keys()
        ]
        for path in want.keys() & got.keys():
            if np.shape(got[path]) != np.shape(want[path]):
                problems.append(
                    f"{name} leaf {path!r} has shape {np.shape(got[path])}, "
                    f"{names[0]} has {np.shape(want[path])}"
                )
            elif is_float(want[path]) != is_float(got[path]):
                problems.append(
                    f"{name} leaf {path!r} has dtype {_dtype(got[path])}, "
                    f"{names[0]} has {_dtype(want[path])}"
                )
    if problems:
        raise ValueError(
            "the trees are not alike: " + "; ".join(sorted(problems)) + ". "
            "Drop, rename or reshape these leaves first (in a recipe: `take`)."
        )


def _check_arrays(name: str, tree: Params) -> None:
    """Raises if a tree is not one of arrays: a path, say, or a module."""
    leaves = named_leaves(tree)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            what = f"{name} leaf {path!r}" if path else name
            raise ValueError(
                f"{what} is a {type(leaf).__name__}, not an array; load checkpoints "
                "first, for example with jaxmerge.load(path)."
            )


_UNFIT = {
    "complex": "whose real and imaginary parts must be merged apart",
    "narrow": "which means nothing without its scales; convert it to bfloat16 first",
}


def _unfit_kind(dtype: np.dtype) -> str | None:
    """Why no method can merge numbers of this dtype, if so."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "complex"
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 2
    return "narrow" if narrow else None


def _dtype(leaf: Any) -> np.dtype:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
