"""A seed fixes a merge bit by bit, however the leaves are laid out or grouped."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge.registry import methods

RANDOM = [m for m in methods().values() if m.needs_key]
every_random_method = pytest.mark.parametrize(
    "method", RANDOM, ids=[m.name for m in RANDOM]
)


def trees(count=4):
    draw = np.random.default_rng(0).standard_normal
    shapes = {"a": {"kernel": (16, 8)}, "b": {"kernel": (24, 16), "bias": (16,)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    base, *others = (
        jax.tree.map(lambda s: np.float32(draw(s)), shapes, is_leaf=is_shape)
        for _ in range(count)
    )
    return base, others


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).view(np.uint32), jax.device_get(tree))


@every_random_method
@pytest.mark.usefixtures("optimised")
def test_sharding_changes_no_bit(method, mesh):
    base, models = trees()
    want = bits(method.function(base, models, key=7))
    rules = {".*kernel": P("data", "model"), ".*": P("model")}
    placed = [jaxmerge.place(tree, mesh, rules) for tree in (base, *models)]
    chex.assert_trees_all_equal(
        bits(method.function(placed[0], placed[1:], key=7)), want
    )


@every_random_method
def test_leaves_one_at_a_time_and_in_any_order_change_no_bit(method):
    base, models = trees()
    whole = bits(method.function(base, models, key=7))
    flat = {
        f"{name}/{leaf}": [tree[name][leaf] for tree in (base, *models)]
        for name in ("b", "a")
        for leaf in base[name]
    }
    for path, (start, *others) in flat.items():
        alone = method.function({path: start}, [{path: x} for x in others], key=7)
        name, leaf = path.split("/")
        np.testing.assert_array_equal(bits(alone)[path], whole[name][leaf])


@every_random_method
def test_models_are_drawn_by_name(method):
    base, models = trees()
    named = method.function(base, models, key=7, names=["x", "y", "z"])
    turned = method.function(base, models[::-1], key=7, names=["z", "y", "x"])
    chex.assert_trees_all_close(named, turned, atol=1e-5)
    with pytest.raises(ValueError, match="give one distinct name per model"):
        method.function(base, models, key=7, names=["x", "x", "z"])


@every_random_method
def test_seeds_leaves_models_and_layers_draw_apart(method):
    ones = {name: {"bias": jnp.ones((3, 400))} for name in ("a", "b")}
    base = jax.tree.map(jnp.zeros_like, ones)
    options = {"stack_axes": 1, "elect": False}
    masks = [
        method.function(base, [ones], key=seed, names=[name], **options)[leaf]["bias"][
            i
        ]
        != 0
        for seed in (0, 1)
        for name in ("x", "y")
        for leaf in ("a", "b")
        for i in range(3)
    ]
    overlaps = np.corrcoef(np.array(masks, float)) - np.eye(len(masks))
    assert np.abs(overlaps).max() < 0.3


@every_random_method
def test_a_key_and_its_seed_are_the_same(method):
    base, models = trees()
    chex.assert_trees_all_equal(
        method.function(base, models, key=3),
        method.function(base, models, key=jax.random.key(3)),
    )
