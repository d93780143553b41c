"""Writes what a task keeps of each leaf that it changes."""

from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.checkpoints import LeafInfo
from jaxmerge.compression.files import (
    LeafFile,
    StoreError,
    as_bytes,
    seal,
    to_buffer,
)
from jaxmerge.compression.kinds import (
    KINDS,
    WHOLE,
    LeafLayout,
    Options,
    Parts,
)
from jaxmerge.compression.packing import add_masked
from jaxmerge.leafwise import task_vector


class Norms(NamedTuple):
    """L1 norms that the scale of a task is made of, summed over leaves.

    Attributes:
        delta: of the task vector.
        kept: of the shared vector within the task's mask.
    """

    delta: float = 0.0
    kept: float = 0.0

    def plus(self, delta: Any, kept: Any) -> "Norms":
        """With those of a further leaf."""
        return Norms(self.delta + float(delta), self.kept + float(kept))

    def scale(self) -> float:
        """What makes the norm of the masked vector that of the task vector; else 1."""
        return self.delta / self.kept if self.kept else 1.0


class NewTask:
    """The leaves of a task, while they are written."""

    def __init__(self, name: str, options: Options, file: BinaryIO):
        self.name, self.options = name, options
        self._file, self._norms = LeafFile(file), Norms()

    def keep(
        self,
        kind: str,
        leaf: LeafLayout,
        infos: Mapping[str, LeafInfo],
        value: np.ndarray,
        delta: Any,
        shared: Parts,
    ) -> None:
        """Writes what the task keeps of a leaf that it changes.

        Args:
            kind: of the store.
            leaf: how leaves of this name are kept.
            infos: the parts that are kept of it.
            value: the leaf of the model.
            delta: the task vector.
            shared: the parts that tasks share of the leaf.
        """
        if WHOLE in infos:
            parts = {WHOLE: value.astype(leaf.info.dtype)}
        else:
            parts = KINDS[kind].encode(leaf, delta, shared, self.options)
            if kind == "emr":
                norms = _l1_norms(delta, shared[WHOLE], parts["bits"])
                self._norms = self._norms.plus(*norms)
        arrays = {name: np.asarray(part) for name, part in parts.items()}
        self._file.write(leaf.name, to_buffer(arrays, infos))

    def document(
        self, kind: str, store: str, order: list[str], made: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What `task.json` says, sealed."""
        entries = self._file.entries
        listed = [
            entry and (entry.digest if entry.nbytes is None else list(entry))
            for entry in map(entries.get, order)
        ]
        threshold = {k: v for k, v in self.options.items() if k == "threshold"}
        scale = {"scale": self._norms.scale()} if kind == "emr" else {}
        document = {"name": self.name, "store": store, **threshold, **scale}
        return seal({**document, "leaves": listed, "made": made})


@jax.jit
def _l1_norms(delta: Array, vector: Array, bits: Array) -> tuple[Array, Array]:
    """The `Norms` of one leaf."""
    kept = add_masked(jnp.zeros_like(delta), vector, bits)
    return jnp.sum(jnp.abs(delta)), jnp.sum(jnp.abs(kept))


def changes(leaf: LeafLayout, start: np.ndarray, value: np.ndarray, task: str) -> Any:
    """The task vector of a leaf; None for a task that leaves it as it is.

    Of a leaf that has none, as it holds no floating-point numbers, its values.
    """
    if leaf.info.dtype.kind in "biu":
        return None if np.array_equal(start, value) else value
    delta = task_vector({"": start}, {"": value})[""]
    changed, finite = map(bool, _look_at(delta))
    if not finite:
        # Masks of attention may hold infinities, and are the same in all models.
        if np.array_equal(as_bytes(start), as_bytes(value)):
            return None
        raise StoreError(
            f"leaf {leaf.name!r} of models[{task!r}], or of the base, has entries that "
            "are NaN, infinite or too far apart; repair the checkpoint, or leave the "
            "model out."
        )
    return delta if changed else None


@jax.jit
def _look_at(delta: Array) -> tuple[Array, Array]:
    return jnp.any(delta != 0), jnp.all(jnp.isfinite(delta))
