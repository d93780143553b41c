"""What appears whole or not at all: a directory that leaves are written into."""

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from jaxmerge.checkpoints.interface import CheckpointError, LeafInfo


class Output:
    """The part of a writer that no format changes (a `LeafWriter`).

    Everything is written into a hidden directory beside `out_dir`, which is synced to
    disk and renamed when the `with` block ends well, and removed when it does not.
    A format says with `_start`, `_put` and `_finish` what goes into it.

    Args:
        out_dir: the directory to create; it must not exist.
        leaves: name -> shape and dtype of everything that will be written.

    Raises:
        FileExistsError: `out_dir` exists.
        CheckpointError: the disk is too small, a leaf is written twice, not at all, or
            with another shape or dtype than announced.
    """

    def __init__(self, out_dir: str | os.PathLike[str], leaves: Mapping[str, LeafInfo]):
        self.path = Path(out_dir).absolute()
        self._refuse_existing()
        if self.path.suffix in (".safetensors", ".msgpack", ".bin"):
            raise CheckpointError(
                f"{self.path} is a name for a file, but a checkpoint is written as a "
                f"directory; choose {self.path.stem!r}, for example."
            )
        if not leaves:
            raise CheckpointError(f"There are no leaves to write to {self.path}.")
        self.leaves = dict(leaves)
        self._written: set[str] = set()
        self._hidden = self.path.with_name(
            f".{self.path.name}.writing-{uuid.uuid4().hex[:8]}"
        )
        self._check_free_space()

    def _start(self) -> None:
        """Prepares the hidden directory, which is there and empty."""
        raise NotImplementedError

    def _put(self, name: str, array: np.ndarray) -> None:
        """Writes a leaf that is as it was announced."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Writes what comes after all leaves."""
        raise NotImplementedError

    def write(self, name: str, array: Any) -> None:
        """Writes one leaf, whatever its memory layout.

        Args:
            name: a key of the announced leaves, not written before.
            array: NumPy or JAX array of the announced shape and dtype.
        """
        if name not in self.leaves:
            raise CheckpointError(
                f"Leaf {name!r} was not announced to the writer of {self.path}; "
                "add it to `leaves`."
            )
        if name in self._written:
            raise CheckpointError(
                f"Leaf {name!r} of {self.path} is written twice; write each leaf once."
            )
        array = np.asarray(array)
        info = LeafInfo(array.shape, array.dtype)
        if info != self.leaves[name]:
            shape, dtype = self.leaves[name]
            raise CheckpointError(
                f"Leaf {name!r} of {self.path} was announced as {dtype}{list(shape)}, "
                f"but the array is {info.dtype}{list(info.shape)}; "
                "reshape or cast it before writing."
            )
        self._put(name, array)
        self._written.add(name)

    def add_file(self, name: str, content: bytes | str | os.PathLike[str]) -> None:
        """Puts a further file next to the weights.

        Args:
            name: its file name in the output.
            content: its bytes, or the path of a file to copy.
        """
        target = self._hidden / name
        if Path(name).name != name:
            raise CheckpointError(
                f"{name!r} is no plain file name; files go directly into {self.path}."
            )
        if target.exists():
            raise CheckpointError(
                f"{self.path} gets a file {name} already; choose another name."
            )
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._hidden.mkdir()
            self._start()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._publish()
        finally:
            self._discard()

    def _publish(self) -> None:
        if missing := [name for name in self.leaves if name not in self._written]:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise CheckpointError(
                f"Leaf {missing[0]!r}{more} of {self.path} was never written; "
                "the incomplete output was removed."
            )
        self._finish()
        for path in (*self._hidden.rglob("*"), self._hidden):
            _sync(path)
        self._refuse_existing()
        self._hidden.rename(self.path)
        _sync(self.path.parent)

    def _discard(self) -> None:
        shutil.rmtree(self._hidden, ignore_errors=True)

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.path):
            raise FileExistsError(
                f"{self.path} exists already, and mixing two checkpoints in one place "
                "would corrupt both. Remove it or choose another name."
            )

    def _check_free_space(self) -> None:
        needed = sum(info.nbytes for info in self.leaves.values())
        place = next(parent for parent in self.path.parents if parent.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise CheckpointError(
                f"{self.path} needs {needed:,} bytes, but {place} has only {free:,} "
                "free. Make room, choose another disk or a smaller dtype."
            )


def _sync(path: Path) -> None:
    """Waits until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
