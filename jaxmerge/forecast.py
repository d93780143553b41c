"""What a merge of checkpoints will do, from their headers alone, before any work.

The plan asks the same lazy leaves that a merge computes: which come whole, which by
rows, in which pieces. Only the last step, the values, is left out.
"""

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, NamedSharding

from jaxmerge.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from jaxmerge.costs import Operations
from jaxmerge.lazy import Deferred
from jaxmerge.leafcosts import LeafCost, cost_of
from jaxmerge.machines import MACHINES, Machine
from jaxmerge.merging import MEMORY
from jaxmerge.parts import PartMerge, is_wide
from jaxmerge.planning import Inputs, MergeError, Part, Step, difference, plan_leaves
from jaxmerge.recipes import Recipe
from jaxmerge.sharding import spread_evenly
from jaxmerge.streaming import WORKERS, StoredLeaf, precision, share_of
from jaxmerge.tree import first_match, is_float


class LeafGroup(NamedTuple):
    """Leaves that are treated alike.

    Attributes:
        name: what they are called, with `*` for numbers that differ.
        names: of each of them.
        shape: of each of them.
        dtypes: of base and models, and the one that is written; None if none is.
        treatment: as in the report of a merge.
        options: all options of the method, rules applied.
        cost: of one of them.
        share: how much of its arithmetic, and of what is in memory for it, falls to the
            busiest device.
        sent: bytes that a device sends to others for one of them.
    """

    name: str
    names: list[str]
    shape: tuple[int, ...]
    dtypes: tuple[tuple[str, ...], str | None]
    treatment: str
    options: dict[str, Any]
    cost: LeafCost
    share: float
    sent: float


class Seconds(NamedTuple):
    """An estimate of how long the parts of a merge take; they overlap."""

    read: float
    hash: float
    compute: float
    send: float
    write: float


class Totals(NamedTuple):
    """All leaves together.

    Attributes:
        inputs: bytes of values in all inputs, each of which is read and hashed.
        read: bytes of values that are read from them, in all passes, by all hosts.
        written: bytes of values that are written, by all hosts.
        operations: all arithmetic.
        sent: bytes that a device sends to others.
        process: bytes of memory that a process takes without values, as this one did;
            0 where the system does not tell.
        host: bytes of values in the memory of a process at a time, without what the
            system keeps of files. On a CPU that is where devices have theirs.
        device: bytes of values in the memory of the busiest device at a time.
        seconds: by part.
    """

    inputs: int
    read: int
    written: int
    operations: Operations
    sent: float
    process: int
    host: int
    device: int
    seconds: Seconds


class MergePlan(NamedTuple):
    """What a merge will do.

    Attributes:
        method: its name.
        models: how many.
        devices: over how many each leaf is spread.
        hosts: in how many processes.
        groups: the leaves.
        totals: of all of them.
    """

    method: str
    models: int
    devices: int
    hosts: int
    groups: list[LeafGroup]
    totals: Totals


def plan_merge(
    recipe: Recipe,
    *,
    out: str | os.PathLike[str] | None = None,
    memory: int = MEMORY,
    mesh: Mapping[str, int] | None = None,
    hosts: int = 1,
    machine: Machine = MACHINES["cpu"],
) -> MergePlan:
    """Plans a merge from the headers of its inputs; no value is read.

    Every program that the merge will run is compiled, for one device of the kind that
    is here, to see what memory it needs. On a mesh, each leaf is spread evenly over all
    devices and comes whole. Leaves that are ranked together (`scope: model`) are
    planned as if each were ranked alone, with the barriers that this has.

    Args:
        recipe: what to merge, and how.
        out: the directory to create, to check it.
        memory: as in `merge_checkpoints`; without effect on a mesh.
        mesh: the number of devices by name of the axis.
        hosts: over how many processes the devices are spread.
        machine: how fast they are.

    Raises:
        MergeError: everything that would stop the merge, a paragraph each.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from jaxmerge import save
        >>> runs = Path(tempfile.mkdtemp())
        >>> for name in ("math", "code"):
        ...     save(runs / name, {"w": np.ones((4, 8), np.float32)})
        >>> recipe = Recipe("average", {"math": runs / "math", "code": runs / "code"})
        >>> totals = plan_merge(recipe).totals
        >>> totals.inputs, totals.written, totals.operations.flops
        (256, 128, 200)
    """
    mesh = mesh or {}
    devices = math.prod(mesh.values())
    if hosts < 1 or devices < 1 or devices % hosts:
        raise MergeError(
            f"{devices} devices cannot be spread over {hosts} hosts; give a mesh whose "
            "number of devices is a multiple of that of hosts."
        )
    merge = _checked(recipe, out, memory)
    limit = 2**62 if mesh else memory
    spread = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    groups = list(_groups(merge, limit, spread))
    totals = _totals(merge.part, groups, devices, hosts, machine)
    return MergePlan(recipe.method, len(recipe.models), devices, hosts, groups, totals)


def _checked(
    recipe: Recipe, out: str | os.PathLike[str] | None, memory: int
) -> PartMerge:
    """The merge that is planned, after all that can be wrong was looked for."""
    errors: list[str] = []
    if out is not None and os.path.lexists(out):
        errors.append(f"{out} exists already; remove it or choose another name.")
    inputs = _open_inputs(recipe, errors)
    if inputs is None:
        raise MergeError("\n".join(errors))
    try:
        steps = plan_leaves(recipe, inputs)
    except MergeError as error:
        errors.append(str(error))
        steps = _those_alike(inputs)
    part = Part(recipe, inputs, steps)
    if out is not None:
        errors += _space_errors(part, Path(out).absolute())
    try:
        merge = PartMerge(part, memory, None, {})
    except MergeError as error:
        errors += dict.fromkeys([str(error), *_option_errors(part)])
    else:
        if not errors:
            return merge
    raise MergeError("\n".join(errors))


def _open_inputs(recipe: Recipe, errors: list[str]) -> Inputs | None:
    base, models = None, {}
    for name, path in {None: recipe.base, **recipe.models}.items():
        if path is None:
            continue
        try:
            opened = open_checkpoint(path, base)
        except (CheckpointError, OSError) as error:
            errors.append(str(error))
            continue
        if name is None:
            base = opened
        else:
            models[name] = opened
    complete = len(models) == len(recipe.models)
    complete &= base is not None or recipe.base is None
    return Inputs(base, models) if complete else None


def _those_alike(inputs: Inputs) -> dict[str, Step]:
    """The leaves that could be merged if others did not stand in the way."""
    checkpoints = inputs.labelled
    steps = {}
    for name, info in inputs.like.leaves.items():
        found = {k: x.leaves[name] for k, x in checkpoints.items() if name in x.leaves}
        if is_float(info) and not difference(found, checkpoints):
            steps[name] = Step("merged", inputs.like, info)
    return steps


def _option_errors(part: Part) -> Iterator[str]:
    """What the method says to each option without the others."""
    options = part.recipe.options
    required = [n for n, p in part.method.options.items() if p.required]
    needed = {name: options[name] for name in required if name in options}
    base = None if part.inputs.base is None else part.shapes(part.inputs.base)
    models = [part.shapes(model) for model in part.inputs.models.values()]
    for name in options:
        tried = needed | {name: options[name]}
        call = part.method.bind(tried, part.recipe.seed, list(part.recipe.models))
        try:
            with precision(is_wide(part)):
                jax.eval_shape(call, base, models)
        except ValueError as error:
            yield f"{part.recipe.source}: {error}"


def _space_errors(part: Part, out: Path) -> Iterator[str]:
    needed = sum(info.nbytes for info in part.written.values())
    place = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        yield (
            f"{out} needs {needed:,} bytes, but {place} has only {free:,} free. Make "
            "room, choose another disk or a smaller dtype."
        )


# Leaves that are alike.


def _groups(merge: PartMerge, memory: int, mesh: AbstractMesh) -> Iterator[LeafGroup]:
    part = merge.part
    alike: dict[Any, list[str]] = {}
    treatments = merge.treatments()
    checkpoints = list(part.inputs.labelled.values())
    for name, step in part.steps.items():
        treatment = treatments[name]
        options = _options_of(part, name) if step.treatment == "merged" else {}
        sources = checkpoints if step.treatment == "merged" else [step.source]
        dtypes = tuple(str(each.leaves[name].dtype) for each in sources)
        out = None if step.treatment == "skipped" else str(step.out.dtype)
        pattern = re.sub(r"\d+", "*", name)
        key = pattern, step.out.shape, (dtypes, out), treatment, repr(options)
        alike.setdefault(key, []).append(name)
    wide = is_wide(part)
    with precision(wide):
        lazy = _lazy_leaves(merge, memory)
    layers = _layers(merge)
    for (pattern, shape, dtypes, treatment, _), names in alike.items():
        first = names[0]
        with precision(wide):
            cost = cost_of(part, first, lazy.get(first))
        share, sent = _on_mesh(cost, shape, layers.get(first), part, mesh)
        options = _options_of(part, first) if first in lazy else {}
        name = pattern if len(names) > 1 else first
        yield LeafGroup(
            name, names, shape, dtypes, treatment, options, cost, share, sent
        )


def _options_of(part: Part, name: str) -> dict[str, Any]:
    """The options of the method as a leaf gets them."""

    def value(option: Any) -> Any:
        if isinstance(option, Mapping):
            try:
                return value(first_match(option, name))
            except KeyError:
                return None
        if isinstance(option, list | tuple):
            return [value(each) for each in option]
        return option

    given = part.recipe.options
    parameters = part.method.options.items()
    return {n: value(given.get(n, parameter.default)) for n, parameter in parameters}


def _lazy_leaves(merge: PartMerge, memory: int) -> dict[str, Any]:
    """The leaves that the method makes, as a merge would compute them."""
    part = merge.part
    if not part.method.spans_model(part.recipe.options):
        return merge.call(*merge.lazy_trees(memory))
    # The method would read all leaves at once to look for what it needs of them.
    call = merge.call
    holds = part.method.holds_model(part.recipe.options)

    def alone(name: str) -> Deferred:
        def stored(checkpoint: Checkpoint) -> dict[str, StoredLeaf]:
            limit = 2**62 if holds else share_of(memory)
            dtype = checkpoint.leaves[name].dtype
            return {name: StoredLeaf(checkpoint, name, limit, dtype)}

        base = None if part.inputs.base is None else stored(part.inputs.base)
        models = [stored(model) for model in part.inputs.models.values()]
        like = part.inputs.like.leaves[name]
        return Deferred(jax.jit(call), call, (base, models), (call, name), like)

    return {name: alone(name) for name in part.merged}


def _layers(merge: PartMerge) -> dict[str, int]:
    """How many matrices a leaf is, where the method works on whole matrices."""
    plan = merge.matrices()
    if plan is None:
        return {}
    return {
        name: math.prod(plan.leaves[name].shape[axis] for axis in layout.axes.stack)
        for name, layout in plan.layouts.items()
    }


# What many devices change, and the sum of it all.


def _on_mesh(
    cost: LeafCost,
    shape: tuple[int, ...],
    layers: int | None,
    part: Part,
    mesh: AbstractMesh,
) -> tuple[float, float]:
    """The share of the busiest device in a leaf, and the bytes that it sends."""
    if mesh.empty:
        return 1.0, 0.0
    devices = mesh.size
    if not layers:
        parts = NamedSharding(mesh, spread_evenly(shape, mesh)).shard_shape(shape)
        # An all-reduce sends each byte about twice, whatever the number of devices.
        told = 2 * (devices - 1) / devices * cost.operations.reduced
        return math.prod(parts) / max(math.prod(shape), 1), told
    # Matrices are whole on one device. Layers are padded to a multiple of the devices:
    # a lone matrix is worked on by every one of them.
    whole = -(-layers // devices)
    matrix = 4 * math.prod(shape) // layers
    # The matrices of all inputs come together (a few methods need no base), and the
    # result goes back.
    stacks = len(part.inputs.labelled) + 1
    return whole / layers, whole * stacks * matrix * (devices - 1) / devices


def _totals(
    part: Part, groups: list[LeafGroup], devices: int, hosts: int, machine: Machine
) -> Totals:
    by_name = {name: group for group in groups for name in group.names}
    of_leaves = [by_name[name] for name in part.written]
    paths = {str(each.path): each for each in part.inputs.labelled.values()}
    inputs = sum(i.nbytes for each in paths.values() for i in each.leaves.values())
    read = sum(group.cost.read for group in of_leaves)
    written = sum(group.cost.written for group in of_leaves)
    operations = sum((group.cost.operations for group in of_leaves), Operations())
    sent = sum(group.sent for group in of_leaves)
    seconds = Seconds(
        read=inputs / hosts / machine.read,
        hash=inputs / hosts / min(machine.hash, machine.read),
        compute=sum(_compute_seconds(group, machine) for group in of_leaves),
        send=sent / machine.link,
        write=written / hosts / machine.write,
    )
    # While a leaf is computed, those before it may still wait to be written.
    before = [
        sum(g.cost.held for g in of_leaves[max(0, i - WORKERS + 1) : i])
        for i in range(len(of_leaves))
    ]
    pairs = list(zip(of_leaves, before, strict=True))
    held = sum(g.cost.held for g in of_leaves) / devices
    if not part.method.holds_model(part.recipe.options):
        held = 0
    host = max(g.share * g.cost.working + late / devices for g, late in pairs)
    device = max(
        g.share * (g.cost.working + g.cost.inputs) + late / devices for g, late in pairs
    )
    return Totals(
        inputs,
        read,
        written,
        operations,
        sent,
        anonymous_memory(),
        int((host + held) * devices / hosts),
        int(device + held),
        seconds,
    )


def _compute_seconds(group: LeafGroup, machine: Machine) -> float:
    cost = group.cost
    products = cost.operations.flops - cost.operations.factorising
    streamed = max(products / machine.flops, cost.traffic / machine.memory)
    return group.share * (streamed + cost.operations.factorising / machine.factorise)


def anonymous_memory() -> int:
    """What this process has in memory, apart from files; 0 if that is not known."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(match[1]) if match else 0
