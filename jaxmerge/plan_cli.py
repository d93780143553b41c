"""The command line of plans: `jaxmerge plan`."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxmerge import meshes
from jaxmerge.console import CommandError, parse_size, print_table, readable_size

# Commands import what they need themselves, so that `--help` does not wait for it.
if TYPE_CHECKING:
    from jaxmerge.forecast import LeafGroup, MergePlan
    from jaxmerge.machines import Machine


def add_to(commands: Any) -> None:
    """Adds `plan` to the commands of a parser."""
    help = "Say what a merge will do and cost, before any work"
    plan = commands.add_parser("plan", help=help, description=f"{help}.")
    plan.set_defaults(command=_plan)
    plan.add_argument("recipe", metavar="RECIPE", help="YAML file, also of mergekit")
    plan.add_argument("--out", metavar="OUT", help="directory to create, to check it")
    plan.add_argument(
        "--memory", metavar="SIZE", default="1GB", help="for values (default: 1GB)"
    )
    meshes.add_layout_to(plan)
    plan.add_argument(
        "--hosts", metavar="N", type=int, default=1, help="processes (default: 1)"
    )
    plan.add_argument(
        "--machine", metavar="NAME", default="cpu", help="cpu (default), h100 or v5e"
    )
    plan.add_argument(
        "--measure", metavar="DIR", help="time this machine, and the disk of DIR"
    )
    plan.add_argument("--rates", metavar="RATES", help="such as read=2GB/s,flops=30T")
    plan.add_argument("--json", metavar="FILE", help="also write all of it as JSON")


def _plan(arguments: argparse.Namespace) -> None:
    from jaxmerge.recipe_files import load_recipe

    memory = parse_size("--memory", arguments.memory)
    mesh = meshes.axes_of(arguments)
    rules = meshes.rules_of(arguments)
    recipe = load_recipe(arguments.recipe)
    machine = _machine(arguments)

    # What is wrong with a recipe is said before the rest is loaded.
    from jaxmerge.forecast import plan_merge

    plan = plan_merge(
        recipe,
        out=arguments.out,
        memory=memory,
        mesh=mesh,
        rules=rules,
        hosts=arguments.hosts,
        machine=machine,
    )
    shared = _shared_options(plan.groups)
    columns = zip(_HEADER, *(_row(group, shared) for group in plan.groups), strict=True)
    header, *rows = zip(*(column for column in columns if any(column[1:])), strict=True)
    print_table(header, rows)
    for line in _summary(plan, machine, shared):
        print(line)
    if arguments.json is not None:
        _write_json(arguments.json, plan, machine)


def _machine(arguments: argparse.Namespace) -> "Machine":
    from jaxmerge.machines import MACHINES, measure, parse_rates
    from jaxmerge.recipe_syntax import unknown

    if arguments.machine not in MACHINES:
        raise CommandError(unknown("machine", arguments.machine, list(MACHINES)))
    machine = MACHINES[arguments.machine]
    if arguments.measure is not None:
        machine = measure(arguments.measure)
    if arguments.rates is None:
        return machine
    try:
        return parse_rates(machine, arguments.rates)
    except ValueError as error:
        raise CommandError(f"--rates is {error}") from None


_HEADER = (
    *("Leaves", "Number", "Shape", "Dtype", "Treatment", "Options", "Slices"),
    *("Read", "Write", "Flops", "Memory"),
)


def _shared_options(groups: Sequence["LeafGroup"]) -> dict[str, Any]:
    """The options of all leaves that are merged, where these agree."""
    first, *others = [group.options for group in groups if group.options] or [{}]
    return {
        name: value
        for name, value in first.items()
        if all(name in options and options[name] == value for options in others)
    }


def _list_options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} {_short(v)}" for n, v in options.items() if v is not None)


def _row(group: "LeafGroup", shared: Mapping[str, Any]) -> list[str]:
    """A row of the table; sizes are those of all leaves, memory is of one."""
    number, cost, (read, written) = len(group.names), group.cost, group.dtypes
    changed = "" if written in (None, read[0]) else f" to {written}"
    own = {name: v for name, v in group.options.items() if name not in shared}
    loops = " per step" if cost.operations.open_loops else ""
    slices = {0: "-", 1: "whole"}.get(cost.slices, str(cost.slices))
    return [
        group.name,
        str(number),
        "x".join(map(str, group.shape)) or "scalar",
        f"{read[0]}{changed}",
        group.treatment,
        _list_options(own),
        f"{group.together} leaves" if group.together > 1 else slices,
        readable_size(number * cost.read),
        readable_size(number * cost.written),
        f"{number * cost.operations.flops:.2g}{loops}",
        readable_size(int(group.working)),
    ]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _summary(
    plan: "MergePlan", machine: "Machine", shared: Mapping[str, Any]
) -> list[str]:
    totals, seconds = plan.totals, plan.totals.seconds
    entries = sum(group.cost.operations.open_loops for group in plan.groups)
    host = readable_size(totals.host)
    lines = [
        f"{plan.method} of {plan.models} models on {plan.devices} devices of "
        f"{plan.hosts} hosts.",
        f"Options of all merged leaves: {_list_options(shared) or 'none'}.",
        f"Inputs: {readable_size(totals.inputs)}, {readable_size(totals.read)} with "
        f"all passes over values; output: {readable_size(totals.written)}.",
        f"Arithmetic: {totals.operations.flops:.3g} flops, of which "
        f"{totals.operations.factorising:.3g} in factorisations"
        + (", counting one step of loops that depend on values." if entries else "."),
        f"Memory of a process: {host} for values, beside "
        f"{readable_size(totals.process)} without any.",
    ]
    if plan.devices > 1:
        lines += [
            f"Memory of a device: {readable_size(totals.device)} for values.",
            f"A device sends {readable_size(int(totals.sent))} to others, with up to "
            f"{totals.operations.reductions:,} all-reduces of few numbers in all.",
        ]
    if totals.device > machine.capacity:
        lines.append(
            f"That is more than the {readable_size(int(machine.capacity))} of a device."
        )
    parts = ", ".join(f"{name} {_time(t)}" for name, t in seconds._asdict().items())
    lines.append(
        f"An estimate of the time, if all of it overlaps: {_time(max(seconds))}, if "
        f"nothing does: {_time(sum(seconds))} ({parts})."
    )
    return lines


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _write_json(path: str, plan: "MergePlan", machine: "Machine") -> None:
    import json

    with open(path, "x", encoding="utf-8") as file:
        content = {"plan": _named(plan), "machine": _named(machine)}
        json.dump(content, file, indent=2)
        file.write("\n")


def _named(value: Any) -> Any:
    """Named tuples as what JSON has: by name."""
    if hasattr(value, "_asdict"):
        return {name: _named(item) for name, item in value._asdict().items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    if isinstance(value, dict):
        return {name: _named(item) for name, item in value.items()}
    # JSON knows no infinity: the memory of a CPU has no limit that is known.
    return None if value == float("inf") else value
