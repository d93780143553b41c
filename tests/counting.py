"""Checkpoints for tests: one in memory, and one that knows how much of it was read."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from jaxmerge.checkpoints import Checkpoint, LeafInfo
from jaxmerge.checkpoints.indexing import ranges


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
