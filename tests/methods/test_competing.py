"""PCB-Merging and SCE against float64 versions and known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_methods import DELTAS, assert_trees_close, by_hand, delta_of, random_case

import jaxmerge as jm


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_pcb_of_a_worked_example(scope):
    merged = jm.pcb(*by_hand(), density=0.5, scope=scope)
    want = [0.845708, 1.344227, 0.7, 0, 2, 0, 0, -3]
    np.testing.assert_allclose(delta_of(merged), want, atol=3e-6)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (
            {"density": 1.0},
            [0.960743, 1.232997, 0.543734, 0, 2.890665, 0.6, 0.180371, -4],
        ),
        (
            {"density": 0.5, "mask_values": True},
            [0, 1.23041, 0, 0, 2.89726, 0, 0, -4],
        ),
        (
            {"density": 0.5},
            [0.963796, 1.23041, 0.541096, 0, 2.89726, 0.6, 0.181898, -4],
        ),
    ],
)
def test_sce_of_a_worked_example(options, want):
    base = {"w": jnp.zeros(8)}  # Two votes cancel exactly.
    models = [{"w": jnp.asarray(delta, jnp.float32)} for delta in DELTAS]
    np.testing.assert_allclose(jm.sce(base, models, **options)["w"], want, atol=3e-6)


@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("agreement", ["raw", "normalized"])
@pytest.mark.parametrize("density", [0.3, 0.8, 1.0])
def test_pcb_follows_the_authors_code(scope, agreement, density):
    base, models = random_case()
    options = {"density": density, "scope": scope, "agreement": agreement}
    want = oracles.pcb(base, models, **options)
    assert_trees_close(jm.pcb(base, models, **options), want, atol=3e-6)


@pytest.mark.parametrize("mask_values", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_sce_follows_the_paper(mask_values, density):
    base, models = random_case()
    options = {"density": density, "mask_values": mask_values}
    want = oracles.sce(base, models, **options)
    assert_trees_close(jm.sce(base, models, **options), want)


def test_pcb_of_many_models_does_not_overflow():
    base, models = random_case(count=2)
    want = oracles.pcb(base, models * 50, density=0.3, scope="model")
    assert_trees_close(jm.pcb(base, models * 50, density=0.3), want, atol=1e-5)


def test_pcb_of_one_model_keeps_the_best_entries_but_for_the_cut():
    base, (model, *_) = random_case()
    merged = jm.pcb(base, [model], density=0.5)
    deltas = oracles.deltas_of(base, [model, merged])
    delta, got = (oracles.flatten(d) for d in deltas)
    kept = np.abs(delta) > np.sort(np.abs(delta))[delta.size // 2]
    largest = np.abs(delta) >= np.sort(np.abs(delta))[-2]
    np.testing.assert_allclose(got[kept & ~largest], delta[kept & ~largest], atol=1e-6)
    np.testing.assert_allclose(got[~kept], 0, atol=1e-6)
    assert len(set(np.abs(got[largest]).round(5))) == 1


def test_pcb_where_scores_are_all_equal():
    base = {"w": jnp.zeros(1)}
    up, down = ({"w": jnp.array([x])} for x in (3.0, -1.0))
    for scope in ("leaf", "model"):
        assert jm.pcb(base, [up, up], scope=scope)["w"].tolist() == [3]
        assert jm.pcb(base, [up, down], scope=scope)["w"].tolist() == [3]
        assert jm.pcb(base, [up, base], scope=scope)["w"].tolist() == [3]


def test_an_untouched_model_has_no_say_in_sce():
    base, models = random_case(count=2)
    for density in (0.3, 1.0):
        # Variances differ, so that other entries may be selected.
        merged = jm.sce(base, [models[0], base], density=density)
        assert_trees_close(merged, models[0])


def test_sce_of_equal_models_is_that_model():
    base, (model, *_) = random_case()
    for count in (1, 3):
        for density in (0.1, 1.0):
            merged = jm.sce(base, [model] * count, density=density)
            assert_trees_close(merged, model)
        # No entry differs, so none is selected.
        merged = jm.sce(base, [model] * count, density=0.1, mask_values=True)
        assert_trees_close(merged, base, atol=0)


def test_sce_weighs_small_updates_as_it_does_large_ones():
    base, models = random_case()
    zero = {k: np.zeros_like(b) for k, b in base.items()}
    deltas = [{k: m[k] - base[k] for k in base} for m in models]
    tiny = [{k: 1e-12 * d[k] for k in d} for d in deltas]
    want = jm.sce(zero, deltas, density=0.3)
    got = {k: 1e12 * x for k, x in jm.sce(zero, tiny, density=0.3).items()}
    assert_trees_close(got, want)


@pytest.mark.parametrize("method", [jm.pcb, jm.sce])
def test_disjoint_updates_add_up(method):
    base = {"w": jnp.zeros(8)}
    deltas = np.zeros((2, 8), np.float32)
    deltas[0, :4], deltas[1, 4:] = [3, -2, 1, 3], [5, 4, 5, -2]
    models = [{"w": jnp.asarray(d)} for d in deltas]
    merged = np.asarray(method(base, models, density=1.0)["w"])
    # PCB gives nothing to the entries with the lowest score.
    np.testing.assert_allclose(merged[[0, 3, 4, 6]], [3, 3, 5, 5], atol=1e-6)


@pytest.mark.parametrize("method", [jm.pcb, jm.sce])
def test_signs_of_all_updates_flip_the_merge(method):
    zero = {"w": jnp.zeros(6)}  # No votes cancel.
    plain = [{"w": jnp.asarray(delta[:6], jnp.float32)} for delta in DELTAS]
    flipped = [{"w": -model["w"]} for model in plain]
    a, b = (method(zero, models, density=0.5)["w"] for models in (plain, flipped))
    np.testing.assert_allclose(a, -b, atol=1e-6)


def test_the_density_of_sce_can_be_mapped_over():
    base, models = random_case()
    densities = jnp.array([0.2, 1.0])
    swept = jax.vmap(lambda d: jm.sce(base, models, density=d))(densities)
    for i, density in enumerate((0.2, 1.0)):
        one = jm.sce(base, models, density=density)
        assert_trees_close({k: v[i] for k, v in swept.items()}, one)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, ms: jm.pcb(b, ms, density={".*": 0.1}), "must be one number"),
        (lambda b, ms: jm.pcb(b, ms, density=0.0), r"must be in \(0, 1\]"),
        (lambda b, ms: jm.pcb(b, ms, agreement="x"), "agreement is 'x'"),
        (lambda b, ms: jm.pcb(b, ms, stack_axes=1), "without scope='leaf'"),
        (lambda b, ms: jm.sce(b, ms, density=1.5), r"must be in \(0, 1\]"),
        (lambda b, ms: jm.sce(b, ms, mask_values=None), "mask_values is None"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_case(count=2))
