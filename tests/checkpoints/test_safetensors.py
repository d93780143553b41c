"""Reading and laying out single files, with the safetensors library as the oracle."""

import json
import os
import re
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from jaxmerge.checkpoints import CheckpointError, LeafInfo, open_checkpoint
from jaxmerge.checkpoints.safetensors import DTYPES, lay_out


def write_raw(path, header, data=b"", length=None):
    """Writes a file with any header, also a wrong one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(start=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.normal(size=(6, 4)).astype(np.float32),
        "half": rng.normal(size=(5,)).astype(np.float16),
        "brain": rng.normal(size=(3, 2)).astype(ml_dtypes.bfloat16),
        "mask": np.array([True, False, True]),
        "count": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "wave": np.array([1 + 2j], np.complex64),
    }


def test_reads_what_the_library_writes(tmp_path, arrays):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.path == path
    assert checkpoint.leaves == {
        name: LeafInfo(array.shape, array.dtype) for name, array in arrays.items()
    }
    for name, array in arrays.items():
        read = checkpoint.read(name)
        assert type(read) is np.ndarray
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array, strict=True)


@pytest.mark.parametrize("name", [name for name in DTYPES if name.startswith("F8")])
def test_reads_float8_that_the_library_accepts(tmp_path, name):
    values = np.arange(256, dtype=np.uint8)
    header = {"w": entry(0, 256, (16, 16), name)}
    path = write_raw(tmp_path / "model.safetensors", header, values.tobytes())
    [(_, oracle)] = safetensors.deserialize(path.read_bytes())
    read = open_checkpoint(path).read("w")
    assert (oracle["dtype"], oracle["shape"]) == (name, [16, 16])
    assert read.dtype == DTYPES[name]
    assert read.tobytes() == oracle["data"] == values.tobytes()


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("matrix", (slice(1, 3),)),
        ("matrix", (slice(None), slice(1, None, 2))),
        ("brain", (slice(2, 3), slice(0, 1))),
        ("empty", (slice(0, 0), slice(1, 2))),
        ("count", ()),
        ("matrix", ...),
    ],
)
def test_slices_match_the_library(tmp_path, arrays, name, index):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path)
    read = open_checkpoint(path).read(name, index)
    assert type(read) is np.ndarray
    np.testing.assert_array_equal(read, arrays[name][index], strict=True)


def test_reading_a_slice_maps_pages_instead_of_copying_the_file(tmp_path):
    # 16 GiB that take no disk: reading them whole would exhaust the machine.
    nbytes = 2**34
    header = {"huge": entry(0, nbytes, (2**20, 2**14), "U8")}
    path = write_raw(tmp_path / "model.safetensors", header)
    os.truncate(path, path.stat().st_size + nbytes)
    read = open_checkpoint(path).read("huge", (slice(2**19, 2**19 + 2), slice(3)))
    assert not read.flags.owndata
    assert read.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_views_stay_valid_and_are_read_only(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"w": np.arange(3.0)}, path)
    read = open_checkpoint(path).read("w")
    path.unlink()
    assert read.tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        read[0] = 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_open_files_do_not_grow_with_the_leaves(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({f"w{i}": np.ones(2) for i in range(50)}, path)
    checkpoint = open_checkpoint(path)

    def count_open():
        return len(os.listdir("/proc/self/fd"))

    before = count_open()
    leaves = [checkpoint.read(name) for name in checkpoint.leaves]
    assert count_open() == before + 1
    leaves.clear()
    assert count_open() == before


def test_unaligned_leaves_are_read_aligned(tmp_path):
    header = {"flag": entry(0, 1, (1,), "BOOL"), "w": entry(1, 9, (2,))}
    data = b"\1" + np.array([1.5, -2.0], np.float32).tobytes()
    read = open_checkpoint(write_raw(tmp_path / "a.safetensors", header, data)).read
    assert read("w").flags.aligned
    assert read("w").tolist() == [1.5, -2.0]


def test_empty_leaf_at_the_end_of_a_page(tmp_path):
    header = json.dumps({"e": entry(0, 0, (0, 2))}).encode().ljust(4096 - 8)
    path = write_raw(tmp_path / "a.safetensors", header)
    assert open_checkpoint(path).read("e").shape == (0, 2)


def test_unknown_leaf_suggests_the_nearest_name(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"mlp.up.weight": np.zeros(1)}, path)
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"no leaf 'mlp.up_weight'.*mean 'mlp.up"):
        checkpoint.read("mlp.up_weight")
    with pytest.raises(CheckpointError, match=r"no leaf '\?'. See `.leaves`"):
        checkpoint.read("?")


def test_a_single_file_has_a_digest_and_no_sidecars(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path = write_raw(tmp_path / "a.safetensors", {})
    checkpoint = open_checkpoint(path)
    assert checkpoint.sidecars() == []
    assert checkpoint.digest() == {
        "a.safetensors": blake3(b"\2\0\0\0\0\0\0\0{}").hexdigest()
    }


@pytest.mark.parametrize(
    ("header", "data_bytes", "message"),
    [
        (b"[1]", 0, "header is JSON but no object"),
        (b"{not json", 0, r"header is not JSON \(.*Copy or download it again"),
        (b"\xff\xfe{}", 0, r"header is not JSON \(.*codec"),
        (b"[" * 100_000, 0, "header is not JSON"),
        (b'{"w": {}, "w": {}}', 0, "names 'w' twice.*distinct names"),
        ({"w": 3}, 0, "entry of leaf 'w' is malformed: 3"),
        ({"w": {"dtype": "F32", "shape": [1]}}, 4, "leaf 'w' is malformed"),
        ({"w": entry(shape=(-1,))}, 4, "leaf 'w' is malformed"),
        ({"w": entry(shape=(True,))}, 4, "leaf 'w' is malformed"),
        ({"w": entry(start=-4, end=0)}, 4, "leaf 'w' is malformed"),
        ({"w": entry(dtype="Q4")}, 4, "leaf 'w' has dtype 'Q4'.*cast it to one of"),
        ({"w": entry(shape=(2,))}, 4, r"'w' has 4 bytes .*shape \(2,\) .* takes 8"),
        ({"w": entry(8, 4)}, 4, r"'w' has -4 bytes at data_offsets \[8, 4\]"),
        (
            {"v": entry(0, 4), "w": entry(2, 6)},
            6,
            r"leaf 'w' at data_offsets \[2, 6\] overlaps leaf 'v', which ends at 4",
        ),
        (
            {"v": entry(0, 4), "w": entry(8, 12)},
            12,
            "'w'.*leaves a hole after leaf 'v'",
        ),
        ({"w": entry(4, 8)}, 8, "'w'.*leaves a hole after the header"),
        ({"w": entry()}, 2, "truncated: leaf 'w' ends at byte 4 .* only 2 of them"),
        ({"w": entry()}, 6, "has 2 bytes after leaf 'w' that belong to no leaf"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__ in the header must map text"),
        ({"__metadata__": "pt"}, 0, "__metadata__ in the header must map text"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, header, data_bytes, message):
    path = write_raw(tmp_path / "bad.safetensors", header, bytes(data_bytes))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    # The library refuses the same files, so we are not stricter than the format.
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load_file(path)


def test_header_longer_than_the_file(tmp_path):
    path = write_raw(tmp_path / "bad.safetensors", {}, length=1000)
    with pytest.raises(CheckpointError, match=r"header of 1000 bytes.*only 10"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_files_too_short_for_a_header(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"truncated: {len(content)} bytes"):
        open_checkpoint(path)


def test_every_truncation_is_noticed(tmp_path, arrays):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_missing_file_lists_the_directory(tmp_path):
    (tmp_path / "other.safetensors").touch()
    path = tmp_path / "model.safetensors"
    message = f"{path} does not exist; {tmp_path} contains other.safetensors"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"directory .* does not exist either"):
        open_checkpoint(tmp_path / "nowhere" / "model.safetensors")


def test_git_lfs_pointer_is_recognised(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    message = f"git-lfs pointer.*run `git lfs pull` in {tmp_path}"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_other_suffixes_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(CheckpointError, match=r"suffix '.gguf'; a checkpoint is"):
        open_checkpoint(path)


infos = st.builds(
    LeafInfo,
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(list(DTYPES.values())),
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), infos))
def test_layout_is_aligned_and_valid_for_the_library(leaves):
    leaves.pop("__metadata__", None)
    layout = lay_out(leaves, {"format": "pt"})
    assert len(layout.head) % 64 == 0
    for name, info in leaves.items():
        assert layout.offsets[name] % info.dtype.itemsize == 0
    values = bytes(layout.nbytes - len(layout.head))
    parsed = dict(safetensors.deserialize(layout.head + values))
    assert {
        name: LeafInfo(tuple(leaf["shape"]), DTYPES[leaf["dtype"]])
        for name, leaf in parsed.items()
    } == leaves
