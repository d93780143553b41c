"""How fast machines are: some by name, and the one that is here by quick probes."""

import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blake3 import blake3

from jaxmerge.linalg import svd


class Machine(NamedTuple):
    """Rates that the time of a merge is estimated from.

    Attributes:
        read: bytes per second that a host reads from the disk with the checkpoints.
        write: and writes to it.
        hash: and hashes, on one core.
        flops: float32 operations per second of a device, in products of matrices.
        factorise: and in SVDs and other factorisations.
        memory: bytes per second between a device and its memory.
        link: bytes per second that a device sends to others.
        capacity: bytes of memory of a device.
    """

    read: float
    write: float
    hash: float
    flops: float
    factorise: float
    memory: float
    link: float
    capacity: float


_DISK = {"read": 2e9, "write": 1e9, "hash": 4e9}
"""Of a host with an NVMe disk or a fast network store, and of BLAKE3 on one core."""

MACHINES: Mapping[str, Machine] = {
    # A few cores of a server; `measure` puts numbers in place of all that.
    "cpu": Machine(
        **_DISK, flops=1e11, factorise=1e10, memory=2e10, link=1e10, capacity=math.inf
    ),
    # Cloud TPU documentation, "TPU v5e": 197 TFLOP/s in bfloat16, of which products in
    # full float32 precision take six; 819 GB/s; 16 GB; 400 GB/s between chips, both
    # ways. How fast factorisations are is a guess: they are many small steps.
    "v5e": Machine(
        **_DISK,
        flops=197e12 / 6,
        factorise=5e11,
        memory=819e9,
        link=200e9,
        capacity=16e9,
    ),
    # NVIDIA H100 data sheet, SXM: 67 TFLOP/s in float32; 3.35 TB/s; 80 GB. Between
    # nodes, 400 Gbit/s for each GPU, as DGX H100 has. The same guess: the SVD of MAGMA
    # with n = 4160 reached 4e11 on an older GPU.
    "h100": Machine(
        **_DISK, flops=67e12, factorise=5e11, memory=3.35e12, link=50e9, capacity=80e9
    ),
}


def measure(directory: str | os.PathLike[str]) -> Machine:
    """Times small pieces of work here, in a few seconds.

    Args:
        directory: on the disk to measure; a file of 64 MB is written there for it.
    """
    entries = 1 << 24
    array = jnp.ones(entries, jnp.float32)
    square = jnp.asarray(
        np.random.default_rng(0).normal(size=(1024, 1024)), jnp.float32
    )
    small = square[:384, :384]
    content = os.urandom(1 << 26)
    write, read = _time_disk(Path(directory), content)
    product = _seconds(jax.jit(lambda x: x @ x), square)
    decomposition = _seconds(jax.jit(lambda x: svd(x)[1]), small)
    return Machine(
        read=len(content) / read,
        write=len(content) / write,
        hash=len(content) / _seconds(lambda: blake3(content).digest()),
        flops=2 * 1024**3 / product,
        factorise=26 * 384**3 / decomposition,
        memory=8 * entries / _seconds(jax.jit(lambda x: x + 1), array),
        link=_measure_link(array),
        capacity=math.inf,
    )


def parse_rates(machine: Machine, text: str) -> Machine:
    """A machine with other rates.

    Raises:
        ValueError: it is not of the form of the example.

    Example:
        >>> parse_rates(MACHINES["cpu"], "read=500MB/s,flops=2e11").read
        500000000.0
    """
    given = {}
    for part in text.split(","):
        name, _, rate = part.partition("=")
        match = _RATE.fullmatch(rate)
        if name not in Machine._fields or match is None:
            raise ValueError(
                f"{part!r}; write a rate such as read=2GB/s or flops=30T, of "
                + ", ".join(Machine._fields)
            )
        number, prefix = match.groups()
        given[name] = float(number) * 1000 ** " kmgt".index((prefix or " ").lower())
    return machine._replace(**given)


_RATE = re.compile(
    r"(\d+(?:\.\d+)?(?:e\d+)?) ?([kmgt])?(?:b|flops?)?(?:/s)?", re.IGNORECASE
)


def _seconds(run: Callable[..., Any], *arguments: Any) -> float:
    """The shortest of a few runs: what else the machine does, makes others longer."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _time_disk(directory: Path, content: bytes) -> tuple[float, float]:
    """Seconds to write a file to disk, and to read it from there."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        start = time.perf_counter()
        file.write(content)
        os.fsync(file.fileno())
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        again = time.perf_counter()
        file.seek(0)
        file.read()
        return written - start, time.perf_counter() - again


def _measure_link(array: jax.Array) -> float:
    devices = jax.local_devices()
    if len(devices) == 1:
        return math.inf
    first, second = (jax.device_put(array, device) for device in devices[:2])
    send = _seconds(lambda: jax.device_put(first, second.device))
    return array.nbytes / send
