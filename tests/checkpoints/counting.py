"""A checkpoint that knows how much of it was read."""

import math
from dataclasses import dataclass, field

from jaxmerge.checkpoints import Checkpoint
from jaxmerge.checkpoints.indexing import ranges


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
