"""RAM, Localize-and-Stitch and trust regions against float64 versions."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_methods import DELTAS, assert_trees_close, by_hand, delta_of, random_case

import jaxmerge as jm

SUM = DELTAS.sum(0)
FAMILY = [
    lambda base, models: jm.ram(base, models),
    lambda base, models: jm.localize_and_stitch(base, models, density=1.0),
    lambda base, models: jm.tatr(base, models),
]
every_method = pytest.mark.parametrize(
    "merge", FAMILY, ids=["ram", "localize_and_stitch", "tatr"]
)


def sparse_case(seed=0, count=3):
    base, models = random_case(seed, count)
    draw = np.random.default_rng(seed + 1).random
    return base, [
        {k: np.where(draw(b.shape) < 0.3, m[k], b) for k, b in base.items()}
        for m in models
    ]


def leaf(*values):
    return {"w": jnp.array(values, jnp.float32)}


@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("method", [jm.ram, jm.localize_and_stitch])
def test_the_mean_of_what_has_changed_in_a_worked_example(method, scope):
    options = {"scope": scope} | ({} if method is jm.ram else {"density": 1.0})
    want = [0.533333, 0.166667, 0.233333, 0, 1.166667, 0.066667, 0, -1.033333]
    merged = method(*by_hand(), **options)
    np.testing.assert_allclose(delta_of(merged), want, atol=3e-6)


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_tatr_of_a_worked_example(scope):
    merged = jm.tatr(*by_hand(), quantile=0.75, scope=scope)
    want = SUM * [1, 0, 1, 1, 0, 1, 1, 1]
    np.testing.assert_allclose(delta_of(merged), want, atol=3e-6)


@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("boost", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("limit", [0.2, 5.0])
def test_ram_follows_the_paper(scope, boost, limit):
    base, models = sparse_case()
    options = {"epsilon": 0.02, "boost": boost, "limit": limit, "scope": scope}
    want = oracles.ram(base, models, **options)
    assert_trees_close(jm.ram(base, models, **options), want)


@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_localize_and_stitch_follows_the_paper(scope, density):
    base, models = random_case()
    options = {"density": density, "scope": scope}
    want = oracles.localize_and_stitch(base, models, **options)
    assert_trees_close(jm.localize_and_stitch(base, models, **options), want)


@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.99, 1.0])
def test_tatr_follows_the_paper(scope, quantile):
    base, models = random_case()
    options = {"quantile": quantile, "scope": scope}
    want = oracles.tatr(base, models, **options)
    assert_trees_close(jm.tatr(base, models, **options), want)


def test_tatr_avoids_what_other_tasks_are_sensitive_to():
    base, models = random_case()
    draw = np.random.default_rng(5).standard_normal
    known = [{k: draw(b.shape) for k, b in base.items()} for _ in models]
    flat = np.abs([oracles.flatten(tree) for tree in known])
    want = oracles.tatr(base, models, quantile=0.6, scope="model", sensitivity=flat)
    merged = jm.tatr(base, models, sensitivity=known, quantile=0.6)
    assert_trees_close(merged, want)

    # The first task is sensitive where the second one moves, but not to itself.
    base, models = leaf(0, 0), [leaf(1, 1), leaf(0, 1)]
    known = [leaf(9, 9), leaf(0, 0)]
    merged = jm.tatr(base, models, sensitivity=known, quantile=0.5)
    assert merged["w"].tolist() == [1, 0]


def test_tatr_of_stacked_layers_has_sensitivities_stacked_too():
    base, models = random_case()
    draw = np.random.default_rng(5).random
    known = [{"a": draw((12, 7))} for _ in models]
    base, models = {"a": base["a"]}, [{"a": m["a"]} for m in models]
    options = {"quantile": 0.6, "scope": "leaf"}
    stacked = jm.tatr(base, models, sensitivity=known, stack_axes=1, **options)["a"]
    row = lambda tree: {"a": tree["a"][3]}  # noqa: E731
    alone = jm.tatr(
        row(base), list(map(row, models)), sensitivity=list(map(row, known)), **options
    )
    np.testing.assert_allclose(stacked[3], alone["a"], atol=1e-6)


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_tatr_keeps_all_that_nothing_conflicts_with(scope):
    base, models = sparse_case(count=2)
    one = jm.tatr(base, models[:1], quantile=0.0, scope=scope)
    assert_trees_close(one, models[0])
    deltas = oracles.deltas_of(base, models)
    merged = jm.tatr(base, models, quantile=0.0, scope=scope)
    both = {k: (deltas[0][k] != 0) & (deltas[1][k] != 0) for k in base}
    want = {k: np.where(both[k], 0, deltas[0][k] + deltas[1][k]) for k in base}
    assert_trees_close(merged, oracles.apply(base, want))


@every_method
def test_known_answers(merge):
    base, models = sparse_case(count=2)
    # One model.
    assert_trees_close(merge(base, models[:1]), models[0])
    # Disjoint updates add up.
    a = {k: np.where(models[1][k] == b, models[0][k], b) for k, b in base.items()}
    moved = oracles.deltas_of(base, [a, models[1]])
    want = {k: moved[0][k] + moved[1][k] for k in base}
    assert_trees_close(merge(base, [a, models[1]]), oracles.apply(base, want))
    # An untouched model changes nothing.
    assert_trees_close(merge(base, [models[0], base]), models[0])


def test_equal_models_are_kept_and_signs_flip():
    base, (model, *_) = random_case()
    for merge in FAMILY[:2]:
        assert_trees_close(merge(base, [model] * 3), model)
    zero = leaf(*[0] * 8)
    plain = [leaf(*delta) for delta in DELTAS]
    flipped = [leaf(*-delta) for delta in DELTAS]
    for merge in FAMILY:
        np.testing.assert_allclose(
            merge(zero, flipped)["w"], -merge(zero, plain)["w"], atol=1e-6
        )


def test_the_boost_of_ram_is_for_what_one_model_alone_has_changed():
    base = leaf(0, 0, 0, 0)
    models = [leaf(1, 1, 0, 1), leaf(1, 0, 1, 0)]
    # The first changes one entry with the other, and two alone; the second one each.
    merged = jm.ram(base, models, boost=1.0, limit=0.75)["w"]
    np.testing.assert_allclose(merged, [1, 1.5, 1.75, 1.5])
    # RAM+ of the paper: a limit on the gain of 2 %.
    merged = jm.ram(base, models, boost=0.1)["w"]
    np.testing.assert_allclose(merged, [1, 1.02, 1.02, 1.02])


def test_the_whole_model_is_counted_by_model():
    base = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    one = {"a": jnp.ones(2), "b": jnp.ones(2)}
    two = {"a": jnp.ones(2), "b": jnp.zeros(2)}
    options = {"boost": 1.0, "limit": 9.0}
    assert jm.ram(base, [one, two], **options)["b"].tolist() == [1, 1]
    by_model = jm.ram(base, [one, two], scope="model", **options)
    assert by_model["b"].tolist() == [2, 2]

    large = {"a": jnp.array([4.0, 3.0]), "b": jnp.array([0.2, 0.1])}
    by_leaf = jm.localize_and_stitch(base, [large], density=0.5, scope="leaf")
    assert [int((x != 0).sum()) for x in by_leaf.values()] == [1, 1]
    by_model = jm.localize_and_stitch(base, [large], density=0.5)
    assert [int((x != 0).sum()) for x in by_model.values()] == [2, 0]


@pytest.mark.parametrize("method", [jm.localize_and_stitch, jm.pcb, jm.ram, jm.tatr])
def test_a_model_without_floats_can_be_ranked(method):
    base = {"steps": jnp.array(3), "none": jnp.zeros((0, 2))}
    merged = method(base, [base, base], scope="model")
    assert merged["steps"] == 3
    assert method({"steps": 3}, [{"steps": 4}], scope="model") == {"steps": 3}


@pytest.mark.parametrize("density", [0.1, 0.25, 0.77])
def test_masks_have_the_density_asked_for(density):
    base, (model, *_) = random_case()
    merged = jm.localize_and_stitch(base, [model], density=density)
    (delta,) = oracles.deltas_of(base, [merged])
    flat = oracles.flatten(delta)
    assert (np.abs(flat) > 1e-7).sum() == int(density * flat.size)


def test_tatr_takes_sensitivities_from_other_devices(mesh):
    base, models = random_case(count=2)
    draw = np.random.default_rng(5).random
    known = [{k: draw(b.shape) for k, b in base.items()} for _ in models]
    want = jm.tatr(base, models, sensitivity=known)
    known[0] = jax.device_put(known[0], jax.devices()[3])
    got = jm.tatr(jm.place(base, mesh), models, sensitivity=known)
    assert_trees_close(got, want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, ms: jm.ram(b, ms, epsilon=-1.0), r"must be in \[0, inf\)"),
        (lambda b, ms: jm.ram(b, ms, scope="model", stack_axes=1), "scope='leaf'"),
        (
            lambda b, ms: jm.localize_and_stitch(b, ms, density={".*": 0.1}),
            "^localize_and_stitch: density has rules by leaf, but scope='model'",
        ),
        (lambda b, ms: jm.localize_and_stitch(b, ms, scope="row"), "scope is 'row'"),
        (lambda b, ms: jm.tatr(b, ms, quantile=2.0), r"must be in \[0, 1\]"),
        (lambda b, ms: jm.tatr(b, ms, quantile={".*": 0.5}), "must be one number"),
        (lambda b, ms: jm.tatr(b, ms, stack_axes=1), "scope='leaf'"),
        (lambda b, ms: jm.tatr(b, ms, sensitivity=ms[:1]), "a list of 2 trees"),
        (lambda b, ms: jm.tatr(b, ms, sensitivity="fisher"), "a list of 2 trees"),
        (
            lambda b, ms: jm.tatr(b, ms, sensitivity=[b, {"a": b["a"]}]),
            r"^tatr: .*only base has leaf 'b', sensitivity\[1\] has not",
        ),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_case(count=2))
