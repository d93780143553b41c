"""Devices, hosts and compiled code, as the options of commands name them."""

import argparse
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmerge.console import CommandError

if TYPE_CHECKING:
    from jax.sharding import Mesh, PartitionSpec


def add_to(command: argparse.ArgumentParser) -> None:
    """Adds the options of a command that computes on several devices."""
    group = command.add_argument_group(
        "devices and hosts",
        "Every host of a cluster runs the same command; all see the same files.",
    )
    add_layout_to(group)
    group.add_argument(
        "--distributed",
        action="store_true",
        help="let the cluster (TPU pod, Slurm, ...) say who the other hosts are",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, without a cluster"
    )
    group.add_argument("--processes", metavar="N", type=int, help="how many there are")
    group.add_argument("--process", metavar="I", type=int, help="which one this is")


def add_layout_to(group: Any) -> None:
    """Adds the options that say how leaves are spread over devices."""
    group.add_argument(
        "--mesh", metavar="AXES", help="such as data=2,model=4: spread leaves over it"
    )
    group.add_argument(
        "--shard",
        metavar="PATTERN=AXES",
        action="append",
        default=[],
        help="how leaves lie on the mesh, such as '.*embed.*=model,-' (- is whole); "
        "by default in equal parts along their longest axes",
    )


def join_hosts(arguments: argparse.Namespace) -> None:
    """Meets the processes on other hosts, if the options speak of some."""
    given = arguments.coordinator, arguments.processes, arguments.process
    if not arguments.distributed and given == (None, None, None):
        return
    if not arguments.distributed and None in given:
        raise CommandError("--coordinator, --processes and --process belong together")
    import jax

    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        raise CommandError(
            f"the processes did not meet: {error} Outside of a cluster, all of them "
            "need --coordinator, --processes and --process."
        ) from error


def mesh_of(arguments: argparse.Namespace) -> "Mesh | None":
    """The mesh that `--mesh` describes, of all devices that there are."""
    axes = axes_of(arguments)
    if axes is None:
        return None
    import jax

    needed, there = math.prod(axes.values()), jax.device_count()
    if needed != there:
        raise CommandError(
            f"--mesh {arguments.mesh} has {needed} devices, but there are {there}; "
            "choose sizes with that product (on CPUs, the environment variable "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N simulates N)"
        )
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def axes_of(arguments: argparse.Namespace) -> dict[str, int] | None:
    """The sizes of the axes that `--mesh` describes, such as `data=2,model=4`."""
    if arguments.mesh is None:
        if arguments.shard:
            raise CommandError("--shard needs a --mesh")
        return None
    axes: dict[str, int] = {}
    for name, size in map(_axis, arguments.mesh.split(",")):
        if name in axes:
            raise CommandError(f"--mesh {arguments.mesh} has two axes {name!r}")
        axes[name] = size
    return axes


def _axis(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name.isidentifier() or not size.isdecimal() or int(size) == 0:
        raise CommandError(f"--mesh: {text!r} is no axis such as data=2")
    return name, int(size)


def rules_of(arguments: argparse.Namespace) -> "dict[str, PartitionSpec]":
    """The rules that `--shard` gives."""
    from jax.sharding import PartitionSpec

    rules = {}
    for rule in arguments.shard:
        pattern, equals, axes = rule.rpartition("=")
        if not equals:
            raise CommandError(f"--shard {rule!r} has no '='; write PATTERN=AXES")
        if pattern in rules:
            raise CommandError(f"--shard has two rules for {pattern!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise CommandError(
                f"--shard: {pattern!r} is no valid regular expression: {error}"
            ) from None
        rules[pattern] = PartitionSpec(*map(_entry, axes.split(",")))
    return rules


def _entry(text: str) -> Any:
    return None if text == "-" else tuple(text.split("+"))


def keep_compiled_code() -> None:
    """Lets JAX find again what it compiled for an earlier command.

    The directory is that of `JAXMERGE_CACHE_DIR`, or `jaxmerge` among the caches of the
    user. A directory that JAX itself is told of comes first.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = os.environ.get("JAXMERGE_CACHE_DIR") or str(caches / "jaxmerge")
    jax.config.update("jax_compilation_cache_dir", directory)
    # Kernels of leaves compile in less than the second that JAX waits for by default.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
