"""Statistics on disk: arrays as safetensors, all else as JSON beside them."""

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

import jaxmerge
from jaxmerge.checkpoints import CheckpointError, LeafInfo, Writer, open_checkpoint
from jaxmerge.matrices import MatrixAxes
from jaxmerge.statistics.types import Site, Statistics, Unknown

HEADER_NAME = "statistics.json"
FORMAT = 1


def save_statistics(
    path: str | os.PathLike[str],
    statistics: Statistics,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes statistics, whole or not at all.

    Args:
        path: the directory to create; it must not exist. It gets safetensors files, and
            `statistics.json` with the leaves, what is not known, and where it is from.
        statistics: what `collect` returns.
        provenance: what to write down about the model and the data, anything that
            `json` can store, for `read_provenance`. The version of jaxmerge is added.

    Raises:
        FileExistsError: `path` exists.
        CheckpointError: the disk is too small.

    Example:
        >>> import tempfile
        >>> from jaxmerge.statistics import collect
        >>> params = {"w": np.ones((2, 3))}
        >>> statistics = collect(lambda p, x: x @ p["w"], params, [np.ones((5, 2))])
        >>> path = Path(tempfile.mkdtemp()) / "statistics"
        >>> save_statistics(path, statistics, {"model": "example"})
        >>> load_statistics(path).tokens["w"].item()
        5.0
    """
    arrays = {
        f"{kind}/{name}": array
        for kind in _KINDS
        for name, array in getattr(statistics, kind).items()
    }
    arrays["examples"] = statistics.examples
    header = {
        "format": FORMAT,
        "sites": [
            site._asdict() | {"axes": site.axes and site.axes._asdict()}
            for site in statistics.sites
        ],
        "unknown": [use._asdict() for use in statistics.unknown],
        "provenance": {**(provenance or {}), "jaxmerge": jaxmerge.__version__},
    }
    content = json.dumps(header, indent=1).encode()
    infos = {name: LeafInfo(x.shape, np.dtype(x.dtype)) for name, x in arrays.items()}
    with Writer(path, infos) as writer:
        writer.add_file(HEADER_NAME, content)
        for name, array in arrays.items():
            writer.write(name, array)


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Reads statistics that `save_statistics` wrote.

    Returns:
        The statistics, with NumPy arrays that are read from disk when they are used.

    Raises:
        CheckpointError: there are none, or they are damaged or of another format.
    """
    header = _read_header(Path(path) / HEADER_NAME)
    checkpoint = open_checkpoint(path)
    found: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in _KINDS}
    for leaf in checkpoint.leaves:
        kind, _, name = leaf.partition("/")
        if kind in found:
            found[kind][name] = checkpoint.read(leaf)
    return Statistics(
        **found,  # type: ignore
        examples=checkpoint.read("examples"),  # type: ignore
        sites=tuple(_site(entry) for entry in header["sites"]),
        unknown=tuple(Unknown(**entry) for entry in header["unknown"]),
    )


def read_provenance(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_statistics` was told of the model and the data.

    Returns:
        The provenance, and the version of jaxmerge that wrote it as "jaxmerge".

    Raises:
        CheckpointError: as of `load_statistics`.
    """
    return _read_header(Path(path) / HEADER_NAME)["provenance"]


_KINDS = tuple(
    field.name
    for field in fields(Statistics)
    if field.name not in ("examples", "sites", "unknown")
)


def _read_header(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; {path.parent} holds no statistics. Give the "
            "directory that save_statistics wrote."
        )
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {header.get('format')}, and this version of jaxmerge "
            f"reads format {FORMAT}; collect the statistics again."
        )
    return header


def _site(entry: dict[str, Any]) -> Site:
    axes = {name: tuple(numbers) for name, numbers in (entry["axes"] or {}).items()}
    return Site(
        path=entry["path"],
        shape=tuple(entry["shape"]),
        dtype=entry["dtype"],
        axes=MatrixAxes(**axes) if axes else None,
        input=entry["input"],
        stack=tuple(entry["stack"]),
    )
