"""Steps after a merge against float64 versions and known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge import calibrate, subspace_boost


def trees(matrices, base=0.0):
    """Task matrices (outputs, inputs) as models in flax layout."""
    return [{"kernel": np.float32(base + matrix.T)} for matrix in matrices]


def calibrated(tasks, change, **options):
    base, merged, *models = trees([0 * change, change, *tasks])
    return np.asarray(calibrate(base, models, merged, **options)["kernel"]).T


def boosted(change, share):
    base, merged = trees([0 * change, change])
    return np.asarray(subspace_boost(base, merged, share=share)["kernel"]).T


def random_matrices(count=3, shape=(12, 9), seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, *shape)))


def orthogonal_tasks(count=3, rank=2, shape=(12, 9), seed=0):
    """Tasks without common inputs or outputs, with distinct singular values."""
    draw = np.random.default_rng(seed).standard_normal
    u, v = (np.linalg.qr(draw((n, count * rank)))[0] for n in shape)
    s = np.arange(1, count * rank + 1.0)
    return [(u[:, t::count] * s[t::count]) @ v[:, t::count].T for t in range(count)]


def svc(tasks, change, floor):
    """Also the counts before the floor, one row per singular triplet."""
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    new, counts = [], []
    for r in range(len(s)):
        row = u[:, r] @ change
        own = [u[:, r] @ task for task in tasks]
        counts.append([row @ a / (a @ a) for a in own])
        new.append(s[r] * len(tasks) / sum(max(floor, c) for c in counts[-1]))
    return (u * new) @ vt, np.array(counts)


def close(got, want, rtol=2e-5):
    np.testing.assert_allclose(got, want, atol=rtol * (np.abs(want).max() or 1.0))


@pytest.mark.parametrize("shape", [(12, 9), (5, 14)])
@pytest.mark.parametrize("floor", [0.1, 1 / 3, 1.0])
def test_calibrate_follows_the_paper(shape, floor):
    tasks = random_matrices(shape=shape)
    want, counts = svc(tasks, 0.7 * sum(tasks), floor)
    assert counts.min() < floor < counts.max()
    close(calibrated(tasks, 0.7 * sum(tasks), floor=floor), want, rtol=1e-4)
    if floor == 1 / 3:
        close(calibrated(tasks, 0.7 * sum(tasks)), want, rtol=1e-4)


def test_calibrate_counts_what_all_tasks_share_once():
    (task,) = random_matrices(1)
    for copies in (1, 4):
        close(calibrated([task] * copies, copies * task), task)
    close(calibrated([task] * 4, 4 * task, floor=1.0), task)
    # Scaled down, it is in each task less than once, which a floor of 1 ignores.
    close(calibrated([task] * 4, 0.5 * task), task)
    close(calibrated([task] * 4, 0.5 * task, floor=1.0), 0.5 * task)


@pytest.mark.parametrize("floor", [None, 0.1, 1.0])
def test_calibrate_scales_the_sum_of_orthogonal_tasks_by_its_floor(floor):
    tasks = orthogonal_tasks()
    hidden = 3 / (1 + 2 * (1 / 3 if floor is None else floor))
    close(calibrated(tasks, sum(tasks), floor=floor), hidden * sum(tasks), rtol=1e-4)


def test_calibrate_does_not_see_the_scale_of_the_merge_above_the_floor():
    common, *own = random_matrices(5)
    tasks = [common + 0.1 * task for task in own]
    want, counts = svc(tasks, sum(tasks), 0.1)
    assert 0.3 * counts.min() > 0.1
    for scale in (0.3, 1.0, 20.0):
        close(calibrated(tasks, scale * sum(tasks), floor=0.1), want, rtol=2e-4)


def test_calibrate_ignores_the_order_of_models_and_their_common_scale():
    tasks = random_matrices(4)
    want = calibrated(tasks, sum(tasks))
    close(calibrated(tasks[::-1], sum(tasks)), want)
    close(calibrated([3 * t for t in tasks], 3 * sum(tasks)), 3 * want, rtol=1e-4)


def test_calibrate_looks_at_outputs():
    tasks = random_matrices(shape=(9, 9))
    turned = calibrated([t.T for t in tasks], sum(tasks).T).T
    assert np.abs(turned - calibrated(tasks, sum(tasks))).max() > 0.1


def test_calibrate_without_anything_to_calibrate():
    task, other = random_matrices(2)
    np.testing.assert_array_equal(calibrated([task, other], 0 * task), 0)
    np.testing.assert_array_equal(calibrated([0 * task, 0 * task], 0 * task), 0)
    close(calibrated([0 * task, 0 * task], task), 2 * task)
    # One of two counts twice, the other as its floor, a half.
    close(calibrated([task, 0 * task], 2 * task), 2 * task * 2 / 2.5)
    for shape in ((1, 9), (12, 1)):
        tasks = random_matrices(shape=shape)
        assert np.isfinite(calibrated(tasks, sum(tasks))).all()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("shape", [(12, 9), (5, 14)])
def test_subspace_boost_follows_the_paper(share, shape):
    (change,) = random_matrices(1, shape)
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    kept = next(k for k in range(len(s)) if s[: k + 1].sum() >= share * s.sum() - 1e-9)
    close(boosted(change, share), (u * np.maximum(s, s[kept])) @ vt, rtol=1e-4)


def test_subspace_boost_at_its_ends():
    (change,) = random_matrices(1)
    close(boosted(change, 1.0), change)
    spectrum = np.linalg.svd(boosted(change, 0.0))[1]
    np.testing.assert_allclose(spectrum, np.linalg.norm(change, 2), rtol=1e-5)
    for share in (0.0, 0.5, 1.0):
        np.testing.assert_array_equal(boosted(0 * change, share), 0)


SHAPES = {
    "block": {
        "query": {"kernel": (6, 2, 4), "bias": (2, 4)},
        "mlp": {"kernel": (8, 6)},
    },
    "embedding": (7, 6),
    "scale": (),
}


def random_tree(seed, dtype=jnp.float32, shapes=SHAPES):
    draw = np.random.default_rng(seed).standard_normal
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(draw(s), dtype), shapes, is_leaf=is_shape)


def steps(base, models, merged):
    yield lambda b, ms, x: calibrate(b, ms, x), (base, models, merged)
    yield lambda b, x: subspace_boost(b, x, share=0.3), (base, merged)


@pytest.mark.parametrize("method", [jm.task_arithmetic, jm.tsv_merge])
def test_steps_compose_with_merges_and_leave_the_rest(method):
    base, *models = (random_tree(seed) for seed in range(4))
    base["count"], models = jnp.array(3), [{**m, "count": jnp.array(5)} for m in models]
    merged = method(base, models)
    before = jax.device_get((base, models, merged))
    for step, inputs in steps(base, models, merged):
        got = step(*inputs)
        for path in ("embedding", "scale", "count"):
            np.testing.assert_array_equal(got[path], merged[path])
        mlp = got["block"]["mlp"]["kernel"]
        assert np.abs(mlp - merged["block"]["mlp"]["kernel"]).max() > 0.01
        query = got["block"]["query"]
        np.testing.assert_array_equal(query["bias"], merged["block"]["query"]["bias"])
        jitted = jax.jit(step)(*inputs)
        for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(got), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    after = jax.device_get((base, models, merged))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_leaves_of_all_layouts_are_the_same_matrices():
    draw = np.random.default_rng(0).standard_normal
    layers = np.float32(draw((4, 2, 12, 9)))  # (tree, layer, outputs, inputs)
    stacked, heads, torch, fused = (
        [{"kernel": x.transpose(0, 2, 1)} for x in layers],
        [
            {
                f"{i}": {"query": {"kernel": x.T.reshape(9, 3, 4)}}
                for i, x in enumerate(t)
            }
            for t in layers
        ],
        [{f"{i}.weight": x for i, x in enumerate(t)} for t in layers],
        [{"in_proj_weight": t.reshape(24, 9)} for t in layers],
    )
    for step, options in (
        (lambda base, merged, *models, **o: calibrate(base, models, merged, **o), {}),
        (
            lambda base, merged, *_, **o: subspace_boost(base, merged, **o),
            {"share": 0.3},
        ),
    ):
        want = step(*torch, **options)
        several = {
            "stacked": step(*stacked, stack_axes=1, **options)["kernel"].mT,
            "fused": step(*fused, fused={".*": 2}, **options)["in_proj_weight"],
            "heads": step(*heads, **options),
        }
        for i in range(2):
            leaf = want[f"{i}.weight"]
            assert np.abs(leaf - layers[1, i]).max() > 0.01
            np.testing.assert_allclose(several["stacked"][i], leaf, atol=1e-5)
            part = several["fused"][12 * i : 12 * (i + 1)]
            np.testing.assert_allclose(part, leaf, atol=1e-5)
            query = several["heads"][f"{i}"]["query"]["kernel"].reshape(9, 12).T
            np.testing.assert_allclose(query, leaf, atol=1e-5)


def test_sharded_equals_unsharded_and_keeps_the_sharding(mesh):
    shapes = {f"block_{i}": {"kernel": (16, 8)} for i in range(5)} | {"scale": (8,)}
    base, *models = (jax.device_get(random_tree(i, shapes=shapes)) for i in range(4))
    merged = jax.device_get(jm.task_arithmetic(base, models))
    rules = {".*kernel": P("data", "model"), ".*": P("model")}
    placed = jm.place(merged, mesh, rules)
    want = [step(*inputs) for step, inputs in steps(base, models, merged)]
    # What comes with the merged model may lie elsewhere, such as on the host.
    others = jm.place(base, mesh), [models[0], *(jm.place(m, mesh) for m in models[1:])]
    got = [step(*inputs) for step, inputs in steps(*others, placed)]
    for tree, expected in zip(got, want, strict=True):
        for a, b, like in zip(
            *map(jax.tree.leaves, (tree, expected, placed)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-5)
            assert a.sharding.is_equivalent_to(like.sharding, a.ndim)


def test_dtypes_are_those_of_the_merged_model_and_changes_are_not_rounded_before():
    tasks = [1e-3 * task for task in random_matrices()]
    base, merged, *models = trees([0 * tasks[0], sum(tasks), *tasks], base=1.0)
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (base, models))
    want = calibrate(base, models, merged)["kernel"]
    for start, ends in ((base, models), narrow):
        got = calibrate(start, ends, merged)["kernel"]
        assert got.dtype == jnp.float32
        boosted = subspace_boost(start, merged)["kernel"]
        assert boosted.dtype == jnp.float32
    assert np.abs(want - merged["kernel"]).max() > 5e-4
    low = {"kernel": jnp.asarray(merged["kernel"], jnp.bfloat16)}
    got = calibrate(base, models, low)["kernel"]
    assert got.dtype == jnp.bfloat16
    exact = calibrate(base, models, {"kernel": np.float32(low["kernel"])})["kernel"]
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def test_numbers_may_be_traced():
    tasks = random_matrices()
    base, merged, *models = trees([0 * tasks[0], sum(tasks), *tasks])
    numbers = jnp.array([0.2, 0.9])
    floors = jax.vmap(lambda f: calibrate(base, models, merged, floor=f)["kernel"])
    shares = jax.vmap(lambda s: subspace_boost(base, merged, share=s)["kernel"])
    for got, floor in zip(floors(numbers), numbers.tolist(), strict=True):
        close(got.T, calibrated(tasks, sum(tasks), floor=floor))
    for got, share in zip(shares(numbers), numbers.tolist(), strict=True):
        close(got.T, boosted(sum(tasks), share))


def test_wrong_input_is_refused_by_name():
    tree = {"kernel": np.ones((2, 2), np.float32)}
    wrong = {"kernel": np.ones((2, 3), np.float32)}
    with pytest.raises(ValueError, match=r"^calibrate: needs at least one model"):
        calibrate(tree, [], tree)
    with pytest.raises(ValueError, match=r"^calibrate: .*models\[0\] leaf 'kernel'"):
        calibrate(tree, [wrong], tree)
    with pytest.raises(ValueError, match=r"^calibrate: .*merged leaf 'kernel' has sha"):
        calibrate(tree, [tree], wrong)
    with pytest.raises(ValueError, match=r"^subspace_boost: .*merged leaf 'kernel'"):
        subspace_boost(tree, wrong)
    with pytest.raises(ValueError, match=r"^subspace_boost: merged is a str, not an a"):
        subspace_boost(tree, "merged")
    for floor in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match=r"^calibrate: floor is .*in \(0, 1\]"):
            calibrate(tree, [tree], tree, floor=floor)
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"^subspace_boost: share is .*\[0, 1\]"):
            subspace_boost(tree, tree, share=share)
    odd = {"odd": np.ones((2, 3, 4), np.float32)}
    with pytest.raises(ValueError, match=r"^calibrate: .*'odd'.*option `matrices`"):
        calibrate(odd, [odd], odd)
    with pytest.raises(ValueError, match=r"^subspace_boost: fused is 3 for leaf"):
        subspace_boost(tree, tree, fused={".*": 3})
