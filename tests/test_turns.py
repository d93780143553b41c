"""Factorisations of one program follow each other, also when it has been compiled."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge
from jaxmerge.linalg import map_matrices
from jaxmerge.tuning.hoisting import hoist
from jaxmerge.turns import in_turn

pytestmark = pytest.mark.usefixtures("optimised")

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = (.*)$")


def factorisations(function, *arguments):
    """What each call of LAPACK in a compiled program needs, call by call."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    entry = text[text.index("ENTRY") :]
    needs, calls = {}, []
    for line in entry.splitlines():
        found = INSTRUCTION.match(line)
        if found is None:
            continue
        name, rest = found.groups()
        operands = [x for x in re.findall(r"%[\w.-]+", rest) if x in needs]
        needs[name] = set(operands).union(*(needs[x] for x in operands))
        if 'custom_call_target="lapack_' in rest:
            calls.append(name)
    return {name: needs[name] for name in calls}


def assert_in_turn(needs, least):
    assert len(needs) >= least
    for one, other in itertools.combinations(needs, 2):
        assert one in needs[other] or other in needs[one]


def tree(seed, stack=()):
    draw = np.random.default_rng(seed).standard_normal
    shapes = {"wide": (6, 9), "tall": (9, 4), "square": (5, 5)}
    return {
        name: {"kernel": jnp.float32(draw((*stack, *shape)))}
        for name, shape in shapes.items()
    }


def square(seed, stack=()):
    return tree(seed, stack)["square"]["kernel"]


def singular(x, y):
    return jnp.linalg.svd(x)[1], jnp.linalg.svd(y)[1], jnp.linalg.eigvalsh(x @ x.T)


def ordered(x, y):
    return in_turn(singular)(x, y)[0]


def constant_first(x, y):
    """Of factorisations whose results say nothing, or begin with a constant."""
    ranks = jnp.linalg.matrix_rank(x), jnp.linalg.matrix_rank(y)
    return ranks, jnp.concatenate([jnp.zeros(1), jnp.linalg.svd(x + y)[1]])


class TestInTurn:
    def test_results_are_those_of_the_function(self):
        x, y = square(0), square(1)
        found, expected = (jax.jit(fn)(x, y) for fn in (ordered, singular))
        jax.tree.map(np.testing.assert_array_equal, found, expected)

    def test_compiled_factorisations_wait_for_each_other(self):
        x, y = square(0), square(1)
        free = factorisations(singular, x, y)
        assert not any(other in need for need in free.values() for other in free)
        assert_in_turn(factorisations(ordered, x, y), 3)
        found = factorisations(lambda *xy: in_turn(constant_first)(*xy)[0], x, y)
        assert_in_turn(found, 3)

    def test_the_first_waits_for_what_it_is_told(self):
        def chained(x, y):
            first, done = in_turn(constant_first)(x, x)
            return first, in_turn(singular, done)(y, y)[0]

        assert_in_turn(factorisations(chained, square(0), square(1)), 5)

    def test_without_a_factorisation_it_hands_on_what_it_waits_for(self):
        after = jnp.ones(())
        assert in_turn(lambda x: x, after)(jnp.ones(2))[1] is after
        empty = in_turn(jnp.linalg.inv, after)(jnp.ones((0, 2, 2)))
        assert empty[1] is after
        assert isinstance(in_turn(lambda x: 1.0)(after)[0], jax.Array)

    def test_a_matrix_of_nothing_but_nan_leaves_others_alone(self):
        x, y = jnp.full((5, 5), jnp.nan), square(1)
        np.testing.assert_array_equal(
            jax.jit(ordered)(x, y)[1], jax.jit(singular)(y, y)[1]
        )

    def test_derivatives_are_those_of_the_function(self):
        def loss(fn, x):
            return sum(jnp.sum(values**2) for values in fn(x, 2 * x))

        x = square(0)
        found, expected = (
            jax.jit(jax.grad(functools.partial(loss, fn)))(x)
            for fn in (ordered, singular)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_derivatives_of_its_own_are_kept(self):
        @jax.custom_jvp
        def largest(x):
            return jnp.linalg.svd(x, compute_uv=False)[0]

        @largest.defjvp
        def _(primals, tangents):
            return largest(*primals), 7 * jnp.sum(*tangents)

        gradient = jax.grad(lambda x: in_turn(largest)(x)[0])(square(0))
        np.testing.assert_array_equal(gradient, np.full((5, 5), 7, np.float32))

    def test_stacks_of_matrices_are_factorised_together(self):
        x, y = square(0, (3,)), square(1, (3,))
        mapped = functools.partial(map_matrices, ordered)
        assert_in_turn(factorisations(mapped, x, y), 3)


@pytest.mark.parametrize(
    ("name", "stack"),
    [("tsv_merge", ()), ("tsv_merge", (2,)), ("dc_merge", ()), ("sftm", ())],
)
def test_merges_under_jit_factorise_in_turn(name, stack):
    base, *models = (tree(seed, stack) for seed in range(4))
    merge = functools.partial(getattr(jaxmerge, name), stack_axes=len(stack))
    assert_in_turn(factorisations(merge, base, models), 3)


def test_fused_parts_factorise_in_turn():
    base, *models = (tree(seed) for seed in range(4))
    merge = functools.partial(jaxmerge.tsv_merge, fused={"wide/kernel": 3})
    assert_in_turn(factorisations(merge, base, models), 5)


def test_leaves_may_lie_on_different_devices():
    base, *models = (tree(seed) for seed in range(3))
    devices = dict(zip(base, jax.devices(), strict=False))
    apart = [
        {name: jax.device_put(leaf, devices[name]) for name, leaf in params.items()}
        for params in (base, *models)
    ]
    merged = jaxmerge.tsv_merge(apart[0], apart[1:])
    expected = jaxmerge.tsv_merge(base, models)
    for name, device in devices.items():
        leaf = merged[name]["kernel"]
        assert leaf.devices() == {device}
        np.testing.assert_array_equal(leaf, expected[name]["kernel"])


def test_what_does_not_depend_on_an_option_still_runs_once():
    base, *models = (tree(seed) for seed in range(3))
    merge = functools.partial(jaxmerge.cart, base, models)
    values, run = hoist(lambda strength: merge(strength=strength), 0.5)
    assert "svd" not in str(jax.make_jaxpr(run)(values, 0.5))
