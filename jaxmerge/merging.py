"""Merges checkpoints as a recipe says, in bounded memory, whole or not at all.

Everything that can be known from names, shapes and options is checked before the first
value is read. A merge that was interrupted goes on where it was when it is run again.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import jaxmerge
from jaxmerge import hosts
from jaxmerge.checkpoints import (
    REPORT_NAME,
    CheckpointError,
    LeafWriter,
    Progress,
    open_writer,
)
from jaxmerge.checkpoints.files import as_json, config_with_dtype
from jaxmerge.heap import give_back
from jaxmerge.mergekit import MergekitRecipe
from jaxmerge.parts import PartMerge, Rules
from jaxmerge.planning import Part, Plan, check_placed, open_inputs, plan_leaves
from jaxmerge.recipes import Recipe
from jaxmerge.reports import (
    LeafReport,
    describe,
    hash_all,
    in_background,
    merge_report,
    model_card,
)
from jaxmerge.streaming import stream

_Digests = Mapping[str, Mapping[str, str]]
"""By path of a checkpoint and name of a file, the BLAKE3."""

MEMORY = 1_000_000_000
_LARGE = 1 << 20  # Bytes; to look for freed memory takes milliseconds.
_INPUTS = ""  # What notes on inputs go by: no leaf has that name.


def merge_checkpoints(
    recipe: Recipe | MergekitRecipe,
    out: str | os.PathLike[str],
    *,
    memory: int = MEMORY,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    blake3: _Digests | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merges checkpoints into a new one.

    Leaves are merged one by one, and those that are too large for `memory` some rows
    at a time: the result is the same, but for the last bit where sums or products are
    rounded (`della`, `sce`, `model_stock` and means on spheres). Whole arrays that a
    leaf's threshold or norm is taken of stay in memory, one at a time. A method that
    needs all leaves at once (`pcb` with `scope: model`, say) is refused if they do not
    fit.

    If the process dies, or is interrupted, the same merge into the same output goes on
    with the leaves that are not there yet. Until it is finished nothing takes away what
    is there: no other error, and no merge that is refused.

    On a mesh, leaves are spread over its devices. Methods of whole matrices compute as
    many leaves of one shape together as there are devices, and as fit into `memory`: a
    matrix keeps one device busy. Several processes that have called
    `jax.distributed.initialize` all call this, with a mesh of all their devices: each
    reads the parts of leaves that its devices hold, and writes its share of the output,
    in a directory that all of them see.

    Args:
        recipe: what to merge, and how: in the terms of this library or of mergekit.
        out: the directory to create; it must not exist.
        memory: about how many bytes values may take, beside what the program needs; of
            several processes, in each.
        mesh: the devices to merge on; by default the first one.
        rules: from patterns of leaf paths to how leaves are sharded on the mesh; by
            default, and where none matches, into equal parts along the longest axes.
        blake3: of the files of all inputs by path, as a report has them: others are
            refused, before anything is merged.
        progress: called whenever something was written.

    Returns:
        The report, as in `jaxmerge_report.json` next to the weights: the recipe,
        versions, BLAKE3 of all inputs, and what became of each leaf.

    Raises:
        FileExistsError: `out` exists.
        CheckpointError: an input is missing or damaged, the disk is too small, or the
            beginning of another merge into `out` is there.
        MergeError: leaves that are not alike, options that do not fit, or a result
            that is not finite. Nothing is left behind but what an interrupted merge had
            written.
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
    with hosts.together():
        if os.path.lexists(out):
            raise FileExistsError(
                f"{out} exists already; remove it or choose another name."
            )
        plan = resolve(recipe)
        check_placed(plan, rules or {})
        merges = [PartMerge(part, memory, mesh, rules or {}) for part in plan.parts]
        opened = open_writer(
            out,
            plan.written,
            plan.format,
            max_shard_bytes=plan.max_shard_bytes,
            identity=identity(plan, memory, mesh),
            process=jax.process_index(),
            agree=None if jax.process_count() == 1 else hosts.agree,
        )
    with opened as writer:
        with hosts.together():
            digests = _hash_and_go_on(plan, writer, blake3)
        output = _Output(writer, progress)
        for merge in merges:
            output.add(merge)
        with hosts.together():
            share = digests.result()
        squares, shares = zip(*hosts.gather([output.squares, share]), strict=True)
        with hosts.together():
            report = merge_report(
                plan,
                _leaf_reports(merges, squares),
                {path: files for each in shares for path, files in each.items()},
                seconds=time.perf_counter() - started,
            )
            for name, content in plan.sidecars.items():
                writer.add_file(name, content)
            writer.add_file(REPORT_NAME, as_json(report))
            writer.add_file("README.md", model_card(plan).encode())
    return report


def resolve(recipe: Recipe | MergekitRecipe) -> Plan:
    """Opens the checkpoints of a recipe and decides what becomes of each leaf.

    Raises:
        CheckpointError: an input is missing or damaged.
        MergeError: leaves that cannot be merged, or rules that match no leaf.
        RecipeError: a recipe of mergekit that does not fit its models.
    """
    if isinstance(recipe, MergekitRecipe):
        from jaxmerge.mergekit.resolving import resolve as resolve_mergekit

        return resolve_mergekit(recipe)
    inputs = open_inputs(recipe)
    sidecars: dict[str, bytes | Path] = {
        path.name: path for path in inputs.like.sidecars()
    }
    config = sidecars.get("config.json")
    if recipe.dtype is not None and isinstance(config, Path):
        sidecars["config.json"] = config_with_dtype(config, recipe.dtype)
    part = Part(recipe, inputs, plan_leaves(recipe, inputs))
    return Plan([part], sidecars, recipe.max_shard_bytes, recipe.format, recipe.text)


class _Output:
    """What is written of an output.

    Attributes:
        squares: by leaf, the sums that `PartMerge.leaf` returns.
    """

    def __init__(self, writer: LeafWriter, progress: Progress | None):
        self._writer, self._progress = writer, progress
        self.squares = {n: note for n, note in writer.done.items() if n != _INPUTS}
        self._total = sum(info.nbytes for info in writer.leaves.values())
        self._bytes = sum(writer.leaves[name].nbytes for name in self.squares)
        self._telling = threading.Lock()

    def add(self, merge: PartMerge) -> None:
        """Writes all leaves of a part that are not there."""
        names = [name for name in merge.part.written if name not in self.squares]
        if names:
            stream(merge.start(names), lambda name: self._add_leaf(merge, name))

    def _add_leaf(self, merge: PartMerge, name: str) -> None:
        def write(index: Any, array: np.ndarray) -> None:
            self._writer.write(name, array, index)
            with self._telling:
                self._bytes += array.nbytes
                if self._progress is not None:
                    self._progress(self._bytes, self._total, name)

        self.squares[name] = merge.leaf(name, write)
        with hosts.together():
            self._writer.complete(name, self.squares[name])
        if self._writer.leaves[name].nbytes >= _LARGE:
            give_back()


def _leaf_reports(
    merges: list[PartMerge], shares: Sequence[Mapping[str, Any]]
) -> dict[str, LeafReport]:
    """What became of each leaf, from the sums of squares of all processes."""
    reports = {}
    for merge in merges:
        steps, treatments = merge.part.steps, merge.treatments()
        for name, step in steps.items():
            norms = (None, None)
            if step.treatment == "merged" and merge.part.inputs.base is not None:
                squares = np.array([share[name] for share in shares])
                norms = np.sqrt(squares.sum(axis=0)).tolist()
            reports[name] = LeafReport(
                treatments[name],
                str(step.source.leaves[name].dtype),
                None if step.treatment == "skipped" else str(step.out.dtype),
                *norms,
            )
    return reports


def identity(plan: Plan, memory: int, mesh: Mesh | None) -> dict[str, Any]:
    """What tells this merge from others into the same output, apart from values."""
    return {
        "the recipe": [describe(part) for part in plan.parts],
        "the output": {
            name: [list(info.shape), str(info.dtype)]
            for name, info in plan.written.items()
        },
        "the format": [plan.format, plan.max_shard_bytes],
        # How many rows there are at a time can change the last bit of a sum.
        "the memory": memory,
        "the mesh": None if mesh is None else dict(mesh.shape),
        "the number of processes": jax.process_count(),
        "the version of jaxmerge": jaxmerge.__version__,
    }


def _hash_and_go_on(
    plan: Plan, writer: LeafWriter, blake3: _Digests | None
) -> Future[_Digests]:
    """Hashes this process's share of the inputs, in the background if that can be.

    Raises:
        CheckpointError: they are not those that an interrupted merge read, or not those
            of `blake3`.
    """
    if writer.done and _INPUTS not in writer.done:
        # It did not come far enough to know what it read.
        writer.start_anew()
    digests = in_background(lambda: _hash(plan, writer))
    if writer.done:
        _check_unchanged(writer, digests.result())
    if blake3 is not None:
        _check_same(blake3, digests.result())
    return digests


def _hash(plan: Plan, writer: LeafWriter) -> _Digests:
    """The BLAKE3 of all files of inputs by path: this process's share of them."""
    stored = {str(each.path.resolve()): each for each in plan.stored()}
    share = list(stored)[jax.process_index() :: jax.process_count()]
    digests = hash_all({path: stored[path] for path in share})
    if _INPUTS not in writer.done:
        writer.complete(_INPUTS, digests)
    return digests


def _check_unchanged(writer: LeafWriter, now: _Digests) -> None:
    """Makes sure that what an interrupted merge wrote comes from these inputs."""
    if (before := writer.done[_INPUTS]) != now:
        raise CheckpointError(
            f"{_changed(before, now)} is not what it was when the merge into "
            f"{writer.path} was interrupted. Bring it back, or remove what was "
            f"written, {writer.unfinished}, to start anew."
        )


def _check_same(before: _Digests, now: _Digests) -> None:
    if {path: dict(before.get(path, {})) for path in now} != now:
        raise CheckpointError(
            f"{_changed(before, now)} is not what was merged then. Bring it back, or "
            "merge what is there now by its recipe."
        )


def _changed(before: _Digests, now: _Digests) -> str:
    return next(x for x in {**now, **before} if now.get(x) != before.get(x))
