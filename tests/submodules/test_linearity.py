import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    BASE,
    BLOCKS,
    MODELS,
    SAMPLES,
    WIDTH,
    block,
    kernels,
    linear,
    network,
    plain,
    random,
    stacked,
)

from jaxmerge import nonlinearity, submodule


def scores(apply, base, model, x, **options):
    found = nonlinearity(apply, base, model, x, **options)
    return {path: float(score) for path, score in found.items()}


def test_nonlinearity_equals_the_integral():
    def apply(params, x):
        return jnp.tanh(x @ params["kernel"])

    base, model = ({"kernel": random(WIDTH, 3, seed=seed)} for seed in (1, 2))
    x = random(6, WIDTH, seed=3)
    grid = np.linspace(0, 1, 5)
    tau = np.float64(model["kernel"]) - base["kernel"]
    path = [np.tanh(np.float64(x) @ (base["kernel"] + a * tau)) for a in grid]
    points = list(zip(grid, path, strict=True))
    whole = np.linalg.norm(path[-1] - path[0], axis=1)
    errors = [
        [np.linalg.norm(p - q, axis=1) / whole - abs(a - b) for a, p in points]
        for b, q in points
    ]
    want = np.trapezoid(np.trapezoid(np.square(errors), grid, axis=0), grid, axis=0)
    found = scores(apply, base, model, x, submodules=[], points=5)
    np.testing.assert_allclose(found[""], want.mean(), rtol=1e-4)
    parts = scores(apply, base, model, [x[:2], x[2:]], submodules=[], points=5)
    np.testing.assert_allclose(parts[""], want.mean(), rtol=1e-4)


def test_linear_functions_have_no_nonlinearity():
    base, model = kernels(1, 2)
    x = random(4, 6, seed=3)
    assert max(scores(linear, base, model, x, submodules="linear").values()) < 1e-10
    same = scores(linear, base, base, x, submodules="linear")
    assert same == {"": 0, "linear": 0}


def test_submodules_are_more_linear_than_the_model():
    def deep(seed):
        networks = [stacked(network(seed + i)) for i in range(4)]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *networks)

    base, change = deep(1)["blocks"], deep(100)["blocks"]
    model = jax.tree.map(lambda b, c: b + 0.1 * c, base, change)

    def apply(params, x):
        return jax.lax.scan(
            lambda x, layer: (submodule("blocks", block)(layer, x), None), x, params
        )[0]

    found = nonlinearity(apply, base, model, SAMPLES[0], submodules="blocks")
    assert found["blocks"].shape == (4 * BLOCKS,)
    assert 0 < np.min(found["blocks"]) < np.max(found["blocks"]) < found[""]


def test_nonlinearity_checks_its_arguments():
    with pytest.raises(ValueError, match="points is 1; it must be a whole number"):
        nonlinearity(plain, BASE, MODELS[0], SAMPLES[0], submodules="head", points=1)
    with pytest.raises(ValueError, match="samples is a list without batches"):
        nonlinearity(plain, BASE, MODELS[0], [], submodules="head")
