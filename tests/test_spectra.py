"""Singular values of task matrices, against NumPy in float64."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge.spectra import singular_values


def make_trees():
    rng = np.random.default_rng(0)

    def tree():
        return {
            "query": {"kernel": rng.normal(size=(8, 2, 3)).astype(np.float32)},
            "layers": {"kernel": rng.normal(size=(2, 8, 4)).astype(np.float32)},
            "norm": {"scale": rng.normal(size=8).astype(np.float32)},
        }

    return [tree() for _ in range(3)]


RULES = {"layers/.*": 1, ".*": 0}


def check(values, base, models):
    assert sorted(values) == ["layers/kernel", "query/kernel"]
    for at, model in enumerate(models):
        delta = model["query"]["kernel"] - base["query"]["kernel"]
        expected = np.linalg.svd(delta.reshape(8, 6), compute_uv=False)
        np.testing.assert_allclose(values["query/kernel"][at], expected, rtol=1e-5)
        delta = model["layers"]["kernel"] - base["layers"]["kernel"]
        expected = np.linalg.svd(delta, compute_uv=False)
        np.testing.assert_allclose(values["layers/kernel"][:, at], expected, rtol=1e-5)


def test_against_numpy():
    base, *models = make_trees()
    check(singular_values(base, models, stack_axes=RULES), base, models)


def test_any_mesh(mesh):
    base, *models = make_trees()
    rules = {"layers/.*": P(None, "data", "model"), "query/.*": P("data"), ".*": P()}
    placed = [jm.place(tree, mesh, rules) for tree in (base, *models)]
    values = singular_values(placed[0], placed[1:], stack_axes=RULES)
    check(values, base, models)


def test_misuse_is_named():
    base, *models = make_trees()
    with pytest.raises(ValueError, match="singular_values: needs at least one model"):
        singular_values(base, [])
    with pytest.raises(ValueError, match=r"No rule says .*'layers/kernel'"):
        singular_values(base, models)
