"""An opened store: parameters of any of its tasks, in memory or on disk."""

import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxmerge
from jaxmerge import sharding
from jaxmerge.checkpoints import REPORT_NAME, LeafInfo, Progress, Writer
from jaxmerge.checkpoints.files import as_json
from jaxmerge.checkpoints.names import nest
from jaxmerge.compression.files import TASKS_NAME, StoreError
from jaxmerge.compression.kinds import KINDS, WHOLE, LeafLayout
from jaxmerge.compression.packing import bits_sharding
from jaxmerge.compression.reading import StoreFiles, TaskRecord, open_files
from jaxmerge.streaming import precision
from jaxmerge.tree import Params


@dataclass(frozen=True)
class Store:
    """The models of several tasks in one place: see `open_store`."""

    files: StoreFiles
    _shardings: Mapping[str, Any] = field(repr=False)
    _parts: dict[str, dict[str, dict[str, Any]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def path(self) -> Path:
        """The directory."""
        return self.files.path

    @property
    def kind(self) -> str:
        """What is kept of the tasks: one of the kinds of `create_store`."""
        return self.files.kind

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that are there now, sorted."""
        return self.files.tasks

    def params(self, task: str) -> Params:
        """Rebuilds the parameters of one task.

        The base and what tasks share are read on first use and stay in memory; of each
        task asked for, its masks or factors do, as packed as they are on disk. Every
        leaf is made by one compiled function.

        Args:
            task: one of `tasks`.

        Returns:
            Nested dict, as of `jaxmerge.load`, of JAX arrays in the dtypes of the base
            (without `jax_enable_x64`, wide numbers become narrow). Leaves that the task
            does not change are the same arrays in the results for all tasks: do not
            donate them.

        Raises:
            StoreError: there is no such task, or the store is damaged.
        """
        record = self.files.task(task)
        seal = record.document["seal"]  # A task may be removed and added again.
        if seal not in self._parts:
            self._parts[seal] = self._load_task(record)
        kept = self._parts[seal]
        return nest(
            {
                name: _decode(
                    self.kind,
                    leaf,
                    self._base[name],
                    self._shared[name],
                    kept[name],
                    record.scale,
                )
                if name in kept
                else self._base[name]
                for name, leaf in self.files.leaves.items()
            }
        )

    @cached_property
    def _base(self) -> dict[str, Any]:
        return {
            name: _put(self.files.read_base(name), self._shardings.get(name))
            for name in self.files.base.leaves
        }

    @cached_property
    def _shared(self) -> dict[str, dict[str, Any]]:
        files = self.files
        return {
            name: self._put_parts(
                leaf, files.read_shared(name), files.shared_parts(leaf)
            )
            for name, leaf in files.leaves.items()
        }

    def _load_task(self, record: TaskRecord) -> dict[str, dict[str, Any]]:
        files, kept = self.files, self.files.read_task(record)
        leaves = [files.leaves[name] for name in kept.places]
        return {
            leaf.name: self._put_parts(leaf, kept.read(leaf.name), files.parts(leaf))
            for leaf in leaves
        }

    def _put_parts(
        self,
        leaf: LeafLayout,
        parts: dict[str, np.ndarray],
        infos: Mapping[str, LeafInfo],
    ) -> dict[str, Any]:
        of_leaf = self._shardings.get(leaf.name)

        def target(name: str) -> Any:
            if of_leaf is None or name == WHOLE:
                return of_leaf
            if infos[name].dtype == bool:
                return bits_sharding(of_leaf, leaf.info.shape, infos[name].shape)
            return NamedSharding(of_leaf.mesh, PartitionSpec())

        return {name: _put(array, target(name)) for name, array in parts.items()}

    def extract(
        self,
        task: str,
        out: str | os.PathLike[str],
        *,
        progress: Progress | None = None,
    ) -> None:
        """Writes the model of one task as a checkpoint, leaf by leaf.

        Args:
            task: one of `tasks`.
            out: the directory to create; it must not exist.
            progress: called after each leaf.

        Raises:
            FileExistsError: `out` exists.
            StoreError: there is no such task, or the store is damaged.
            CheckpointError: the disk is too small.
        """
        record, leaves = self.files.task(task), self.files.base.leaves
        total, done = self.files.base_bytes, 0
        with Writer(out, leaves) as writer:
            for sidecar in self.files.sidecars():
                writer.add_file(sidecar.name, sidecar)
            for name, array in self._arrays(record):
                writer.write(name, array)
                done += array.nbytes
                if progress is not None:
                    progress(done, total, name)
            writer.add_file(REPORT_NAME, as_json(self._report(record)))

    def _arrays(self, record: TaskRecord) -> Iterator[tuple[str, np.ndarray]]:
        """The leaves of a task; while one is in use, the next is read and checked."""
        kept, leaves = self.files.read_task(record), list(self.files.leaves.values())

        def read(leaf: LeafLayout, pool: ThreadPoolExecutor) -> list[Any]:
            jobs: list[Any] = [pool.submit(self.files.read_base, leaf.name)]
            if leaf.name in kept.places:
                jobs.append(pool.submit(self.files.read_shared, leaf.name))
                jobs.append(pool.submit(kept.read, leaf.name))
            return jobs

        with ThreadPoolExecutor(2) as pool:
            ahead = read(leaves[0], pool) if leaves else []
            for leaf, following in zip(leaves, [*leaves[1:], None], strict=True):
                jobs = ahead
                ahead = [] if following is None else read(following, pool)
                base, *of_task = [job.result() for job in jobs]
                if of_task:
                    shared, parts = of_task
                    with precision(leaf.is_double):
                        base = _decode(
                            self.kind, leaf, base, shared, parts, record.scale
                        )
                yield leaf.name, np.asarray(base)

    def _report(self, record: TaskRecord) -> dict[str, Any]:
        document = self.files.document
        return {
            "store": str(self.path.resolve()),
            "kind": self.kind,
            "options": document["options"],
            "base": document["made"],
            "task": {k: v for k, v in record.document.items() if k != "leaves"},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {"jaxmerge": jaxmerge.__version__, "jax": jax.__version__},
        }

    def verify(self) -> None:
        """Reads every byte of the store and checks it.

        Raises:
            StoreError: lists what is damaged, each with its task and leaf.
        """
        problems = []

        def attempt(read: Callable[..., Any], of: Any) -> Any:
            try:
                return read(of)
            except StoreError as error:
                problems.append(str(error))

        attempt(lambda files: files.sidecars(), self.files)
        for name in self.files.leaves:
            attempt(self.files.read_base, name)
            attempt(self.files.read_shared, name)
        for task in self.tasks:
            record = attempt(self.files.task, task)
            if record is not None:
                kept = self.files.read_task(record)
                for name in kept.places:
                    attempt(kept.read, name)
        if problems:
            raise StoreError("\n".join(problems))

    def sizes(self) -> "Sizes":
        """What the store takes on disk, and what its models would."""
        records = [self.files.task(task) for task in self.tasks]
        changed = {name for record in records for name in record.entries}
        leaves = self.files.base.leaves
        trained = sum(leaves[name].nbytes for name in changed)
        apart = len(records) * trained + self.files.base_bytes - trained
        tasks = {r.name: _size_of(self.path / TASKS_NAME / r.name) for r in records}
        return Sizes(_size_of(self.path), apart, tasks)


class Sizes(NamedTuple):
    """Bytes on disk.

    Attributes:
        store: of all files of the store.
        apart: of the models if each were stored, and what no task changes once.
        tasks: of the files of each task.
    """

    store: int
    apart: int
    tasks: dict[str, int]


def open_store(
    path: str | os.PathLike[str],
    mesh: Mesh | None = None,
    rules: Mapping[str, PartitionSpec] | None = None,
) -> Store:
    """Opens a store that `create_store` made.

    Args:
        path: its directory.
        mesh: where parameters are to be; by default on one device.
        rules: how leaves are sharded over it, by path, as in `jaxmerge.place`. Masks
            are sharded like their leaves, except along a last axis whose shards are no
            whole bytes of bits.

    Returns:
        The store. Its lists are read; values are when they are needed, and every byte
        is checked before it counts.

    Raises:
        StoreError: there is none, or its lists are damaged.
        ValueError: rules that do not fit the leaves, or rules without a mesh.
    """
    files = open_files(Path(path))
    if mesh is None:
        if rules is not None:
            raise ValueError("open_store: rules have no effect without a mesh.")
        return Store(files, {})
    shapes = {n: jax.ShapeDtypeStruct(*info) for n, info in files.base.leaves.items()}
    return Store(files, sharding.shardings(shapes, mesh, rules))


def _decode(
    kind: str, leaf: LeafLayout, base: Any, shared: Any, parts: Any, scale: float
) -> Any:
    if WHOLE in parts:
        return parts[WHOLE]
    return KINDS[kind].decode(leaf, base, shared, parts, scale)


def _put(array: np.ndarray, target: Any) -> Any:
    # A copy: what aliased a file would change with it.
    return jax.device_put(array, target, may_alias=False)


def _size_of(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
