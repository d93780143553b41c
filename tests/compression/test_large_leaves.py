"""Leaves of many models that do not fit into memory: the same store, in less of it."""

import gc
import json
import time
import weakref

import numpy as np
import pytest

from jaxmerge.compression import create_store
from jaxmerge.compression.sources import InMemory

TASKS = [f"t{i}" for i in range(6)]
ROWS, COLUMNS = 64, 24
LEAF = 4 * ROWS * COLUMNS
MEMORY = 4 * LEAF
MOST = 3 * LEAF


@pytest.fixture(scope="module")
def trees():
    rng = np.random.default_rng(0)
    base = {"w": rng.normal(size=(ROWS, COLUMNS)), "b": rng.normal(size=7)}
    moved = {
        task: {n: x + 0.1 * rng.normal(size=x.shape) for n, x in base.items()}
        for task in TASKS
    }
    moved["t1"]["w"] = base["w"]

    def narrow(tree):
        return {n: x.astype(np.float32) for n, x in tree.items()}

    return narrow(base), {task: narrow(tree) for task, tree in moved.items()}


class Reads:
    """What is read of "w", and how many bytes of it are in memory together.

    Up to `allowed`, nobody waits for bytes to be let go of.
    """

    def __init__(self, monkeypatch, allowed=MOST):
        self.rows, self.now, self.most = [], 0, 0
        read = InMemory.read

        def noted(source, name, index=...):
            part = read(source, name, index).copy()
            if name == "w":
                self.rows.append(len(part))
                self._wait_for(allowed - part.nbytes)
                self.now += part.nbytes
                self.most = max(self.most, self.now)
                weakref.finalize(part, self._free, part.nbytes)
            return part

        monkeypatch.setattr(InMemory, "read", noted)

    def _wait_for(self, nbytes):
        """Lets go of what is in cycles, and of what running computations still hold."""
        deadline = time.monotonic() + 5
        while self.now > nbytes and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)

    def _free(self, nbytes):
        self.now -= nbytes


def contents(path):
    """The files of a store, without dates and what depends on them."""
    files = {}
    for file in path.rglob("*"):
        if file.suffix == ".json":
            document = json.loads(file.read_text())
            left_out = ("made", "seal", "store")
            files[file.relative_to(path)] = {
                key: value for key, value in document.items() if key not in left_out
            }
        elif file.is_file():
            files[file.relative_to(path)] = file.read_bytes()
    return files


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("tall", {}),
        ("tall", {"multi_task": "ties"}),
        ("emr", {}),
        ("rtvq", {"stack_axes": 1}),
        ("tvq", {}),
        ("bitdelta", {"matrices": {"w": "io"}}),
    ],
)
def test_the_same_store_in_less_memory(kind, options, trees, tmp_path, monkeypatch):
    base, models = trees
    create_store(tmp_path / "whole", base, models, kind=kind, **options)
    reads = Reads(monkeypatch)
    create_store(tmp_path / "rows", base, models, kind=kind, memory=MEMORY, **options)
    # The base, one model, and rows of all: not all models.
    assert reads.most <= MOST
    rows = [count for count in reads.rows if count < ROWS]
    assert not rows or max(rows) * 4 * COLUMNS * (len(TASKS) + 1) <= MEMORY
    assert bool(rows) == (kind in ("tall", "emr", "rtvq"))
    assert contents(tmp_path / "whole") == contents(tmp_path / "rows")


def test_what_fits_is_read_once(trees, tmp_path, monkeypatch):
    reads = Reads(monkeypatch, allowed=LEAF * (len(TASKS) + 1))
    create_store(tmp_path / "store", *trees, kind="emr")
    assert reads.rows == [ROWS] * (len(TASKS) + 1)
