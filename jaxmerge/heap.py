"""The memory that this process has of the operating system."""

import ctypes
import re
import sys
from pathlib import Path

_C = ctypes.CDLL(None) if sys.platform == "linux" else None


def anonymous_memory() -> int:
    """The bytes of this process apart from files; 0 if the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(match[1]) if match else 0


def give_back() -> None:
    """Returns freed memory to the system, where the C library would keep it.

    With glibc each thread keeps what it freed. A compiler allocates and frees much, and
    merges compile in several threads: that can be half of what the process has.
    """
    if hasattr(_C, "malloc_trim"):
        _C.malloc_trim(0)
