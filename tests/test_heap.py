"""What the process has of the system's memory."""

import sys

import pytest

from jaxmerge.heap import anonymous_memory, give_back


@pytest.mark.skipif(
    sys.platform != "linux", reason="other systems do not tell or keep memory"
)
def test_freed_memory_goes_back():
    give_back()  # Or the blocks find room in what other tests freed.
    before = anonymous_memory()
    blocks = [bytearray(4096) for _ in range(20_000)]
    last = bytearray(4096)  # Above them in memory: they are not at its end.
    there = anonymous_memory()
    assert there - before > 60e6
    del blocks
    kept = anonymous_memory()
    give_back()
    assert kept - anonymous_memory() > 60e6
    assert len(last) == 4096
