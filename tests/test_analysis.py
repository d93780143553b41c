"""Task vectors compared with plain NumPy in float64."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge.analysis import compare, compare_checkpoints, layer_of
from jaxmerge.checkpoints import CheckpointError, open_checkpoint, save

PATHS = ("embed/kernel", "layer_0/bias", "layer_0/kernel", "scale")


def make_trees(models=3):
    rng = np.random.default_rng(0)

    def tree():
        return {
            "embed": {"kernel": rng.normal(size=(8, 4)).astype(np.float32)},
            "layer_0": {
                "kernel": rng.normal(size=(4, 2, 8)).astype(np.float32),
                "bias": rng.normal(size=8).astype(np.float32),
            },
            "scale": np.float32(rng.normal()),
            "steps": np.int32(3),
        }

    base, *others = [tree() for _ in range(models + 1)]
    others[1]["embed"]["kernel"][:4] = base["embed"]["kernel"][:4]
    return base, others


def flat(tree, paths=PATHS):
    leaves = jaxmerge.tree.named_leaves(tree)
    return np.concatenate([np.asarray(leaves[p], np.float64).ravel() for p in paths])


def check(part, base, models, paths):
    start = flat(base, paths)
    deltas = np.stack([flat(model, paths) - start for model in models])
    norms = np.linalg.norm(deltas, axis=1)
    assert part.entries == start.size
    assert part.base_norm == pytest.approx(np.linalg.norm(start), rel=1e-6)
    np.testing.assert_allclose(part.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(
        part.relative_norms, norms / np.linalg.norm(start), rtol=1e-6
    )
    expected = deltas @ deltas.T / np.outer(norms, norms)
    np.testing.assert_allclose(part.cosines, expected, atol=1e-6)
    changed = (deltas != 0).sum(0) > 1
    conflicts = (deltas > 0).any(0) & (deltas < 0).any(0)
    assert part.sign_conflict == pytest.approx(conflicts.sum() / changed.sum())


def test_against_numpy():
    base, models = make_trees()
    result = compare(base, models, names=["a", "b", "c"])
    assert result.names == ("a", "b", "c")
    assert sorted(result.leaves) == sorted(PATHS)
    check(result.total, base, models, PATHS)
    check(result.layers["layer_0"], base, models, PATHS[1:3])
    for path in PATHS:
        check(result.leaves[path], base, models, [path])


def test_sharded_arrays_give_the_same(mesh):
    base, models = make_trees()
    rules = {"embed/kernel": P("data", "model"), ".*/kernel": P("model"), ".*": P()}
    first, second = jaxmerge.place(base, mesh, rules), jaxmerge.place(base, mesh)
    placed = [jaxmerge.place(model, mesh) for model in models]
    expected = compare(base, models).total
    for start in (first, second):
        result = compare(start, placed).total
        np.testing.assert_allclose(result.cosines, expected.cosines, atol=1e-6)
        assert result.sign_conflict == expected.sign_conflict


def test_small_updates_of_bfloat16_models_survive():
    base = {"w": np.full(64, 1, ml_dtypes.bfloat16)}
    model = {"w": np.full(64, 1 + 2**-7, ml_dtypes.bfloat16)}
    assert compare(base, [model]).total.norms[0] == 8 * 2**-7


def test_task_vectors_that_are_zero():
    base = {"w": np.zeros(3, np.float32)}
    total = compare(base, [base, {"w": np.ones(3, np.float32)}]).total
    np.testing.assert_array_equal(total.cosines, [[0, 0], [0, 1]])
    np.testing.assert_array_equal(total.relative_norms, [0, 0])
    assert total.sign_conflict == 0


def test_sums_over_leaves_are_in_float64():
    """In float32, 2**24 + 1 would be 2**24."""
    base = {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    model = {"a": np.float32([2**12]), "b": np.float32([1])}
    assert compare(base, [model]).total.norms[0] ** 2 == pytest.approx(
        2**24 + 1, rel=1e-12
    )


def test_checkpoints_give_the_same_and_say_what_is_left_out(tmp_path):
    base, models = make_trees(2)
    expected = compare(base, models).total
    models[1]["extra"] = np.ones(2, np.float32)
    models[0]["odd"] = np.ones(2, np.float32)
    base["odd"] = models[1]["odd"] = np.ones(3, np.float32)
    for name, tree in (("base", base), ("a", models[0]), ("b", models[1])):
        save(tmp_path / name, tree)
    opened = {name: open_checkpoint(tmp_path / name) for name in ("a", "b")}
    result = compare_checkpoints(open_checkpoint(tmp_path / "base"), opened)
    assert result.names == ("a", "b")
    assert result.left_out == ("odd", "extra")
    np.testing.assert_allclose(result.total.norms, expected.norms, rtol=1e-12)


def test_checkpoints_without_a_common_leaf(tmp_path):
    save(tmp_path / "base", {"w": np.zeros(2, np.float32)})
    save(tmp_path / "a", {"model.w": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match=r"it has w, .*models have model\.w"):
        compare_checkpoints(
            open_checkpoint(tmp_path / "base"), {"a": open_checkpoint(tmp_path / "a")}
        )


@pytest.mark.parametrize(
    ("base", "models", "message"),
    [
        ({"w": np.ones(2)}, [], "compare: needs at least one model"),
        ({"w": np.ones(2)}, [{"w": np.ones(3)}], r"compare: .*models\[0\] leaf 'w'"),
        ({"w": np.ones(2, int)}, [{"w": np.ones(2, int)}], "no floating-point leaves"),
    ],
)
def test_errors(base, models, message):
    with pytest.raises(ValueError, match=message):
        compare(base, models)


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3"),
        ("block_3/attention_1/kernel", "block_3"),
        ("h.11.mlp2.weight", "h.11"),
        ("fc1.weight", "fc1"),
        ("lm_head.weight", "lm_head"),
        ("Dense_0", "Dense_0"),
        ("w", "w"),
        ("encoder/conv2d_norm/scale", "encoder/conv2d_norm"),
    ],
)
def test_layer_of(path, layer):
    assert layer_of(path) == layer


def test_compiles_once_per_shape():
    from jaxmerge.analysis import _leaf_sums

    jax.clear_caches()
    leaves = {f"w{i}": np.zeros((3, 5), np.float32) for i in range(4)}
    compare(leaves, [leaves])
    assert _leaf_sums._cache_size() == 1
