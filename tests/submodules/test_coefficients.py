import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from networks import (
    BASE,
    CLASSES,
    MODELS,
    SAMPLES,
    TASKS,
    WIDTH,
    kernels,
    linear,
    linen,
    plain,
    plain_scan,
    random,
    stacked,
)

import jaxmerge
from jaxmerge import submodule, submodule_coefficients, submodule_merge
from jaxmerge.tree import named_leaves


def test_a_linear_submodule_gets_regmean_within_the_span_of_the_task_vectors():
    base, *models = kernels(1, 2, 3, 4)
    samples = [random(40, 6, seed=t) * np.exp(random(6, seed=t + 9)) for t in range(3)]
    found = submodule_coefficients(linear, base, models, samples, submodules="linear")
    start, *ends = (np.float64(p["linear"]["kernel"]) for p in [base, *models])
    taus = [end - start for end in ends]
    grams = [np.float64(x).T @ np.float64(x) for x in samples]
    a = [[sum(np.sum(k * (g @ m)) for g in grams) for m in taus] for k in taus]
    b = [
        sum(np.sum(k * (g @ t)) for g, t in zip(grams, taus, strict=True)) for k in taus
    ]
    np.testing.assert_allclose(found["linear"], np.linalg.solve(a, b), rtol=1e-4)

    def objective(alpha):
        kernel = start + sum(c * tau for c, tau in zip(alpha, taus, strict=True))
        return sum(
            np.sum(np.square(np.float64(x) @ (kernel - end)))
            for x, end in zip(samples, ends, strict=True)
        )

    least = objective(found["linear"])
    for move in np.concatenate([np.eye(3), -np.eye(3)]):
        assert objective(found["linear"] + 1e-2 * move) > least


def test_one_model_comes_back():
    merged, found = submodule_merge(
        linen, BASE, MODELS[:1], SAMPLES[:1], submodules=r"block_\d|head", info=True
    )
    for coefficients in found.values():
        np.testing.assert_allclose(coefficients, [1.0], rtol=1e-6)
    for got, want in zip(
        jax.tree.leaves(merged), jax.tree.leaves(MODELS[0]), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_equal_models_share_the_change():
    models, samples = [MODELS[0]] * 2, [SAMPLES[0]] * 2
    found = submodule_coefficients(linen, BASE, models, samples, submodules=r"block_\d")
    for coefficients in found.values():
        np.testing.assert_allclose(coefficients, [0.5, 0.5], rtol=1e-5)


def test_tasks_that_do_not_meet_are_added_up():
    base = {"linear": {"kernel": random(6, 5, seed=1)}}
    models, samples = [], []
    for task, own in enumerate([slice(0, 3), slice(3, 6)]):
        kernel, x = base["linear"]["kernel"].copy(), np.zeros((30, 6), np.float32)
        kernel[own] += random(3, 5, seed=task + 2)
        x[:, own] = random(30, 3, seed=task + 4)
        models.append({"linear": {"kernel": kernel}})
        samples.append(x)
    found = submodule_coefficients(linear, base, models, samples, submodules="linear")
    np.testing.assert_allclose(found["linear"], [1, 1], rtol=1e-5)


def test_a_submodule_that_nobody_changed_stays():
    models = [{**model, "block_0": BASE["block_0"]} for model in MODELS]
    models[1] = {**models[1], "block_1": BASE["block_1"]}
    for normalize in (False, True):
        found = submodule_coefficients(
            linen,
            BASE,
            models,
            SAMPLES,
            submodules=r"block_\d",
            normalize=normalize,
        )
        assert found["block_0"].tolist() == [0, 0, 0]
        assert found["block_1"][1] == 0
        assert np.all(found["block_1"][[0, 2]] > 0)


def test_normalised_tasks_do_not_weigh_more_for_larger_inputs():
    base, *models = kernels(1, 2, 3)
    samples = [random(40, 6, seed=t) for t in range(2)]
    larger = [samples[0], 10 * samples[1]]
    run = functools.partial(
        submodule_coefficients, linear, base, models, submodules="linear"
    )
    even, uneven = (run(x, normalize=True)["linear"] for x in (samples, larger))
    np.testing.assert_allclose(even, uneven, rtol=1e-4)
    published = run(larger)["linear"]
    assert published[1] > 0.95
    assert published[0] < 0.2


def test_batches_add_up_and_compile_once():
    traced = []

    def apply(params, x):
        traced.append(x.shape)
        return plain(params, x)

    wide = [random(8, WIDTH, seed=t) for t in range(TASKS)]
    run = functools.partial(submodule_coefficients, base=BASE, models=MODELS)
    whole = run(plain, samples=wide, submodules=r"block_\d")
    parts = run(apply, samples=[[x[:4], x[4:]] for x in wide], submodules=r"block_\d")
    assert traced == [(4, WIDTH)] * 2  # To look for submodules, and to run.
    for path, coefficients in parts.items():
        np.testing.assert_allclose(coefficients, whole[path], rtol=1e-4)


def test_masked_positions_do_not_count():
    def apply(params, batch):
        return plain(params, batch["x"].reshape(-1, WIDTH)).reshape(2, 3, CLASSES)

    def tokenwise(params, batch):
        head = submodule("head", lambda p, x: x @ p["kernel"] + p["bias"][None, None])
        return head(params["head"], batch["x"])

    samples = [
        {"x": random(2, 3, WIDTH, seed=t), "n": np.array([3, 1])} for t in (0, 1)
    ]
    other = [{**batch, "x": batch["x"].copy()} for batch in samples]
    for batch in other:
        batch["x"][1, 1:] = 100.0

    def mask(batch):
        return jnp.arange(3)[None] < batch["n"][:, None]

    run = functools.partial(
        submodule_coefficients, base=BASE, models=MODELS[:2], submodules="head"
    )
    got, want = (run(tokenwise, samples=x, mask=mask)["head"] for x in (samples, other))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert not np.allclose(run(tokenwise, samples=other)["head"], want, rtol=1e-3)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\), with which no"):
        run(apply, samples=samples, mask=mask)


@pytest.mark.parametrize(
    ("others", "share"), [("average", 1 / TASKS), ("task_arithmetic", 1), ("base", 0)]
)
def test_merged_leaves_are_linear_combinations(others, share):
    merged, found = submodule_merge(
        linen,
        BASE,
        MODELS,
        SAMPLES,
        submodules=r"block_\d",
        others=others,
        scale={".*bias": 0.0, ".*": 0.5},
        info=True,
    )
    models = [named_leaves(model) for model in MODELS]
    leaves = named_leaves(BASE)
    for path, leaf in named_leaves(merged).items():
        module = path.partition("/")[0]
        outside = [0.5 * share * (not path.endswith("bias"))] * TASKS
        alpha = found.get(module, outside)
        taus = [model[path] - leaves[path] for model in models]
        want = leaves[path] + sum(c * tau for c, tau in zip(alpha, taus, strict=True))
        np.testing.assert_allclose(leaf, want, atol=1e-5)


def test_dtypes_stay_and_what_is_no_float_is_copied():
    def cast(params):
        half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
        return {**half, "steps": jnp.arange(3)}

    base, *models = map(cast, [BASE, *MODELS])
    models[0]["steps"] += 1
    merged = submodule_merge(linen, base, models, SAMPLES, submodules=r"block_\d")
    assert merged["steps"].tolist() == [0, 1, 2]
    for got, like in zip(jax.tree.leaves(merged), jax.tree.leaves(base), strict=True):
        assert got.dtype == like.dtype


@pytest.mark.parametrize("apply", [linen, plain_scan])
def test_sharded_equals_unsharded(mesh, apply):
    trees, batches = [BASE, *MODELS], [random(8, WIDTH, seed=t) for t in range(TASKS)]
    if apply is plain_scan:
        trees = list(map(stacked, trees))
    rules = {".*up/kernel": P(*[None] * (trees[0].keys() >= {"blocks"}), None, "model")}
    placed = [jaxmerge.place(tree, mesh, {**rules, ".*": P()}) for tree in trees]
    sharded = [jaxmerge.place({"x": x}, mesh, {".*": P("data")})["x"] for x in batches]
    run = functools.partial(submodule_coefficients, apply, submodules="block.*[s\\d]")
    got = run(placed[0], placed[1:], sharded)
    want = run(trees[0], trees[1:], batches)
    for path, coefficients in got.items():
        np.testing.assert_allclose(coefficients, want[path], rtol=1e-4)
    merged = submodule_merge(
        apply, placed[0], placed[1:], sharded, submodules="block.*[s\\d]"
    )
    for leaf, like in zip(
        jax.tree.leaves(merged), jax.tree.leaves(placed[0]), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def broken(params, x):
    return plain(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), x / 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"apply": broken}, r"'block_0' has outputs on samples\[0\]"),
        ({"models": []}, "needs at least one model"),
        ({"models": [{}] * 3}, "only base has leaf"),
        ({"samples": SAMPLES[:2]}, "a batch or a list of batches: 3 entries"),
        ({"samples": SAMPLES[0]}, "a batch or a list of batches: 3 entries"),
        ({"samples": [*SAMPLES[:2], []]}, "a list without batches"),
        ({"normalize": 1.5}, "normalize is 1.5; it must be one of"),
        ({"others": "mean"}, "others is 'mean'; it must be one of"),
        ({"scale": "large"}, "scale of leaf 'head/"),
    ],
)
def test_errors_name_what_is_wrong(changes, message):
    arguments = {
        "apply": plain,
        "base": BASE,
        "models": MODELS,
        "samples": SAMPLES,
        "submodules": r"block_\d",
    }
    with pytest.raises(ValueError, match=message):
        submodule_merge(**arguments | changes)
