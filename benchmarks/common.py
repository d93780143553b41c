"""What benchmark scripts share: timing, saying where they ran, writing their table."""

import datetime
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"
LOAD = os.getloadavg()[0]


def times_in_turn(
    sides: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run by side; a first run, which compiles, is not counted."""
    times = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            start = clock()
            jax.block_until_ready(side())
            if repeat:
                times[name].append(clock() - start)
    return times


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """The median of the ratios run by run."""
    return float(np.median([a / b for a, b in zip(of, to, strict=True)]))


def machine() -> str:
    """The hardware, versions, date and command of this run, as one paragraph."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    devices = ", ".join(sorted({d.device_kind for d in jax.devices()}))
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, load average "
        f"before {LOAD:.1f}; JAX device: {devices}. "
        f"Python {platform.python_version()}, jax {jax.__version__}, "
        f"numpy {np.__version__}. {datetime.date.today().isoformat()}, "
        f"`python {' '.join(sys.argv)}`."
    )


def write_table(
    name: str,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str,
) -> None:
    """Prints a table and writes it to `results/NAME.md`."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    text = "\n".join([f"# {title}", "", *lines, "", note, ""])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
