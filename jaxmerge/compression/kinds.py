"""What a store keeps of a task: the kinds of stores, each a few functions of one leaf.

- `tall`: one multi-task vector for all tasks, and a bit per entry and task that says
  whether the entry speaks for the task (TALL-masks).
- `emr`: one elected task vector, a bit per entry and task, a scale per task (EMR).
- `tsv`: the leading singular vectors of each task matrix (TSV-Compress).
- `tvq`: each task vector in a few bits per entry.
- `rtvq`: the mean of all task vectors in a few bits per entry, and what each adds to it
  in fewer.
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
    dequantise,
    quantise,
)
from jaxmerge.leafwise import map_leaves, units_of
from jaxmerge.lowrank import LowRank, apply_adapter
from jaxmerge.matrices import MatrixAxes, leaf_axes, matrix_shape
from jaxmerge.methods.masking import localise
from jaxmerge.methods.multitask import MultiTaskVector, multi_task_vector
from jaxmerge.methods.unified import agreeing, unify
from jaxmerge.options import Leaf, choice, number, whole_number, without_effect
from jaxmerge.streaming import computed
from jaxmerge.tree import Params, is_float

Options = Mapping[str, Any]
Parts = dict[str, Any]
"""What is kept of a leaf for one task or for all: arrays by name; masks are packed."""

Models = Mapping[str, Any]
"""A leaf of the models, by task, of those tasks that change it; it may be lazy."""

CALLER = "create_store"
WHOLE = "whole"


class LeafLayout(NamedTuple):
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

    @property
    def is_double(self) -> bool:
        """Whether arithmetic with it needs float64, which JAX has off."""
        return self.info.dtype == np.float64


class Kind(NamedTuple):
    """What a store of one kind keeps, and how it makes leaves of it.

    Attributes:
        summary: one line for users.
        defaults: the options and their defaults.
        parts: shape and dtype of what is kept of a leaf, by name; bool if packed.
        encode: from a task vector, and the parts that tasks share, to its parts.
        decode: from the base leaf, the shared parts, the parts and the task's scale to
            the leaf.
        share: from a leaf of the base and of the models, and what `measure` found, to
            the parts that tasks share. Lazy leaves are read some rows at a time.
        shared: shape and dtype of these, as of `parts`.
        measure: what must be known before the first leaf is written, from the base and
            the models by task, trees of lazy leaves.
        by_matrix: whether it codes matrices alone, and keeps other leaves whole.
    """

    summary: str
    defaults: Options
    parts: Callable[[LeafLayout, Options], dict[str, LeafInfo]]
    encode: Callable[[LeafLayout, Array, Parts, Options], Parts]
    decode: Callable[[LeafLayout, Any, Parts, Parts, float], Any]
    share: Callable[[LeafLayout, Any, Models, Options, Any], Parts] | None = None
    shared: Callable[[LeafLayout, Options], dict[str, LeafInfo]] = lambda leaf, _: {}
    measure: Callable[[Params, Mapping[str, Params], Options], Any] = (
        lambda base, models, options: None
    )
    by_matrix: bool = False


def in_order(leaves: Mapping[str, LeafInfo]) -> list[str]:
    """The order of leaves in a store: wide dtypes first, so that all are aligned."""
    return sorted(leaves, key=lambda name: (-leaves[name].dtype.itemsize, name))


def plan_leaf(
    kind: str, name: str, info: LeafInfo, options: Options, tasks: int
) -> LeafLayout:
    """Decides how a leaf is kept.

    Raises:
        ValueError: no rule says which axes of a leaf are inputs and which are outputs.
    """
    if not is_float(info):
        return LeafLayout(name, info, whole=True)
    if "stack_axes" not in KINDS[kind].defaults:
        return LeafLayout(name, info)
    stacked = options["stack_axes"]
    if not KINDS[kind].by_matrix:
        stack = units_of(Leaf(CALLER, name, info.shape, tasks), stacked)
        return LeafLayout(name, info, axes=MatrixAxes(stack, (), ()))
    try:
        axes = leaf_axes(name, info.shape, options["matrices"], stacked)
    except ValueError as error:
        raise ValueError(
            f"{CALLER}: {error} Such rules are the option `matrices`."
        ) from None
    if not axes.is_matrix:
        return LeafLayout(name, info, whole=True, axes=axes)
    full = min(matrix_shape(info.shape, axes)[-2:])
    rank = min(full, options.get("rank") or max(1, full // tasks))
    return LeafLayout(name, info, axes=axes, rank=rank)


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
        choice(CALLER, "multi_task", options["multi_task"], ["task_arithmetic", "ties"])
        choice(CALLER, "scope", options["scope"], ["leaf", "model"])
        if options["multi_task"] != "ties":
            needs = "multi_task='ties'"
            without_effect(CALLER, "scope", options["scope"], "leaf", needs)
    for name in {"bits", "shared_bits"} & options.keys():
        if whole_number(CALLER, name, options[name], least=1) > 8:
            raise ValueError(
                f"{CALLER}: {name} is {options[name]}; it must be at most 8."
            )
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


def _one_vector(leaf: LeafLayout, options: Options) -> dict[str, LeafInfo]:
    return {WHOLE: leaf.info}


def _mask_parts(leaf: LeafLayout, options: Options) -> dict[str, LeafInfo]:
    return {"bits": LeafInfo(leaf.info.shape, np.dtype(bool))}


class _Mixture(NamedTuple):
    """How the task vectors of `tasks`, in this order, are added up."""

    tasks: list[str]
    vector: MultiTaskVector


def _tall_measure(
    base: Params, models: Mapping[str, Params], options: Options
) -> _Mixture:
    how = options["multi_task"], options["scope"]
    trees = list(models.values())
    return _Mixture(list(models), multi_task_vector(CALLER, base, trees, *how, 0))


def _tall_share(
    leaf: LeafLayout, base: Any, models: Models, options: Options, measured: _Mixture
) -> Parts:
    tasks, vector = measured
    of_tasks = [models.get(task, base) for task in tasks]
    kernel, dtype, numbers = vector.kernel, leaf.info.dtype, vector.numbers
    return {WHOLE: _combined(leaf, kernel, base, of_tasks, dtype, numbers)}


def _combined(
    leaf: LeafLayout,
    kernel: Callable[..., Array],
    base: Any,
    models: Sequence[Any],
    dtype: np.dtype,
    numbers: Callable[[Leaf], dict[str, Any]] = lambda leaf: {},
) -> np.ndarray:
    """What a kernel makes of the task vectors of a leaf, in `dtype`."""
    trees = [{leaf.name: model} for model in models]
    of_base = {leaf.name: base}
    made = map_leaves(kernel, trees, numbers, method=CALLER, base=of_base)[leaf.name]
    whole = np.empty(leaf.info.shape, dtype)
    with np.errstate(over="ignore"):
        for index, part in computed(made, leaf.is_double):
            whole[index] = part
    return whole


def _tall_encode(
    leaf: LeafLayout, delta: Array, shared: Parts, options: Options
) -> Parts:
    return {"bits": _localised(delta, shared[WHOLE], options["threshold"])}


@jax.jit
def _localised(delta: Array, vector: Array, threshold: float) -> Array:
    return pack(localise(delta, vector.astype(delta.dtype), threshold, True))


def _emr_share(
    leaf: LeafLayout, base: Any, models: Models, options: Options, measured: Any
) -> Parts:
    of_tasks, dtype = list(models.values()), leaf.info.dtype
    return {WHOLE: _combined(leaf, unify, base, of_tasks, dtype)}


def _emr_encode(
    leaf: LeafLayout, delta: Array, shared: Parts, options: Options
) -> Parts:
    return {"bits": _agreeing(delta, shared[WHOLE])}


@jax.jit
def _agreeing(delta: Array, vector: Array) -> Array:
    return pack(agreeing(delta, vector))


def _masked_decode(
    leaf: LeafLayout, base: Any, shared: Parts, parts: Parts, scale: float
) -> Any:
    return add_masked(base, shared[WHOLE], parts["bits"], scale)


def _low_rank_parts(leaf: LeafLayout, options: Options) -> dict[str, LeafInfo]:
    *stack, inputs, outputs = matrix_shape(leaf.info.shape, leaf.axes)
    return {
        "left": LeafInfo((*stack, outputs, leaf.rank), leaf.wide),
        "right": LeafInfo((*stack, leaf.rank, inputs), leaf.wide),
    }


def _low_rank_encode(
    leaf: LeafLayout, delta: Array, shared: Parts, options: Options
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
    leaf: LeafLayout, base: Any, shared: Parts, parts: Parts, scale: float
) -> Any:
    moved = apply_adapter(
        {leaf.name: base},
        {leaf.name: LowRank(parts["left"], parts["right"])},
        matrices={leaf.name: leaf.axes},
    )
    return moved[leaf.name].astype(base.dtype)


def _per_layer(leaf: LeafLayout) -> LeafInfo:
    """One number for each layer of a leaf, along axes of length 1."""
    sizes = enumerate(leaf.info.shape)
    shape = tuple(size if axis in leaf.axes.stack else 1 for axis, size in sizes)
    return LeafInfo(shape, leaf.wide)


def _codes_of(leaf: LeafLayout, bits: int) -> dict[str, LeafInfo]:
    planes = LeafInfo((bits, *(leaf.info.shape or (1,))), np.dtype(bool))
    return {"bits": planes, "step": _per_layer(leaf), "zero": _per_layer(leaf)}


def _codes_parts(leaf: LeafLayout, options: Options) -> dict[str, LeafInfo]:
    return _codes_of(leaf, options["bits"])


def _codes_encode(
    leaf: LeafLayout, delta: Array, shared: Parts, options: Options
) -> Parts:
    return quantise(delta, options["bits"], leaf.axes.stack)._asdict()


def _codes_decode(
    leaf: LeafLayout, base: Any, shared: Parts, parts: Parts, scale: float
) -> Any:
    return apply_quantised(base, Codes(**parts))


def _offset_parts(leaf: LeafLayout, options: Options) -> dict[str, LeafInfo]:
    return _codes_of(leaf, options["shared_bits"])


def _offset_share(
    leaf: LeafLayout, base: Any, models: Models, options: Options, measured: Any
) -> Parts:
    total = _combined(leaf, _added, base, list(models.values()), leaf.wide)
    # XLA would multiply by the rounded inverse of a number that it knows.
    mean = total / len(models)
    return quantise(mean, options["shared_bits"], leaf.axes.stack)._asdict()


def _added(deltas: Sequence[Array]) -> Array:
    return sum(deltas)  # type: ignore[return-value]


def _residual_encode(
    leaf: LeafLayout, delta: Array, shared: Parts, options: Options
) -> Parts:
    residual = _residual(delta, Codes(**shared))
    return quantise(residual, options["bits"], leaf.axes.stack)._asdict()


@jax.jit
def _residual(delta: Array, offset: Codes) -> Array:
    # From what the offset is read as, not what it was: that corrects its errors.
    return delta - dequantise(offset, delta.shape)


def _residual_decode(
    leaf: LeafLayout, base: Any, shared: Parts, parts: Parts, scale: float
) -> Any:
    return apply_quantised(base, Codes(**shared), Codes(**parts))


def _signs_parts(leaf: LeafLayout, options: Options) -> dict[str, LeafInfo]:
    return _mask_parts(leaf, options) | {"scale": _per_layer(leaf)}


def _signs_encode(
    leaf: LeafLayout, delta: Array, shared: Parts, options: Options
) -> Parts:
    return binarise(delta, leaf.axes.stack)._asdict()


def _signs_decode(
    leaf: LeafLayout, base: Any, shared: Parts, parts: Parts, scale: float
) -> Any:
    return apply_quantised(base, Signs(**parts))


_MATRICES = {"matrices": None, "stack_axes": 0}

KINDS: Mapping[str, Kind] = {
    "tall": Kind(
        "one multi-task vector, a bit per entry and task (TALL-masks)",
        {"threshold": 0.4, "multi_task": "task_arithmetic", "scope": "leaf"},
        _mask_parts,
        _tall_encode,
        _masked_decode,
        _tall_share,
        _one_vector,
        _tall_measure,
    ),
    "emr": Kind(
        "one elected task vector, a bit per entry and task, a scale per task (EMR)",
        {},
        _mask_parts,
        _emr_encode,
        _masked_decode,
        _emr_share,
        _one_vector,
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
    "rtvq": Kind(
        "their mean in a few bits per entry, and what each adds in fewer (RTVQ)",
        {"bits": 2, "shared_bits": 3, "stack_axes": 0},
        _codes_parts,
        _residual_encode,
        _residual_decode,
        _offset_share,
        _offset_parts,
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
