"""What a store keeps of a task: the kinds of stores, each a few functions of one leaf.

- `tall`: one multi-task vector for all tasks, and a bit per entry and task that says
  whether the entry speaks for the task (TALL-masks).
- `emr`: one elected task vector, a bit per entry and task, a scale per task (EMR).
- `tsv`: the leading singular vectors of each task matrix (TSV-Compress).
- `tvq`: each task vector in a few bits per entry.
- `bitdelta`: the signs of each task vector, and one magnitude per matrix.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.adapters import tsv_compress
from jaxmerge.checkpoints import LeafInfo
from jaxmerge.compression.packing import add_masked, pack
from jaxmerge.compression.quantising import (
    Codes,
    Signs,
    apply_quantised,
    binarise,
    quantise,
)
from jaxmerge.leafwise import units_of
from jaxmerge.lowrank import LowRank, apply_adapter
from jaxmerge.matrices import MatrixAxes, leaf_axes, matrix_shape
from jaxmerge.methods.masking import localise
from jaxmerge.methods.trimming import ties
from jaxmerge.methods.unified import agreeing, unify
from jaxmerge.options import Leaf, choice, number, whole_number
from jaxmerge.tree import is_float

Options = Mapping[str, Any]
Parts = dict[str, Any]
"""What is kept of a leaf for one task: arrays by name; masks are packed in rows."""

CALLER = "create_store"
WHOLE = "whole"


class StoredLeaf(NamedTuple):
    """A leaf, and how tasks keep what they change of it.

    Attributes:
        name: its name in the base.
        info: its shape and dtype.
        whole: whether a task that changes it keeps all of it, exactly: it holds no
            floating-point numbers, or it is no matrix in a store of matrices.
        axes: which axes stack layers and, in a store of matrices, which are inputs and
            outputs.
        rank: the number of singular triplets kept, if so.
    """

    name: str
    info: LeafInfo
    whole: bool = False
    axes: MatrixAxes = MatrixAxes((), (), ())
    rank: int = 0

    @property
    def wide(self) -> np.dtype:
        """The dtype of numbers about the leaf: float32, or wider if it is."""
        return np.promote_types(self.info.dtype, np.float32)


class Kind(NamedTuple):
    """What a store of one kind keeps, and how it makes leaves of it.

    Attributes:
        summary: one line for users.
        defaults: the options and their defaults.
        parts: shape and dtype of what is kept of a leaf, by name; bool if packed.
        encode: from a task vector, and the vector that tasks share, to its parts.
        decode: from the base leaf, the shared vector, the parts and the task's scale to
            the leaf.
        share: from all task vectors to the vector that tasks share.
        by_matrix: whether it codes matrices alone, and keeps other leaves whole.
    """

    summary: str
    defaults: Options
    parts: Callable[[StoredLeaf, Options], dict[str, LeafInfo]]
    encode: Callable[[StoredLeaf, Array, Any, Options], Parts]
    decode: Callable[[StoredLeaf, Any, Any, Parts, float], Any]
    share: Callable[[StoredLeaf, Sequence[Array], Options], Array] | None = None
    by_matrix: bool = False


def in_order(leaves: Mapping[str, LeafInfo]) -> list[str]:
    """The order of leaves in a store: wide dtypes first, so that all are aligned."""
    return sorted(leaves, key=lambda name: (-leaves[name].dtype.itemsize, name))


def plan_leaf(
    kind: str, name: str, info: LeafInfo, options: Options, tasks: int
) -> StoredLeaf:
    """Decides how a leaf is kept.

    Raises:
        ValueError: no rule says which axes of a leaf are inputs and which are outputs.
    """
    if not is_float(info):
        return StoredLeaf(name, info, whole=True)
    if "stack_axes" not in KINDS[kind].defaults:
        return StoredLeaf(name, info)
    stacked = options["stack_axes"]
    if not KINDS[kind].by_matrix:
        stack = units_of(Leaf(CALLER, name, info.shape, tasks), stacked)
        return StoredLeaf(name, info, axes=MatrixAxes(stack, (), ()))
    try:
        axes = leaf_axes(name, info.shape, options["matrices"], stacked)
    except ValueError as error:
        raise ValueError(
            f"{CALLER}: {error} Such rules are the option `matrices`."
        ) from None
    if not axes.is_matrix:
        return StoredLeaf(name, info, whole=True, axes=axes)
    full = min(matrix_shape(info.shape, axes)[-2:])
    rank = min(full, options.get("rank") or max(1, full // tasks))
    return StoredLeaf(name, info, axes=axes, rank=rank)


def checked_options(kind: str, given: Options, tasks: Collection[str]) -> Options:
    """All options of a kind.

    Raises:
        ValueError: the kind or an option is unknown, or its value is out of range.
    """
    choice(CALLER, "kind", kind, list(KINDS))
    defaults = KINDS[kind].defaults
    for name in given:
        if name not in defaults:
            known = ", ".join(defaults) or "none"
            raise ValueError(
                f"{CALLER}: a store of kind {kind!r} has no option {name!r}; its "
                f"options: {known}."
            )
    options = {**defaults, **given}
    if "threshold" in options:
        options["threshold"] = _checked_threshold(options["threshold"], tasks)
    if "multi_task" in options:
        choice(CALLER, "multi_task", options["multi_task"], list(_MIXTURES))
    if "bits" in options and whole_number(CALLER, "bits", options["bits"], least=1) > 8:
        raise ValueError(f"{CALLER}: bits is {options['bits']}; it must be at most 8.")
    if options.get("rank") is not None:
        whole_number(CALLER, "rank", options["rank"], least=1)
    return options


def _checked_threshold(threshold: Any, tasks: Collection[str]) -> Any:
    if not isinstance(threshold, Mapping):
        return float(number(CALLER, "threshold", threshold, "[0, inf)"))
    if threshold.keys() != set(tasks):
        raise ValueError(
            f"{CALLER}: threshold is given for {', '.join(map(repr, threshold))}, but "
            f"the tasks are {', '.join(map(repr, tasks))}; give one for each task."
        )
    return {
        task: float(number(CALLER, f"threshold of task {task!r}", value, "[0, inf)"))
        for task, value in threshold.items()
    }


def options_of_task(options: Options, task: str) -> Options:
    """The options with the threshold of one task."""
    threshold = options.get("threshold")
    if isinstance(threshold, Mapping):
        return {**options, "threshold": threshold[task]}
    return options


def _sum(leaf: StoredLeaf, deltas: Sequence[Array]) -> Array:
    return sum(deltas)  # type: ignore[return-value]


def _ties(leaf: StoredLeaf, deltas: Sequence[Array]) -> Array:
    trees = [{leaf.name: delta} for delta in deltas]
    start = {leaf.name: jnp.zeros_like(deltas[0])}
    return ties(start, trees, vote="mass", tie="majority", aggregate="sum")[leaf.name]


_MIXTURES = {"task_arithmetic": _sum, "ties": _ties}


def _mask_parts(leaf: StoredLeaf, options: Options) -> dict[str, LeafInfo]:
    return {"bits": LeafInfo(leaf.info.shape, np.dtype(bool))}


def _tall_encode(
    leaf: StoredLeaf, delta: Array, vector: Any, options: Options
) -> Parts:
    return {"bits": _localised(delta, vector, options["threshold"])}


@jax.jit
def _localised(delta: Array, vector: Array, threshold: float) -> Array:
    return pack(localise(delta, vector.astype(delta.dtype), threshold, True))


_unified = jax.jit(unify)


@jax.jit
def _agreeing(delta: Array, vector: Array) -> Array:
    return pack(agreeing(delta, vector))


def _masked_decode(
    leaf: StoredLeaf, base: Any, vector: Any, parts: Parts, scale: float
) -> Any:
    return add_masked(base, vector, parts["bits"], scale)


def _low_rank_parts(leaf: StoredLeaf, options: Options) -> dict[str, LeafInfo]:
    *stack, inputs, outputs = matrix_shape(leaf.info.shape, leaf.axes)
    return {
        "left": LeafInfo((*stack, outputs, leaf.rank), leaf.wide),
        "right": LeafInfo((*stack, leaf.rank, inputs), leaf.wide),
    }


def _low_rank_encode(
    leaf: StoredLeaf, delta: Array, vector: Any, options: Options
) -> Parts:
    (adapter,) = tsv_compress(
        {leaf.name: jnp.zeros_like(delta)},
        [{leaf.name: delta}],
        rank=leaf.rank,
        matrices={leaf.name: leaf.axes},
    )
    factors = adapter[leaf.name]
    return {"left": factors.left, "right": factors.right}  # type: ignore[union-attr]


def _low_rank_decode(
    leaf: StoredLeaf, base: Any, vector: Any, parts: Parts, scale: float
) -> Any:
    moved = apply_adapter(
        {leaf.name: base},
        {leaf.name: LowRank(parts["left"], parts["right"])},
        matrices={leaf.name: leaf.axes},
    )
    return moved[leaf.name].astype(base.dtype)


def _per_layer(leaf: StoredLeaf) -> LeafInfo:
    """One number for each layer of a leaf, along axes of length 1."""
    sizes = enumerate(leaf.info.shape)
    shape = tuple(size if axis in leaf.axes.stack else 1 for axis, size in sizes)
    return LeafInfo(shape, leaf.wide)


def _codes_parts(leaf: StoredLeaf, options: Options) -> dict[str, LeafInfo]:
    planes = LeafInfo((options["bits"], *(leaf.info.shape or (1,))), np.dtype(bool))
    return {"bits": planes, "step": _per_layer(leaf), "zero": _per_layer(leaf)}


def _codes_encode(
    leaf: StoredLeaf, delta: Array, vector: Any, options: Options
) -> Parts:
    return quantise(delta, options["bits"], leaf.axes.stack)._asdict()


def _codes_decode(
    leaf: StoredLeaf, base: Any, vector: Any, parts: Parts, scale: float
) -> Any:
    return apply_quantised(base, Codes(**parts))


def _signs_parts(leaf: StoredLeaf, options: Options) -> dict[str, LeafInfo]:
    return _mask_parts(leaf, options) | {"scale": _per_layer(leaf)}


def _signs_encode(
    leaf: StoredLeaf, delta: Array, vector: Any, options: Options
) -> Parts:
    return binarise(delta, leaf.axes.stack)._asdict()


def _signs_decode(
    leaf: StoredLeaf, base: Any, vector: Any, parts: Parts, scale: float
) -> Any:
    return apply_quantised(base, Signs(**parts))


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


@jax.jit
def l1_norms(delta: Array, vector: Array, bits: Array) -> tuple[Array, Array]:
    """The `Norms` of one leaf."""
    kept = add_masked(jnp.zeros_like(delta), vector, bits)
    return jnp.sum(jnp.abs(delta)), jnp.sum(jnp.abs(kept))


_MATRICES = {"matrices": None, "stack_axes": 0}

KINDS: Mapping[str, Kind] = {
    "tall": Kind(
        "one multi-task vector, a bit per entry and task (TALL-masks)",
        {"threshold": 0.4, "multi_task": "task_arithmetic"},
        _mask_parts,
        _tall_encode,
        _masked_decode,
        lambda leaf, deltas, options: _MIXTURES[options["multi_task"]](leaf, deltas),
    ),
    "emr": Kind(
        "one elected task vector, a bit per entry and task, a scale per task (EMR)",
        {},
        _mask_parts,
        lambda leaf, delta, vector, options: {"bits": _agreeing(delta, vector)},
        _masked_decode,
        lambda leaf, deltas, options: _unified(deltas),
    ),
    "tsv": Kind(
        "leading singular vectors of each task matrix (TSV-Compress)",
        {"rank": None, **_MATRICES},
        _low_rank_parts,
        _low_rank_encode,
        _low_rank_decode,
        by_matrix=True,
    ),
    "tvq": Kind(
        "task vectors in a few bits per entry (TVQ)",
        {"bits": 4, "stack_axes": 0},
        _codes_parts,
        _codes_encode,
        _codes_decode,
    ),
    "bitdelta": Kind(
        "signs of task vectors, a magnitude per matrix (BitDelta)",
        dict(_MATRICES),
        _signs_parts,
        _signs_encode,
        _signs_decode,
        by_matrix=True,
    ),
}
