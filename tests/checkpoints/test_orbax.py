"""Orbax checkpoints: Orbax itself as the oracle, in both directions, and damage."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from jaxmerge.checkpoints import (
    CheckpointError,
    LeafInfo,
    open_checkpoint,
    open_writer,
    orbax_writer,
)
from jaxmerge.cli import main


@pytest.fixture(scope="module")
def params():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    sharded = jnp.arange(8 * 6, dtype=jnp.bfloat16).reshape(8, 6)
    return {
        "layers": [{"w": jnp.arange(3.0)}, {"w": jnp.zeros(3)}],
        "model.embed.weight": jax.device_put(
            sharded, NamedSharding(mesh, P("data", "model"))
        ),
        "nested": {"with.dots": np.arange(4, dtype=np.int64), "none": None},
        "step": jnp.int32(3),
    }


def save_v1(path, params):
    ocp.save(path, params)


def save_standard(path, params):
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params)


def save_step(path, params):
    with v0.CheckpointManager(path) as manager:
        manager.save(7, args=v0.args.StandardSave(params))
        manager.wait_until_finished()


def save_directories(path, params):
    v0.PyTreeCheckpointer(use_ocdbt=False).save(path, params)


WRITERS = {
    "v1": (save_v1, "."),
    "StandardCheckpointer": (save_standard, "."),
    "PyTreeCheckpointer without OCDBT": (save_directories, "."),
    "CheckpointManager": (save_step, "7"),
}


@pytest.fixture(scope="module", params=WRITERS)
def written(request, tmp_path_factory, params):
    """A checkpoint by each of the writers of Orbax."""
    save, inner = WRITERS[request.param]
    path = tmp_path_factory.mktemp("orbax") / "ckpt"
    save(path, params)
    return path / inner


@pytest.fixture(scope="module")
def v1(tmp_path_factory, params):
    path = tmp_path_factory.mktemp("orbax") / "ckpt"
    ocp.save(path, params)
    return path


@pytest.fixture
def copy(tmp_path, v1):
    return Path(shutil.copytree(v1, tmp_path / "copy"))


def test_what_orbax_writes_is_read(written, params):
    checkpoint = open_checkpoint(written)
    expected = {
        "layers/0/w": params["layers"][0]["w"],
        "layers/1/w": params["layers"][1]["w"],
        "model.embed.weight": params["model.embed.weight"],
        "nested/with.dots": params["nested"]["with.dots"],
        "step": params["step"],
    }
    assert checkpoint.leaves == {
        name: LeafInfo(leaf.shape, leaf.dtype) for name, leaf in expected.items()
    }
    for name, leaf in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), leaf, strict=True)
    part = (slice(3, 5), slice(-1, None))
    np.testing.assert_array_equal(
        checkpoint.read("model.embed.weight", part),
        np.asarray(params["model.embed.weight"])[part],
    )
    files = checkpoint.digest()
    assert any(name.endswith("_METADATA") for name in files)
    assert all((checkpoint.path / name).is_file() for name in files)
    assert checkpoint.sidecars() == []


@pytest.fixture
def ours(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_writer, "MAX_CHUNK_BYTES", 2048)
    arrays = {
        "a/kernel": np.arange(1024, dtype=np.float32).reshape(32, 32),
        "a/half": np.arange(6).astype(jnp.bfloat16),
        "a/with.dots": np.arange(5),
        "empty": np.zeros((0, 3), np.float32),
        "scale": np.float32(0.5),
    }
    leaves = {n: LeafInfo(a.shape, a.dtype) for n, a in arrays.items()}
    with open_writer(tmp_path / "out", leaves, "orbax") as writer:
        for name, array in arrays.items():
            writer.write(name, array)
        writer.add_file("config.json", b"{}")
    tree = {name: arrays[name] for name in ("empty", "scale")}
    tree["a"] = {name[2:]: a for name, a in arrays.items() if name.startswith("a/")}
    return tmp_path / "out", tree


def same(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), b, strict=True),
        found,
        expected,
    )


def test_orbax_v1_restores_what_is_written(ours, mesh):
    path, tree = ours
    same(ocp.load(path), tree)
    metadata = ocp.metadata(path).metadata
    target = jax.tree.map(
        lambda m: jax.ShapeDtypeStruct(
            m.shape,
            jnp.float32,
            sharding=NamedSharding(
                mesh, P("data", "model") if m.shape == (32, 32) else P()
            ),
        ),
        metadata,
    )
    loaded = ocp.load(path, target)
    assert loaded["a"]["kernel"].sharding.spec == P("data", "model")
    same(loaded, jax.tree.map(lambda a: a.astype(np.float32), tree))


def test_orbax_v0_restores_what_is_written(ours):
    path, tree = ours
    with v0.StandardCheckpointer() as checkpointer:
        same(checkpointer.restore(path / "state"), tree)
    same(v0.PyTreeCheckpointer().restore(path / "state"), tree)


def test_a_damaged_chunk_is_noticed_by_who_reads_it(ours):
    path, tree = ours
    kernel = tree["a"]["kernel"]
    first_row = kernel[0].tobytes()
    for file in (path / "state" / "d").iterdir():
        damaged = bytearray(first_row)
        damaged[5] ^= 1
        file.write_bytes(file.read_bytes().replace(first_row, damaged))
    checkpoint = open_checkpoint(path)
    lower = (slice(16, 32),)
    np.testing.assert_array_equal(checkpoint.read("a/kernel", lower), kernel[lower])
    with pytest.raises(CheckpointError, match="leaf 'a/kernel' are missing or damaged"):
        checkpoint.read("a/kernel", (slice(0, 1), slice(0, 1)))


def damage_metadata(path):
    (path / "state/_METADATA").write_text("{")


def damage_keys(path):
    (path / "state/_METADATA").write_text('{"tree_metadata": {"x": 3}}')


def announce_more(path):
    file = path / "state/_METADATA"
    text = file.read_text().replace("with.dots", "without.dots")
    file.write_text(text)


def note_text(path):
    file = path / "state/_METADATA"
    metadata = json.loads(file.read_text())
    entry = {"key_metadata": [{"key": "x"}], "value_metadata": {"value_type": "string"}}
    metadata["tree_metadata"]["x"] = entry
    file.write_text(json.dumps(metadata))


DAMAGES = {
    "no metadata": (
        lambda path: (path / "state/_METADATA").unlink(),
        r"incomplete Orbax checkpoint: no _METADATA .*; .*copy contains .*state.* Copy",
    ),
    "no item": (lambda path: shutil.rmtree(path / "state"), "no _METADATA in it"),
    "no database": (
        lambda path: (path / "state/manifest.ocdbt").unlink(),
        r"manifest\.ocdbt is missing\. Copy or download it again",
    ),
    "no JSON": (damage_metadata, r"_METADATA is damaged, or of a version"),
    "no keys": (damage_keys, r"_METADATA is damaged, or of a version"),
    "no array": (announce_more, r"leaf 'nested/without\.dots' is announced in _META"),
    "no files": (
        lambda path: shutil.rmtree(path / "state/d"),
        r"leaf 'layers/0/w' is announced in _METADATA, but its array is missing or d",
    ),
    "text": (note_text, r"leaf 'x' is text, not an array; save only parameters"),
    "damaged database": (
        lambda path: (path / "state/manifest.ocdbt").write_bytes(b"no database"),
        r"leaf 'layers/0/w' .* its array is missing or damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_said_in_a_line(copy, capfd, damage):
    damaging, message = DAMAGES[damage]
    damaging(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert main(["inspect", str(copy)]) == 1
    assert capfd.readouterr().err == f"jaxmerge: {caught.value}\n"


@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_lost_chunks_are_named_and_never_zeros(tmp_path, params, capfd, how):
    path = tmp_path / "ckpt"
    save_directories(path, params)
    chunk = path / "model.embed.weight" / "1.0"
    if how == "truncated":
        chunk.write_bytes(chunk.read_bytes()[:-3])
    else:
        chunk.unlink()
    checkpoint = open_checkpoint(path)
    above = (slice(0, 2),)
    np.testing.assert_array_equal(
        checkpoint.read("model.embed.weight", above),
        np.asarray(params["model.embed.weight"])[above],
    )
    with pytest.raises(
        CheckpointError, match=r"values of leaf 'model\.embed\.weight' are"
    ):
        checkpoint.read("model.embed.weight")
    assert capfd.readouterr() == ("", "")


def test_truncated_database(copy, capfd):
    files = sorted((copy / "state").rglob("d/*"), key=lambda p: -p.stat().st_size)
    for file in files:
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        open_checkpoint(copy)
    assert capfd.readouterr() == ("", "")


def test_what_is_no_single_checkpoint(tmp_path, params, v1):
    several = tmp_path / "several"
    ocp.save_checkpointables(several, {"params": {"w": np.ones(2)}, "ema": {"w": 1.0}})
    with pytest.raises(CheckpointError, match=r"several items, ema, params; name the"):
        open_checkpoint(several)
    assert set(open_checkpoint(several / "params").leaves) == {"w"}
    for step in (7, 11):
        shutil.copytree(v1, tmp_path / "steps" / str(step))
    with pytest.raises(CheckpointError, match=r"checkpoints, 7, 11; .* as .*steps/11"):
        open_checkpoint(tmp_path / "steps")
    (several / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(several / "ema")
    assert set(open_checkpoint(several).leaves) == {"w"}
    left = tmp_path / "out.orbax-checkpoint-tmp"
    shutil.copytree(v1, left)
    with pytest.raises(CheckpointError, match="what is left of an interrupted save"):
        open_checkpoint(left)
