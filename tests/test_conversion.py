"""Conversion: Python and the command line, there and back, or nothing at all."""

import json

import ml_dtypes
import numpy as np
import pytest
from counting import Counting

import jaxmerge
from jaxmerge import conversion, convert, open_checkpoint
from jaxmerge.checkpoints import FORMATS, CheckpointError, orbax_writer
from jaxmerge.checkpoints.views import View
from jaxmerge.cli import main
from jaxmerge.renaming import Rule


@pytest.fixture
def hf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def values(*shape):
        return rng.normal(size=shape).astype(ml_dtypes.bfloat16)

    params = {"model.embed_tokens.weight": values(9, 4), "model.norm.weight": values(4)}
    for i in range(11):
        params[f"model.layers.{i}.mlp.up_proj.weight"] = values(6, 4)
        params[f"model.layers.{i}.input_layernorm.weight"] = values(4)
    jaxmerge.save(tmp_path / "hf", params)
    config = {"model_type": "llama", "torch_dtype": "bfloat16"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    return params


def fail(capsys, *argv):
    assert main(argv) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("jaxmerge: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("to", ["orbax", "msgpack", "safetensors"])
def test_there_and_back_is_bit_for_bit(hf, tmp_path, capsys, to):
    there = ["--names", "llama", "--stack", "layers_{}"]
    assert main(["convert", "hf", "flax", "--to", to, *there]) == 0
    assert f"Wrote flax: 4 leaves, 696 bytes, as {to}." in capsys.readouterr().out
    flax = jaxmerge.load("flax")
    assert set(flax) == {"embed_tokens", "layers", "norm"}
    kernel = flax["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.shape == (11, 4, 6)
    np.testing.assert_array_equal(
        kernel[10], hf["model.layers.10.mlp.up_proj.weight"].T
    )
    back = ["--names", "llama", "--inverse", "--unstack", "layers_{}"]
    assert main(["convert", "flax", "back", "--to", "safetensors", *back]) == 0
    found = jaxmerge.load("back")
    assert found.keys() == hf.keys()
    for name, array in hf.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    for directory in ("flax", "back"):
        for sidecar in ("config.json", "tokenizer.json"):
            copied = (tmp_path / directory / sidecar).read_bytes()
            assert copied == (tmp_path / "hf" / sidecar).read_bytes()


def test_dtype_is_that_of_the_config_too(hf, tmp_path):
    seen = []
    convert("hf", "out", "orbax", dtype="float32", progress=lambda *a: seen.append(a))
    for name, array in hf.items():
        np.testing.assert_array_equal(
            open_checkpoint("out").read(name), array.astype(np.float32), strict=True
        )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "float32"}
    total = 2 * sum(array.nbytes for array in hf.values())
    assert seen[-1][:2] == (total, total)
    assert [step[2] for step in seen] == list(open_checkpoint("hf").leaves)


def test_rules_as_objects_and_open_checkpoints(hf):
    rules = [Rule(r"model\.(.+)", r"\1")]
    convert(open_checkpoint("hf"), "short", "safetensors", names=rules)
    assert "norm.weight" in open_checkpoint("short").leaves
    convert("short", "long", "safetensors", names=rules, inverse=True)
    assert open_checkpoint("long").leaves == open_checkpoint("hf").leaves


@pytest.mark.parametrize("to", FORMATS)
def test_large_leaves_are_converted_by_rows(hf, monkeypatch, to):
    monkeypatch.setattr(conversion, "BLOCK_BYTES", 100)
    monkeypatch.setattr(orbax_writer, "MAX_CHUNK_BYTES", 40)
    sizes = []
    read = View.read

    def noted(self, name, index=...):
        array = read(self, name, index)
        sizes.append(array.nbytes)
        return array

    monkeypatch.setattr(View, "read", noted)
    source = Counting(open_checkpoint("hf"))
    convert(source, "out", to, names="llama", stack="layers_{}")
    assert max(sizes) <= 100
    assert source.nbytes == {name: array.nbytes for name, array in hf.items()}
    convert(
        "out", "back", "safetensors", names="llama", inverse=True, unstack="layers_{}"
    )
    for name, array in hf.items():
        np.testing.assert_array_equal(open_checkpoint("back").read(name), array)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hf", "hf", "--to", "orbax"], "hf exists already"),
        (["no", "out", "--to", "orbax"], "no does not exist"),
        (["hf", "out", "--to", "zip"], "format is 'zip'; it must be one of"),
        (["hf", "out", "--to", "orbax", "--names", "bert"], "no rule matches model.em"),
        (["hf", "out", "--to", "orbax", "--names", "lama"], "did you mean 'llama'?"),
        (["hf", "out", "--to", "orbax", "--dtype", "int8"], "dtype is 'int8'; it must"),
        (["hf", "out", "--to", "orbax", "--stack", "h.{}"], "has no layers 'h.{}'"),
        (
            ["hf", "out", "--to", "orbax", "--unstack", "h_{}"],
            "has no leaves below 'h'",
        ),
    ],
)
def test_failures(hf, tmp_path, capsys, words, message):
    before = sorted(tmp_path.iterdir())
    assert message in fail(capsys, "convert", *words)
    assert sorted(tmp_path.iterdir()) == before


def test_damage_on_the_way_leaves_nothing(hf, tmp_path, capsys):
    convert("hf", "orbax", "orbax")
    data = max((tmp_path / "orbax/state/d").iterdir(), key=lambda p: p.stat().st_size)
    opened = open_checkpoint("orbax")
    data.write_bytes(b"")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        convert(opened, "out", "msgpack")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "orbax"]
    assert "missing or damaged" in fail(
        capsys, "convert", "orbax", "out", "--to", "orbax"
    )


def test_too_large_for_the_dtype(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    jaxmerge.save("big", {"w": np.array([1e6], np.float32)})
    message = fail(
        capsys, "convert", "big", "out", "--to", "orbax", "--dtype", "float16"
    )
    assert "leaf 'w': an entry is too large for float16" in message
    assert [p.name for p in tmp_path.iterdir()] == ["big"]


@pytest.mark.parametrize(
    ("to", "format"), [("orbax", "Orbax"), ("msgpack", "flax msg")]
)
def test_inspect(hf, capsys, to, format):
    convert("hf", "out", to)
    assert main(["inspect", "out"]) == 0
    assert f"Format: {format}" in capsys.readouterr().out
