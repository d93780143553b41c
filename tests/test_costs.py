"""What computations cost: counts against textbooks, footprints against arithmetic."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxmerge import costs
from jaxmerge.costs import count_operations, footprint
from jaxmerge.numerics import kth_magnitude

MATRIX = jax.ShapeDtypeStruct((64, 16), jnp.float32)


def count(function, *shapes, large=1):
    return count_operations(jax.make_jaxpr(function)(*shapes), large)


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (lambda x: x.T @ x, 2 * 64 * 16 * 16),
        (lambda x: 2 * x + x, 2 * 64 * 16),
        (lambda x: x.reshape(16, 64).T, 0),
        (lambda x: jnp.sum(x), 64 * 16),
        (lambda x: jnp.linalg.svd(x, full_matrices=False), 6 * 64 * 16**2 + 20 * 16**3),
        (lambda x: jnp.linalg.cholesky(x[:16]), 16**3 / 3),
        (lambda x: jax.vmap(lambda y: y @ y.T)(x.reshape(4, 16, 16)), 8 * 16**3),
    ],
)
def test_flops_are_those_of_textbooks(function, flops):
    found = count(function, MATRIX).flops
    # Factorisations come with a few operations on entries.
    assert flops <= found <= flops + 8 * 16 * 16


def test_factorisations_are_told_apart():
    found = count(lambda x: jnp.linalg.svd(x @ x.T)[1], MATRIX)
    assert 0 < found.factorising < found.flops


def test_loops_count_as_often_as_they_run():
    once = count(lambda x: x + x, MATRIX).flops
    many = count(lambda x: lax.fori_loop(0, 10, lambda i, y: y + x, x), MATRIX)
    assert 10 * once <= many.flops <= 10 * once + 100
    assert many.open_loops == 0


def test_loops_that_depend_on_values_count_one_step():
    found = count(
        lambda x: lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y + x, x), MATRIX
    )
    assert found.open_loops == 1
    assert found.flops < 2 * 64 * 16


def test_a_search_has_its_usual_number_of_passes():
    x = jnp.ones(1 << 18)
    found = count_operations(jax.make_jaxpr(lambda x: kth_magnitude(x, 9))(x))
    assert found.open_loops == 0
    # Six passes with seven bounds each compare, convert and add; a sample is sorted.
    assert 6 * 7 * 2 < found.flops / x.size < 6 * 7 * 5


def test_of_branches_the_longest_counts():
    def branches(x):
        return lax.cond(x[0, 0] > 0, lambda y: y, lambda y: y * y * y, x)

    assert count(branches, MATRIX).flops >= 2 * 64 * 16


def test_reductions_of_large_arrays_are_counted():
    found = count(lambda x: x / jnp.max(x) + jnp.sum(x[0]), MATRIX, large=64 * 16)
    assert found.reductions == 1
    assert found.reduced == 4


def test_a_footprint_allocates_nothing():
    huge = jax.ShapeDtypeStruct((1 << 20, 1 << 14), jnp.float32)
    found = footprint(lambda x: 2 * x[:, :2], huge)
    assert found.arguments == 1 << 36
    assert found.results == 1 << 23


def test_a_footprint_has_what_lapack_takes():
    square = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    found = footprint(lambda x: jnp.linalg.svd(x)[0], square)
    assert found.temporary >= 4 * 4 * 512**2


FUSED = """
%fused (a: f32[1,8,2], b: f32[2,16], c: f32[8,16], zero: f32[]) -> f32[8] {
  %a = f32[1,8,2]{2,1,0} parameter(0)
  %b = f32[2,16]{1,0} parameter(1)
  %c = f32[8,16]{1,0} parameter(2)
  %zero = f32[] parameter(3)
  %flat = f32[8,2]{1,0} bitcast(%a)
  %dot = f32[8,16]{1,0} dot(%flat, %b), lhs_contracting_dims={1}
  %product = f32[8,16]{1,0} multiply(%dot, %c)
  ROOT %sum = f32[8]{0} reduce(%product, %zero), dimensions={1}, to_apply=%add
}
%ynn_fusion.1 = f32[8]{0} fusion(%x, %y, %z, %w), kind=kCustom, calls=%fused
"""


def test_a_fused_matrix_product_has_all_arrays_in_between_at_once():
    found = costs._ynnpack_workspace(FUSED)
    assert found == 4 * (8 * 16 + 8 * 16 + 2 * 16)
    # Without one, they come one after the other.
    alone = FUSED.replace("dot(%flat, %b)", "broadcast(%zero)")
    assert costs._ynnpack_workspace(alone) == 4 * 8 * 16
