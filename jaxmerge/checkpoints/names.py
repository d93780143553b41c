"""Leaf names: nested parameters to flat names such as "encoder/layer_0/kernel"."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmerge.checkpoints.interface import CheckpointError


def flatten(params: Any) -> dict[str, Any]:
    """Names every leaf of a pytree by its path, joined with "/".

    Containers without leaves, and None, leave no trace.

    Raises:
        CheckpointError: two leaves get one name, one leaf's name is a prefix of
            another's path, or `params` is a bare array.

    Example:
        >>> flatten({"dense": {"kernel": 1.0}, "layers": [2.0, 3.0]})
        {'dense/kernel': 1.0, 'layers/0': 2.0, 'layers/1': 3.0}
    """
    import jax  # Only pytrees need it: reading files must not wait for jax.

    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name:
            raise CheckpointError(
                "A leaf needs a name: put the array into a dict, {'name': array}."
            )
        if name in leaves:
            raise CheckpointError(f"Two leaves have the name {name!r}; rename one.")
        leaves[name] = leaf
    nest(leaves)
    return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Builds nested dicts from names with "/"; other names stay whole.

    Raises:
        CheckpointError: one name is a prefix of another's path.

    Example:
        >>> nest({"dense/kernel": 1.0, "model.layers.0.mlp.weight": 2.0})
        {'dense': {'kernel': 1.0}, 'model.layers.0.mlp.weight': 2.0}
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or last in node:
            raise CheckpointError(
                f"{name!r} and another leaf are nested in one another, so they fit in "
                "no dict of dicts: rename one, or read them by name from "
                "open_checkpoint(path)."
            )
        node[last] = leaf
    return tree


def require_leaf(name: str, leaves: Mapping[str, Any], path: Path) -> None:
    """Raises if the checkpoint at `path` has no leaf of this name."""
    if name not in leaves:
        close = difflib.get_close_matches(name, leaves, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "See `.leaves` for those."
        raise CheckpointError(f"{path} has no leaf {name!r}. {hint}")
