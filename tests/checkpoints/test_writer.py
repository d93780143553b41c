"""Writing directories: what the library reads back, and what must never be left."""

import errno
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxmerge.checkpoints import (
    CheckpointError,
    LeafInfo,
    Writer,
    load,
    output,
    save,
    writer,
)

INDEX = "model.safetensors.index.json"
F32 = np.dtype("float32")


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def test_one_file_is_readable_by_the_library(tmp_path):
    leaves = {"w": LeafInfo((2, 3), F32), "n": LeafInfo((), np.dtype("int64"))}
    with Writer(tmp_path / "out", leaves, metadata={"recipe": "r"}) as out:
        out.write("n", np.array(5))
        out.write("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == ["model.safetensors"]
    path = tmp_path / "out" / "model.safetensors"
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt", "recipe": "r"}
        np.testing.assert_array_equal(file.get_tensor("w"), [[0, 1, 2], [3, 4, 5]])
        assert file.get_tensor("n").item() == 5
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0


def test_shards_follow_the_order_of_leaves(tmp_path):
    params = {
        name: np.full(size, size, np.float32)
        for name, size in [("a", 4), ("b", 6), ("c", 20), ("d", 1), ("e", 9)]
    }
    save(tmp_path / "out", params, max_shard_bytes=40)
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert names_in(tmp_path / "out") == [*shards, INDEX]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 160}
    assert index["weight_map"] == {
        **dict.fromkeys("ab", shards[0]),
        "c": shards[1],
        **dict.fromkeys("de", shards[2]),
    }
    for name, shard in index["weight_map"].items():
        found = safetensors.numpy.load_file(tmp_path / "out" / shard)[name]
        np.testing.assert_array_equal(found, params[name])
    loaded = load(tmp_path / "out")
    for name, array in params.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(24, dtype=ml_dtypes.bfloat16).reshape(4, 6)[::2, ::-3],
        np.broadcast_to(np.float32(3), (2, 5)),
        np.arange(6.0)[::-1],
    ],
)
def test_any_memory_layout_is_written_in_c_order(tmp_path, array):
    save(tmp_path / "out", {"w": array})
    path = tmp_path / "out" / "model.safetensors"
    with safetensors.safe_open(path, framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("w"), array, strict=True)


def test_leaves_in_any_order_from_several_threads(tmp_path):
    params = {f"w{number}": np.full(100, number) for number in range(40)}
    leaves = {name: LeafInfo(w.shape, w.dtype) for name, w in params.items()}
    with (
        Writer(tmp_path / "out", leaves, max_shard_bytes=3000) as out,
        ThreadPoolExecutor(4) as pool,
    ):
        for future in [
            pool.submit(out.write, name, params[name]) for name in reversed(params)
        ]:
            future.result()
    loaded = load(tmp_path / "out")
    for name, array in params.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)


def test_further_files(tmp_path):
    source = tmp_path / "tokenizer.json"
    source.write_text("tokens")
    with Writer(tmp_path / "out", {}) as out:
        out.add_file("report.json", b"{}")
        out.add_file("tokenizer.json", source)
        for name in ("report.json", "model.safetensors", INDEX):
            with pytest.raises(CheckpointError, match=f"a file {name} already"):
                out.add_file(name, b"")
        with pytest.raises(CheckpointError, match="no plain file name"):
            out.add_file("../escaped", b"")
    assert (tmp_path / "out" / "report.json").read_bytes() == b"{}"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokens"


def test_output_is_invisible_until_complete(tmp_path):
    with Writer(tmp_path / "deep" / "out", {"w": LeafInfo((1,), F32)}) as out:
        out.write("w", np.ones(1, np.float32))
        assert not (tmp_path / "deep" / "out").exists()
    assert names_in(tmp_path / "deep") == ["out"]


def test_permissions_are_the_usual_ones(tmp_path):
    save(tmp_path / "out", {"w": np.zeros(1)})
    (tmp_path / "ordinary").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("kind", ["directory", "file", "broken link"])
def test_existing_output_is_refused_before_any_work(tmp_path, kind):
    out_dir = tmp_path / "out"
    if kind == "directory":
        out_dir.mkdir()
    elif kind == "file":
        out_dir.touch()
    else:
        out_dir.symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        FileExistsError, match=r"out exists already.*Remove it or choose"
    ):
        Writer(out_dir, {})
    assert names_in(tmp_path) == ["out"]


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    def write_late():
        with Writer(tmp_path / "out", {}):
            (tmp_path / "out").mkdir()

    with pytest.raises(FileExistsError, match="exists already"):
        write_late()
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == []


def test_too_small_a_disk_is_noticed_before_any_work(tmp_path):
    leaves = {"w": LeafInfo((2**60,), F32)}
    message = r"needs 4,611,686,018,427,\d{3},\d{3} bytes, but .* has only [\d,]+ free"
    with pytest.raises(CheckpointError, match=message):
        Writer(tmp_path / "deep" / "out", leaves)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0; it must be positive"),
        ({"metadata": {"n": 1}}, r"metadata\['n'\] is a int.*text only"),
        ({"leaves": {"": LeafInfo((), F32)}}, "cannot have the name ''"),
        ({"leaves": {"__metadata__": LeafInfo((), F32)}}, "name '__metadata__'"),
        (
            {"leaves": {"w": LeafInfo((), np.dtype("complex128"))}},
            "Leaf 'w' has dtype complex128, which safetensors cannot store; cast it",
        ),
        ({"leaves": {"w": LeafInfo((), np.dtype(">f4"))}}, "Leaf 'w' has dtype >f4"),
        (
            {"leaves": {"w": LeafInfo((), np.dtype(ml_dtypes.int4))}},
            "Leaf 'w' has dtype int4",
        ),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, arguments, message):
    with pytest.raises(CheckpointError, match=message):
        Writer(tmp_path / "out", **{"leaves": {}, **arguments})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        ([("x", np.ones(2, np.float32))], "Leaf 'x' was not announced.*add it"),
        ([("w", np.ones(3, np.float32))], r"'w'.*float32\[2\].*is float32\[3\]; resh"),
        ([("w", np.ones(2))], r"announced as float32\[2\], but .* float64\[2\]"),
        ([("w", np.ones(2, np.float32))] * 2, "'w' of .* is written twice"),
        ([("w", np.ones(2, np.float32))], "Leaf 'v' of .* was never written"),
        ([], "Leaf 'w' and 1 more of .* was never written"),
    ],
)
def test_wrong_writes_leave_nothing_behind(tmp_path, writes, message):
    leaves = {"w": LeafInfo((2,), F32), "v": LeafInfo((2,), F32)}

    def write_all():
        with Writer(tmp_path / "out", leaves) as out:
            for name, array in writes:
                out.write(name, array)

    with pytest.raises(CheckpointError, match=message):
        write_all()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_interruption_leaves_nothing_behind(tmp_path, error):
    def interrupted():
        with Writer(tmp_path / "out", {"w": LeafInfo((2,), F32)}) as out:
            out.write("w", np.ones(2, np.float32))
            raise error("stop")

    with pytest.raises(error, match="stop"):
        interrupted()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("step", ["_write_at", "_create_file", "sync"])
def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, step):
    module = output if step == "sync" else writer
    real = getattr(module, step)
    calls = []

    def fails_the_second_time(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(module, step, fails_the_second_time)
    params = {"a": np.ones(8), "b": np.ones(8)}
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path / "out", params, max_shard_bytes=64)
    assert names_in(tmp_path) == []


LIMITED_WRITER = """
import os, resource, sys
import numpy as np
from jaxmerge.checkpoints import LeafInfo, Writer

out_dir, reserves = sys.argv[1], sys.argv[2] == "True"
if not reserves:
    del os.posix_fallocate
info = LeafInfo((100_000,), np.dtype("float64"))
with Writer(out_dir, {"a": info, "b": info}) as writer:
    print("started")
    writer.write("a", np.ones(100_000))
    # The kernel refuses to write beyond the limit, as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    writer.write("b", np.ones(100_000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits differ elsewhere")
@pytest.mark.parametrize("reserves", [True, False])
def test_refused_writes_leave_nothing_behind(tmp_path, reserves):
    (tmp_path / "parent").mkdir()
    out_dir = tmp_path / "parent" / "out"
    command = [sys.executable, "-c", LIMITED_WRITER, str(out_dir), str(reserves)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "started\n"
    assert re.search(r"OSError: \[Errno 27\] File too large", done.stderr)
    assert names_in(tmp_path / "parent") == []


def test_file_systems_that_cannot_reserve_space_still_work(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(writer.os, "posix_fallocate", refuse, raising=False)
    save(tmp_path / "out", {"w": np.arange(3.0)})
    assert load(tmp_path / "out")["w"].tolist() == [0.0, 1.0, 2.0]


def test_free_space_is_that_of_the_target_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    asked = []
    monkeypatch.setattr(
        output.shutil, "disk_usage", lambda path: asked.append(path) or usage
    )
    with pytest.raises(CheckpointError, match="has only 1,000 free"):
        save(tmp_path / "new" / "out", {"w": np.ones(1000)})
    assert asked == [tmp_path]
