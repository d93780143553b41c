"""All formats: what is written in one comes back from another, or nothing appears."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import flax.serialization
import ml_dtypes
import numpy as np
import pytest

from jaxmerge.checkpoints import (
    FORMATS,
    CheckpointError,
    LeafInfo,
    msgpack_writer,
    open_checkpoint,
    open_writer,
    orbax_writer,
)
from jaxmerge.checkpoints.names import nest

F32 = np.dtype("float32")
ARRAYS = {
    "encoder/layers_0/kernel": np.arange(12, dtype=ml_dtypes.bfloat16).reshape(3, 4),
    "encoder/layers_10/kernel": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "encoder/scale": np.float32(0.1),
    "empty": np.zeros((0, 4), np.float32),
    "flags": np.array([True, False]),
    "model.layers.0.mlp.weight": np.array([[1.5, np.nan], [-0.0, np.inf]], np.float32),
    "nested/with.dots/w": np.ones((1, 1), np.float16),
    "narrow": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
    "step": np.int32(7),
    "wide": np.arange(100, dtype=np.int64)[::-3],
}


def infos(arrays):
    return {name: LeafInfo(a.shape, a.dtype) for name, a in arrays.items()}


def write(path, format, arrays=ARRAYS):
    with open_writer(path, infos(arrays), format) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
        writer.add_file("config.json", b'{"a": 1}')
    return open_checkpoint(path)


def assert_same(checkpoint, arrays=ARRAYS):
    assert checkpoint.leaves == infos(arrays)
    for name, array in arrays.items():
        found = checkpoint.read(name)
        assert isinstance(found, np.ndarray)
        assert found.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("last", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_round_trips_are_bit_for_bit(tmp_path, first, last):
    written = write(tmp_path / "first", first)
    assert_same(written)
    leaves = {name: written.read(name) for name in written.leaves}
    again = write(tmp_path / "last", last, leaves)
    assert_same(again)
    assert again.sidecars() == [tmp_path / "last" / "config.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "last"]
    digests = again.digest()
    file = min(digests)
    shutil.copyfile(again.path / file, tmp_path / "copy")
    (again.path / file).write_bytes((tmp_path / "copy").read_bytes() + b" ")
    assert again.digest()[file] != digests[file]


@pytest.mark.parametrize("format", FORMATS)
def test_parts(tmp_path, monkeypatch, format):
    monkeypatch.setattr(orbax_writer, "MAX_CHUNK_BYTES", 64)
    array = np.arange(7 * 9, dtype=np.float32).reshape(7, 9)
    checkpoint = write(tmp_path / "out", format, {"w": array, "s": np.array(1.5)})
    for index in (
        *(..., (), (slice(2, 5),), (slice(-3, None), slice(1, 100))),
        *((slice(None, None, -2), slice(8, 1, -3)), (slice(3, 3), slice(0, 2))),
    ):
        np.testing.assert_array_equal(checkpoint.read("w", index), array[index])
    assert checkpoint.read("s", ()).tolist() == 1.5
    with pytest.raises(CheckpointError, match="has no leaf 'x'"):
        checkpoint.read("x")


def test_msgpack_is_what_flax_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(msgpack_writer, "MAX_PIECE_BYTES", 70_001)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 70_001)
    sizes = [0, 1, 2, 3, 40, 50, 60, 15_000, 17_000, 100_000]
    arrays = {f"b/{n:06}": np.arange(n, dtype=np.float32) for n in sizes}
    arrays |= {f"a.{n}": np.ones(n, np.int8) for n in (*range(12), 200, 230, 250)}
    arrays |= {"m/x/w": np.ones((300, 2, 100), ml_dtypes.bfloat16), "s": np.array(2.0)}
    write(tmp_path / "out", "msgpack", arrays)
    content = (tmp_path / "out" / "flax_model.msgpack").read_bytes()
    assert content == flax.serialization.to_bytes(nest(arrays))
    assert_same(open_checkpoint(tmp_path / "out"), arrays)


@pytest.mark.parametrize("format", FORMATS)
def test_threads_may_write(tmp_path, format):
    arrays = {f"l{i}/w": np.full((50, 40), i, np.float32) for i in range(20)}
    with (
        open_writer(tmp_path / "out", infos(arrays), format) as writer,
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(writer.write, arrays, arrays.values()))
    checkpoint = open_checkpoint(tmp_path / "out")
    for name, array in arrays.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


@pytest.mark.parametrize("format", FORMATS)
def test_leaves_may_be_written_in_parts(tmp_path, monkeypatch, format):
    """By writes of their bytes alone, as other hosts write those between them."""
    monkeypatch.setattr(orbax_writer, "MAX_CHUNK_BYTES", 64)
    monkeypatch.setattr(msgpack_writer, "MAX_PIECE_BYTES", 50)
    array = np.arange(11 * 3 * 5, dtype=np.int16).reshape(11, 3, 5)
    arrays = {"rows": array, "columns": array, "middle": array, "line": array[0, 0]}
    with (
        monkeypatch.context() as patch,
        open_writer(tmp_path / "out", infos(arrays), format) as writer,
    ):
        patch.setattr(np, "memmap", None)
        for name, axis, ends in (
            *(("rows", 0, (4, 5, 9, 11)), ("columns", 2, (2, 5))),
            *(("middle", 1, (1, 3)), ("line", 0, (4, 5))),
        ):
            for start, stop in reversed(list(zip((0, *ends), ends, strict=False))):
                index = (*[slice(None)] * axis, slice(start, stop))
                writer.write(name, arrays[name][index], index)
        with pytest.raises(CheckpointError, match=r"'rows' of .* is written twice"):
            writer.write("rows", array[:1], (slice(0, 1),))
    assert_same(open_checkpoint(tmp_path / "out"), arrays)


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_writer_goes_on(tmp_path, format):
    arrays = {"a": np.arange(3.0), "b": np.arange(8.0).reshape(4, 2), "e": np.zeros(0)}

    def write(*steps):
        path = tmp_path / "out"
        with open_writer(path, infos(arrays), format, identity="it") as writer:
            for step in steps:
                step(writer)
        return writer

    def interrupted(writer):
        writer.write("a", arrays["a"])
        writer.complete("a", "note")
        writer.write("b", np.full((2, 2), 9.0), (slice(0, 2),))
        writer.add_file("config.json", b"half of i")
        writer.add_file("old.json", b"not wanted any more")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(interrupted)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    resumed = write(
        lambda writer: writer.write("b", arrays["b"]),
        lambda writer: writer.add_file("config.json", b"all of it"),
    )
    assert resumed.done == {"a": "note"}
    assert (tmp_path / "out/config.json").read_bytes() == b"all of it"
    assert not (tmp_path / "out/old.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same(open_checkpoint(tmp_path / "out"), arrays)


@pytest.mark.parametrize("format", FORMATS)
def test_two_processes_write_one_output(tmp_path, monkeypatch, format):
    """Threads stand for them; each writes its own columns of every leaf."""
    monkeypatch.setattr(orbax_writer, "MAX_CHUNK_BYTES", 256)
    arrays = {f"l{i}/w": np.arange(160.0).reshape(16, 10) + i for i in range(4)}
    barrier = threading.Barrier(2, timeout=60)

    def agree(error):
        barrier.wait()
        if error is not None:
            raise error

    def process(number):
        options = {"identity": "it", "process": number, "agree": agree}
        out = open_writer(tmp_path / "out", infos(arrays), format, **options)
        with out as writer:
            for name, array in arrays.items():
                index = (slice(None), slice(5 * number, 5 * number + 5))
                writer.write(name, array[index], index)
            writer.add_file("config.json", b"{}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(process, range(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same(open_checkpoint(tmp_path / "out"), arrays)


LEAVES = {"a": LeafInfo((2,), F32), "b": LeafInfo((), F32)}


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_appears_unless_all_of_it_does(tmp_path, format):
    def attempt(*calls, error=CheckpointError, match=None):
        def use():
            with open_writer(tmp_path / "deep" / "out", LEAVES, format) as writer:
                for call in calls:
                    call(writer)

        with pytest.raises(error, match=match):
            use()
        assert list((tmp_path / "deep").iterdir()) == []

    def interrupt(writer):
        assert [p.name[:13] for p in writer.path.parent.iterdir()] == [".out.writing-"]
        raise KeyboardInterrupt

    def a(writer):
        writer.write("a", np.zeros(2, np.float32))

    attempt(a, interrupt, error=KeyboardInterrupt)
    attempt(a, match="Leaf 'b' of .*out was never written")
    attempt(a, a, match="'a' of .*out is written twice")
    attempt(lambda w: w.write("c", np.ones(1)), match="'c' was not announced")
    attempt(
        lambda w: w.write("a", np.zeros(3, np.float32)), match=r"float32\[3\]; resh"
    )
    attempt(lambda w: w.write("a", np.zeros(2)), match="announced as float32.*float64")
    attempt(lambda w: w.add_file("x/y", b""), match="no plain file name")
    attempt(
        lambda w: [w.add_file("x", b""), w.add_file("x", b"")], match="gets a file x al"
    )


@pytest.mark.parametrize("format", FORMATS)
def test_what_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, format):
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken exists already"):
        open_writer(tmp_path / "taken", LEAVES, format)
    with pytest.raises(CheckpointError, match=r"a name for a file.*choose 'out'"):
        open_writer(tmp_path / "out.msgpack", LEAVES, format)
    odd = {"w": LeafInfo((1,), np.dtype("datetime64[s]"))}
    with pytest.raises(CheckpointError, match="Leaf 'w' has dtype datetime64"):
        open_writer(tmp_path / "out", odd, format)
    huge = {"w": LeafInfo((2**55,), F32)}
    with pytest.raises(CheckpointError, match=r"needs 144,115,188,0.* bytes, but"):
        open_writer(tmp_path / "out", huge, format)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_names_that_a_format_cannot_tell_apart(tmp_path):
    leaf = LeafInfo((1,), F32)
    for format in ("orbax", "msgpack"):
        with pytest.raises(CheckpointError, match="nested in one another"):
            open_writer(tmp_path / "out", {"a": leaf, "a/b": leaf}, format)
    with pytest.raises(CheckpointError, match=r"'a\.b' and 'a/b' have one name"):
        open_writer(tmp_path / "out", {"a.b": leaf, "a/b": leaf}, "orbax")


def test_unknown_format(tmp_path):
    with pytest.raises(CheckpointError, match="format is 'zip'; it must be one of"):
        open_writer(tmp_path / "out", LEAVES, "zip")


def test_safetensors_come_before_flax_where_both_are(tmp_path):
    path = write(tmp_path / "out", "safetensors", {"w": np.ones(2)}).path
    other = write(tmp_path / "flax", "msgpack", {"x": np.ones(3)})
    assert set(other.leaves) == {"x"}
    shutil.copy(other.path / "flax_model.msgpack", path)
    assert set(open_checkpoint(path).leaves) == {"w"}
