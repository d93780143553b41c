"""Runs commands and measures them from outside: time, and memory at its peak."""

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SAMPLE_SECONDS = 0.02


class Run(NamedTuple):
    """What a command took.

    Attributes:
        wall: seconds from its start to its end.
        cpu: seconds of all its threads, in user mode and in the kernel.
        resident: bytes of memory at the peak, with files that are mapped.
        anonymous: bytes without the files, which the system could not drop.
    """

    wall: float
    cpu: float
    resident: int
    anonymous: int


def measure(command: Sequence[Any], env: Mapping[str, str] | None = None) -> Run:
    """Runs a command to its end; memory is that of it and of all that it starts.

    Args:
        command: a program and its arguments.
        env: environment variables beside those of this process.

    Raises:
        RuntimeError: the command fails; with the end of what it said.
    """
    command = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        child = subprocess.Popen(
            command, env={**os.environ, **(env or {})}, stdout=said, stderr=said
        )
        ended = threading.Event()
        peaks = {"VmRSS": 0, "RssAnon": 0}
        sampler = threading.Thread(target=_sample, args=(child.pid, peaks, ended))
        sampler.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        ended.set()
        sampler.join()
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read()[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall, cpu, peaks["VmRSS"], peaks["RssAnon"])


def _sample(pid: int, peaks: dict[str, int], ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_SECONDS):
        sizes = [_memory(each) for each in _family(pid)]
        for name, peak in peaks.items():
            peaks[name] = max(peak, sum(size.get(name, 0) for size in sizes))


def _family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    with contextlib.suppress(OSError):  # The process has ended.
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in _read(Path(f"/proc/{pid}/task/{thread}/children")).split():
                yield from _family(int(child))


def _memory(pid: int) -> dict[str, int]:
    """Sizes in bytes, by their names in the process's status."""
    lines = (line.split() for line in _read(Path(f"/proc/{pid}/status")).splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if "kB" in words}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # The process has ended.
        return ""
