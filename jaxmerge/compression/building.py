"""Builds a store from a base and models, leaf by leaf, and adds tasks to one."""

import contextlib
import datetime
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

import jaxmerge
from jaxmerge import streaming
from jaxmerge.checkpoints import Checkpoint, Progress, Writer
from jaxmerge.compression.files import (
    BASE_NAME,
    LEAVES_NAME,
    SHARED_NAME,
    STORE_NAME,
    TASK_NAME,
    TASKS_NAME,
    StoreError,
    VectorFile,
    as_bytes,
    check_space,
    compact_json,
    digest,
    file_info,
    part_bytes,
    seal,
    to_array,
    whole_directory,
)
from jaxmerge.compression.kinds import (
    CALLER,
    KINDS,
    WHOLE,
    LeafLayout,
    Models,
    Options,
    Parts,
    checked_options,
    in_order,
    options_of_task,
    plan_leaf,
)
from jaxmerge.compression.reading import (
    FORMAT,
    digest_of_leaves,
    layout_of,
    open_files,
)
from jaxmerge.compression.sources import (
    Source,
    check_sources,
    checked_name,
    open_source,
)
from jaxmerge.compression.writing import NewTask, changes
from jaxmerge.reports import hash_all, in_background
from jaxmerge.tree import Params, is_float

MEMORY = 1_000_000_000


def create_store(
    path: str | os.PathLike[str],
    base: Source,
    models: Mapping[str, Source],
    *,
    kind: str = "tall",
    memory: int = MEMORY,
    progress: Progress | None = None,
    **options: Any,
) -> None:
    r"""Keeps fine-tuned models together, in little more than the space of two.

    Leaf by leaf: a leaf of the base and of every model is in memory if all of them fit;
    else the leaf of one model at a time, and some rows of all models, which are then
    read more than once. Leaves that no model changes are stored once, with the base. A
    leaf that only some tasks change takes space in these alone; others get the base's,
    exactly. Leaves without floating-point numbers, and in `"tsv"` and `"bitdelta"`
    those that are no matrices, are kept whole by each task that changes them.

    Args:
        path: the directory to create; it must not exist.
        base: what all models were fine-tuned from, a checkpoint or a pytree.
        models: by name of the task, which also names a directory.
        kind: `"tall"` keeps $\theta_0 + m_t \odot \tau_{MTL}$ with the masks of
            `jaxmerge.tall_masks`; `"emr"` EMR-Merging's elected vector, masks and
            scales; `"tsv"` leading singular vectors (`jaxmerge.tsv_compress`); `"tvq"`
            and `"bitdelta"` quantised task vectors; `"rtvq"` the quantised mean of task
            vectors, and quantised differences from it. The vector that tasks share is
            kept in the dtypes of the base.
        memory: about how many bytes a leaf of all models, and their task vectors, may
            take; the store is the same. Beside it, the leaf of one model takes a few
            times its size.
        progress: called after each leaf that is written.
        options: of the kind. `"tall"`: `threshold` (0.4), one number or one per task by
            name; `multi_task`, `"task_arithmetic"` or `"ties"`; and what TIES ranks
            entries within, `scope`, each `"leaf"`, or the `"model"` as the authors do,
            in further passes over the files. `"tsv"`: `rank`, None for an equal share
            of the full one; `matrices` and `stack_axes`, as in `tsv_compress`.
            `"tvq"`: `bits` (4), from 1 to 8, and `stack_axes`. `"rtvq"`: `bits` (2) of
            differences, `shared_bits` (3) of the mean, and `stack_axes`. `"bitdelta"`:
            `matrices` and `stack_axes`.

    Raises:
        FileExistsError: `path` exists.
        CheckpointError: a checkpoint is missing or damaged.
        StoreError: trees that are not alike, an invalid name or option, weights that
            are not finite, or a disk that is too small. Nothing is left behind.

    Example:
        >>> import tempfile
        >>> from jaxmerge.compression import open_store
        >>> base = {"w": np.zeros(4, np.float32)}
        >>> models = {
        ...     "math": {"w": np.array([1, 0, 3, 0], np.float32)},
        ...     "code": {"w": np.array([0, 2, 0, 0], np.float32)},
        ... }
        >>> path = Path(tempfile.mkdtemp()) / "store"
        >>> create_store(path, base, models)
        >>> open_store(path).params("math")["w"].tolist()
        [1.0, 0.0, 3.0, 0.0]
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(
            f"{path} exists already; remove it or choose another name."
        )
    if not isinstance(models, Mapping) or not models:
        raise StoreError(
            f"{CALLER}: models is {models!r:.60}; give a dict of at least one model, "
            "each by the name of its task."
        )
    start = open_source(CALLER, "base", base, None)
    sources = {
        checked_name(CALLER, name): open_source(CALLER, f"models[{name!r}]", m, start)
        for name, m in models.items()
    }
    check_sources(CALLER, start, sources)
    with _as_store_errors(CALLER):
        chosen = checked_options(kind, options, list(sources))
        leaves = [
            plan_leaf(kind, name, start.leaves[name], chosen, len(sources))
            for name in in_order(start.leaves)
        ]
    check_space(path, _most_bytes(kind, chosen, leaves, len(sources)))

    with whole_directory(path) as hidden, contextlib.ExitStack() as stack:
        files = {n: _open_leaves(stack, hidden / TASKS_NAME / n) for n in sources}
        tasks = {n: NewTask(n, options_of_task(chosen, n), f) for n, f in files.items()}
        hashes = in_background(lambda: hash_all({"": start, **sources}))
        inputs = _Inputs(start, sources, memory)
        sections = _write_leaves(
            hidden, kind, chosen, leaves, inputs, tasks, progress or _silent
        )
        document = seal(
            {
                "format": FORMAT,
                "kind": kind,
                "options": chosen,
                "leaves": digest_of_leaves(start.leaves),
                "sidecars": {
                    path.name: digest(path.read_bytes()) for path in start.sidecars()
                },
                "layouts": {
                    leaf.name: at for leaf in leaves if (at := layout_of(leaf))
                },
                **sections,
                "made": _made(start, hashes.result()[""]),
            }
        )
        (hidden / STORE_NAME).write_bytes(compact_json(document))
        order = [leaf.name for leaf in leaves]
        for name, task in tasks.items():
            made = _made(sources[name], hashes.result()[name])
            listed = task.document(kind, document["seal"], order, made)
            (hidden / TASKS_NAME / name / TASK_NAME).write_bytes(compact_json(listed))


def add_task(
    path: str | os.PathLike[str],
    name: str,
    model: Source,
    *,
    threshold: float | None = None,
    progress: Progress | None = None,
) -> None:
    """Adds the model of one more task to a store: all of it, or nothing.

    What tasks share was fixed when the store was made: the new task gets a mask on that
    vector, which knows nothing of it. Compare the result with the model; if they differ
    too much, make a new store of all models. Leaves that no task changed before are
    kept whole.

    Args:
        path: the store.
        name: of the new task.
        model: a checkpoint or a pytree, like the base.
        threshold: of a `"tall"` store; by default the one that the store was made with,
            if that was one for all tasks.
        progress: called after each leaf.

    Raises:
        StoreError: as `create_store`; or the store is damaged, or has such a task.
    """
    files = open_files(Path(path))
    if checked_name("add_task", name) in files.tasks:
        raise StoreError(
            f"add_task: {files.path} has a task {name!r} already; choose another name, "
            "or remove its directory first."
        )
    given = {} if threshold is None else {"threshold": threshold}
    with _as_store_errors("add_task"):
        checked_options(files.kind, given, [name])
    options = {**files.document["options"], **given}
    if isinstance(options.get("threshold"), Mapping):
        raise StoreError(
            f"add_task: {files.path} has one threshold per task; give one for {name!r}."
        )
    source = open_source("add_task", f"models[{name!r}]", model, files.base)
    check_sources("add_task", files.base, {name: source})
    place, done = files.path / TASKS_NAME / name, 0
    with whole_directory(place) as hidden, contextlib.ExitStack() as stack:
        task = NewTask(name, options, _open_leaves(stack, hidden))
        hashes = in_background(source.digest)
        for leaf in files.leaves.values():
            start, value = files.read_base(leaf.name), source.read(leaf.name)
            done += start.nbytes
            with streaming.precision(leaf.is_double):
                delta = changes(leaf, start, value, name)
                if delta is not None:
                    shared = files.read_shared(leaf.name)
                    parts = files.parts(leaf)
                    task.keep(files.kind, leaf, parts, value, delta, shared)
            if progress is not None:
                progress(done, files.base_bytes, leaf.name)
        made = _made(source, hashes.result())
        listed = task.document(
            files.kind, files.document["seal"], list(files.leaves), made
        )
        (hidden / TASK_NAME).write_bytes(compact_json(listed))


class _Inputs(NamedTuple):
    """What a store is built from.

    Attributes:
        base: the base.
        models: by task.
        memory: how many bytes a leaf of all of them may take.
    """

    base: Checkpoint
    models: Mapping[str, Checkpoint]
    memory: int

    def lazy(self, name: str, task: str | None = None) -> streaming.StoredLeaf:
        """A leaf of a model, or of the base, of which some rows are read at a time."""
        checkpoint = self.base if task is None else self.models[task]
        dtype = checkpoint.leaves[name].dtype
        return streaming.StoredLeaf(checkpoint, name, self.memory, dtype)

    def fit(self, leaf: LeafLayout) -> bool:
        """Whether a leaf of all models can be in memory, with the task vectors."""
        each = 2 * leaf.info.entries * leaf.wide.itemsize
        return each * (len(self.models) + 1) <= self.memory


class _LeafTasks(NamedTuple):
    """A leaf of the base, and those of the models.

    Attributes:
        leaf: which leaf, and how it is kept.
        base: that of the base.
        read: from a task to the leaf of its model, and what `changes` says of it.
        inputs: where these come from.
    """

    leaf: LeafLayout
    base: np.ndarray
    read: Callable[[str], tuple[np.ndarray, Any]]
    inputs: _Inputs

    def changed(self) -> Models:
        """The leaf of the models that change it: arrays, or lazy if they do not fit."""
        tasks = [task for task in self.inputs.models if self.read(task)[1] is not None]
        if self.inputs.fit(self.leaf):
            return {task: self.read(task)[0] for task in tasks}
        return {task: self.inputs.lazy(self.leaf.name, task) for task in tasks}


def _measure(
    kind: str, options: Options, leaves: list[LeafLayout], inputs: _Inputs
) -> Any:
    """What the kind has to know of all leaves, read in passes."""
    floats = [leaf for leaf in leaves if is_float(leaf.info)]
    widths = {leaf.wide for leaf in floats}
    if options.get("scope") == "model" and len(widths) > 1:
        raise StoreError(
            f"{CALLER}: base has leaves of float64 and of narrower numbers, which "
            "scope='model' cannot rank together; convert it, or set scope to 'leaf'."
        )

    def lazy(task: str | None = None) -> Params:
        return {leaf.name: inputs.lazy(leaf.name, task) for leaf in floats}

    trees = {task: lazy(task) for task in inputs.models}
    with streaming.precision(np.dtype(np.float64) in widths):
        return KINDS[kind].measure(lazy(), trees, options)


def _read_leaves(leaves: list[LeafLayout], inputs: _Inputs) -> Iterator[_LeafTasks]:
    """Reads leaf by leaf; numbers are as wide as the leaf is until the next one."""
    for leaf in leaves:
        start = inputs.base.read(leaf.name)

        def read(
            task: str, leaf: LeafLayout = leaf, start: np.ndarray = start
        ) -> tuple[np.ndarray, Any]:
            value = inputs.models[task].read(leaf.name)
            return value, changes(leaf, start, value, task)

        fit = inputs.fit(leaf)
        with streaming.precision(leaf.is_double):
            yield _LeafTasks(
                leaf, start, functools.cache(read) if fit else read, inputs
            )


def _write_leaves(
    hidden: Path,
    kind: str,
    options: Options,
    leaves: list[LeafLayout],
    inputs: _Inputs,
    tasks: Mapping[str, NewTask],
    progress: Progress,
) -> dict[str, list[str | None]]:
    """Writes base, shared vector and tasks; returns the digests of the first two."""
    measured, base = _measure(kind, options, leaves, inputs), inputs.base
    digests, done = {}, 0
    total = sum(leaf.info.nbytes for leaf in leaves)
    infos = {leaf.name: KINDS[kind].shared(leaf, options) for leaf in leaves}
    with contextlib.ExitStack() as stack:
        shared = None
        if KINDS[kind].share is not None:
            file = stack.enter_context((hidden / SHARED_NAME).open("wb"))
            shared = VectorFile(file, {n: file_info(i) for n, i in infos.items()})
        writer = stack.enter_context(Writer(hidden / BASE_NAME, base.leaves))
        for sidecar in base.sidecars():
            writer.add_file(sidecar.name, sidecar)
        for of_leaf in _read_leaves(leaves, inputs):
            name = of_leaf.leaf.name
            writer.write(name, of_leaf.base)
            digests[name] = digest(as_bytes(of_leaf.base))
            _write_tasks(kind, options, of_leaf, tasks, shared, measured)
            done += of_leaf.leaf.info.nbytes
            progress(done, total, name)
        if shared is not None:
            shared.finish()
    of_shared = shared.digests if shared is not None else {}
    return {
        "base": [digests[leaf.name] for leaf in leaves],
        "shared": [of_shared.get(leaf.name) for leaf in leaves],
    }


def _write_tasks(
    kind: str,
    options: Options,
    of_leaf: _LeafTasks,
    tasks: Mapping[str, NewTask],
    file: VectorFile | None,
    measured: Any,
) -> None:
    leaf, shared, infos = of_leaf.leaf, {}, {WHOLE: of_leaf.leaf.info}
    changed = list(tasks)
    if not leaf.whole:
        infos = KINDS[kind].parts(leaf, options)
        if file is not None:
            models = of_leaf.changed()
            changed = list(models)
            if models:
                shared = _shared_parts(kind, options, of_leaf, models, measured)
                of_shared = KINDS[kind].shared(leaf, options)
                file.write(leaf.name, to_array(shared, of_shared))
    for task in changed:
        value, delta = of_leaf.read(task)
        if delta is not None:
            tasks[task].keep(kind, leaf, infos, value, delta, shared)


def _shared_parts(
    kind: str, options: Options, of_leaf: _LeafTasks, models: Models, measured: Any
) -> Parts:
    share, leaf = KINDS[kind].share, of_leaf.leaf
    assert share is not None
    fit = of_leaf.inputs.fit(leaf)
    base = of_leaf.base if fit else of_leaf.inputs.lazy(leaf.name)
    made = share(leaf, base, models, options, measured)
    parts = {name: np.asarray(part) for name, part in made.items()}
    if not all(np.isfinite(part).all() for part in parts.values()):
        raise StoreError(
            f"{CALLER}: leaf {leaf.name!r}: the tasks together move it further than "
            f"{leaf.info.dtype} reaches; convert the base to bfloat16 or float32."
        )
    return parts


def _most_bytes(
    kind: str, options: Options, leaves: list[LeafLayout], tasks: int
) -> int:
    """The size of the store if every task changes every leaf."""
    total = 0
    for leaf in leaves:
        of_task, of_all = leaf.info.nbytes, 0
        if not leaf.whole:
            of_task = sum(map(part_bytes, KINDS[kind].parts(leaf, options).values()))
            of_all = sum(map(part_bytes, KINDS[kind].shared(leaf, options).values()))
        total += leaf.info.nbytes + of_all + tasks * of_task
    return total


def _open_leaves(stack: contextlib.ExitStack, place: Path) -> BinaryIO:
    place.mkdir(parents=True, exist_ok=True)
    return stack.enter_context((place / LEAVES_NAME).open("wb"))


def _made(source: Checkpoint, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Where a part of the store comes from."""
    return {
        "from": str(source.path.absolute()) if hashes else "memory",
        "blake3": dict(hashes),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"jaxmerge": jaxmerge.__version__, "jax": version("jax")},
    }


def _silent(done: int, total: int, name: str) -> None:
    pass


@contextlib.contextmanager
def _as_store_errors(caller: str) -> Iterator[None]:
    """Errors in what was asked for, under the name of the function that was called."""
    try:
        yield
    except ValueError as error:
        raise StoreError(str(error).replace(CALLER, caller, 1)) from error
