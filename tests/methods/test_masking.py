"""TALL-masks and Consensus against float64 versions of the paper and known answers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge import recipes

# Three task vectors on one leaf, small enough to do by hand.
BASE = np.array([0.5, -1, 2, 0, 1.5, -0.5, 0.25, 3])
DELTAS = np.array(
    [
        [1, -2, 0.5, 0, 3, -0.1, 0.2, -4],
        [0.8, 1.5, -0.5, 0, -2, -0.3, 0.1, 0.4],
        [-0.2, 1, 0.7, 0, 2.5, 0.6, -0.3, 0.5],
    ]
)
SUM = np.array([1.6, 0.5, 0.7, 0, 3.5, 0.2, 0, -3.1])
SPECS = {"a": P("data", None), "b": P(), "c": P(None, "model", "data")}


def by_hand():
    tree = lambda x: {"w": np.float32(x)}  # noqa: E731
    return tree(BASE), [tree(BASE + delta) for delta in DELTAS]


def random_case(count=3, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    shapes = {"a": (12, 8), "b": (5,), "c": (3, 2, 4)}
    base = {k: np.float32(draw(s)) for k, s in shapes.items()}
    models = [
        {k: np.float32(b + 0.1 * draw(b.shape)) for k, b in base.items()}
        for _ in range(count)
    ]
    return base, models


def gaussian_case(count, size, seed=0):
    draws = np.random.default_rng(seed).standard_normal((count, size))
    return {"w": np.zeros(size, np.float32)}, [{"w": np.float32(d)} for d in draws]


def assert_masks(masks, want):
    for mask, expected in zip(masks, want, strict=True):
        assert mask.keys() == expected.keys()
        for name in expected:
            assert mask[name].dtype == bool
            np.testing.assert_array_equal(mask[name], expected[name])


def assert_close(got, want, atol=1e-6):
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=atol)


def test_worked_examples():
    base, models = by_hand()
    masks = np.array([mask["w"] for mask in jm.tall_masks(base, models)])
    rows = ["".join(str(int(x)) for x in mask) for mask in masks]
    assert rows == ["11101011", "11100110", "01101110"]
    np.testing.assert_array_equal(masks.sum(0), [2, 3, 3, 0, 2, 2, 3, 1])
    kept = [1, 1, 1, 1, 1, 1, 1, 0]
    merged = jm.consensus(base, models)["w"]
    np.testing.assert_allclose(merged - BASE, SUM * kept, atol=1e-6)


def test_worked_examples_at_threshold_one():
    base, models = by_hand()
    masks = np.array([m["w"] for m in jm.tall_masks(base, models, threshold=1.0)])
    # Rounding decides of the entry left out: its task vectors sum to zero.
    counts = np.delete(masks.sum(0), 6)
    np.testing.assert_array_equal(counts, [1, 2, 2, 0, 2, 1, 1])
    merged = jm.consensus(base, models, threshold=1.0)["w"]
    kept = [0, 1, 1, 0, 1, 0, 0, 0]
    np.testing.assert_allclose(merged - BASE, SUM * kept, atol=1e-6)


@pytest.mark.parametrize("threshold", [[0.2, 0.4, 0.6], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize(
    "merge",
    [
        {"multi_task": "task_arithmetic"},
        {"multi_task": "ties"},
        {"multi_task": "ties", "scope": "model"},
    ],
    ids=["sum", "ties", "ties-model"],
)
def test_follows_the_paper(merge, threshold):
    base, models = random_case()
    options = {"threshold": threshold, **merge}
    want = oracles.tall_masks(base, models, **options)
    assert_masks(jm.tall_masks(base, models, **options), want)
    for agreement in range(5):
        got = jm.consensus(base, models, agreement=agreement, **options)
        want = oracles.consensus(base, models, agreement=agreement, **options)
        assert_close(got, want)


@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("strict", [True, False])
def test_votes_that_cancel_and_entries_at_the_threshold(scope, strict):
    base, models = random_case(count=4)
    # So coarse that all arithmetic is exact and much of it ties.
    exact = lambda tree: {k: np.round(x * 16) / 16 for k, x in tree.items()}  # noqa: E731
    base, models = exact(base), [exact(model) for model in models]
    options = {
        "threshold": [0.25, 0.5, 1.0, 2.0],
        "multi_task": "ties",
        "scope": scope,
        "strict": strict,
    }
    want = oracles.tall_masks(base, models, **options)
    assert_masks(jm.tall_masks(base, models, **options), want)


def test_any_merge_can_be_the_multi_task_vector():
    base, models = random_case()
    ties = {"vote": "mass", "tie": "majority", "aggregate": "sum"}
    for scope in ("leaf", "model"):
        merged = jm.ties(base, models, scope=scope, **ties)
        given = jm.tall_masks(base, models, multi_task=merged)
        named = jm.tall_masks(base, models, multi_task="ties", scope=scope)
        assert_masks(given, named)
        got = jm.consensus(base, models, multi_task=merged)
        assert_close(
            got, jm.consensus(base, models, multi_task="ties", scope=scope), atol=1e-5
        )


def test_one_task_is_recovered_whatever_the_threshold():
    base, (model, *_) = random_case()
    model["b"][:2] = base["b"][:2]
    for threshold in (0.0, 0.4, 9.0):
        (mask,) = jm.tall_masks(base, [model], threshold=threshold)
        assert_masks([mask], [{k: model[k] != base[k] for k in base}])
        assert_close(jm.apply_mask(base, model, mask), model, atol=0)


def test_disjoint_tasks_are_recovered_and_share_nothing():
    base, models = random_case()
    owner = {k: np.arange(b.size).reshape(b.shape) % 4 for k, b in base.items()}
    models = [
        {k: np.where(owner[k] == i, m[k], base[k]) for k in base}
        for i, m in enumerate(models)
    ]
    merged = jm.task_arithmetic(base, models)
    masks = jm.tall_masks(base, models, threshold=7.0)
    for model, mask in zip(models, masks, strict=True):
        assert_close(jm.apply_mask(base, merged, mask), model)
    assert_close(jm.consensus(base, models), base, atol=0)
    assert_close(jm.consensus(base, models, agreement=1), merged)


@pytest.mark.parametrize(("count", "empty"), [(6, False), (7, True)])
def test_masks_of_equal_models_empty_when_there_are_many(count, empty):
    base, (model, *_) = random_case()
    base = {k: np.round(b * 64) / 64 for k, b in base.items()}  # Sums are exact.
    model = {k: base[k] + np.sign(m) * 0.5 for k, m in model.items()}
    threshold = 0.2 if empty else 0.1875
    masks = jm.tall_masks(base, [model] * count, threshold=threshold)
    assert all(not x.any() if empty else x.all() for m in masks for x in m.values())
    if empty:
        assert_close(jm.consensus(base, [model] * count, threshold=threshold), base)


def test_opposite_tasks_cancel_out_whatever_is_masked():
    zero = {"w": np.zeros(8, np.float32)}
    delta = {"w": np.float32(DELTAS[0])}
    models = [delta, {"w": -delta["w"]}]
    for threshold, marked in ((0.9, delta["w"] != 0), (1.0, np.zeros(8, bool))):
        masks = jm.tall_masks(zero, models, threshold=threshold)
        assert_masks(masks, [{"w": marked}] * 2)
        merged = jm.task_arithmetic(zero, models)
        assert not jm.apply_mask(zero, merged, masks[0])["w"].any()


def test_paper_and_code_differ_in_weights_that_no_task_has_moved():
    base, models = random_case()
    for model in models:
        model["b"] = base["b"]
        model["a"] = np.where(np.arange(8) < 2, base["a"], model["a"])
    still = {k: np.all([m[k] == base[k] for m in models], 0) for k in base}
    strict = jm.tall_masks(base, models)
    loose = jm.tall_masks(base, models, strict=False)
    differ = [
        {k: s[k] ^ w[k] for k in base} for s, w in zip(strict, loose, strict=True)
    ]
    assert_masks(differ, [{k: jnp.asarray(v) for k, v in still.items()}] * 3)
    assert not any(mask["b"].any() for mask in strict)
    assert_close(
        jm.consensus(base, models),
        jm.consensus(base, models, strict=False),
        atol=0,
    )


def test_masks_thin_out_as_the_threshold_grows():
    base, models = random_case()
    thresholds = [0.0, 0.2, 0.4, 0.6, 1.0, 1e6]
    runs = [jm.tall_masks(base, models, threshold=t) for t in thresholds]
    for model, *of_task in zip(models, *runs, strict=True):
        for name in base:
            assert (of_task[0][name] == (model[name] != base[name])).all()
            pairs = itertools.pairwise(of_task)
            assert all((more[name] >= less[name]).all() for more, less in pairs)
            assert not of_task[-1][name].any()


def test_at_threshold_one_no_mask_is_closer_to_the_task():
    base, models = random_case()
    vector = oracles.multi_task_vector(base, models, "task_arithmetic")
    masks = jm.tall_masks(base, models, threshold=1.0)
    for mask, delta in zip(masks, oracles.deltas_of(base, models), strict=True):
        for name in base:
            errors = [abs(m * vector[name] - delta[name]) for m in (0, 1)]
            got = np.where(mask[name], errors[1], errors[0])
            np.testing.assert_allclose(got, np.minimum(*errors), atol=1e-6)


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.6])
def test_density_of_gaussian_tasks_is_the_closed_form(threshold):
    tasks, size = 8, 100_000
    masks = jm.tall_masks(*gaussian_case(tasks, size), threshold=threshold)
    want = 2 / np.pi * np.arctan(1 / (threshold * np.sqrt(tasks - 1)))
    error = np.sqrt(want * (1 - want) / size)
    densities = [float(mask["w"].mean()) for mask in masks]
    np.testing.assert_allclose(densities, want, atol=3 * error)


def test_consensus_is_nested_between_the_merge_and_the_base():
    base, models = random_case()
    for name in ("task_arithmetic", "ties"):
        runs = [
            jm.consensus(base, models, agreement=k, multi_task=name) for k in range(5)
        ]
        for more, less in itertools.pairwise(runs):
            for leaf, start in base.items():
                assert ((less[leaf] == more[leaf]) | (less[leaf] == start)).all()
        assert_close(runs[4], base, atol=0)
    merged = jm.task_arithmetic(base, models, scale=0.3)
    assert_close(jm.consensus(base, models, agreement=0, scale=0.3), merged)


def test_consensus_takes_masks_of_any_making():
    base, models = random_case()
    masks = jm.tall_masks(base, models, threshold=[0.2, 0.6, 1.0])
    want = jm.consensus(base, models, threshold=[0.2, 0.6, 1.0], scale=0.5)
    assert_close(jm.consensus(base, models, masks=masks, scale=0.5), want, atol=0)
    everything = [{k: np.ones(b.shape, bool) for k, b in base.items()}]
    got = jm.consensus(base, models, masks=everything, agreement=1)
    assert_close(got, jm.task_arithmetic(base, models))


def test_stacked_layers_are_trimmed_one_by_one_and_masks_fit_them():
    base, models = random_case()
    base, models = {"w": base["c"]}, [{"w": m["c"]} for m in models]
    options = {"multi_task": "ties", "stack_axes": 1}
    masks = jm.tall_masks(base, models, **options)
    stacked = jm.consensus(base, models, masks=masks, **options)
    assert_close(stacked, jm.consensus(base, models, **options), atol=0)
    for i in range(3):
        layer = lambda tree: {"w": tree["w"][i]}  # noqa: B023, E731
        layers = [layer(model) for model in models]
        alone = jm.tall_masks(layer(base), layers, multi_task="ties")
        assert_masks([layer(mask) for mask in masks], alone)
        merged = jm.consensus(layer(base), layers, multi_task="ties")
        assert_close(layer(stacked), merged)


def test_parts_of_the_leaves_get_the_masks_of_the_whole():
    base, models = random_case()
    whole = jm.tall_masks(base, models, threshold={"a": [0.2, 0.3, 0.4], ".*": 0.5})
    for name, threshold in {"a": [0.2, 0.3, 0.4], "b": 0.5, "c": 0.5}.items():
        part = [{name: model[name]} for model in models]
        alone = jm.tall_masks({name: base[name]}, part, threshold=threshold)
        assert_masks(alone, [{name: mask[name]} for mask in whole])


def test_leaves_without_floats_have_empty_masks_and_are_copied():
    base, models = random_case()
    base["steps"] = jnp.array(7)
    for i, model in enumerate(models):
        model["steps"] = jnp.array(i)
    masks = jm.tall_masks(base, models)
    assert [mask["steps"].shape for mask in masks] == [(0,)] * 3
    assert jm.apply_mask(base, models[2], masks[2])["steps"] == 7
    merged = jm.consensus(base, models, masks=masks)
    assert merged["steps"] == 7
    assert_close(merged, jm.consensus(base, models), atol=0)


def test_small_updates_of_bfloat16_models_count_in_full():
    base = {"w": jnp.ones(4, jnp.bfloat16)}
    moves = [[1e-3, 0, 1e-3, 0], [0, 1e-3, -3e-3, 0]]
    models = [{"w": 1 + jnp.array(m, jnp.float32)} for m in moves]
    masks = jm.tall_masks(base, models, threshold=0.4)
    want = [[True, False, False, False], [False, True, True, False]]
    assert [mask["w"].tolist() for mask in masks] == want
    merged = jm.consensus(base, models, scale=100.0, agreement=1)["w"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(merged), [1.1, 1.1, 0.8, 1], rtol=1e-2)


@pytest.mark.parametrize(
    "merge",
    [{}, {"multi_task": "ties"}, {"multi_task": "ties", "scope": "model"}],
    ids=["sum", "ties", "ties-model"],
)
def test_sharded_equals_unsharded_keeps_the_sharding_and_gathers_nothing(mesh, merge):
    base, models = random_case()
    want = jm.tall_masks(base, models, **merge)
    merged = jm.consensus(base, models, **merge)
    applied = jm.apply_mask(base, models[0], want[0])
    placed = jm.place(base, mesh, SPECS)
    others = [models[0], *(jm.place(model, mesh, SPECS) for model in models[1:])]
    masks = jm.tall_masks(placed, others, **merge)
    assert_masks(jax.device_get(masks), jax.device_get(want))
    for mask in masks:
        for name, leaf in placed.items():
            assert mask[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    got = jm.consensus(placed, others, masks=[want[0], *masks[1:]], **merge)
    assert_close(jax.device_get(got), jax.device_get(merged))
    got = jm.apply_mask(placed, models[0], want[0])
    assert got["a"].sharding.is_equivalent_to(placed["a"].sharding, 2)
    assert_close(jax.device_get(got), jax.device_get(applied), atol=0)
    others = [jm.place(model, mesh, SPECS) for model in models]
    call = jax.jit(lambda b, ms: jm.tall_masks(b, ms, **merge))
    assert "all-gather" not in call.lower(placed, others).compile().as_text()
    assert_masks(jax.device_get(call(placed, others)), jax.device_get(want))


def test_thresholds_may_be_traced_and_mapped_over():
    base, models = random_case()
    thresholds = jnp.array([[0.2, 0.4, 0.6], [1.0, 0.5, 0.1]])
    runs = jax.vmap(lambda t: jm.tall_masks(base, models, threshold=t))(thresholds)
    for i, row in enumerate([[0.2, 0.4, 0.6], [1.0, 0.5, 0.1]]):
        want = jm.tall_masks(base, models, threshold=row)
        assert_masks([{k: x[i] for k, x in run.items()} for run in runs], want)


def test_thresholds_are_chosen_task_by_task_the_first_of_the_best():
    base, models = random_case()
    merged = jm.task_arithmetic(base, models)
    seen = []

    def score(params, task):
        seen.append((task, params))
        return -round(sum(np.abs(params[k] - models[task][k]).sum() for k in base), 1)

    grid = (0.2, 0.4, 1.0, 1.000001)
    chosen = jm.choose_thresholds(base, models, score, grid=grid)
    assert chosen.scores.shape == (3, 4)
    assert chosen.values == [1.0] * 3
    for i, (task, params) in enumerate(seen):
        assert task == i // 4
        mask = jm.tall_masks(base, models, threshold=grid[i % 4])[task]
        assert_close(params, jm.apply_mask(base, merged, mask))
    prefers = [lambda k: -k, lambda k: k, lambda k: 0]
    density = lambda params: float((params["a"] != base["a"]).mean())  # noqa: E731
    chosen = jm.choose_thresholds(
        base, models, lambda params, task: prefers[task](density(params))
    )
    assert chosen.values == [0.6, 0.2, 0.2]


def test_all_thresholds_are_tried_with_one_compilation(compilations):
    base, models = random_case()
    jax.clear_caches()
    jm.choose_thresholds(base, models, lambda params, task: 0.0, grid=[0.3])
    compilations.clear()
    chosen = jm.choose_thresholds(base, models, lambda params, task: task)
    assert chosen.values == [0.2] * 3
    assert not compilations


def test_recipes_know_consensus(tmp_path):
    base, models = random_case()
    runs = {}
    for name, params in {
        "start": base,
        **dict(zip("abc", models, strict=True)),
    }.items():
        jm.save(tmp_path / name, params)
        runs[name] = str(tmp_path / name)
    start = runs.pop("start")
    for options in (
        {"threshold": [0.2, 0.4, 0.6], "agreement": 1, "scale": 0.5},
        {"multi_task": "ties", "scope": "model"},
    ):
        recipe = recipes.Recipe("consensus", runs, base=start, options=options)
        jm.merge_checkpoints(recipe, tmp_path / f"out{len(options)}")
        got = jm.load(tmp_path / f"out{len(options)}")
        assert_close(got, jm.consensus(base, models, **options))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, ms: jm.tall_masks(b, []), "tall_masks: needs at least one model"),
        (
            lambda b, ms: jm.tall_masks(b, ms, multi_task="sum"),
            "tall_masks: multi_task is 'sum'; it must be one of 'task_arithmetic'",
        ),
        (
            lambda b, ms: jm.tall_masks(b, ms, multi_task={"a": b["a"]}),
            "tall_masks: .*multi_task has not",
        ),
        (
            lambda b, ms: jm.tall_masks(b, ms, threshold=[0.1, 0.2]),
            "threshold of leaf 'a' has 2 values for 3 models",
        ),
        (
            lambda b, ms: jm.tall_masks(b, ms, threshold=-0.1),
            r"it must be in \[0, inf\)",
        ),
        (
            lambda b, ms: jm.tall_masks(
                b, ms, multi_task="ties", scope="model", stack_axes=1
            ),
            "tall_masks: stack_axes has no effect without scope='leaf'",
        ),
        (
            lambda b, ms: jm.consensus(b, ms, agreement=0.5),
            "consensus: agreement is 0.5; it must be a whole number",
        ),
        (
            lambda b, ms: jm.consensus(b, ms, masks=[]),
            "consensus: masks must be a list of one tree or more",
        ),
        (
            lambda b, ms: jm.consensus(b, ms, masks=ms),
            r"consensus: .*masks\[0\] leaf 'a' has dtype float32, base has bool",
        ),
        (
            lambda b, ms: jm.consensus(
                b, ms, masks=[{k: np.ones(x.shape, int) for k, x in b.items()}]
            ),
            r"consensus: masks\[0\] leaf 'a' is int32, not bool",
        ),
        (
            lambda b, ms: jm.consensus(
                b, ms, masks=jm.tall_masks(b, ms), threshold=np.ones(3)
            ),
            "consensus: threshold has no effect without masks=None",
        ),
        (
            lambda b, ms: jm.apply_mask(b, {"a": b["a"]}, {}),
            "apply_mask: .*merged has not",
        ),
        (
            lambda b, ms: jm.apply_mask(b, b, {"a": np.ones(3, bool)}),
            r"apply_mask: .*mask leaf 'a' has shape \(3,\), base has \(12, 8\)",
        ),
        (
            lambda b, ms: jm.choose_thresholds(b, ms, lambda p, t: float("nan")),
            "choose_thresholds: the score of task 0 at threshold 0.2 is NaN",
        ),
        (
            lambda b, ms: jm.choose_thresholds(b, ms, lambda p, t: 0, grid=[]),
            "choose_thresholds: grid is empty",
        ),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_case())
