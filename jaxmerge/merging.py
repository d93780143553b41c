"""Merges checkpoints as a recipe says, leaf by leaf: no model is in memory as a whole.

Everything that can be known from names, shapes and options is checked before the first
value is read, and the output appears whole or not at all.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmerge.checkpoints import REPORT_NAME, Checkpoint, CheckpointError, Writer
from jaxmerge.matrixwise import plan_matrices
from jaxmerge.planning import Inputs, MergeError, Step, open_inputs, plan_leaves
from jaxmerge.recipes import Recipe
from jaxmerge.registry import methods
from jaxmerge.reports import LeafReport, in_background, merge_report, norm
from jaxmerge.tree import is_float

Progress = Callable[[int, int, str], None]
"""Called with the bytes written so far, those of the whole output, and the leaf."""


def merge_checkpoints(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merges checkpoints into a new one.

    Only the leaves of one name are in memory at a time. A method that ranks entries
    across the model (`scope: model`) needs all of them at once.

    Args:
        recipe: what to merge, and how.
        out: the directory to create; it must not exist.
        progress: called after each leaf that was written.

    Returns:
        The report, as in `jaxmerge_report.json` next to the weights: the recipe,
        versions, SHA-256 of all inputs, and what became of each leaf.

    Raises:
        FileExistsError: `out` exists.
        CheckpointError: an input is missing or damaged, or the disk is too small.
        MergeError: leaves that are not alike, options that do not fit, or a result
            that is not finite. Nothing is left behind.

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
    steps = plan_leaves(recipe, inputs)
    method = methods()[recipe.method]
    call = method.bind(recipe.options, recipe.seed, list(recipe.models))
    _try_on_shapes(recipe, inputs, steps, call)
    sidecars = _sidecars(recipe, inputs)

    written = {n: step.out for n, step in steps.items() if step.treatment != "skipped"}
    total, done = sum(info.nbytes for info in written.values()), 0
    kinds = _kinds(recipe, inputs, steps)
    leaves = {
        name: LeafReport(
            kinds.get(name, step.treatment),
            dtype_in=str(step.source.leaves[name].dtype),
            dtype_out=str(step.out.dtype) if name in written else None,
        )
        for name, step in steps.items()
    }
    with Writer(out, written, recipe.max_shard_bytes) as writer:
        digests = in_background(lambda: _digests(inputs))
        for name, array, norms in _arrays_out(recipe, inputs, steps, call):
            writer.write(name, array)
            leaves[name] = leaves[name]._replace(**norms)
            done += array.nbytes
            if progress is not None:
                progress(done, total, name)
        for name, content in sidecars.items():
            writer.add_file(name, content)
        report = merge_report(
            recipe,
            inputs.base,
            inputs.models,
            leaves,
            digests.result(),
            seconds=time.perf_counter() - started,
        )
        writer.add_file(REPORT_NAME, _json(report))
    return report


_Call = Callable[[Any, list[Any]], dict[str, Any]]
"""A merge method with all its options: from base and models to the merged leaves."""


def _try_on_shapes(
    recipe: Recipe, inputs: Inputs, steps: Mapping[str, Step], call: _Call
) -> None:
    """Runs the method without values, to have its errors before any is read."""

    def shapes(checkpoint: Checkpoint) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct(*checkpoint.leaves[name])
            for name in _merged_names(steps)
        }

    base = None if inputs.base is None else shapes(inputs.base)
    models = [shapes(model) for model in inputs.models.values()]
    like = models[0] if base is None else base
    try:
        with _precision(like.values()):
            jax.eval_shape(call, base, models)
    except ValueError as error:
        raise MergeError(f"{recipe.source}: {error}") from error


def _kinds(recipe: Recipe, inputs: Inputs, steps: Mapping[str, Step]) -> dict[str, str]:
    """What becomes of leaves that are no matrices, where only matrices are merged."""
    options = {
        name: recipe.options.get(name, option.default)
        for name, option in methods()[recipe.method].options.items()
        if name in ("others", "matrices", "stack_axes", "fused")
    }
    if "others" not in options:
        return {}
    shapes = {
        name: jax.ShapeDtypeStruct(*inputs.like.leaves[name])
        for name in _merged_names(steps)
    }
    plan = plan_matrices(shapes, [shapes], method=recipe.method, **options)
    return dict.fromkeys(plan.rest, f"no matrix: {plan.others}")


def _merged_names(steps: Mapping[str, Step]) -> list[str]:
    return [name for name, step in steps.items() if step.treatment == "merged"]


def _arrays_out(
    recipe: Recipe, inputs: Inputs, steps: Mapping[str, Step], call: _Call
) -> Iterator[tuple[str, np.ndarray, dict[str, float]]]:
    """Yields the name, the values and the norms of every leaf to write."""
    for name, step in steps.items():
        if step.treatment not in ("merged", "skipped"):
            array = step.source.read(name)
            _check_finite(recipe, inputs, name, [array])
            yield name, _round(name, array, step.out.dtype), {}

    names = _merged_names(steps)
    whole = methods()[recipe.method].needs_whole_model(recipe.options)
    for group in [names] if whole else [[name] for name in names]:
        merged = _merge_group(recipe, inputs, {n: steps[n] for n in group}, call)
        for name in group:
            array = np.asarray(merged.pop(name))
            _check_finite(recipe, inputs, name, [array])
            array = _round(name, array, steps[name].out.dtype)
            yield name, array, _norms(inputs, name, array)


def _check_finite(
    recipe: Recipe, inputs: Inputs, name: str, arrays: Sequence[np.ndarray]
) -> None:
    if any(is_float(array) and not math.isfinite(norm(array)) for array in arrays):
        raise MergeError(_explain_not_finite(recipe, inputs, name))


def _merge_group(
    recipe: Recipe, inputs: Inputs, steps: Mapping[str, Step], call: _Call
) -> dict[str, Any]:
    def read(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        return {name: checkpoint.read(name) for name in steps}

    base = None if inputs.base is None else read(inputs.base)
    models = [read(model) for model in inputs.models.values()]
    everyone = models if base is None else [base, *models]
    for name in steps:
        # Methods that compare magnitudes would drop a NaN without a trace.
        _check_finite(recipe, inputs, name, [leaves[name] for leaves in everyone])
    like = everyone[0] if methods()[recipe.method].needs_base else models[0]
    for name, leaf in like.items():
        # The result has the dtype of these leaves and must not be rounded twice.
        if leaf.dtype != steps[name].out.dtype:
            like[name] = leaf.astype(np.promote_types(leaf.dtype, np.float32))
    with _precision(like.values()):
        return jax.device_get(call(base, models))


def _precision(leaves: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """Switches float64 on, which JAX has off, where a leaf needs it."""
    wide = any(leaf.dtype == np.float64 for leaf in leaves)
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def _round(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype)
    if math.isfinite(norm(array)) and not math.isfinite(norm(rounded)):
        largest = np.max(np.abs(array))
        raise MergeError(
            f"leaf {name!r} has entries up to {largest:g}, too large for {dtype}; "
            "choose another dtype, such as bfloat16."
        )
    return rounded


def _norms(inputs: Inputs, name: str, array: np.ndarray) -> dict[str, float]:
    if inputs.base is None:
        return {}
    base = inputs.base.read(name)
    return {"base_norm": norm(base), "task_vector_norm": norm(array, minus=base)}


def _explain_not_finite(recipe: Recipe, inputs: Inputs, name: str) -> str:
    counts = []
    for label, checkpoint in inputs.labelled.items():
        leaf = checkpoint.read(name)
        nans, infs = int(np.isnan(leaf).sum()), int(np.isinf(leaf).sum())
        kinds = [f"{n} {kind}" for n, kind in ((nans, "NaN"), (infs, "inf")) if n]
        if kinds:
            counts.append(f"{label} has {', '.join(kinds)}")
    reason = (
        f"{'; '.join(counts)}. Repair the checkpoint, leave the model out, or take "
        "the leaf from a checkpoint where it is finite, with a rule under `take`."
        if counts
        else f"all inputs are finite, so the options of {recipe.method} are too large."
    )
    return f"{recipe.source}: leaf {name!r} comes out not finite: {reason}"


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


def _digests(inputs: Inputs) -> dict[Path, dict[str, str]]:
    by_path = {each.path: each for each in inputs.labelled.values()}
    return {path: checkpoint.digest() for path, checkpoint in by_path.items()}
