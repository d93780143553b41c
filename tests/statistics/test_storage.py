"""Statistics on disk and back, and sums of statistics."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hooks import normal

import jaxmerge
from jaxmerge.checkpoints import CheckpointError
from jaxmerge.statistics import (
    Unknown,
    collect,
    load_statistics,
    read_provenance,
    save_statistics,
)


@pytest.fixture(scope="module")
def statistics():
    params = {"a/b.weight": normal(0, 2, 4, 4), "bias": normal(1, 4), "lost": normal(2)}

    def apply(params, x):
        weights = params["a/b.weight"]
        x = jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]
        return x + params["bias"][None]

    return collect(
        apply,
        params,
        [normal(3, 5, 4)],
        what=("gram", "fisher_block", "output_gradient"),
        dtype="bfloat16",
    )


def test_round_trip(tmp_path, statistics):
    save_statistics(tmp_path / "saved", statistics, {"model": "a", "examples": [1, 2]})
    loaded = load_statistics(tmp_path / "saved")
    assert jax.tree.structure(loaded) == jax.tree.structure(statistics)
    jax.tree.map(np.testing.assert_array_equal, loaded, statistics)
    assert loaded.gram["a/b.weight"].dtype == jnp.bfloat16
    assert loaded.unknown == (Unknown("lost", "none", "no data meets it"),)
    assert loaded.axes == statistics.axes
    assert read_provenance(tmp_path / "saved") == {
        "model": "a",
        "examples": [1, 2],
        "jaxmerge": jaxmerge.__version__,
    }
    assert (loaded + statistics).examples == 10


def test_nothing_is_overwritten(tmp_path, statistics):
    save_statistics(tmp_path / "saved", statistics)
    with pytest.raises(FileExistsError, match="exists already"):
        save_statistics(tmp_path / "saved", statistics)


def test_errors_say_what_is_wrong(tmp_path, statistics):
    with pytest.raises(CheckpointError, match="holds no statistics"):
        load_statistics(tmp_path)
    save_statistics(tmp_path / "saved", statistics)
    header = tmp_path / "saved" / "statistics.json"
    header.write_text("{}")
    with pytest.raises(CheckpointError, match="has format None"):
        load_statistics(tmp_path / "saved")
    header.write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_statistics(tmp_path / "saved")


def test_sums_need_the_same_model_and_kinds(statistics):
    with pytest.raises(ValueError, match="belong to different models"):
        statistics + dataclasses.replace(statistics, sites=statistics.sites[1:])
    with pytest.raises(ValueError, match="not of the same kinds"):
        statistics + dataclasses.replace(statistics, gram={})


def test_sums_are_in_float32(statistics):
    assert statistics.gram["a/b.weight"].dtype == jnp.bfloat16
    shards = [statistics] * 600
    for total in (sum(shards), functools.reduce(operator.add, shards)):
        assert total.tokens["a/b.weight"][0] == 600 * 5
        for got, part in zip(*map(jax.tree.leaves, (total, statistics)), strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, 600 * np.float32(part), rtol=1e-4)
    loaded = jax.tree.map(np.asarray, statistics)
    np.testing.assert_array_equal((loaded + statistics).examples, 10)
    with pytest.raises(TypeError):
        1 + statistics
