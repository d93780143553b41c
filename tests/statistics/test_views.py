"""Views of leaves: an axis is followed through any reshape, transpose and slice."""

import math

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmerge.statistics import views


def factorised(draw, size):
    """Cuts a size into factors, with ones among them."""
    sizes = []
    while size > 1:
        divisors = [n for n in range(2, size + 1) if size % n == 0]
        sizes.append(draw(st.sampled_from(divisors)))
        size //= sizes[-1]
        if draw(st.booleans()):
            sizes.append(1)
    return sizes


@st.composite
def walks(draw):
    """A leaf's shape, and how a model rearranges it."""
    shape = tuple(
        draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
    )
    steps, now = [], shape
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            now = tuple(factorised(draw, math.prod(now)))
            steps.append(("reshape", now, {"dimensions": None}))
        else:
            order = tuple(draw(st.permutations(range(len(now)))))
            now = tuple(now[axis] for axis in order)
            steps.append(("transpose", now, {"permutation": order}))
    return shape, steps


@given(walks())
@settings(deadline=None, max_examples=60)
def test_factors_say_where_every_entry_is_from(walk):
    """Walks an array of flat indices beside the view, and compares."""
    shape, steps = walk
    view = views.whole("w", shape)
    leaf = np.arange(math.prod(shape)).reshape(shape)
    for primitive, now, params in steps:
        leaf = (
            leaf.transpose(params["permutation"]) if primitive == "transpose" else leaf
        )
        leaf = leaf.reshape(now)
        view = views.rearrange(view, primitive, now, params)
        if view is None:  # parts that no factors describe, such as 6 out of 2 x 9
            return
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    expected = np.zeros(leaf.shape, int)
    for axis, factors in enumerate(view.axes):
        place = np.zeros(1, int)
        for factor in factors:
            steps = np.arange(factor.size) * factor.stride * strides[factor.axis]
            place = (place[:, None] + steps[None]).reshape(-1)
        expected += place.reshape([-1 if a == axis else 1 for a in range(leaf.ndim)])
    np.testing.assert_array_equal(leaf, expected)
    # And a layout brings it all back.
    layout = views.elementwise_layout(view)
    back = views.arrange(jnp.asarray(leaf).reshape(-1), 0, layout)
    np.testing.assert_array_equal(back, np.arange(leaf.size))


def test_repeated_values_are_no_part_of_the_leaf():
    view = views.whole("w", (3, 1))
    view = views.rearrange(
        view, "broadcast_in_dim", (5, 3, 2), {"broadcast_dimensions": (1, 2)}
    )
    assert view.axes == ((), (views.Factor(0, 1, 3),), ())
    assert view.repeats(0)
    assert view.repeats(2)
    assert views.rearrange(view, "reshape", (5, 1, 3, 2), {}).axes[2] == view.axes[1]
    assert views.rearrange(view, "reshape", (15, 2), {}) is None
