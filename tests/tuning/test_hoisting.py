"""Functions in two parts: the same results, and nothing done twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge
from jaxmerge.jaxprs import body_of, inside
from jaxmerge.tuning.hoisting import hoist


def primitives(function, *arguments):
    jaxpr = body_of(jax.make_jaxpr(function)(*arguments)).jaxpr
    return [e.primitive.name for eqn in jaxpr.eqns for e in (eqn, *inside(eqn))]


@pytest.fixture
def models():
    rng = np.random.default_rng(0)
    base = {"kernel": np.float32(rng.normal(size=(16, 8)))}
    moved = [np.float32(rng.normal(size=(16, 8))) for _ in range(3)]
    return base, [{"kernel": base["kernel"] + 0.1 * x} for x in moved]


@pytest.mark.parametrize("name", ["ties", "tsv_merge"])
def test_trimming_and_factorising_do_not_depend_on_the_scale(models, name):
    merge = functools.partial(getattr(jaxmerge, name), *models)
    whole = primitives(lambda s: merge(scale=s), 0.3)
    assert {"while", "scan", "svd"} & set(whole)
    values, run = hoist(lambda s: merge(scale=s), 0.3)
    assert len(primitives(run, values, 0.7)) < 10
    np.testing.assert_allclose(
        run(values, 0.7)["kernel"], merge(scale=0.7)["kernel"], rtol=1e-6
    )


def test_arrays_become_arguments_and_none_is_kept_twice():
    table = jnp.arange(6.0)

    def function(x):
        shifted = table + 1
        return {"a": shifted * x, "b": shifted - x, "c": table, "d": jnp.zeros(6) + x}

    values, run = hoist(function, 1.0)
    assert [v.tolist() for v in values] == [[1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]]
    assert not jax.make_jaxpr(run)(values, 2.0).consts
    want = function(2.0)
    for name, leaf in run(values, 2.0).items():
        np.testing.assert_array_equal(leaf, want[name])


def test_what_calls_close_over_is_an_argument_too():
    tables = [jnp.arange(3.0), jnp.arange(3.0) + 1]
    inner = jax.jit(lambda x: x * tables[1])
    outer = jax.jit(lambda x: inner(x) + tables[0])
    values, run = hoist(lambda x: outer(x) - tables[1], 1.0)
    assert len(values) == 2
    assert not jax.make_jaxpr(run)(values, 2.0).consts
    assert run(values, 2.0).tolist() == [1, 3, 5]


def test_what_depends_on_nothing_or_on_everything():
    values, run = hoist(lambda x: (jnp.ones(2), 3.0, x), jnp.ones(3))
    ones, three, x = run(values, jnp.arange(3.0))
    assert ones.tolist() == [1, 1]
    assert float(three) == 3
    assert x.tolist() == [0, 1, 2]
    values, run = hoist(lambda x: jnp.sin(x) ** 2, 1.0)
    assert values == []
    np.testing.assert_allclose(run(values, 2.0), np.sin(2.0) ** 2, rtol=1e-6)


def test_calls_within_calls_share_what_they_compute():
    w = jnp.arange(1.0, 4.0)

    @jax.jit
    def inner(x, y):
        return jnp.cos(x), jnp.sin(y)

    @jax.jit
    def outer(x):
        fixed, varying = inner(w, x)
        again, _ = inner(w + 1, x)
        return fixed + again + varying

    values, run = hoist(outer, 1.0)
    assert "cos" not in primitives(run, values, 1.0)
    np.testing.assert_allclose(run(values, 0.3), outer(0.3), rtol=1e-6)


def test_loops_branches_and_rules_of_derivatives_stay_whole():
    @jax.custom_jvp
    def twice(x):
        return 2 * x

    twice.defjvp(lambda primals, tangents: (twice(*primals), 7 * tangents[0]))
    w = jnp.arange(3.0)

    def function(x):
        total = jax.lax.fori_loop(0, 3, lambda i, t: t + w[i] * x, 0.0)
        return twice(total) + jax.lax.cond(x > 0, lambda: w[1], lambda: w[2])

    values, run = hoist(function, 1.0)
    assert jax.grad(lambda x: run(values, x))(1.0) == 7 * 3
    assert run(values, 1.0) == function(1.0) == 7
    assert run(values, -1.0) == function(-1.0) == -4


def test_random_draws_are_made_once():
    base, model = {"w": jnp.zeros(8)}, {"w": jnp.ones(8)}
    merge = functools.partial(jaxmerge.dare, base, [model], key=3)
    values, run = hoist(lambda s: merge(scale=s), 1.0)
    assert not any("random" in name for name in primitives(run, values, 1.0))
    np.testing.assert_array_equal(run(values, 0.5)["w"], merge(scale=0.5)["w"])
