"""A PEFT LoRA adapter and its base: the model that one makes of the other.

An adapter adds `scaling * B @ A` to leaves of its base. Factors mean nothing apart (the
mean of products is not the product of the means), so no checkpoint offers them as
leaves.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxmerge.checkpoints.interface import (
    FLOATS,
    Checkpoint,
    CheckpointError,
    Index,
    LeafInfo,
)
from jaxmerge.checkpoints.names import require_leaf
from jaxmerge.checkpoints.peft_files import (
    CONFIG_NAME,
    MERGE_FIRST,
    PeftAdapter,
    open_adapter,
)

if TYPE_CHECKING:
    from jaxmerge.lowrank import LowRank


@dataclass(frozen=True)
class AdapterOnBase:
    """The model that an adapter makes of its base (a `Checkpoint`).

    Leaves that the adapter changes are in float32, or wider if they were: rounding to
    bfloat16 would lose most of a small update. A leaf is computed when it is read.
    """

    path: Path
    leaves: Mapping[str, LeafInfo]
    _adapter: PeftAdapter = field(repr=False)
    _base: Checkpoint = field(repr=False)
    _transposed: frozenset[str] = field(repr=False)

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Reads the leaf of the base and adds the adapter's update to it."""
        require_leaf(name, self.leaves, self.path)
        if name in self._adapter.whole:
            start = self._adapter.read_whole(name, index)
        else:
            start = self._base.read(name, index)
        start = start.astype(self.leaves[name].dtype, copy=False)
        if name not in self._adapter.factors:
            return start
        return start + self._update(name, index)

    def _update(self, name: str, index: Index) -> np.ndarray:
        left, right = self._adapter.read_factors(name, self.leaves[name].dtype)
        if name in self._transposed:
            left, right = right.T, left.T
        if index is not ...:
            left, right = left[index[:1]], right[:, *index[1:]]
        return np.tensordot(left, right, axes=1)

    def sidecars(self) -> list[Path]:
        return self._base.sidecars()

    def digest(self) -> dict[str, str]:
        """Computes the BLAKE3 of the adapter's own files, not of the base."""
        return self._adapter.digest()


def put_on_base(adapter: PeftAdapter, base: Checkpoint) -> AdapterOnBase:
    """Joins an adapter and its base, checking that names and shapes fit.

    Raises:
        CheckpointError: they do not; the message names the leaf.
    """
    for name in adapter.names:
        try:
            require_leaf(name, base.leaves, base.path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{adapter.path} changes leaf {name!r}, but {error} The adapter was "
                f"trained on {adapter.base_name!r}; if that is this base, save it "
                "again from the model class that was trained, which names leaves so."
            ) from None
        if base.leaves[name].dtype not in FLOATS:
            raise CheckpointError(
                f"{adapter.path} changes leaf {name!r}, which is "
                f"{base.leaves[name].dtype} in {base.path}; take a base whose weights "
                "are in bfloat16, float16 or float32."
            )
        if name in adapter.whole:
            _check_shape(adapter, base, name, adapter.whole_shape(name))
    leaves = {
        name: info._replace(dtype=np.promote_types(info.dtype, np.float32))
        for name, info in base.leaves.items()
        if name in adapter.factors or name in adapter.whole
    }
    return AdapterOnBase(
        adapter.path,
        {**base.leaves, **leaves},
        adapter,
        base,
        _transposed_leaves(adapter, base),
    )


def load_adapter(
    path: str | os.PathLike[str], base: Checkpoint | None = None
) -> "dict[str, LowRank | np.ndarray]":
    """Reads what a PEFT LoRA adapter adds to the leaves of its base.

    Args:
        path: the directory with `adapter_config.json` and `adapter_model.safetensors`.
        base: the base, as `open_checkpoint` opens it. It is needed for leaves that were
            trained as a whole (`modules_to_save`, biases), which the adapter stores as
            new values; the names and shapes of all leaves are checked against it.

    Returns:
        From leaf names of the base to a `LowRank` of NumPy arrays in float32, with the
        scaling (alpha / r, or alpha / sqrt(r) of rsLoRA) in its left factor, or to a
        task vector, for leaves that were trained as a whole. `apply_adapter` adds them
        to a base.

    Raises:
        CheckpointError: another kind of adapter than plain LoRA, a damaged one, one
            that does not fit `base`, or that needs it.
    """
    # jax comes with it: only who wants a pytree should wait for that.
    from jaxmerge.lowrank import LowRank

    adapter = open_adapter(Path(path))
    whole: dict[str, LowRank | np.ndarray] = {}
    if base is not None:
        model = put_on_base(adapter, base)
        whole = {name: model.read(name) - base.read(name) for name in adapter.whole}
    elif adapter.whole:
        raise CheckpointError(
            f"{path} stores leaf {next(iter(adapter.whole))!r} as a whole, from which "
            "a task vector is found by subtracting the base: "
            "load_adapter(path, jaxmerge.open_checkpoint(base))."
        )
    factors = {name: adapter.read_factors(name) for name in adapter.factors}
    return {
        name: LowRank(left, right.reshape(len(right), -1))  # type: ignore[arg-type]
        for name, (left, right) in factors.items()
    } | whole


def _transposed_leaves(adapter: PeftAdapter, base: Checkpoint) -> frozenset[str]:
    """The leaves that store (inputs, outputs).

    One setting speaks of all linear layers of an adapter, though a model may have both
    kinds, and PEFT corrects it by the layer. So shapes decide, and for square matrices
    the setting, unless a shape has proved it wrong.
    """
    transposed, square, proved = set(), [], {}
    for name, factors in adapter.factors.items():
        shape, product = base.leaves[name].shape, adapter.product_shape(name)
        if factors.embedding:
            _check_shape(adapter, base, name, product[::-1])
            transposed.add(name)
        elif len(product) > 2 or shape not in (product, product[::-1]):
            _check_shape(adapter, base, name, product)
        elif product == product[::-1]:
            square.append(name)
        else:
            proved[name] = shape != product
    for name, is_transposed in proved.items():
        if square and is_transposed != adapter.fan_in_fan_out:
            raise CheckpointError(
                f"{adapter.path}: fan_in_fan_out is {adapter.fan_in_fan_out} in "
                f"{CONFIG_NAME}, which the shape of leaf {name!r} in {base.path} "
                f"contradicts, and the shape of leaf {square[0]!r} does not tell. If "
                "all adapted layers are of one kind, correct the setting. "
                + MERGE_FIRST
            )
    transposed.update(name for name, is_transposed in proved.items() if is_transposed)
    return frozenset(transposed.union(square if adapter.fan_in_fan_out else ()))


def _check_shape(
    adapter: PeftAdapter, base: Checkpoint, name: str, shape: tuple[int, ...]
) -> None:
    if shape != base.leaves[name].shape:
        raise CheckpointError(
            f"{adapter.path} has an update of shape {shape} for leaf {name!r}, which "
            f"has shape {base.leaves[name].shape} in {base.path}. Take the base that "
            f"it was trained on, {adapter.base_name!r}."
        )
