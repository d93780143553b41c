"""Reading directories in Hugging Face layout, whole and damaged."""

import json
import textwrap

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from blake3 import blake3

from jaxmerge.checkpoints import (
    CheckpointError,
    LeafInfo,
    open_checkpoint,
)

INDEX = "model.safetensors.index.json"
F32 = np.dtype("float32")


@pytest.fixture
def sharded(tmp_path):
    """Three leaves in two shards, written by the library."""
    safetensors.numpy.save_file(
        {"a": np.arange(4.0), "b": np.ones((2, 2), np.float32)},
        tmp_path / "x.safetensors",
    )
    safetensors.numpy.save_file({"c": np.arange(3)}, tmp_path / "y.safetensors")
    weight_map = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_reads_shards_through_the_index(sharded):
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.path == sharded
    assert checkpoint.leaves == {
        "a": LeafInfo((4,), np.dtype("float64")),
        "b": LeafInfo((2, 2), F32),
        "c": LeafInfo((3,), np.dtype("int64")),
    }
    assert checkpoint.read("a", (slice(1, 3),)).tolist() == [1.0, 2.0]
    assert checkpoint.read("c").tolist() == [0, 1, 2]
    files = [INDEX, "x.safetensors", "y.safetensors"]
    assert checkpoint.digest() == {
        name: blake3((sharded / name).read_bytes()).hexdigest() for name in files
    }
    with pytest.raises(CheckpointError, match=f"{sharded} has no leaf 'd'"):
        checkpoint.read("d")


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_reads_a_directory_with_one_file(tmp_path, name):
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / name)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.read("w").tolist() == [1.0, 1.0]
    assert list(checkpoint.digest()) == [name]


def test_model_file_wins_over_other_files(tmp_path):
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "model.safetensors")
    safetensors.numpy.save_file(
        {"v": np.ones(2)}, tmp_path / "consolidated.safetensors"
    )
    assert set(open_checkpoint(tmp_path).leaves) == {"w"}


def test_sidecars_are_what_belongs_next_to_the_weights(sharded):
    kept = ["config.json", "merges.txt", "modeling.py", "t.jinja", "tokenizer.model"]
    left = [".hidden.json", "README.md", "jaxmerge_report.json", "pytorch_model.bin"]
    for name in (*kept, *left, "pytorch_model.bin.index.json", "optimizer.pt"):
        (sharded / name).touch()
    (sharded / "folder.json").mkdir()
    sidecars = open_checkpoint(sharded).sidecars()
    assert sidecars == [sharded / name for name in kept]


def test_missing_shard(sharded):
    (sharded / "y.safetensors").unlink()
    message = f"{INDEX} names the shard y.safetensors, which is missing; .*Download"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


def test_index_names_a_leaf_that_its_shard_lacks(sharded):
    safetensors.numpy.save_file({"z": np.ones(1)}, sharded / "y.safetensors")
    message = "y.safetensors holds leaf 'c', but it does not.*download both again"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


def test_shard_holds_a_leaf_that_the_index_does_not_name(sharded):
    safetensors.numpy.save_file(
        {"c": np.ones(1), "extra": np.ones(1)}, sharded / "y.safetensors"
    )
    message = r"y.safetensors holds leaf 'extra', which model.* does not name"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


def test_two_checkpoints_in_one_directory(sharded):
    safetensors.numpy.save_file({"a": np.ones(1)}, sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"two checkpoints.*Remove the stale one"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", r"is not JSON \("),
        ("[]", "no valid 'weight_map'"),
        ('{"weight_map": {"a": 1}}', "no valid 'weight_map'"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "files in the same directory"),
        ("version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ],
)
def test_bad_indices(sharded, index, message):
    (sharded / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(sharded)
    assert str(sharded / INDEX) in str(caught.value)


def test_damaged_shard_is_named(sharded):
    (sharded / "y.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"y.safetensors is truncated"):
        open_checkpoint(sharded)


def test_directory_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=f"no weights.*{tmp_path} is empty"):
        open_checkpoint(tmp_path)
    for number in range(20):
        (tmp_path / f"{number:02d}.json").touch()
    message = r"looked for model.safetensors, .* contains 00.json, .* and 8 more"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_several_files_without_index(sharded):
    (sharded / INDEX).unlink()
    message = r"several safetensors files \(x.safetensors, y.safetensors\).*Name one"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


def test_pickled_weights_are_refused_with_the_way_to_convert(tmp_path):
    for name in ("optimizer.pt", "pytorch_model-1.bin", "pytorch_model-2.bin"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert "pytorch_model-1.bin holds PyTorch weights in pickle format" in message
    assert "Convert to safetensors first" in message
    assert "optimizer" not in message
    compile(textwrap.dedent(message[message.index("    import") :]), "remedy", "exec")
    with pytest.raises(CheckpointError, match=r"optimizer.pt holds PyTorch weights"):
        open_checkpoint(tmp_path / "optimizer.pt")
