"""Reading flax msgpack files, written by flax itself."""

import flax.serialization
import jax.numpy as jnp
import numpy as np
import pytest
from blake3 import blake3

from jaxmerge.checkpoints import (
    CheckpointError,
    LeafInfo,
    load,
    open_checkpoint,
    save,
)


@pytest.fixture
def params():
    return {
        "encoder": {
            "kernel": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
            "bias": jnp.ones(3),
        },
        "scale": jnp.float32(2.0),
    }


@pytest.fixture
def path(tmp_path, params):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(flax.serialization.to_bytes(params))
    return path


def test_leaves_have_nested_names(path):
    checkpoint = open_checkpoint(path)
    assert checkpoint.leaves == {
        "encoder/bias": LeafInfo((3,), np.dtype("float32")),
        "encoder/kernel": LeafInfo((2, 3), np.dtype(jnp.bfloat16)),
        "scale": LeafInfo((), np.dtype("float32")),
    }
    kernel = checkpoint.read("encoder/kernel", (slice(1, 2), slice(0, 2)))
    assert kernel.astype(float).tolist() == [[3.0, 4.0]]
    assert checkpoint.read("scale", ()).shape == ()
    assert checkpoint.sidecars() == []
    digest = blake3(path.read_bytes()).hexdigest()
    assert checkpoint.digest() == {"flax_model.msgpack": digest}


def test_load_and_conversion_to_safetensors(tmp_path, path, params):
    save(tmp_path / "converted", load(path))
    for loaded in (load(path), load(tmp_path / "converted")):
        assert loaded.keys() == params.keys()
        np.testing.assert_array_equal(
            loaded["encoder"]["kernel"], params["encoder"]["kernel"], strict=True
        )
        assert loaded["encoder"]["bias"].flags.writeable


def test_large_arrays_that_flax_splits_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 16)
    array = np.arange(20, dtype=np.float32).reshape(4, 5)
    path = tmp_path / "a.msgpack"
    path.write_bytes(flax.serialization.to_bytes({"w": array}))
    np.testing.assert_array_equal(open_checkpoint(path).read("w"), array)


def test_lists_numbers_and_none(tmp_path):
    path = tmp_path / "a.msgpack"
    tree = {"layers": [np.zeros(2), np.ones(2)], "step": 3, "unused": None}
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.leaves) == {"layers/0", "layers/1", "step"}
    assert checkpoint.read("step").item() == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no flax msgpack file"),
        (b"hello", "damaged or no flax msgpack file"),
        (b"\x81\xa1w\xc7\x01\x01\xc0", "damaged or no flax msgpack file"),
        (b"\x01", "holds a int, not a dict of parameters.*to_bytes"),
        (b"\x81\xa1w\xa1x", "leaf 'w' is a str, not an array; save only the param"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.msgpack"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_truncated_and_missing_files(path):
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged or no flax msgpack"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"contains flax_model\.msgpack"):
        open_checkpoint(path.with_name("other.msgpack"))


def test_unknown_leaf(path):
    with pytest.raises(CheckpointError, match="Did you mean 'encoder/bias'"):
        open_checkpoint(path).read("encoder/bia")
