"""Statistics of data: what it tells about each weight of any JAX model."""

from jaxmerge.statistics.collecting import collect, trace
from jaxmerge.statistics.storage import (
    load_statistics,
    read_provenance,
    save_statistics,
)
from jaxmerge.statistics.types import Site, Statistics, Trace, Unknown

__all__ = [
    "Site",
    "Statistics",
    "Trace",
    "Unknown",
    "collect",
    "load_statistics",
    "read_provenance",
    "save_statistics",
    "trace",
]
