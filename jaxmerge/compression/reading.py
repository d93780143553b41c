"""Reads a store leaf by leaf; every byte is checked before it counts."""

import difflib
import mmap
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.checkpoints import Checkpoint, CheckpointError, LeafInfo, open_checkpoint
from jaxmerge.checkpoints.files import contents_of
from jaxmerge.compression.files import (
    BASE_NAME,
    LEAVES_NAME,
    SHARED_NAME,
    STORE_NAME,
    TASK_NAME,
    TASKS_NAME,
    Entry,
    StoreError,
    as_bytes,
    compact_json,
    digest,
    file_info,
    from_array,
    from_buffer,
    part_bytes,
    unsealed,
)
from jaxmerge.compression.kinds import KINDS, WHOLE, LeafLayout, in_order
from jaxmerge.matrices import MatrixAxes
from jaxmerge.tree import is_float

FORMAT = 1


class TaskRecord(NamedTuple):
    """What `task.json` says.

    Attributes:
        name: of the task.
        entries: the leaves that it changes, by name, in the order of the file.
        scale: what multiplies its masked vector.
        document: everything as it is written.
    """

    name: str
    entries: dict[str, Entry]
    scale: float
    document: Mapping[str, Any]


@dataclass(frozen=True)
class StoreFiles:
    """A store on disk, opened: its lists are read, no values.

    Attributes:
        path: the directory.
        document: what `store.json` says.
        base: the checkpoint of the base.
    """

    path: Path
    document: Mapping[str, Any]
    base: Checkpoint = field(repr=False)

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.document["kind"]

    @property
    def base_bytes(self) -> int:
        """The size of the base's values."""
        return sum(info.nbytes for info in self.base.leaves.values())

    @property
    def tasks(self) -> list[str]:
        """The names of all tasks that are there now, sorted."""
        places = (self.path / TASKS_NAME).iterdir()
        return sorted(p.name for p in places if p.is_dir() and p.name[0] != ".")

    @cached_property
    def leaves(self) -> dict[str, LeafLayout]:
        """How every leaf is kept, by name, in the order of the files."""
        layouts = self.document["layouts"]
        return {
            name: _leaf(self.kind, name, self.base.leaves[name], layouts.get(name))
            for name in in_order(self.base.leaves)
        }

    @cached_property
    def _digests(self) -> dict[str, dict[str, str | None]]:
        return {
            section: dict(zip(self.leaves, self.document[section], strict=True))
            for section in ("base", "shared")
        }

    @cached_property
    def _shared(self) -> Checkpoint:
        return open_checkpoint(self.path / SHARED_NAME)

    def parts(self, leaf: LeafLayout) -> dict[str, LeafInfo]:
        """What a task keeps of a leaf, if it changes it, in the order of the file.

        One that was added later may change leaves of which tasks share nothing; these
        it keeps whole.
        """
        kind = KINDS[self.kind]
        alone = kind.share and self._digests["shared"][leaf.name] is None
        if leaf.whole or alone:
            return {WHOLE: leaf.info}
        return kind.parts(leaf, self.document["options"])

    def shared_parts(self, leaf: LeafLayout) -> dict[str, LeafInfo]:
        """What tasks share of a leaf: nothing, if none changed it at the start."""
        if self._digests["shared"][leaf.name] is None:
            return {}
        return KINDS[self.kind].shared(leaf, self.document["options"])

    def read_base(self, name: str) -> np.ndarray:
        """Reads a leaf of the base.

        Raises:
            StoreError: it is damaged.
        """
        info = self.base.leaves[name]
        expected = self._digests["base"][name]
        return self._checked("the base", self.base, name, info, expected)

    def sidecars(self) -> list[Path]:
        """The files beside the base, such as configuration and tokenizer.

        Raises:
            StoreError: one is missing or damaged.
        """
        paths = []
        for name, expected in self.document["sidecars"].items():
            paths.append(self.path / BASE_NAME / name)
            if not paths[-1].is_file() or digest(paths[-1].read_bytes()) != expected:
                raise StoreError(
                    f"{paths[-1]} is missing or damaged. Copy the store again."
                )
        return paths

    def read_shared(self, name: str) -> dict[str, np.ndarray]:
        """Reads what tasks share of a leaf; masks come packed in rows.

        Raises:
            StoreError: it is damaged.
        """
        infos = self.shared_parts(self.leaves[name])
        if not infos:
            return {}
        try:
            file = self._shared
        except CheckpointError as error:
            raise _damaged(self.path, "the shared vector", name, str(error)) from error
        info, expected = file_info(infos), self._digests["shared"][name]
        array = self._checked("the shared vector", file, name, info, expected)
        return from_array(array, infos)

    def _checked(
        self,
        section: str,
        file: Checkpoint,
        name: str,
        info: LeafInfo,
        expected: str | None,
    ) -> np.ndarray:
        found = file.leaves.get(name)
        if found != info:
            what = "missing" if found is None else f"{found.dtype}{list(found.shape)}"
            raise _damaged(self.path, section, name, f"it is {what}")
        array = file.read(name)
        if digest(as_bytes(array)) != expected:
            raise _damaged(self.path, section, name, _MISMATCH)
        return array

    def task(self, name: str) -> TaskRecord:
        """Reads what there is to know of a task.

        Raises:
            StoreError: there is no such task, or its list is damaged.
        """
        if name not in self.tasks:
            close = difflib.get_close_matches(name, self.tasks, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            known = ", ".join(self.tasks) or "none"
            raise StoreError(
                f"{self.path} has no task {name!r}.{hint} Its tasks: {known}."
            )
        document = unsealed(self.path / TASKS_NAME / name / TASK_NAME)
        if document["name"] != name or document["store"] != self.document["seal"]:
            raise StoreError(
                f"{self.path}: task {name!r} was made for another store or under "
                f"another name ({document['name']!r}); remove its directory and add "
                "the model again."
            )
        entries = {
            leaf: Entry(listed) if isinstance(listed, str) else Entry(*listed)
            for leaf, listed in zip(self.leaves, document["leaves"], strict=True)
            if listed is not None
        }
        return TaskRecord(name, entries, document.get("scale", 1.0), document)

    def read_task(self, task: TaskRecord) -> "TaskLeaves":
        """Opens the leaves of a task; those that it changes can be read from them."""
        path = self.path / TASKS_NAME / task.name / LEAVES_NAME
        if not task.entries:
            return TaskLeaves(self, task, b"", {})
        places, end = {}, 0
        for name, entry in task.entries.items():
            size = sum(part_bytes(i) for i in self.parts(self.leaves[name]).values())
            start, end = end, end + (size if entry.nbytes is None else entry.nbytes)
            places[name] = slice(start, end)
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # An empty file cannot be mapped.
            data = b""
        return TaskLeaves(self, task, data, places)


class TaskLeaves(NamedTuple):
    """The leaves that a task changes, on disk."""

    store: StoreFiles
    task: TaskRecord
    data: Any
    places: Mapping[str, slice]

    def read(self, name: str) -> dict[str, np.ndarray]:
        """Reads the parts of a leaf; masks come packed in rows.

        Raises:
            StoreError: it is damaged.
        """
        section = f"task {self.task.name!r}"
        place, entry = self.places[name], self.task.entries[name]
        with memoryview(self.data) as whole, whole[place] as stored:
            if len(stored) < place.stop - place.start:
                problem = "its file ends before it: truncated"
                raise _damaged(self.store.path, section, name, problem)
            if digest(stored) != entry.digest:
                raise _damaged(self.store.path, section, name, _MISMATCH)
            data = (
                zlib.decompress(stored) if entry.nbytes is not None else bytes(stored)
            )
        return from_buffer(data, self.store.parts(self.store.leaves[name]))


_MISMATCH = "its bytes do not match their digest"


def _damaged(path: Path, section: str, name: str, problem: str) -> StoreError:
    remedy = "Copy the store again"
    if section.startswith("task"):
        remedy += ", or remove the task's directory and add its model again"
    return StoreError(
        f"{path}: {section} is damaged at leaf {name!r}: {problem}. {remedy}."
    )


def _leaf(kind: str, name: str, info: LeafInfo, layout: Any) -> LeafLayout:
    if layout is not None:
        stack, inputs, outputs, rank = layout
        axes = MatrixAxes(tuple(stack), tuple(inputs), tuple(outputs))
        return LeafLayout(name, info, axes=axes, rank=rank)
    return LeafLayout(name, info, whole=KINDS[kind].by_matrix or not is_float(info))


def layout_of(leaf: LeafLayout) -> list[Any] | None:
    """What `store.json` says of a leaf; None for what goes without saying."""
    if leaf.whole or not any(leaf.axes):
        return None
    return [*map(list, leaf.axes), leaf.rank]


def open_files(path: Path) -> StoreFiles:
    """Opens a store.

    Raises:
        StoreError: there is none, it is damaged, or another version wrote it.
    """
    if not (path / STORE_NAME).is_file():
        raise StoreError(f"{path} is no store: no {STORE_NAME}; {contents_of(path)}.")
    document = unsealed(path / STORE_NAME)
    if document["format"] != FORMAT:
        raise StoreError(
            f"{path} has format {document['format']}, this version of jaxmerge reads "
            f"{FORMAT}; it was written by {document['made']['versions']['jaxmerge']}."
        )
    try:
        base = open_checkpoint(path / BASE_NAME)
    except CheckpointError as error:
        raise StoreError(f"{path}: the base is damaged: {error}") from error
    if digest_of_leaves(base.leaves) != document["leaves"]:
        raise StoreError(
            f"{path}: the base is damaged: names, shapes or dtypes of leaves are not "
            "what they were. Copy the store again."
        )
    return StoreFiles(path, document, base)


def digest_of_leaves(leaves: Mapping[str, LeafInfo]) -> str:
    """What identifies names, shapes and dtypes, in the order of a store."""
    known = [[n, *leaves[n].shape, str(leaves[n].dtype)] for n in in_order(leaves)]
    return digest(compact_json({"leaves": known}))
