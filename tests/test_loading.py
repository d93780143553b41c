"""Checkpoints onto a mesh: the same values, and no slice read that nobody holds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import Counting
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from loading_process import RULES

from jaxmerge import load_sharded, open_checkpoint
from jaxmerge.checkpoints import FORMATS, CheckpointError, LeafInfo, open_writer
from jaxmerge.renaming import Rule, rename

ARRAYS = {
    "rows": np.arange(16 * 6).reshape(16, 6).astype(jnp.bfloat16),
    "columns": np.arange(5 * 8, dtype=np.float32).reshape(5, 8) / 7,
    "scale": np.float32(3),
    "steps": np.arange(4, dtype=np.int32),
}


@pytest.fixture(scope="module", params=FORMATS)
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "model"
    infos = {name: LeafInfo(a.shape, a.dtype) for name, a in ARRAYS.items()}
    with open_writer(path, infos, request.param) as writer:
        for name, array in ARRAYS.items():
            writer.write(name, array)
    return path


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (P("data"), P(None, "model")),
        (P(("model", "data")), P(None, ("data", "model"))),
        (P(None, "model"), P()),
    ],
)
def test_every_sharding_gives_what_is_in_the_file(path, mesh, rows, columns):
    rules = {"rows": rows, "columns": columns, ".*": P()}
    checkpoint = Counting(open_checkpoint(path))
    params = load_sharded(checkpoint, mesh, rules)
    assert params.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(params[name], array, strict=True)
    assert params["rows"].sharding == NamedSharding(mesh, rows)
    assert params["columns"].sharding == NamedSharding(mesh, columns)
    # Eight devices, but no slice twice.
    assert checkpoint.nbytes == {name: a.nbytes for name, a in ARRAYS.items()}


def test_cast_and_selection(path, mesh):
    params = load_sharded(path, mesh, {".*": P()}, dtype="float16")
    for name, array in ARRAYS.items():
        floating = name != "steps"
        expected = array.astype(np.float16) if floating else array
        np.testing.assert_array_equal(params[name], expected, strict=True)
    for leaves in ("s.*", ["steps", "scale"]):
        checkpoint = Counting(open_checkpoint(path))
        params = load_sharded(checkpoint, mesh, leaves=leaves)
        assert params.keys() == checkpoint.nbytes.keys() == {"scale", "steps"}


def test_a_view_is_loaded_under_its_names(path, mesh):
    checkpoint = rename(
        open_checkpoint(path), [Rule("(rows|columns)", r"layer/\1")], keep_rest=True
    )
    params = load_sharded(checkpoint, mesh, {"layer/rows": P("data"), ".*": P()})
    np.testing.assert_array_equal(params["layer"]["rows"], ARRAYS["rows"])
    assert params["layer"]["rows"].sharding.spec == P("data")


def test_what_does_not_fit(path, mesh):
    with pytest.raises(CheckpointError, match=r"no leaf that 'x\.\*' matches"):
        load_sharded(path, mesh, leaves="x.*")
    with pytest.raises(CheckpointError, match="Did you mean 'scale'"):
        load_sharded(path, mesh, leaves=["scal"])
    with pytest.raises(CheckpointError, match="dtype is 'int8'; it must be one of"):
        load_sharded(path, mesh, dtype="int8")
    with pytest.raises(ValueError, match=r"'columns' of shape .* not divisible by"):
        load_sharded(path, mesh, {"columns": P("data"), ".*": P()})


def test_two_processes_read_only_what_they_hold(tmp_path):
    source = tmp_path / "model"
    infos = {name: LeafInfo(a.shape, a.dtype) for name, a in ARRAYS.items()}
    with open_writer(source, infos, "orbax") as writer:
        for name, array in ARRAYS.items():
            writer.write(name, array)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    script = [sys.executable, here / "loading_process.py"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(here.parent)
    processes = [
        subprocess.Popen(
            [*script, str(number), str(port), source, tmp_path],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()

    mesh = jax.make_mesh((2, 4), ("data", "model"))
    alone = load_sharded(source, mesh, RULES, dtype="float32")
    for number in range(2):
        read = json.loads((tmp_path / f"{number}.json").read_text())
        assert read == {
            name: array.nbytes // (2 if name in ("rows", "columns") else 1)
            for name, array in ARRAYS.items()
        }
        held = np.load(tmp_path / f"{number}.npz")
        assert {key.split("|")[0] for key in held} == set(ARRAYS)
        for key, part in held.items():
            name, index = key.split("|")
            whole = np.asarray(alone[name])
            index = tuple(
                slice(start, None if stop == -1 else stop)
                for start, stop in json.loads(index)
            )
            np.testing.assert_array_equal(part, whole[index], strict=True)
