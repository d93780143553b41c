"""Ranks over models that are read leaf by leaf: the same as of a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import jaxmerge
from jaxmerge.compression import create_store, mixing, open_store
from jaxmerge.compression.mixing import kth_magnitudes
from jaxmerge.compression.sources import InMemory

SIGNS = {"vote": "mass", "tie": "majority", "aggregate": "sum"}


def leaves_of(dtype):
    numbers = st.floats(-4, 4, width=16).map(lambda x: x * 1.37)
    return st.lists(arrays(dtype, st.integers(1, 9), elements=numbers), min_size=1)


@settings(deadline=None, max_examples=40)
@given(st.one_of(leaves_of(np.float32), leaves_of(np.float64)), st.data())
def test_ranks_are_those_of_a_sort(leaves, data):
    everything = np.sort(np.abs(np.concatenate(leaves)))[::-1]
    k = data.draw(st.integers(1, everything.size))
    read = lambda: [{"a": leaf} for leaf in leaves]  # noqa: E731
    found = kth_magnitudes(read, k, leaves[0].dtype)["a"]
    assert found.dtype == leaves[0].dtype
    assert found == everything[k - 1]


def test_vectors_have_ranks_of_their_own_and_zeros_need_not_be_read():
    first = {"a": np.float32([3, -5]), "b": np.float32([0.25])}
    second = {"a": np.float32([1])}
    for k, expected in ((1, (5, 0.25)), (2, (3, 0)), (3, (1, 0)), (4, (0, 0))):
        found = kth_magnitudes(lambda: [first, second], k, np.dtype(np.float32))
        assert (found["a"], found["b"]) == expected


def test_extreme_numbers_and_long_leaves(monkeypatch):
    monkeypatch.setattr(mixing, "_CHUNK", 7)
    tiny, huge = np.float32(1e-45), np.finfo(np.float32).max
    leaf = np.array([0, -tiny, tiny * 2, huge, -huge, 1] * 5, np.float32)
    ordered = np.sort(np.abs(leaf))[::-1]
    for k in (1, 11, 16, 21, 30):
        found = kth_magnitudes(lambda: [{"a": leaf}], k, leaf.dtype)
        assert found["a"] == ordered[k - 1]


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


def test_leaves_of_several_dtypes_are_ranked_together(tmp_path):
    rng = np.random.default_rng(0)
    base = {
        "wide": np.zeros(40),
        "narrow": np.zeros(50, np.float32),
        "half": np.zeros(30, jnp.bfloat16),
    }

    def model():
        return {n: rng.normal(size=x.shape).astype(x.dtype) for n, x in base.items()}

    models = {"one": model(), "two": model()}
    # A threshold that float32 rounds down, next to entries that it must not admit.
    threshold = np.sort(np.abs(np.concatenate([*models["one"].values()], dtype=float)))
    models["one"]["wide"][0] = threshold[-25] + 1e-12
    path = tmp_path / "store"
    create_store(path, base, models, multi_task="ties", scope="model")
    with jax.enable_x64(True):
        whole = of_whole_models(base, models)
        for name, vector in shared(path).items():
            np.testing.assert_array_equal(vector, whole[name], err_msg=name)


def test_files_are_read_in_three_passes_before_the_last(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    base = {f"{i}": rng.normal(size=8).astype(np.float32) for i in range(3)}
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
    assert names == ["0", "0", "1", "1", "2", "2"] * 4
    assert seen[0][:2] == (32, 4 * 96)
    assert seen[-1][:2] == (4 * 96, 4 * 96)
    assert open_store(tmp_path / "store").files.document["options"]["scope"] == "model"


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_models_that_equal_the_base(tmp_path, scope):
    base = {"w": np.ones(3, np.float32)}
    models = {"same": base, "other": {"w": np.float32([1, 2, 1])}}
    path = tmp_path / "store"
    create_store(path, base, models, multi_task="ties", scope=scope)
    np.testing.assert_array_equal(open_store(path).params("same")["w"], 1)
    np.testing.assert_array_equal(open_store(path).params("other")["w"], [1, 2, 1])
