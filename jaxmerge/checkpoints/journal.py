"""What of an output is on disk already, so that an interrupted writer can go on."""

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmerge.checkpoints.interface import CheckpointError

SECONDS_BETWEEN_SYNCS = 5.0


class Journal:
    """A file that names the leaves that are complete, with a note on each.

    A leaf is in it only after its values are on disk, also if the machine fails.

    Args:
        path: the file; made if it is not there.
        identity: what is being written, from what: JSON. An existing journal must have
            the same.
        sync: called to bring values to disk before the journal says that they are.

    Attributes:
        is_new: whether there was none before.
        done: name of a complete leaf -> the note on it.

    Raises:
        CheckpointError: the journal is of something else, or in use.
    """

    def __init__(self, path: Path, identity: Any, sync: Callable[[], None]):
        self.path, self._sync = path, sync
        self._identity = identity
        self._pending: list[str] = []
        self._synced = time.monotonic()
        self._writing = threading.RLock()
        self._file = path.open("a+", encoding="utf-8")
        try:
            self._lock()
            lines = self._read()
            self.is_new = not lines
            self.done: dict[str, Any] = dict(json.loads(line) for line in lines[1:])
        except BaseException:
            self._file.close()
            raise

    def start_anew(self) -> None:
        """Forgets what is complete."""
        with self._writing:
            self.done.clear()
            self._file.truncate(0)
            self._append([json.dumps(self._identity)])

    def add(self, name: str, note: Any) -> None:
        """Notes that a leaf is complete; sooner or later, as syncing takes time."""
        with self._writing:
            self._pending.append(json.dumps([name, note]))
            if time.monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS:
                self.flush()

    def flush(self) -> None:
        """Brings everything that is complete to disk."""
        with self._writing:
            if self._pending:
                self._sync()
                self._append(self._pending)
                self._pending = []
            self._synced = time.monotonic()

    def close(self) -> None:
        """Lets go of the file."""
        with self._writing:
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{self.path.parent} is being written by another process; wait for "
                "it, or choose another name for the output."
            ) from None

    def _read(self) -> list[str]:
        """The lines that are there, of which the first is the identity."""
        self._file.seek(0)
        text = self._file.read()
        # The last line is cut off where the writing of it was interrupted.
        whole = text[: text.rfind("\n") + 1]
        lines = whole.splitlines()
        if lines and json.loads(lines[0]) != json.loads(json.dumps(self._identity)):
            raise CheckpointError(
                f"{self.path.parent} holds the beginning of another output of this "
                f"name: {_difference(json.loads(lines[0]), self._identity)}. Go on "
                "with that one as it was, or remove the directory to start anew."
            )
        self._file.truncate(len(whole.encode()))
        if not lines:
            self._append([json.dumps(self._identity)])
        return lines

    def _append(self, lines: list[str]) -> None:
        self._file.write("".join(line + "\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())


def completed(path: Path) -> set[str]:
    """The names of the leaves that a journal has."""
    lines = path.read_text(encoding="utf-8").splitlines(True)[1:]
    return {json.loads(line)[0] for line in lines if line.endswith("\n")}


def _difference(before: Any, now: Any) -> str:
    """Which entry of an identity has changed."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            if before.get(key) != json.loads(json.dumps(now.get(key))):
                return f"{key} changed since"
    return "it was made from something else"
