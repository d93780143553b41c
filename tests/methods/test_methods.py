"""Each method against a float64 version of the paper, and against known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxmerge as jm
from jaxmerge.methods import dropping
from jaxmerge.methods.dropping import keep_probabilities

# Three task vectors on one leaf, small enough to do by hand.
BASE = np.array([0.5, -1, 2, 0, 1.5, -0.5, 0.25, 3])
DELTAS = np.array(
    [
        [1, -2, 0.5, 0, 3, -0.1, 0.2, -4],
        [0.8, 1.5, -0.5, 0, -2, -0.3, 0.1, 0.4],
        [-0.2, 1, 0.7, 0, 2.5, 0.6, -0.3, 0.5],
    ]
)

RNG = np.random.default_rng(0)


def by_hand():
    tree = lambda x: {"kernel": jnp.asarray(x, jnp.float32).reshape(8, 1)}  # noqa: E731
    return tree(BASE), [tree(BASE + delta) for delta in DELTAS]


def delta_of(merged):
    return np.asarray(merged["kernel"]).ravel() - BASE


def random_case(seed=0, count=3):
    draw = np.random.default_rng(seed).standard_normal
    shapes = {"a": (12, 7), "b": (5,), "c": (3, 2, 4)}
    base = {k: draw(s).astype(np.float32) for k, s in shapes.items()}
    return base, [
        {k: (b + 0.1 * draw(b.shape)).astype(np.float32) for k, b in base.items()}
        for _ in range(count)
    ]


def assert_trees_close(got, want, atol=2e-6):
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    ("method", "options", "want"),
    [
        (jm.task_arithmetic, {}, [1.6, 0.5, 0.7, 0, 3.5, 0.2, 0, -3.1]),
        (jm.ties, {"density": 0.5}, [0.9, 1.25, 0.7, 0, 2.75, 0.6, 0, -4]),
        (
            jm.ties,
            {"density": 0.5, "scope": "model", "vote": "mass", "tie": "majority"},
            [0.9, 1.25, 0.6, 0, 2.75, 0.6, 0, -4],
        ),
        (
            jm.ties,
            {"density": 0.5, "scope": "model", "aggregate": "sum"},
            [1.8, 2.5, 1.2, 0, 5.5, 0.6, 0, -4],
        ),
        (
            jm.ties,
            {"density": 0.5, "scope": "model", "aggregate": "max"},
            [1, 1.5, 0.7, 0, 3, 0.6, 0, -4],
        ),
        (jm.magmax, {}, [1, -2, 0.7, 0, 3, 0.6, -0.3, -4]),
        (
            jm.breadcrumbs,
            {"density": 0.5, "gamma": 0.25},
            np.sum(
                DELTAS
                * [
                    [1, 1, 1, 0, 0, 0, 1, 0],
                    [1, 0, 1, 0, 0, 1, 0, 1],
                    [0, 0, 1, 0, 0, 1, 1, 1],
                ],
                0,
            ),
        ),
        (jm.model_stock, {"clip": False}, -2.629032 * DELTAS.mean(0)),
        (
            jm.model_stock,
            {"clip": False, "angle": "mean_angle"},
            -3.194322 * DELTAS.mean(0),
        ),
        (jm.model_stock, {}, np.zeros(8)),
    ],
)
def test_worked_examples(method, options, want):
    np.testing.assert_allclose(delta_of(method(*by_hand(), **options)), want, atol=3e-6)


def test_keep_probabilities_of_della_rise_with_rank():
    want = [0.521429, 0.564286, 0.478571, 0.35, 0.607143, 0.392857, 0.435714, 0.65]
    got = keep_probabilities(jnp.asarray(DELTAS[0], jnp.float32), 0.35, 0.65)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.mean(want) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "rows",
    [
        np.abs(RNG.normal(size=(5, 40))).astype(np.float32),
        RNG.integers(0, 9, (5, 40)).astype(np.float32),
        RNG.integers(0, 9, (2, 2**16 + 1)).astype(np.float32),
        RNG.integers(0, 9, (5, 40)).astype(np.float64),
    ],
)
def test_numpy_ranks_as_xla_does(rows, monkeypatch):
    monkeypatch.setattr(dropping, "_BLOCK", 100)
    expected = dropping.ROWS_IN_NUMPY["_ranks"].compiled(rows[:, None])[:, 0]
    ranks = np.empty(rows.shape, expected.dtype)
    dropping._ranks_with_numpy(rows, ranks)
    np.testing.assert_array_equal(ranks, expected)


def test_della_ranks_each_row_alone_and_a_single_entry_gets_the_middle():
    delta = jnp.array([[1.0, 20.0], [3.0, 10.0]])
    assert keep_probabilities(delta, 0.2, 0.6, rows=(1,)).tolist() == pytest.approx(
        np.array([[0.2, 0.6], [0.6, 0.2]], np.float32)
    )
    assert keep_probabilities(delta[:1], 0.2, 0.6, rows=(1,)).tolist() == [
        pytest.approx([0.4, 0.4])
    ]


@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("tie", ["drop", "positive", "negative", "majority"])
@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_ties_follows_the_paper(scope, tie, aggregate, density):
    base, models = random_case()
    # Votes that cancel exactly: halves are exact in float32.
    for name in base:
        base[name] = np.round(base[name] * 2) / 2
        models[0][name] = base[name] + np.float32(0.5)
        models[1][name] = base[name] - np.float32(0.5) * (np.abs(base[name]) > 0.5)
        models[2][name] = np.round(models[2][name] * 16) / 16
    options = {"density": density, "scope": scope, "tie": tie, "aggregate": aggregate}
    want = oracles.ties(base, models, **options)
    assert_trees_close(jm.ties(base, models, **options), want)


def test_ties_by_model_lets_large_leaves_crowd_out_small_ones():
    base = {"big": jnp.zeros(4), "small": jnp.zeros(4)}
    model = {"big": jnp.array([4.0, 3, 2, 1]), "small": jnp.array([0.4, 0.3, 0.2, 0.1])}
    by_leaf = jm.ties(base, [model], density=0.5)
    by_model = jm.ties(base, [model], density=0.5, scope="model", rounding="floor")
    assert [int((x != 0).sum()) for x in by_leaf.values()] == [2, 2]
    assert [int((x != 0).sum()) for x in by_model.values()] == [4, 0]


def test_votes_by_weighted_mass_mass_and_count_differ():
    base = {"w": jnp.zeros(2)}
    models = [{"w": jnp.array(d)} for d in ([1.0, 3.0], [-0.6, -1.0], [-0.6, -1.0])]
    options = {"density": 1.0, "weights": [3.0, 1.0, 1.0]}
    votes = {
        v: jm.ties(base, models, vote=v, **options)["w"]
        for v in ("weighted", "mass", "count")
    }
    np.testing.assert_allclose(votes["weighted"], [1.0, 3.0])
    np.testing.assert_allclose(votes["mass"], [-0.6, 3.0])
    np.testing.assert_allclose(votes["count"], [-0.6, -1.0])


def test_a_balanced_majority_is_negative_as_in_the_authors_code():
    base, models = {"w": jnp.zeros(1)}, [{"w": jnp.array([x])} for x in (1.0, -1.0)]
    for scope in ("leaf", "model"):
        merged = jm.ties(base, models, density=1.0, tie="majority", scope=scope)
        assert merged["w"].tolist() == [-1]


def test_majority_is_that_of_the_scope():
    base = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    up, down = {"a": jnp.array([1.0, 1.0])}, {"a": jnp.array([-1.0, 1.0])}
    models = [up | {"b": -jnp.ones(3)}, down | {"b": -jnp.ones(3)}]
    options = {"density": 1.0, "tie": "majority"}
    assert jm.ties(base, models, **options)["a"].tolist() == [1, 1]
    by_model = jm.ties(base, models, scope="model", **options)
    assert by_model["a"].tolist() == [-1, 1]


def test_the_largest_agreeing_entry_keeps_its_sign_under_negative_weights():
    base, models = {"w": jnp.zeros(1)}, [{"w": jnp.array([x])} for x in (2.0, 1.0)]
    options = {"weights": [-1.0, 1.0], "density": 1.0, "vote": "mass"}
    assert jm.ties(base, models, aggregate="max", **options)["w"].tolist() == [-2]
    assert jm.ties(base, models, aggregate="sum", **options)["w"].tolist() == [-1]


def test_negative_weights_forget_without_flipping_the_merge():
    base, models = {"w": jnp.zeros(1)}, [{"w": jnp.array([-2.0])}]
    merged = {
        d: float(jm.ties(base, models, weights=-1.0, density=1.0, divisor=d)["w"][0])
        for d in ("weights", "signed_weights", "count")
    }
    assert merged == {"weights": 2.0, "signed_weights": -2.0, "count": 2.0}


def test_rescaled_trim_keeps_the_l1_norm():
    base, (model, *_) = random_case()
    merged = jm.ties(base, [model], density=0.3, rescale="l1")
    for name, leaf in base.items():
        np.testing.assert_allclose(
            np.abs(merged[name] - leaf).sum(),
            np.abs(model[name] - leaf).sum(),
            rtol=1e-4,
        )


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
def test_breadcrumbs_follows_the_paper(density, gamma):
    base, models = random_case()
    want = oracles.breadcrumbs(base, models, density=density, gamma=gamma)
    assert_trees_close(jm.breadcrumbs(base, models, density=density, gamma=gamma), want)


def test_breadcrumbs_by_row_counts_per_output_in_either_layout():
    base, models = random_case()
    out_in = {"w": base["a"]}, [{"w": m["a"]} for m in models]
    in_out = {"w": base["a"].T}, [{"w": m["a"].T} for m in models]
    options = {"density": 0.4, "gamma": 0.1, "scope": "row"}
    a = jm.breadcrumbs(*out_in, matrices={"w": "oi"}, **options)["w"]
    b = jm.breadcrumbs(*in_out, matrices={"w": "io"}, **options)["w"]
    np.testing.assert_array_equal(a, b.T)
    row = jm.breadcrumbs(
        {"w": base["a"][3]}, [{"w": m["a"][3]} for m in models], density=0.4, gamma=0.1
    )
    np.testing.assert_allclose(a[3], row["w"], atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("angle", ["mean_cosine", "mean_angle"])
def test_model_stock_follows_the_paper(count, angle):
    base, models = random_case(count=count)
    shared = {
        k: 0.1 * np.random.default_rng(9).standard_normal(b.shape)
        for k, b in base.items()
    }
    models = [{k: (m[k] + shared[k]).astype(np.float32) for k in m} for m in models]
    want = oracles.model_stock(base, models, angle=angle)
    got = jm.model_stock(base, models, angle=angle, clip=False)
    assert_trees_close(got, want, atol=2e-5)


def test_model_stock_of_orthogonal_models_is_the_base_of_equal_ones_their_mean():
    base = {"w": jnp.zeros(2)}
    a, b = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}
    assert jm.model_stock(base, [a, b])["w"].tolist() == [0, 0]
    assert jm.model_stock(base, [a, a])["w"].tolist() == [1, 0]
    opposite = {"w": -a["w"]}
    for clip in (True, False):
        assert jm.model_stock(base, [a, opposite], clip=clip)["w"].tolist() == [0, 0]


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_follows_the_great_circle(t):
    base, (model, *_) = random_case()
    for name in base:
        got = jm.slerp([{"w": base[name]}, {"w": -2 * model[name][::-1]}], t=t)["w"]
        want = oracles.slerp(base[name], -2 * model[name][::-1], t)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_slerp_of_equal_norms_keeps_the_norm_and_of_unequal_ones_mixes():
    e0, e1 = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    assert np.linalg.norm(jm.slerp([{"w": e0}, {"w": e1}])["w"]) == pytest.approx(1)
    mixed = jm.slerp([{"w": e0}, {"w": 3 * e1}])["w"]
    assert np.linalg.norm(mixed) == pytest.approx(np.sqrt(5), rel=1e-6)


def test_slerp_refuses_three_models():
    with pytest.raises(ValueError, match="between two models, got 3"):
        jm.slerp([{"w": jnp.ones(2)}] * 3)


@pytest.mark.parametrize("rescale", ["inverse", "l1", None])
def test_dare_is_unbiased_only_if_divided_by_the_density(rescale):
    base, model = {"w": jnp.zeros(8)}, {"w": jnp.asarray(DELTAS[0], jnp.float32)}
    keys = jax.random.split(jax.random.key(1), 20_000)
    draw = lambda key: jm.dare(base, [model], key=key, rescale=rescale)["w"]  # noqa: E731
    draws = jax.jit(jax.vmap(draw))(keys)
    if rescale == "inverse":
        np.testing.assert_allclose(draws.mean(0), DELTAS[0], atol=0.1)
        np.testing.assert_allclose(draws.var(0), DELTAS[0] ** 2, rtol=0.05, atol=1e-6)
    elif rescale == "l1":
        norms = jnp.abs(draws).sum(1)
        assert set(np.round(np.unique(norms), 3)) <= {0, np.float32(10.8)}
        mean = np.asarray(draws.mean(0))
        np.testing.assert_allclose(mean[[2, 0, 7]], [0.792, 1.317, -3.17], atol=0.06)
    else:
        np.testing.assert_allclose(draws.mean(0), DELTAS[0] / 2, atol=0.05)


def test_della_is_unbiased():
    base, model = {"bias": jnp.zeros(8)}, {"bias": jnp.asarray(DELTAS[0], jnp.float32)}
    keys = jax.random.split(jax.random.key(1), 20_000)
    draw = lambda key: jm.della(base, [model], key=key)["bias"]  # noqa: E731
    np.testing.assert_allclose(
        jax.jit(jax.vmap(draw))(keys).mean(0), DELTAS[0], atol=0.06
    )


@pytest.mark.parametrize("density", [0.05, 0.98])
def test_della_refuses_probabilities_outside_the_unit_interval(density):
    base, models = by_hand()
    with pytest.raises(
        ValueError, match=r"leaves \(0, 1\]; choose a smaller half_width"
    ):
        jm.della(base, models, key=0, density=density)


def test_zero_weights_give_a_defined_mean():
    models = [{"w": jnp.ones(2)}, {"w": jnp.full(2, 3.0)}]
    assert jm.average(models, weights=[1, -1])["w"].tolist() == [-2, -2]


def test_options_by_model_and_by_path():
    base, models = random_case(count=2)
    merged = jm.task_arithmetic(
        base,
        models,
        weights={"a": [1.0, 0.0], ".*": [0.0, 0.5]},
        scale={"b": 2.0, ".*": 1.0},
    )
    np.testing.assert_allclose(merged["a"], models[0]["a"], atol=1e-6)
    np.testing.assert_allclose(merged["b"], models[1]["b"], atol=1e-6)
    np.testing.assert_allclose(merged["c"], (base["c"] + models[1]["c"]) / 2, atol=1e-6)


def test_coefficients_can_be_mapped_over_and_differentiated():
    base, models = random_case()
    scales = jnp.linspace(0, 1, 5)
    for method in (jm.task_arithmetic, jm.ties, jm.magmax, jm.breadcrumbs):
        swept = jax.vmap(lambda s: method(base, models, scale=s))(scales)  # noqa: B023
        one = method(base, models, scale=0.25)
        assert_trees_close({k: v[1] for k, v in swept.items()}, one)

    def loss(weights, models):
        merged = jm.task_arithmetic(base, models, weights=weights)
        return sum(jnp.sum(leaf**2) for leaf in merged.values())

    weights = jnp.array([0.1, 0.2, 0.3])
    slope = jax.grad(loss)(weights, models)
    step = jnp.array([1e-2, 0, 0])
    numeric = (loss(weights + step, models) - loss(weights - step, models)) / 2e-2
    np.testing.assert_allclose(slope[0], numeric, rtol=1e-2)
    through_ties = jax.grad(
        lambda ms: sum(jnp.sum(x) for x in jm.ties(base, ms, density=0.5).values())
    )(models)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(through_ties))
    assert any(x.any() for x in jax.tree.leaves(through_ties))


def test_gradients_are_finite_where_norms_vanish_or_angles_do():
    x = {"w": jnp.array([1.0, 2.0])}
    zero = {"w": jnp.zeros(2)}
    for merge, models in (
        (jm.slerp, [x, x]),
        (jm.slerp, [x, zero]),
        (lambda ms: jm.model_stock(x, ms), [x, {"w": jnp.array([3.0, 1.0])}]),
    ):
        slope = jax.grad(lambda ms, merge=merge: merge(ms)["w"].sum())(models)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, ms: jm.dare(b, ms, key=0, vote="mass"), "vote has no effect"),
        (lambda b, ms: jm.dare(b, ms, key=0, elect="no"), "elect is 'no'"),
        (lambda b, ms: jm.dare(b, ms, key=1.5), "key is 1.5; give a jax.random.key"),
        (lambda b, ms: jm.dare(b, ms, key=-1), r"key is -1.*in \[0, 2\*\*32\)"),
        (lambda b, ms: jm.dare(b, ms, key=None), "key is None"),
        (
            lambda b, ms: jm.breadcrumbs(b, ms, aggregate="max"),
            "aggregate without elect is 'max'",
        ),
        (
            lambda b, ms: jm.model_stock(b, ms, matrices={".*": "o"}),
            "matrices has no effect without scope='row'",
        ),
        (
            lambda b, ms: jm.ties(b, ms, scope="model", stack_axes=1),
            "stack_axes has no effect without scope='leaf'",
        ),
        (
            lambda b, ms: jm.ties(b, ms, scope="model", density={".*": 0.2}),
            "rules by leaf, but scope='model'",
        ),
        (lambda b, ms: jm.ties(b, ms, stack_axes=0.5), "not a whole number"),
        (lambda b, ms: jm.ties(b, ms, weights=None), "weights of leaf 'a' is None"),
        (lambda b, ms: jm.ties(b, ms, scale=float("nan")), "is nan, not finite"),
        (lambda b, ms: jm.ties(b, ms, scale={"(": 1.0}), "no valid regular expression"),
        (lambda b, ms: jm.ties(b, ms[0]), "models is a dict; give a list of trees"),
        (lambda b, ms: jm.ties("run", ["x"]), "base is a str, not an array; load"),
        (lambda b, ms: jm.ties(None, ms), "needs a base"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_case(count=2))


def test_seeds_of_all_kinds_agree():
    base, models = random_case(count=2)
    want = jm.dare(base, models, key=3)
    for key in (np.int64(3), jnp.int32(3), jax.random.key(3), jax.random.PRNGKey(3)):
        assert_trees_close(jm.dare(base, models, key=key), want, atol=0)


def test_draws_do_not_depend_on_the_float_width():
    base, models = random_case(count=1)
    kept = {k: jm.dare(base, models, key=3)[k] != b for k, b in base.items()}
    with jax.enable_x64(True):
        wide = jm.dare({k: np.float64(b) for k, b in base.items()}, models, key=3)
        for k, b in base.items():
            np.testing.assert_array_equal(wide[k] != b, kept[k])


def test_a_mean_without_election_divides_by_all_weights():
    base, models = random_case(count=2)
    options = {"density": 1.0, "gamma": 0.0, "weights": [1.0, 3.0]}
    mean = jm.breadcrumbs(base, models, aggregate="mean", **options)
    assert_trees_close(mean, jm.average(models, weights=[1.0, 3.0]))


def test_ties_by_model_takes_models_from_other_devices(mesh):
    base, models = random_case(count=2)
    want = jm.ties(base, models, scope="model")
    models[0] = jax.device_put(models[0], jax.devices()[3])
    assert_trees_close(jm.ties(jm.place(base, mesh), models, scope="model"), want)


def test_laws_of_sign_scale_and_partition():
    base, models = random_case()
    zero = {k: np.zeros_like(b) for k, b in base.items()}
    deltas = [{k: m[k] - base[k] for k in base} for m in models]
    flip = [{k: -d[k] for k in d} for d in deltas]
    grown = [{k: 4 * d[k] for k in d} for d in deltas]
    for method in (
        jm.task_arithmetic,
        jm.ties,
        jm.breadcrumbs,
        jm.magmax,
        jm.model_stock,
    ):
        merged = method(zero, deltas)
        assert_trees_close(method(zero, flip), {k: -x for k, x in merged.items()})
        assert_trees_close(method(zero, grown), {k: 4 * x for k, x in merged.items()})
    # Outliers, crumbs and the rest make up a task vector.
    options = {"density": 0.4, "gamma": 0.1}
    kept = jm.breadcrumbs(zero, deltas[:1], **options)["a"] != 0
    assert int(kept.sum()) == int(0.4 * kept.size)
    top = np.sort(np.abs(deltas[0]["a"]).ravel())[-int(0.1 * kept.size) :]
    assert not np.isin(np.abs(deltas[0]["a"])[kept], top).any()


def test_float64_leaves_are_merged_in_float64():
    with jax.enable_x64(True):
        base, model = {"w": jnp.ones(2)}, {"w": jnp.full(2, 1 + 1e-12)}
        merged = jm.task_arithmetic(base, [model], scale=jnp.float64(3.0))["w"]
        np.testing.assert_allclose(merged - 1, 3e-12, rtol=1e-3)


def test_bfloat16_models_merge_in_float32():
    base = {"w": jnp.ones(8, jnp.bfloat16)}
    model = {"w": jnp.full(8, 1.001, jnp.float32)}
    merged = jm.task_arithmetic(base, [model], scale=100.0)["w"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(merged.astype(jnp.float32), 1.1, rtol=1e-2)
