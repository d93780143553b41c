"""What benchmark scripts share: saying where they ran, and writing their table."""

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"


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
        f"{model}, {len(os.sched_getaffinity(0))} cores; JAX device: {devices}. "
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
