"""Checkpoints for tests: one in memory, and what knows how much was read or written."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from jaxmerge.checkpoints import Checkpoint, LeafInfo, LeafWriter
from jaxmerge.checkpoints.indexing import ranges
from jaxmerge.checkpoints.safetensors import SafetensorsFile


def count_bytes(monkeypatch):
    """Counts the bytes of all reads of safetensors and of all writes, [read, written].

    And, by name, how often something of a leaf is written.
    """
    read, write, totals, writes = SafetensorsFile.read, LeafWriter.write, [0, 0], {}

    def counted_read(self, *where):
        array = read(self, *where)
        totals[0] += array.nbytes
        return array

    def counted_write(self, name, array, *where):
        totals[1] += array.nbytes
        writes[name] = writes.get(name, 0) + 1
        write(self, name, array, *where)

    monkeypatch.setattr(SafetensorsFile, "read", counted_read)
    monkeypatch.setattr(LeafWriter, "write", counted_write)
    return totals, writes


@dataclass
class Memory:
    """A checkpoint in memory."""

    arrays: dict
    path: Path = Path("memory")

    @property
    def leaves(self):
        return {n: LeafInfo(a.shape, a.dtype) for n, a in self.arrays.items()}

    def read(self, name, index=...):
        return self.arrays[name][index]

    def sidecars(self):
        return [self.path / "config.json"]

    def digest(self):
        return {"model": "00"}


@dataclass
class Counting:
    """Passes everything on to `inner` and counts the bytes that are asked for."""

    inner: Checkpoint
    nbytes: dict = field(default_factory=dict)

    @property
    def path(self):
        return self.inner.path

    @property
    def leaves(self):
        return self.inner.leaves

    def read(self, name, index=...):
        shape, dtype = self.leaves[name]
        entries = math.prod(len(along) for along in ranges(index, shape))
        self.nbytes[name] = self.nbytes.get(name, 0) + entries * dtype.itemsize
        return self.inner.read(name, index)

    def sidecars(self):
        return self.inner.sidecars()

    def digest(self):
        return self.inner.digest()
