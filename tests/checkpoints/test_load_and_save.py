"""Whole trees: what is saved comes back bit for bit, or is refused."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxmerge.checkpoints import (
    CheckpointError,
    load,
    open_checkpoint,
    save,
)
from jaxmerge.checkpoints.safetensors import DTYPES


def assert_same_tree(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for leaf, want in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        want = np.asarray(want)
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype)
        assert leaf.tobytes() == want.tobytes()


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_round_trip_is_exact(tmp_path, dtype, shape):
    nbytes = int(np.prod(shape)) * dtype.itemsize
    bits = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 256, nbytes)
    # Arbitrary bits: also NaN payloads and signed zeros must come back.
    array = bits.astype(np.uint8).view(dtype).reshape(shape)
    params = {"block": {"w": array}, "model.norm.weight": array}
    save(tmp_path / "out", params)
    loaded = load(tmp_path / "out")
    assert_same_tree(loaded, params)
    assert loaded["block"]["w"].flags.writeable


@settings(deadline=None, max_examples=25)
@given(
    st.recursive(
        hnp.arrays(
            st.sampled_from([np.float32, np.int8, np.bool_, ml_dtypes.bfloat16]),
            hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
            elements=st.sampled_from([0, 1]),
        ),
        lambda trees: st.dictionaries(
            st.text("abc.", min_size=1, max_size=3), trees, min_size=1, max_size=3
        ),
        max_leaves=8,
    ).map(lambda tree: {"root": tree}),
    st.integers(1, 200),
)
def test_any_tree_round_trips(tmp_path_factory, params, max_shard_bytes):
    path = tmp_path_factory.mktemp("tree") / "out"
    save(path, params, max_shard_bytes=max_shard_bytes)
    assert_same_tree(load(path), params)


def test_jax_arrays_sharded_over_devices(tmp_path, mesh):
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    array = jax.device_put(np.arange(32.0, dtype=np.float32).reshape(8, 4), spec)
    params = {"layers": [{"w": array}, {"w": array.astype(jnp.bfloat16)}]}
    save(tmp_path / "out", params)
    expected = {"layers": {"0": {"w": array}, "1": {"w": array.astype(jnp.bfloat16)}}}
    assert_same_tree(load(tmp_path / "out"), expected)


def test_save_copies_sidecars(tmp_path):
    source = tmp_path / "config.json"
    source.write_text("{}")
    save(tmp_path / "out", {"w": np.ones(1)}, sidecars=[source])
    assert open_checkpoint(tmp_path / "out").sidecars() == [
        tmp_path / "out" / "config.json"
    ]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (np.ones(2), "A leaf needs a name"),
        ({"w": "text"}, "Leaf 'w' is a str, not an array"),
        ({"step": 3}, "Leaf 'step' is a int, not an array; convert it with numpy"),
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, "Two leaves .* name 'a/b'"),
        ({"a": np.ones(1), "a/b": np.ones(1)}, "'a/b' and another leaf are nested"),
        ({"a": {"b": np.ones(1)}, "a/b/c": np.ones(1)}, "rename one"),
        ({"key": jax.random.key(0)}, r"Leaf 'key' has dtype key<fry>.*cast it"),
    ],
)
def test_trees_that_cannot_be_saved(tmp_path, params, message):
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "out", params)
    assert names_in(tmp_path) == []


def test_loading_names_that_do_not_nest(tmp_path):
    arrays = {"a/b": np.ones(1), "a": np.ones(1)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"read them by name from open_checkpoint"
    ):
        load(tmp_path)
    assert set(open_checkpoint(tmp_path).leaves) == {"a", "a/b"}
