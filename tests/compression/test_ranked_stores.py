"""TIES of whole models that are read leaf by leaf: the same as in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge
from jaxmerge.compression import StoreError, create_store, open_store
from jaxmerge.compression.sources import InMemory

SIGNS = {"vote": "mass", "tie": "majority", "aggregate": "sum"}


def of_whole_models(base, models):
    return jaxmerge.ties(base, list(models.values()), scope="model", **SIGNS)


def shared(path):
    return jaxmerge.load(path / "shared.safetensors")


def test_exact_ties_go_to_the_majority_of_the_model(tmp_path):
    base = {"a": np.zeros(4, np.float32), "b": np.zeros(6, np.float32)}
    negative = np.float32([0, 0, -9, -9, 1, 0])
    models = {
        "one": {"a": np.float32([9, 9, 1, 0]), "b": negative},
        "two": {"a": np.float32([-9, 9, 1, 0]), "b": negative},
    }
    path = tmp_path / "store"
    create_store(path, base, models, multi_task="ties", scope="model")
    vector = shared(path)
    # Most entries of the leaf are positive, most of the model are not.
    np.testing.assert_array_equal(vector["a"], [-9, 18, 0, 0])
    np.testing.assert_array_equal(vector["b"], 2 * negative * (negative < 0))
    for name, leaf in of_whole_models(base, models).items():
        np.testing.assert_array_equal(vector[name], leaf)


@pytest.mark.parametrize("dtype", [np.float64, jnp.bfloat16])
def test_any_dtype_is_ranked(tmp_path, dtype):
    rng = np.random.default_rng(0)
    base = {"w": np.zeros(40, dtype), "v": np.ones(50, dtype)}
    models = {
        task: {n: (x + rng.normal(size=x.shape)).astype(dtype) for n, x in base.items()}
        for task in ("one", "two")
    }
    path = tmp_path / "store"
    create_store(path, base, models, multi_task="ties", scope="model")
    with jax.enable_x64(dtype == np.float64):
        zeros = {n: np.zeros_like(x) for n, x in base.items()}
        wide = np.promote_types(dtype, np.float32)
        deltas = {
            task: {n: x.astype(wide) - base[n].astype(wide) for n, x in model.items()}
            for task, model in models.items()
        }
        whole = of_whole_models(zeros, deltas)
        for name, vector in shared(path).items():
            np.testing.assert_array_equal(vector, whole[name], err_msg=name)


def test_leaves_of_several_widths_are_refused(tmp_path):
    base = {"wide": np.zeros(4), "narrow": np.zeros(4, np.float32)}
    models = {"one": {n: x + 1 for n, x in base.items()}}
    with pytest.raises(StoreError, match=r"float64 and of narrower.*scope to 'leaf'"):
        create_store(tmp_path / "store", base, models, multi_task="ties", scope="model")
    assert not list(tmp_path.iterdir())


def test_large_leaves_are_measured_some_rows_at_a_time(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    base = {"w": np.zeros((20, 8), np.float32)}
    models = {task: {"w": rng.normal(size=(20, 8)).astype(np.float32)} for task in "ab"}
    options = {"multi_task": "ties", "scope": "model"}
    create_store(tmp_path / "whole", base, models, **options)
    read, indices = InMemory.read, []

    def noted(self, name, *index):
        indices.append(index)
        return read(self, name, *index)

    monkeypatch.setattr(InMemory, "read", noted)
    create_store(tmp_path / "rows", base, models, memory=1000, **options)
    assert len({index[0][0].start for index in indices if index}) > 2
    whole, rows = (shared(tmp_path / name)["w"] for name in ("whole", "rows"))
    np.testing.assert_array_equal(whole, rows)


def test_files_are_read_in_passes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    base = {f"{i}": rng.normal(size=(2, 4)).astype(np.float32) for i in range(3)}
    models = {"one": {n: x + 1 for n, x in base.items()}}
    read, names = InMemory.read, []

    def counted(self, name, *index):
        names.append(name)
        return read(self, name, *index)

    monkeypatch.setattr(InMemory, "read", counted)
    seen = []
    create_store(
        tmp_path / "store",
        base,
        models,
        multi_task="ties",
        scope="model",
        progress=lambda *told: seen.append(told),
    )
    # Two for the threshold, one for the majority of signs, and the last one.
    assert names == ["0", "0", "1", "1", "2", "2"] * 4
    assert [told[0] for told in seen] == [32, 64, 96]
    assert open_store(tmp_path / "store").files.document["options"]["scope"] == "model"


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_models_that_equal_the_base(tmp_path, scope):
    base = {"w": np.ones(3, np.float32)}
    models = {"same": base, "other": {"w": np.float32([1, 2, 1])}}
    path = tmp_path / "store"
    create_store(path, base, models, multi_task="ties", scope=scope)
    np.testing.assert_array_equal(open_store(path).params("same")["w"], 1)
    np.testing.assert_array_equal(open_store(path).params("other")["w"], [1, 2, 1])
