"""Scores on the plane of two task vectors, against plain NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge import landscape
from jaxmerge.landscape import scan_plane
from jaxmerge.tuning import batching


def make_models(number=4):
    rng = np.random.default_rng(0)

    def tree():
        return {
            "up": {
                "kernel": rng.normal(size=(8, 4)).astype(np.float32),
                "bias": rng.normal(size=4).astype(np.float32),
            },
            "steps": np.int32(3),
        }

    return [tree() for _ in range(number)]


def flat(tree):
    leaves = (tree["up"]["bias"], tree["up"]["kernel"])
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])


def score(params):
    up = params["up"]
    return jnp.sum(jnp.square(up["kernel"])) + jnp.sum(up["bias"])


def expected_score(vector):
    return np.sum(vector[4:] ** 2) + np.sum(vector[:4])


def test_against_numpy():
    base, a, b, other = make_models()
    start = flat(base)
    u = (flat(a) - start) / np.linalg.norm(flat(a) - start)
    v = flat(b) - start - (flat(b) - start) @ u * u
    v /= np.linalg.norm(v)
    scan = scan_plane(score, base, a, b, {"other": other}, points=3)
    expected = [[expected_score(start + x * u + y * v) for x in scan.x] for y in scan.y]
    np.testing.assert_allclose(scan.scores, expected, rtol=1e-5)
    assert list(scan.marks) == ["base", "A", "B", "other"]
    for model, mark in zip((base, a, b, other), scan.marks.values(), strict=True):
        delta = flat(model) - start
        on_plane = (delta @ u, delta @ v)
        off = np.linalg.norm(delta - on_plane[0] * u - on_plane[1] * v)
        assert (mark.x, mark.y) == pytest.approx(on_plane, abs=1e-5)
        assert mark.distance == pytest.approx(off, abs=1e-5)
        assert mark.score == pytest.approx(expected_score(flat(model)), rel=1e-5)


def test_the_grid_reaches_beyond_all_marks():
    base, a, b, other = make_models()
    far = jax.tree.map(lambda x, y: x + 3 * (y - x), base, other)
    scan = scan_plane(score, base, a, b, {"far": far}, points=2, margin=0.5)
    for axis, along in enumerate((scan.x, scan.y)):
        places = [mark[axis] for mark in scan.marks.values()]
        width = max(places) - min(places)
        assert along[0] == pytest.approx(min(places) - 0.5 * width)
        assert along[-1] == pytest.approx(max(places) + 0.5 * width)


def test_any_mesh(mesh):
    trees = make_models(3)
    expected = scan_plane(score, *trees, points=2)
    rules = {".*kernel": P("data", "model"), ".*": P()}
    placed = [jm.place(tree, mesh, rules) for tree in trees]
    scan = scan_plane(score, *placed, points=2)
    np.testing.assert_allclose(scan.scores, expected.scores, rtol=1e-5)


def test_memory_bounds_how_many_are_scored_at_a_time(monkeypatch):
    trees = make_models(3)
    together = []

    def batch(*arguments):
        batched = batching.batch(*arguments)
        together.append(batched.together)
        return batched

    monkeypatch.setattr(landscape, "batch", batch)
    one_by_one = scan_plane(score, *trees, points=3, memory=1)
    all_at_once = scan_plane(score, *trees, points=3, memory="1GB")
    assert together[0] == 1
    assert together[1] >= 9
    np.testing.assert_allclose(one_by_one.scores, all_at_once.scores, rtol=1e-6)


def test_all_points_are_one_compiled_call(compilations):
    trees = make_models(3)
    scan_plane(score, *trees, points=2)  # What a process compiles but once.
    counts = []
    for points in (2, 3, 6):
        jax.clear_caches()
        compilations.clear()
        scan_plane(score, *trees, points=points)
        counts.append(len(compilations))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"b": c["a"]}, "scan_plane: the base and the two models lie on"),
        (lambda c: c | {"a": c["base"]}, "lie on one line"),
        (lambda c: c | {"b": {"w": np.ones(2)}}, r"scan_plane: .*not alike"),
        (
            lambda c: c | {"score": lambda p: p["up"]["bias"]},
            r"scan_plane: the score is of shape \(4,\)",
        ),
        (lambda c: c | {"names": ("A", "A", "B")}, "one occurs twice"),
        (lambda c: c | {"merged": {"A": c["b"]}}, "one occurs twice"),
        (lambda c: c | {"points": 1}, "scan_plane: points"),
        (lambda c: c | {"memory": "much"}, "scan_plane: memory is"),
    ],
)
def test_misuse_is_named(change, message):
    base, a, b = make_models(3)
    with pytest.raises(ValueError, match=message):
        scan_plane(**change({"score": score, "base": base, "a": a, "b": b}))
