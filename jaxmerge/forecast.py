"""What a merge of checkpoints will do, from their headers alone, before any work.

The plan asks the same lazy leaves that a merge computes: which come whole, which by
rows, in which pieces. Only the last step, the values, is left out.
"""

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from jaxmerge.checkpoints import Checkpoint
from jaxmerge.costs import Operations
from jaxmerge.heap import anonymous_memory
from jaxmerge.lazy import Deferred, Whole
from jaxmerge.leafcosts import LeafCost, cost_of
from jaxmerge.machines import MACHINES, Machine
from jaxmerge.mergekit import MergekitRecipe
from jaxmerge.merging import MEMORY
from jaxmerge.parts import PartMerge, Rules, is_wide
from jaxmerge.planning import MergeError, Part, Plan
from jaxmerge.preflight import checked
from jaxmerge.recipes import Recipe
from jaxmerge.reports import HASHES
from jaxmerge.streaming import WORKERS, StoredLeaf, precision, share_of
from jaxmerge.tree import first_match


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
        together: how many of them, and of others of their shape, are computed at once.
        share: how much of its arithmetic falls to the busiest device.
        sent: bytes that a device sends to others for one of them.
    """

    name: str
    names: list[str]
    shape: tuple[int, ...]
    dtypes: tuple[tuple[str, ...], str | None]
    treatment: str
    options: dict[str, Any]
    cost: LeafCost
    together: int
    share: float
    sent: float

    @property
    def working(self) -> float:
        """What `LeafCost.working` is in the memory of the busiest device."""
        return self.together * self.share * self.cost.working

    @property
    def inputs(self) -> float:
        """What `LeafCost.inputs` is in the memory of the busiest device."""
        return self.together * self.share * self.cost.inputs


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
    recipe: Recipe | MergekitRecipe,
    *,
    out: str | os.PathLike[str] | None = None,
    memory: int = MEMORY,
    mesh: Mapping[str, int] | None = None,
    rules: Rules | None = None,
    hosts: int = 1,
    machine: Machine = MACHINES["cpu"],
) -> MergePlan:
    """Plans a merge from the headers of its inputs; no value is read.

    Every program that the merge will run is compiled, for one device of the kind that
    is here, to see what memory it needs. On a mesh each leaf comes whole. Leaves that
    are ranked together (`scope: model`) are planned as if each were ranked alone, with
    the barriers that this has. Of leaves that a recipe of mergekit rearranges, the
    bytes are those that come out of that.

    Args:
        recipe: what to merge, and how: in the terms of this library or of mergekit.
        out: the directory to create, to check it.
        memory: as in `merge_checkpoints`.
        mesh: the number of devices by name of the axis.
        rules: how leaves are sharded on the mesh, as in `merge_checkpoints`.
        hosts: over how many processes the devices are spread.
        machine: how fast they are.

    Raises:
        MergeError: everything that would stop the merge, a paragraph each.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
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
    spread = AbstractMesh(tuple(mesh.values()), tuple(mesh)) if mesh else None
    plan, merges = checked(recipe, out, memory, spread, rules or {})
    groups = [list(_groups(merge, memory * hosts)) for merge in merges]
    totals = _totals(plan, groups, devices, hosts, machine)
    models = max(len(part.inputs.models) for part in plan.parts)
    rows = list(itertools.chain(*groups))
    return MergePlan(recipe.method, models, devices, hosts, rows, totals)


# Leaves that are alike.


def _groups(merge: PartMerge, memory: int) -> Iterator[LeafGroup]:
    part = merge.part
    alike: dict[Any, list[str]] = {}
    treatments = merge.treatments()
    checkpoints = list(part.inputs.labelled.values())
    wide = is_wide(part)
    with precision(wide):
        lazy = _lazy_leaves(merge, memory)
        together = _together(merge, memory)
    for name, step in part.steps.items():
        treatment = treatments[name]
        options = _options_of(part, name) if step.treatment == "merged" else {}
        sources = checkpoints if step.treatment == "merged" else [step.source]
        dtypes = tuple(str(each.leaves[name].dtype) for each in sources)
        out = None if step.treatment == "skipped" else str(step.out.dtype)
        pattern = re.sub(r"\d+", "*", name)
        spec = merge.placed[name].spec if name in merge.placed else None
        same = together.get(name, 1), spec, repr(options)
        key = pattern, step.out.shape, (dtypes, out), treatment, same
        alike.setdefault(key, []).append(name)
    layers = _layers(merge)
    for (pattern, shape, dtypes, treatment, _), names in alike.items():
        first = names[0]
        with precision(wide):
            cost = _cost_of(merge, first, lazy.get(first))
        number = together.get(first, 1)
        share, sent = _on_mesh(merge, first, cost, layers.get(first), number)
        options = _options_of(part, first) if first in lazy else {}
        name = pattern if len(names) > 1 else first
        yield LeafGroup(
            *(name, names, shape, dtypes, treatment, options, cost, number, share, sent)
        )


def _cost_of(merge: PartMerge, name: str, leaf: Any) -> LeafCost:
    if name not in merge.placed or not isinstance(leaf, Deferred):
        return cost_of(merge.part, name, leaf)
    # Sums over leaves that lie on a mesh are made in another way.
    with jax.sharding.use_abstract_mesh(merge.placed[name].mesh.abstract_mesh):
        return cost_of(merge.part, name, leaf)._replace(alone=True)


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
    """The leaves that the method makes, as a merge would on one device."""
    part = merge.part
    if not part.method.spans_model(part.recipe.options):
        return merge.call(*merge.lazy_trees(memory, on_mesh=False))
    # The method would read all leaves at once to look for what it needs of them.
    call = merge.call
    holds = part.method.holds_model(part.recipe.options)

    def alone(name: str) -> Deferred:
        def stored(checkpoint: Checkpoint) -> dict[str, StoredLeaf]:
            share = share_of(memory, on_mesh=False)
            dtype = checkpoint.leaves[name].dtype
            whole = holds or name in merge.placed
            return {name: StoredLeaf(checkpoint, name, share, dtype, whole=whole)}

        base = None if part.inputs.base is None else stored(part.inputs.base)
        models = [stored(model) for model in part.inputs.models.values()]
        like = part.inputs.like.leaves[name]
        return Deferred(jax.jit(call), call, (base, models), (call, name), like)

    return {name: alone(name) for name in part.merged}


def _together(merge: PartMerge, memory: int) -> dict[str, int]:
    """How many leaves are computed at once, by name, where that is more than one."""
    part = merge.part
    if not merge.placed or part.method.spans_model(part.recipe.options):
        return {}
    leaves = merge.call(*merge.lazy_trees(memory)).items()
    return {n: x.together.number for n, x in leaves if isinstance(x, Whole)}


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
    merge: PartMerge, name: str, cost: LeafCost, layers: int | None, together: int
) -> tuple[float, float]:
    """The share of the busiest device in a leaf, and the bytes that it sends."""
    if name not in merge.placed:
        return 1.0, 0.0
    placed, shape = merge.placed[name], merge.part.steps[name].out.shape
    devices = placed.mesh.size
    if not layers:
        share = math.prod(placed.shard_shape(shape)) / max(math.prod(shape), 1)
        # An all-reduce sends each byte about twice, whatever the number of devices.
        return share, 2 * (1 - share) * cost.operations.reduced
    # Matrices are whole on one device. Layers are padded to a multiple of the devices:
    # a lone matrix is worked on by every one of them.
    whole = -(-layers * together // devices) / together
    matrix = 4 * math.prod(shape) // layers
    # The matrices of all inputs come together (a few methods need no base), and the
    # result goes back.
    stacks = len(merge.part.inputs.labelled) + 1
    return whole / layers, whole * stacks * matrix * (devices - 1) / devices


def _totals(
    plan: Plan,
    groups: list[list[LeafGroup]],
    devices: int,
    hosts: int,
    machine: Machine,
) -> Totals:
    of_parts = []
    for part, of_part in zip(plan.parts, groups, strict=True):
        by_name = {name: group for group in of_part for name in group.names}
        of_parts.append([by_name[name] for name in part.written])
    memory = [
        _memory(part, of_leaves, devices)
        for part, of_leaves in zip(plan.parts, of_parts, strict=True)
    ]
    of_leaves = list(itertools.chain(*of_parts))
    inputs = sum(x.nbytes for each in plan.stored() for x in each.leaves.values())
    read = sum(group.cost.read for group in of_leaves)
    written = sum(group.cost.written for group in of_leaves)
    operations = sum((group.cost.operations for group in of_leaves), Operations())
    sent = sum(group.sent for group in of_leaves)
    seconds = Seconds(
        read=inputs / hosts / machine.read,
        hash=inputs / hosts / min(HASHES * machine.hash, machine.read),
        compute=sum(_compute_seconds(group, machine) for group in of_leaves),
        send=sent / machine.link,
        write=written / hosts / machine.write,
    )
    return Totals(
        inputs,
        read,
        written,
        operations,
        sent,
        anonymous_memory(),
        int(max(host for host, _ in memory) * devices / hosts),
        int(max(device for _, device in memory)),
        seconds,
    )


def _memory(
    part: Part, of_leaves: list[LeafGroup], devices: int
) -> tuple[float, float]:
    """Bytes in the memory of the busiest device, without inputs and with them."""
    host = device = held = 0.0
    for i, group in enumerate(of_leaves):
        cost = group.cost
        before = [each.cost for each in of_leaves[max(0, i - WORKERS + 1) : i]]
        # While a leaf is computed, so are those before it, or they wait to be written;
        # on a mesh those that are computed with it wait to be taken.
        late = sum(x.held if x.alone else x.working for x in before)
        late += (group.together - 1) * cost.held
        host = max(host, group.working + late / devices)
        # Inputs of matrices are there twice: as they are sharded, and whole.
        cut = group.together * cost.inputs / devices if group.together > 1 else 0
        device = max(device, group.working + group.inputs + cut + late / devices)
    if part.method.holds_model(part.recipe.options):
        held = sum(group.cost.held for group in of_leaves) / devices
    return host + held, device + held


def _compute_seconds(group: LeafGroup, machine: Machine) -> float:
    cost = group.cost
    products = cost.operations.flops - cost.operations.factorising
    streamed = max(products / machine.flops, cost.traffic / machine.memory)
    return group.share * (streamed + cost.operations.factorising / machine.factorise)
