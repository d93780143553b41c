"""Choosing coefficients of every registered method, on one device and on a mesh.

A new method is covered as soon as it is registered.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from task_statistics import random_statistics

import jaxmerge
from jaxmerge.registry import methods
from jaxmerge.tuning import few_shot_coefficients, sweep

METHODS = list(methods().values())
every_method = pytest.mark.parametrize("method", METHODS, ids=[m.name for m in METHODS])
SHAPES = {"kernel": (16, 8), "bias": (8,)}
SPECS = {"kernel": P("data", "model"), "bias": P("model")}


def trees(count):
    rng = np.random.default_rng(0)
    base = {name: np.float32(rng.normal(size=s)) for name, s in SHAPES.items()}
    moved = [
        {
            name: np.float32(x + 0.3 * rng.normal(size=x.shape))
            for name, x in base.items()
        }
        for _ in range(count)
    ]
    return base, moved


def with_base(method, statistics):
    """A registered method as `function(base, models, *, ...)`."""
    drawn = {"key": 0} if method.needs_key else {}
    known = (statistics,) if method.needs_statistics else ()

    def merge(base, models, **options):
        inputs = (base, models) if method.needs_base else (models,)
        return method.function(*inputs, *known, **drawn, **options)

    # The options of the method, as those that learn coefficients look for them.
    signature = inspect.signature(method.function)
    parameters = [p for n, p in signature.parameters.items() if n in method.parameters]
    first = [inspect.Parameter(n, _POSITIONAL) for n in ("base", "models")]
    merge.__signature__ = signature.replace(parameters=[*first, *parameters])
    return merge


_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD


def placed(mesh, base, models):
    put = lambda tree: jaxmerge.place(tree, mesh, SPECS)  # noqa: E731
    return put(base), [put(model) for model in models]


def apply(params, inputs):
    return jnp.tanh(inputs @ params["kernel"] + params["bias"][None])


def score(params):
    return jnp.mean(params["kernel"] ** 2) + jnp.mean(params["bias"])


def first_number(method):
    """The option to sweep: the first one with a number that can be traced."""
    given = {"weights": (0.3, 1.0), "t": (0.1, 0.4)}
    for name, option in method.options.items():
        if name in given:
            return name, given[name]
        if name in ("scale", "boost", "threshold", "floor"):
            return name, (0.5 * option.default, 1.5 * option.default)
    return None


@every_method
def test_a_sweep_on_a_mesh_is_a_loop_on_one_device(method):
    chosen = first_number(method)
    if chosen is None:
        pytest.skip("has no number that could be swept")
    base, models = trees(min(3, method.max_models or 3))
    merge = with_base(method, random_statistics(models))
    name, values = chosen
    want = [float(score(merge(base, models, **{name: v}))) for v in values]
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    merge = functools.partial(merge, *placed(mesh, base, models))
    found = sweep(merge, [{name: v} for v in values], score)
    assert found.static == ()
    np.testing.assert_allclose(found.scores, want, rtol=1e-5)


@every_method
def test_coefficients_are_learned_through_it(method):
    base, models = trees(min(3, method.max_models or 3))
    rng = np.random.default_rng(1)
    inputs = np.float32(rng.normal(size=(6, 16)))
    merge = with_base(method, random_statistics(models))
    found = few_shot_coefficients(
        apply,
        base,
        models,
        (inputs, np.float32(apply(models[0], inputs))),
        loss=square,
        granularity="layer",
        method=merge,
        option="t" if "t" in method.options else None,
        steps=2,
        learning_rate=1e-3,
    )
    assert found.coefficients.keys() == SHAPES.keys()
    assert np.isfinite(found.losses).all()
    assert all(np.isfinite(c).all() for c in found.coefficients.values())
    assert any((c != np.float32(0.3)).any() for c in found.coefficients.values())
    # Which entries are chosen may change with the lengths of task vectors, by jumps.
    assert found.option == "task vectors" or found.losses[1] < found.losses[0]


def square(outputs, labels):
    return (outputs - labels) ** 2
