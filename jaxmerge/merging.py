"""Merges checkpoints as a recipe says, in bounded memory, whole or not at all.

Everything that can be known from names, shapes and options is checked before the first
value is read. A merge that was interrupted goes on where it was when it is run again.
"""

import collections
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxmerge
from jaxmerge import hosts
from jaxmerge.checkpoints import (
    REPORT_NAME,
    Checkpoint,
    CheckpointError,
    Index,
    Writer,
)
from jaxmerge.lazy import load
from jaxmerge.matrixwise import plan_matrices
from jaxmerge.planning import Inputs, MergeError, Part, open_inputs, plan_leaves
from jaxmerge.recipes import Recipe
from jaxmerge.reports import (
    LeafReport,
    describe,
    in_background,
    merge_report,
    sum_of_squares,
)
from jaxmerge.sharding import shardings, spread_evenly
from jaxmerge.streaming import (
    StoredLeaf,
    all_finite,
    computed,
    own_parts,
    precision,
    stream,
)
from jaxmerge.tree import is_float

Progress = Callable[[int, int, str], None]
"""Called with the bytes written so far, those of the whole output, and the leaf."""

MEMORY = 1_000_000_000
_INPUTS = ""  # What notes on inputs go by: no leaf has that name.


def merge_checkpoints(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    memory: int = MEMORY,
    mesh: Mesh | None = None,
    rules: Mapping[str, PartitionSpec] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merges checkpoints into a new one.

    Leaves are merged one by one, and those that are too large for `memory` some rows
    at a time: the result is the same. A method that needs all leaves at once (`pcb`
    with `scope: model`, say) is refused if they do not fit.

    If the process dies, or is interrupted, the same merge into the same output goes on
    with the leaves that are not there yet.

    On a mesh, leaves are spread over its devices. Several processes that have called
    `jax.distributed.initialize` all call this, with a mesh of all their devices: each
    reads the parts of leaves that its devices hold, and writes its share of the output,
    in a directory that all of them see.

    Args:
        recipe: what to merge, and how.
        out: the directory to create; it must not exist.
        memory: about how many bytes values may take, beside what the program needs.
        mesh: the devices to merge on; by default the first one.
        rules: from patterns of leaf paths to how leaves are sharded on the mesh; by
            default, and where none matches, into equal parts along the longest axes.
        progress: called whenever something was written.

    Returns:
        The report, as in `jaxmerge_report.json` next to the weights: the recipe,
        versions, SHA-256 of all inputs, and what became of each leaf.

    Raises:
        FileExistsError: `out` exists.
        CheckpointError: an input is missing or damaged, the disk is too small, or the
            beginning of another merge into `out` is there.
        MergeError: leaves that are not alike, options that do not fit, or a result
            that is not finite. Nothing is left behind.
        OtherHostError: another process raised one of these.

    Example:
        >>> import pathlib, tempfile
        >>> from jaxmerge import load, save
        >>> runs = pathlib.Path(tempfile.mkdtemp())
        >>> save(runs / "math", {"w": np.zeros(2, np.float32)})
        >>> save(runs / "code", {"w": np.ones(2, np.float32)})
        >>> recipe = Recipe("average", {"math": runs / "math", "code": runs / "code"})
        >>> report = merge_checkpoints(recipe, runs / "merged")
        >>> load(runs / "merged")["w"].tolist(), report["totals"]["treatments"]
        ([0.5, 0.5], {'merged': 1})
    """
    started = time.perf_counter()
    if os.path.lexists(out):
        raise FileExistsError(
            f"{out} exists already; remove it or choose another name."
        )
    inputs = open_inputs(recipe)
    part = Part(recipe, inputs, plan_leaves(recipe, inputs))
    placed = _shardings(part, mesh, rules)
    _try_on_shapes(part)
    _check_memory(part, memory)
    sidecars = _sidecars(recipe, inputs)
    with Writer(
        out,
        part.written,
        recipe.max_shard_bytes,
        identity=_identity(part, mesh),
        process=jax.process_index(),
        agree=None if jax.process_count() == 1 else hosts.agree,
    ) as writer:
        digests = in_background(lambda: _hash(inputs, writer))
        _go_on(writer, digests.result)
        merge = _Merge(part, writer, memory, placed, progress)
        stream([name for name in part.written if name not in writer.done], merge.leaf)
        for name, content in sidecars.items():
            writer.add_file(name, content)
        report = merge_report(
            recipe,
            inputs.base,
            inputs.models,
            merge.reports(),
            {
                p: files
                for share in hosts.gather(digests.result())
                for p, files in share.items()
            },
            seconds=time.perf_counter() - started,
        )
        writer.add_file(REPORT_NAME, _json(report))
    return report


class _Merge:
    """The leaves of a part on their way into the output.

    Args:
        part: what becomes of them.
        writer: of the output.
        memory: how many bytes values may take.
        placed: how leaves lie on a mesh.
        progress: told of everything that was written.
    """

    def __init__(
        self,
        part: Part,
        writer: Writer,
        memory: int,
        placed: Mapping[str, NamedSharding],
        progress: Progress | None,
    ):
        self._part, self._writer, self._progress = part, writer, progress
        self._placed = placed
        self._squares = {n: note for n, note in writer.done.items() if n != _INPUTS}
        self._total = sum(info.nbytes for info in part.written.values())
        self._bytes = sum(part.written[name].nbytes for name in self._squares)
        self._telling = threading.Lock()
        self._wide = _is_wide(part)
        self._merged = _merged_leaves(part, memory, placed, self._wide)

    def leaf(self, name: str) -> None:
        """Merges, or copies, one leaf."""
        part, step = self._part, self._part.steps[name]
        merged = name in self._merged
        base = part.inputs.base if merged else None
        squares = np.zeros(2)
        with hosts.together():
            _check_inputs(part, name, self._placed.get(name))
        with hosts.together():
            for index, array in self._values(name):
                _check_finite(part, name, array)
                array = _round(name, array, step.out.dtype)
                if base is not None:
                    start = base.read(name, index)
                    squares += sum_of_squares(start), sum_of_squares(array, start)
                self._writer.write(name, array, index)
                self._tell(name, array.nbytes)
        self._squares[name] = squares.tolist()
        self._writer.complete(name, self._squares[name])

    def _values(self, name: str) -> Iterable[tuple[Index, np.ndarray]]:
        if name in self._merged:
            return computed(self._merged[name], self._wide)
        step = self._part.steps[name]
        parts = own_parts(step.out.shape, self._placed.get(name))
        return ((index, step.source.read(name, index)) for index in parts)

    def reports(self) -> dict[str, LeafReport]:
        """What became of each leaf."""
        kinds = _kinds(self._part)
        shares = hosts.gather(self._squares)
        reports = {}
        for name, step in self._part.steps.items():
            norms = (None, None)
            if name in self._merged and self._part.inputs.base is not None:
                norms = np.sqrt(sum(np.array(share[name]) for share in shares)).tolist()
            reports[name] = LeafReport(
                kinds.get(name, step.treatment),
                str(step.source.leaves[name].dtype),
                None if step.treatment == "skipped" else str(step.out.dtype),
                *norms,
            )
        return reports

    def _tell(self, name: str, nbytes: int) -> None:
        with self._telling:
            self._bytes += nbytes
            if self._progress is not None:
                self._progress(self._bytes, self._total, name)


def _call_of(part: Part) -> Callable[[Any, list[Any]], dict[str, Any]]:
    """The method with all its options: from base and models to the merged leaves."""
    recipe = part.recipe
    return part.method.bind(recipe.options, recipe.seed, list(recipe.models))


def _merged_leaves(
    part: Part, memory: int, placed: Mapping[str, NamedSharding], wide: bool
) -> dict[str, Any]:
    """The leaves that the method makes, computed when they are asked for."""
    inputs, method = part.inputs, part.method
    like = inputs.base if method.needs_base else next(iter(inputs.models.values()))

    def leaves(checkpoint: Checkpoint) -> dict[str, StoredLeaf]:
        return {name: stored(checkpoint, name) for name in part.merged}

    def stored(checkpoint: Checkpoint, name: str) -> StoredLeaf:
        dtype, out = checkpoint.leaves[name].dtype, part.steps[name].out.dtype
        if checkpoint is like and dtype != out:
            # The result has the dtype of this leaf and must not be rounded twice.
            dtype = np.promote_types(dtype, np.float32)
        # While one leaf is computed, another may wait to be written.
        return StoredLeaf(checkpoint, name, memory // 2, dtype, placed.get(name))

    base = None if inputs.base is None else leaves(inputs.base)
    models = [leaves(model) for model in inputs.models.values()]
    if method.spans_model(part.recipe.options):
        with hosts.together():
            for name in part.merged:
                _check_inputs(part, name, placed.get(name))
    with precision(wide):
        if method.holds_model(part.recipe.options):
            base, models = load((base, models))
        return _call_of(part)(base, models)


def _is_wide(part: Part) -> bool:
    checkpoints = part.inputs.labelled.values()
    return any(
        checkpoint.leaves[name].dtype == np.float64
        for name in part.merged
        for checkpoint in checkpoints
    )


def _shardings(
    part: Part, mesh: Mesh | None, rules: Mapping[str, PartitionSpec] | None
) -> dict[str, NamedSharding]:
    """How leaves lie on a mesh."""
    if mesh is None:
        return {}
    leaves = {name: jax.ShapeDtypeStruct(*info) for name, info in part.written.items()}
    evenly = {re.escape(n): spread_evenly(x.shape, mesh) for n, x in leaves.items()}
    try:
        return shardings(leaves, mesh, collections.ChainMap(rules or {}, evenly))
    except ValueError as error:
        raise MergeError(f"{part.recipe.source}: {error}") from error


def _try_on_shapes(part: Part) -> None:
    """Runs the method without values, to have its errors before any is read."""
    base = None if part.inputs.base is None else part.shapes(part.inputs.base)
    models = [part.shapes(model) for model in part.inputs.models.values()]
    try:
        with precision(_is_wide(part)):
            jax.eval_shape(_call_of(part), base, models)
    except ValueError as error:
        raise MergeError(f"{part.recipe.source}: {error}") from error


def _check_memory(part: Part, memory: int) -> None:
    """Refuses a method that needs all leaves at once, if they do not fit."""
    if not part.method.holds_model(part.recipe.options):
        return
    checkpoints = part.inputs.labelled.values()
    needed = sum(each.leaves[n].nbytes for n in part.merged for each in checkpoints)
    if needed > memory:
        raise MergeError(
            f"{part.recipe.source}: {part.method.name} with these options needs all "
            f"leaves of all models in memory, {needed:,} bytes, more than the "
            f"{memory:,} that are allowed: allow more memory, or set scope to 'leaf'."
        )


def _kinds(part: Part) -> dict[str, str]:
    """What becomes of leaves that are no matrices, where only matrices are merged."""
    options = {
        name: part.recipe.options.get(name, option.default)
        for name, option in part.method.options.items()
        if name in ("others", "matrices", "stack_axes", "fused")
    }
    if "others" not in options:
        return {}
    shapes = part.shapes(part.inputs.like)
    plan = plan_matrices(shapes, [shapes], method=part.method.name, **options)
    return dict.fromkeys(plan.rest, f"no matrix: {plan.others}")


def _identity(part: Part, mesh: Mesh | None) -> dict[str, Any]:
    """What tells this merge from others into the same output, apart from values."""
    recipe = part.recipe
    return {
        "the recipe": describe(recipe) | {"names": list(recipe.models)},
        "the inputs": {
            label: str(checkpoint.path.resolve())
            for label, checkpoint in part.inputs.labelled.items()
        },
        "the output": {
            name: [list(info.shape), str(info.dtype)]
            for name, info in part.written.items()
        },
        "the mesh": None if mesh is None else dict(mesh.shape),
        "the number of processes": jax.process_count(),
        "the version of jaxmerge": jaxmerge.__version__,
    }


def _hash(inputs: Inputs, writer: Writer) -> dict[str, dict[str, str]]:
    """The SHA-256 of all files of inputs by path: this process's share of them."""
    by_path = {str(each.path): each for each in inputs.labelled.values()}
    share = list(by_path)[jax.process_index() :: jax.process_count()]
    digests = {path: by_path[path].digest() for path in share}
    if _INPUTS not in writer.done:
        writer.complete(_INPUTS, digests)
    return digests


def _go_on(writer: Writer, digests: Callable[[], dict[str, dict[str, str]]]) -> None:
    """Makes sure that what an interrupted merge wrote comes from these inputs."""
    if not writer.done:
        return
    before = writer.done.get(_INPUTS)
    if before is None:
        # It did not come far enough to know what it read.
        writer.start_anew()
    elif before != (now := digests()):
        changed = next(path for path in now if now[path] != before.get(path))
        raise CheckpointError(
            f"{changed} is not what it was when the merge into {writer.path} was "
            "interrupted. Bring it back, or remove what was written, "
            f"{writer.unfinished}, to start anew."
        )


def _round(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype)
    if not all_finite(rounded):
        largest = np.max(np.abs(array))
        raise MergeError(
            f"leaf {name!r} has entries up to {largest:g}, too large for {dtype}; "
            "choose another dtype, such as bfloat16."
        )
    return rounded


def _check_inputs(part: Part, name: str, sharding: NamedSharding | None) -> None:
    """Checks what this process reads of a leaf, which brings it from disk, too."""
    step = part.steps[name]
    merged = step.treatment == "merged"
    for checkpoint in part.inputs.labelled.values() if merged else [step.source]:
        for index in own_parts(step.out.shape, sharding):
            _check_finite(part, name, checkpoint.read(name, index))


def _check_finite(part: Part, name: str, array: np.ndarray) -> None:
    """Raises if a leaf is not finite: methods that rank entries would drop a NaN."""
    if is_float(array) and not all_finite(array):
        raise MergeError(_explain_not_finite(part, name))


def _explain_not_finite(part: Part, name: str) -> str:
    counts = []
    for label, checkpoint in part.inputs.labelled.items():
        if name not in checkpoint.leaves:
            continue
        leaf = checkpoint.read(name)
        nans, infs = int(np.isnan(leaf).sum()), int(np.isinf(leaf).sum())
        kinds = [f"{n} {kind}" for n, kind in ((nans, "NaN"), (infs, "inf")) if n]
        if kinds:
            counts.append(f"{label} has {', '.join(kinds)}")
    reason = (
        f"{'; '.join(counts)}. Repair the checkpoint, leave the model out, or take "
        "the leaf from a checkpoint where it is finite, with a rule under `take`."
        if counts
        else "all inputs are finite, so the options of "
        f"{part.method.name} are too large."
    )
    return f"{part.recipe.source}: leaf {name!r} comes out not finite: {reason}"


def _sidecars(recipe: Recipe, inputs: Inputs) -> dict[str, bytes | Path]:
    """Config, tokenizer and code of the output; the config says the new dtype."""
    sidecars: dict[str, bytes | Path] = {
        path.name: path for path in inputs.like.sidecars()
    }
    path = sidecars.get("config.json")
    if recipe.dtype is None or not isinstance(path, Path):
        return sidecars
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); repair it.") from error
    for key in {"torch_dtype", "dtype"} & config.keys():
        config[key] = recipe.dtype
    return sidecars | {"config.json": _json(config)}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
