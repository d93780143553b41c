"""What the README says is what the library does."""

import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxmerge
from jaxmerge.cli import main
from jaxmerge.registry import markdown_table

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    fences = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Checkpoints and adapters of the names that the README uses."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0).standard_normal
    start = {
        "mlp": {"kernel": draw((4, 4)), "bias": draw(4)},
        "head": {"bias": draw(2)},
    }
    for name in ("start", "math", "code", "law"):
        params = {
            module: {
                leaf: np.float32(x + 0.1 * draw(x.shape)) for leaf, x in leaves.items()
            }
            for module, leaves in start.items()
        }
        jaxmerge.save(f"checkpoints/{name}", params)
    jaxmerge.save("llama", {"mlp.weight": np.float32(draw((4, 4)))})
    layer = "model.layers.{}.self_attn.q_proj.weight"
    layers = {layer.format(i): np.float32(draw((4, 4))) for i in range(2)}
    jaxmerge.save("llama-hf", layers)
    for task in ("math", "code"):
        path = Path(f"llama-{task}-lora")
        path.mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (path / "adapter_config.json").write_text(json.dumps(config))
        shapes = {"lora_A": (2, 4), "lora_B": (4, 2)}
        tensors = {
            f"base_model.model.mlp.{name}.weight": np.float32(draw(shape))
            for name, shape in shapes.items()
        }
        safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    return tmp_path


def test_table_of_methods_is_that_of_the_registry():
    assert markdown_table() in README, "copy this into the README:\n" + markdown_table()


def test_python_examples_run(checkpoints):
    first, second, steps, tuning, adapters, data, store = blocks("python")
    exec(first, {})
    assert jaxmerge.load("checkpoints/merged")["mlp"]["kernel"].shape == (4, 4)
    names: dict = {}
    exec(second, names)
    assert names["sweep"]["mlp"]["kernel"].shape == (200, 4, 4)
    np.testing.assert_allclose(names["merged"]["mlp"]["bias"], 0, atol=1e-6)
    exec(steps, names)
    ranks = [
        np.linalg.matrix_rank(
            names[n]["mlp"]["kernel"] - names["base"]["mlp"]["kernel"]
        )
        for n in ("merged", "boosted")
    ]
    assert ranks == [1, 4]
    assert names["calibrated"]["mlp"]["kernel"].shape == (4, 4)
    score = lambda params: -jnp.square(params["mlp"]["bias"] - 0.1).sum()  # noqa: E731
    found = {**names, "score": score}
    exec(tuning, found)
    np.testing.assert_allclose(found["merged"]["mlp"]["bias"], 0.1, atol=2e-3)
    with jax.numpy_rank_promotion("allow"):  # The bias of its model.
        exec(data, names)
    np.testing.assert_allclose(
        names["matched"]["mlp"]["kernel"], names["merged"]["mlp"]["kernel"], atol=0.1
    )
    exec(store, names)
    assert set(names["params"]) == {"mlp", "head"}
    exec(adapters, names)
    assert np.abs(names["merged"]["mlp.weight"] - names["base"]["mlp.weight"]).max() > 0


def test_recipe_and_commands_run(checkpoints, capsys):
    (recipe,) = blocks("yaml")
    Path("recipe.yaml").write_text(recipe)
    commands = [
        shlex.split(line, comments=True)[1:]
        for block in blocks("")
        for line in block.splitlines()
        if line.startswith("jaxmerge ")
    ]
    assert len(commands) == 9
    for command in commands:
        assert main(command) == 0, command
    assert jaxmerge.load("out")["mlp"]["kernel"].shape == (4, 4)
    merged = jaxmerge.load("merged")
    assert merged["mlp"]["kernel"].dtype == "bfloat16"
    first, back = (jaxmerge.load(name) for name in ("llama-hf", "back"))
    jax.tree.map(np.testing.assert_array_equal, back, first)
    assert "mlp/kernel" in capsys.readouterr().out


def test_links_to_files_work():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
