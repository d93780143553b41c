"""FW-Merging: a plain version in NumPy, known optima, and what convergence promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge.tree import named_leaves

SHAPES = {"a": (4, 3), "b": (5,)}


def tree(rng, scale=1.0):
    return {n: np.float32(scale * rng.normal(size=s)) for n, s in SHAPES.items()}


@pytest.fixture
def pool():
    rng = np.random.default_rng(0)
    return tree(rng), [tree(rng) for _ in range(3)]


def distance(params, target):
    """Half the squared distance from a target, whose gradient is the difference."""
    return sum(jnp.sum((params[n] - target[n]) ** 2) for n in params) / 2


def oracle(start, models, targets, steps, size, scope, alignment):
    """Frank-Wolfe on the mean of `distance`, in float64, as one would write it down."""
    point = {n: np.float64(x) for n, x in start.items()}
    pool = [{n: np.float64(x) for n, x in m.items()} for m in [*models, start]]
    for k in range(steps):
        slope = {n: np.mean([point[n] - t[n] for t in targets], axis=0) for n in point}

        def score(model, n, slope=slope, point=point):
            if alignment == "inner":
                return np.vdot(slope[n], model[n])
            lengths = np.linalg.norm(slope[n]) * np.linalg.norm(model[n])
            return np.vdot(slope[n], model[n]) / lengths

        groups = [list(point)] if scope == "model" else [[n] for n in point]
        moved = {}
        for names in groups:
            best = np.argmin([sum(score(m, n) for n in names) for m in pool])
            moved |= {n: pool[best][n] for n in names}
        share = 2 / (k + 2) * size
        point = {n: (1 - share) * point[n] + share * moved[n] for n in point}
    return point


@pytest.mark.parametrize("scope", ["model", "leaf"])
@pytest.mark.parametrize("alignment", ["inner", "cosine"])
def test_agrees_with_the_plain_version(pool, scope, alignment):
    start, models = pool
    rng = np.random.default_rng(1)
    targets = [tree(rng, 0.5) for _ in range(2)]
    how = {"scope": scope, "alignment": alignment}
    merged = jaxmerge.fw_merge(
        start, models, distance, targets, steps=6, step_size=0.7, **how
    )
    expected = oracle(start, models, targets, 6, 0.7, scope, alignment)
    for name, leaf in merged.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["model", "leaf"])
def test_a_model_at_the_optimum_is_chosen_and_neared_by_the_steps(pool, scope):
    start, models = pool
    merged, info = jaxmerge.fw_merge(
        start, models, distance, [models[1]], steps=3, scope=scope, info=True
    )
    for chosen in info.chosen.values():
        assert chosen.tolist() == [1, 1, 1]
    # gamma: 0.1, 0.1 * 2 / 3, 0.1 / 2
    left = (1 - 0.1) * (1 - 0.2 / 3) * (1 - 0.05)
    for name, leaf in merged.items():
        expected = models[1][name] + left * (start[name] - models[1][name])
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)
    assert (np.diff(info.losses) < 0).all()


def test_a_full_first_step_arrives_and_then_nothing_moves(pool):
    start, models = pool
    merged, info = jaxmerge.fw_merge(
        start, models, distance, [models[2]], steps=3, step_size=1.0, info=True
    )
    for name, leaf in merged.items():
        np.testing.assert_allclose(leaf, models[2][name], rtol=1e-6, atol=1e-6)
    assert info.losses[1] < 1e-10


def test_it_nears_the_best_mixture_as_fast_as_the_theorem_says(pool):
    start, models = pool
    best = {n: (models[0][n] + models[1][n]) / 2 for n in start}
    merged, info = jaxmerge.fw_merge(
        start, models, distance, [best], steps=60, step_size=1.0, info=True
    )
    ends = [start, *models]
    diameter = max(float(2 * distance(a, b)) for a in ends for b in ends)
    # The curvature of the distance is its diameter squared: 2 C / (k + 2).
    bound = 2 * diameter / (np.arange(60) + 2)
    assert (info.losses[1:] <= bound[1:]).all()
    assert (info.gaps >= info.losses - 1e-6).all()  # The optimum is 0.
    assert distance(merged, best) < 0.02 * info.losses[0]


def test_models_that_do_not_help_change_nothing(pool):
    start, models = pool
    away = [{n: 2 * x - models[0][n] for n, x in start.items()}] * 4
    alone, few = jaxmerge.fw_merge(
        start, models[:1], distance, [models[0]], steps=4, info=True
    )
    among, many = jaxmerge.fw_merge(
        start, [*models[:1], *away], distance, [models[0]], steps=4, info=True
    )
    for name in SHAPES:
        np.testing.assert_array_equal(alone[name], among[name])
        assert few.chosen[name].tolist() == many.chosen[name].tolist() == [0] * 4


def test_the_start_is_in_the_pool(pool):
    start, models = pool
    _, info = jaxmerge.fw_merge(start, models, distance, [start], steps=1, info=True)
    assert info.chosen["a"].tolist() == [-1]  # At the optimum, nothing moves.
    away = {n: 3 * start[n] - 2 * models[0][n] for n in start}
    _, info = jaxmerge.fw_merge(start, models[:1], distance, [away], steps=1, info=True)
    assert info.chosen["a"].tolist() == [1]


def test_the_loss_is_traced_once_for_all_steps_and_batches(pool):
    start, models = pool
    traces = []

    def loss(params, batch):
        traces.append(batch)
        return jnp.mean((params["a"].sum() - batch) ** 2)

    batches = [np.float32([1, 2]), np.float32([3, 4])]
    jaxmerge.fw_merge(start, models, loss, batches, steps=3)
    jaxmerge.fw_merge(models[0], models, loss, batches, steps=2)
    # A first gradient, and one that is added to it.
    assert len(traces) == 2


def test_leaves_without_gradient_and_without_floats_stay():
    start = {"w": jnp.ones(2), "frozen": jnp.ones(3), "steps": jnp.array([3])}
    model = {"w": jnp.zeros(2), "frozen": jnp.zeros(3), "steps": jnp.array([9])}

    def loss(params, batch):
        return jnp.sum(params["w"]) * batch + 0 * params["steps"].sum()

    merged = jaxmerge.fw_merge(start, [model], loss, [1.0], scope="leaf", steps=1)
    np.testing.assert_allclose(merged["w"], 0.9)
    np.testing.assert_array_equal(merged["frozen"], 1)
    np.testing.assert_array_equal(merged["steps"], [3])
    merged = jaxmerge.fw_merge(start, [model], loss, [1.0], steps=1)
    np.testing.assert_allclose(merged["frozen"], 0.9)


def test_small_steps_of_bfloat16_add_up(pool):
    start = {"w": jnp.ones(4, jnp.bfloat16)}
    model = {"w": jnp.full(4, 1.25, jnp.bfloat16)}
    seen = []

    def loss(params, batch):
        seen.append(params["w"].dtype)
        return jnp.sum(jnp.square(params["w"] - batch))

    merged = jaxmerge.fw_merge(
        start, [model], loss, [jnp.bfloat16(1.25)], steps=10, step_size=0.01
    )
    assert merged["w"].dtype == jnp.bfloat16
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    share = 1 - np.prod([1 - 0.02 / (k + 2) for k in range(10)])
    np.testing.assert_allclose(np.float32(merged["w"]), 1 + 0.25 * share, rtol=2**-8)
    # Each step alone is less than rounding would keep.
    assert 0.25 * 0.01 < 2**-8 < 0.25 * share


def test_sharded_models(mesh, pool):
    rng = np.random.default_rng(2)
    start, *models = ({"w": np.float32(rng.normal(size=(8, 16)))} for _ in range(3))
    target = NamedSharding(mesh, P("data", "model"))

    def loss(params, batch):
        return jnp.mean(jnp.square(params["w"] - batch))

    goal = models[0]["w"] / 2 + models[1]["w"] / 2
    whole = jaxmerge.fw_merge(start, models, loss, [goal], steps=3)
    placed = jax.device_put(start, target)
    merged = jaxmerge.fw_merge(
        placed, models, loss, [jax.device_put(goal, target)], steps=3
    )
    assert merged["w"].sharding.is_equivalent_to(target, 2)
    np.testing.assert_allclose(merged["w"], whole["w"], rtol=1e-6, atol=1e-6)


def test_no_steps(pool):
    start, models = pool
    merged, info = jaxmerge.fw_merge(
        start, models, distance, [start], steps=0, info=True
    )
    assert info.losses.shape == info.gaps.shape == info.chosen["a"].shape == (0,)
    for name, leaf in named_leaves(merged).items():
        np.testing.assert_array_equal(leaf, start[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": []}, "needs at least one model"),
        ({"models": [{"a": np.ones(2)}]}, r"models\[0\] "),
        ({"batches": []}, "batches must be a list of at least one"),
        ({"steps": -1}, "steps is -1"),
        ({"step_size": 1.5}, r"step_size is 1.5; it must be in \(0, 1\]"),
        ({"scope": "layer"}, "scope is 'layer'"),
        ({"alignment": "dot"}, "alignment is 'dot'"),
        ({"loss": lambda params, batch: params["b"]}, r"array of shape \(5,\)"),
        (
            {"loss": lambda params, batch: jnp.log(-1 - params["b"].sum() ** 2)},
            r"the loss on batches\[0\] is nan at step 0",
        ),
        (
            {"loss": lambda params, batch: jnp.sqrt(0 * params["b"].sum())},
            "leaf 'b' has a gradient at step 0, .* not finite",
        ),
    ],
)
def test_errors(pool, options, message):
    start, models = pool
    given = {"models": models, "loss": distance, "batches": [start]} | options
    with pytest.raises(ValueError, match=message) as caught:
        jaxmerge.fw_merge(start, **given)
    assert str(caught.value).startswith("fw_merge: ")
