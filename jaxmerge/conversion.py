"""Converts checkpoints between formats, names and dtypes, leaf by leaf."""

import os
from collections.abc import Iterator, Sequence

from jaxmerge.checkpoints import (
    Checkpoint,
    Index,
    LeafInfo,
    Progress,
    open_checkpoint,
    open_writer,
)
from jaxmerge.checkpoints.files import config_with_dtype
from jaxmerge.checkpoints.stacking import stack_layers, unstack_layers
from jaxmerge.checkpoints.views import cast
from jaxmerge.renaming import Rule, load_rules, rename

BLOCK_BYTES = 128 * 2**20


def convert(
    source: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str],
    to: str,
    *,
    names: str | Sequence[Rule] | None = None,
    inverse: bool = False,
    keep_rest: bool = False,
    unstack: str | None = None,
    stack: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint in another format, with other names or another dtype.

    Rows of one leaf are in memory at a time, about 128 MiB of them, and of a stacked
    leaf one layer more; except of a msgpack file, which is read whole. Config,
    tokenizer and code go with it.

    Args:
        source: what `open_checkpoint` opens, or a checkpoint that is open.
        out: the directory to create; it must not exist.
        to: the format, one of `jaxmerge.checkpoints.FORMATS`.
        names: rules for names and axes: a preset (`jaxmerge.renaming.presets()`), a
            YAML file, or `Rule`s; by default names stay.
        inverse: whether the rules are undone.
        keep_rest: whether leaves that no rule matches stay; else they are an error.
        unstack: takes leaves that stack layers apart first, into names such as
            "layers_{}"; see `checkpoints.stacking`.
        stack: stacks layers of such names, after renaming.
        dtype: of the floating-point leaves, such as "bfloat16"; by default their own.
        progress: called after each leaf that was written.

    Raises:
        FileExistsError: `out` exists.
        CheckpointError: an input that is missing, damaged or cannot be converted so, or
            a disk that is too small. Nothing is left behind.
        RecipeError: rules that mean nothing.

    Example:
        >>> import pathlib, tempfile
        >>> import jaxmerge, numpy as np
        >>> tmp = pathlib.Path(tempfile.mkdtemp())
        >>> jaxmerge.save(tmp / "hf", {"model.norm.weight": np.ones(2, np.float32)})
        >>> convert(tmp / "hf", tmp / "flax", "orbax", names="llama", dtype="bfloat16")
        >>> jaxmerge.load(tmp / "flax")
        {'norm': {'scale': array([1, 1], dtype=bfloat16)}}
    """
    view = open_checkpoint(source) if isinstance(source, str | os.PathLike) else source
    if unstack is not None:
        view = unstack_layers(view, unstack)
    if names is not None:
        rules = (
            load_rules(names, inverse=inverse)
            if isinstance(names, str)
            else [rule.inverse if inverse else rule for rule in names]
        )
        view = rename(view, rules, keep_rest=keep_rest)
    if stack is not None:
        view = stack_layers(view, stack)
    if dtype is not None:
        view = cast(view, dtype)

    total, done = sum(info.nbytes for info in view.leaves.values()), 0
    with open_writer(out, view.leaves, to) as writer:
        for path in view.sidecars():
            if dtype is not None and path.name == "config.json":
                writer.add_file(path.name, config_with_dtype(path, dtype))
            else:
                writer.add_file(path.name, path)
        for name, info in view.leaves.items():
            for index in _blocks(info, writer.row_step(name)):
                writer.write(name, view.read(name, index), index)
            done += info.nbytes
            if progress is not None:
                progress(done, total, name)


def _blocks(info: LeafInfo, step: int) -> Iterator[Index]:
    """Cuts a leaf into rows that are in memory together."""
    if info.nbytes <= BLOCK_BYTES or not info.shape:
        yield ...
        return
    rows = info.shape[0]
    at_once = max(step, BLOCK_BYTES * rows // info.nbytes // step * step)
    for start in range(0, rows, at_once):
        yield (slice(start, min(start + at_once, rows)),)
