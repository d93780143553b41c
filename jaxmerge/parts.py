"""The leaves of one part of an output: each checked, computed, and handed on."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge import hosts
from jaxmerge.checkpoints import Checkpoint, Index
from jaxmerge.lazy import Whole, load
from jaxmerge.matrixwise import MatrixPlan, plan_matrices
from jaxmerge.planning import Part
from jaxmerge.recipe_syntax import MergeError
from jaxmerge.reports import sums_of_squares
from jaxmerge.sharding import AnyMesh, mesh_only_if, shardings, spread_evenly
from jaxmerge.streaming import (
    StoredLeaf,
    all_finite,
    blocks,
    computed,
    own_parts,
    precision,
    share_of,
    turns,
)
from jaxmerge.tree import is_float

Rules = Mapping[str, PartitionSpec]


class PartMerge:
    """A part on its way into the output; made before any value is read.

    Args:
        part: what becomes of which leaf.
        memory: about how many bytes values may take.
        mesh: the devices to merge on.
        rules: how leaves lie on them.

    Attributes:
        placed: how each leaf lies on the mesh, if there is one.

    Raises:
        MergeError: an option or a rule does not fit a leaf, or the method needs more
            memory.
    """

    def __init__(self, part: Part, memory: int, mesh: AnyMesh | None, rules: Rules):
        self.part = part
        self._memory, self.placed = memory, _placed(part, mesh, rules)
        self._merged: dict[str, Any] = {}
        self._wide = is_wide(part)
        self._try_on_shapes()
        self._check_memory()

    def start(self, names: list[str]) -> list[str]:
        """Measures what the method must know of all leaves before the first.

        Args:
            names: of all leaves that are going to be asked for.

        Returns:
            The names in the order in which they should be: leaves that are computed
            together follow each other, so that few of them wait.
        """
        part = self.part
        if not part.merged:
            return names
        if part.method.spans_model(part.recipe.options):
            with hosts.together():
                for name in part.merged:
                    self._check_inputs(name)
        # Of arrays on a mesh, each process has a share.
        processes = jax.process_count() if self.placed else 1
        base, models = self.lazy_trees(self._memory * processes)
        with turns, precision(self._wide), mesh_only_if(bool(self.placed)):
            if part.method.holds_model(part.recipe.options):
                base, models = load((base, models))
            self._merged = self.call(base, models)
        for name in self._merged.keys() - set(names):
            if isinstance(leaf := self._merged[name], Whole):
                leaf.give_up()
        return self._side_by_side(names)

    def leaf(
        self, name: str, write: Callable[[Index, np.ndarray], None]
    ) -> tuple[float, float]:
        """Merges, or copies, a leaf.

        Args:
            name: of a leaf that is written.
            write: called with each part of it that this process has to write.

        Returns:
            The sums of squares, in float64, of the base and of the task vector, as far
            as this process writes them; zeros if there is no base.

        Raises:
            MergeError: an input or the result is not finite, or too large for the
                dtype of the output.
            OtherHostError: another process raised one of these.
        """
        part, out = self.part, self.part.steps[name].out
        base = part.inputs.base if name in self._merged else None
        squares = np.zeros(2)
        with hosts.together():
            self._check_inputs(name)
        with hosts.together():
            for index, array in self._values(name):
                self._check_finite(name, array)
                rounded = _round(name, array, out.dtype)
                if base is not None:
                    squares += sums_of_squares(base.read(name, index), rounded)
                write(index, rounded)
        of_base, of_task_vector = squares.tolist()
        return of_base, of_task_vector

    def _side_by_side(self, names: list[str]) -> list[str]:
        """Names, those of leaves that are computed together after each other."""
        groups: dict[Any, list[str]] = {}
        for name in names:
            leaf = self._merged.get(name)
            key = leaf.together if isinstance(leaf, Whole) else name
            groups.setdefault(key, []).append(name)
        return [name for group in groups.values() for name in group]

    def treatments(self) -> dict[str, str]:
        """What becomes of each leaf, in a word."""
        treatments = {name: step.treatment for name, step in self.part.steps.items()}
        return treatments | self._policies()

    def _values(self, name: str) -> Iterator[tuple[Index, np.ndarray]]:
        if name in self._merged:
            yield from computed(self._merged[name], self._wide)
            return
        source = self.part.steps[name].source
        for index in self._blocks(name, source):
            yield index, source.read(name, index)

    def _blocks(self, name: str, checkpoint: Checkpoint) -> Iterator[Index]:
        """What this process reads of a leaf, cut into parts of bounded size."""
        shape, dtype = checkpoint.leaves[name]
        for part in own_parts(shape, self.placed.get(name)):
            yield from blocks(shape, part, dtype.itemsize)

    def call(self, base: Any, models: list[Any]) -> dict[str, Any]:
        """The merged leaves: what the method makes of base and models."""
        recipe = self.part.recipe
        method = self.part.method
        return method.bind(recipe.options, recipe.seed, list(recipe.models))(
            base, models
        )

    def lazy_trees(self, memory: int, *, on_mesh: bool = True) -> tuple[Any, list[Any]]:
        """The leaves of base and models that are merged, not read yet.

        Args:
            memory: about how many bytes values may take, of a mesh in all processes.
            on_mesh: whether they come to lie on the mesh, if there is one; if not, they
                are whole as there.
        """
        part, inputs = self.part, self.part.inputs
        uses_base = part.method.uses_base(part.recipe.options)
        like = inputs.base if uses_base else next(iter(inputs.models.values()))

        def stored(checkpoint: Checkpoint, name: str) -> StoredLeaf:
            dtype, out = checkpoint.leaves[name].dtype, part.steps[name].out.dtype
            if checkpoint is like and dtype != out:
                # The result has the dtype of this leaf and must not be rounded twice.
                dtype = np.promote_types(dtype, np.float32)
            placed = self.placed.get(name) if on_mesh else None
            share = share_of(memory, on_mesh=placed is not None)
            whole = name in self.placed
            return StoredLeaf(checkpoint, name, share, dtype, placed, whole)

        def leaves(checkpoint: Checkpoint) -> dict[str, StoredLeaf]:
            return {name: stored(checkpoint, name) for name in part.merged}

        base = None if inputs.base is None else leaves(inputs.base)
        return base, [leaves(model) for model in inputs.models.values()]

    def _try_on_shapes(self) -> None:
        """Runs the method without values, to have its errors before any is read."""
        part = self.part
        base = None if part.inputs.base is None else part.shapes(part.inputs.base)
        models = [part.shapes(model) for model in part.inputs.models.values()]
        if not part.merged:
            return
        try:
            with precision(self._wide), mesh_only_if(bool(self.placed)):
                jax.eval_shape(self.call, base, models)
        except ValueError as error:
            raise MergeError(f"{part.recipe.source}: {error}") from error

    def _check_memory(self) -> None:
        """Refuses a method that needs all leaves at once, if they do not fit."""
        part = self.part
        if not part.method.holds_model(part.recipe.options):
            return
        checkpoints = part.inputs.labelled.values()
        needed = sum(each.leaves[n].nbytes for n in part.merged for each in checkpoints)
        if needed > self._memory:
            raise MergeError(
                f"{part.recipe.source}: {part.method.name} with these options needs "
                f"all leaves of all models in memory, {needed:,} bytes, more than the "
                f"{self._memory:,} that are allowed: allow more memory, or set scope "
                "to 'leaf'."
            )

    def _policies(self) -> dict[str, str]:
        """What becomes of leaves that are no matrices, where only those are merged."""
        plan = self.matrices()
        if plan is None:
            return {}
        return dict.fromkeys(plan.rest, f"no matrix: {plan.others}")

    def matrices(self) -> MatrixPlan | None:
        """Which leaves are which matrices, if the method merges only those."""
        part = self.part
        options = {
            name: part.recipe.options.get(name, option.default)
            for name, option in part.method.options.items()
            if name in ("others", "matrices", "stack_axes", "fused")
        }
        if "others" not in options:
            return None
        shapes = part.shapes(part.inputs.like)
        return plan_matrices(shapes, [shapes], method=part.method.name, **options)

    def _check_inputs(self, name: str) -> None:
        """Checks what this process reads of a leaf, which brings it from disk, too."""
        step = self.part.steps[name]
        everyone = list(self.part.inputs.labelled.values())
        for checkpoint in everyone if step.treatment == "merged" else [step.source]:
            for index in self._blocks(name, checkpoint):
                self._check_finite(name, checkpoint.read(name, index))

    def _check_finite(self, name: str, array: np.ndarray) -> None:
        """Raises if values are not finite: methods that rank them would drop a NaN."""
        if is_float(array) and not all_finite(array):
            raise MergeError(_explain_not_finite(self.part, name))


def is_wide(part: Part) -> bool:
    """Whether it is merged in float64, as a leaf of it is stored."""
    checkpoints = part.inputs.labelled.values()
    return any(
        checkpoint.leaves[name].dtype == np.float64
        for name in part.merged
        for checkpoint in checkpoints
    )


def _placed(part: Part, mesh: AnyMesh | None, rules: Rules) -> dict[str, NamedSharding]:
    """How leaves lie on a mesh."""
    if mesh is None:
        return {}
    leaves = {name: jax.ShapeDtypeStruct(*info) for name, info in part.written.items()}
    evenly = {re.escape(n): spread_evenly(x.shape, mesh) for n, x in leaves.items()}
    others = {pattern: evenly[pattern] for pattern in evenly if pattern not in rules}
    try:
        return shardings(leaves, mesh, {**rules, **others})
    except ValueError as error:
        raise MergeError(f"{part.recipe.source}: {error}") from error


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
