"""KnOTS against a float64 transcription, and its known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_tasks import close, merged_matrix, orthogonal_tasks, random_matrices

import jaxmerge as jm

SHAPES = {"wide/kernel": (14, 5), "tall/kernel": (4, 30), "kernel": (9, 9)}


def knots_of_layers(layers, density):
    """The merged task matrices of layers, each a list of one matrix per task."""
    bases, rows = [], []
    for tasks in layers:
        u, s, vt = np.linalg.svd(np.concatenate(tasks, 1), full_matrices=False)
        rank = int((s > 1e-5 * s[0]).sum())
        bases.append(u[:, :rank])
        rows.append(np.split(s[:rank, None] * vt[:rank], len(tasks), axis=1))
    vectors = [
        np.concatenate([of[t].ravel() for of in rows]) for t in range(len(rows[0]))
    ]
    trimmed = []
    for vector in vectors:
        cut = len(vector) - int(len(vector) * density)
        smallest = np.sort(np.abs(vector))[cut - 1] if density < 1 else 0
        trimmed.append(np.where(np.abs(vector) >= smallest, vector, 0))
    signs = np.sign(sum(trimmed))
    agree = [(np.sign(vector) == signs) * (vector != 0) for vector in trimmed]
    total = sum(vector * a for vector, a in zip(trimmed, agree, strict=True))
    mean = total / np.maximum(sum(agree), 1)
    ends = np.cumsum([of[0].size for of in rows])[:-1]
    parts = zip(bases, rows, np.split(mean, ends), strict=True)
    return [u @ part.reshape(of[0].shape) for u, of, part in parts]


def random_layers(count=3):
    """A tree of zeros, one tree per task, and their task matrices by layer."""
    draw = np.random.default_rng(0).standard_normal
    models = [
        {path: np.float32(draw(shape)) for path, shape in SHAPES.items()}
        for _ in range(count)
    ]
    models = [m | {"kernel": 3 * m["kernel"]} for m in models]
    base = {path: np.zeros(shape, np.float32) for path, shape in SHAPES.items()}
    layers = [[np.float64(m[path].T) for m in models] for path in SHAPES]
    return base, models, layers


@pytest.mark.parametrize("density", [0.05, 0.2, 0.75, 1.0])
def test_entries_of_all_matrices_of_a_task_are_ranked_together(density):
    base, models, layers = random_layers()
    got = jm.knots(base, models, density=density)
    want = knots_of_layers(layers, density)
    for path, matrix in zip(SHAPES, want, strict=True):
        close(got[path].T, matrix)


def test_entries_of_each_matrix_are_ranked_alone_within_leaves():
    base, models, layers = random_layers()
    got = jm.knots(base, models, scope="leaf")
    for path, tasks in zip(SHAPES, layers, strict=True):
        (want,) = knots_of_layers([tasks], 0.2)
        close(got[path].T, want)
    together = jm.knots(base, models)
    assert not np.allclose(together["kernel"], got["kernel"])


def test_stacked_layers_and_fused_parts_count_as_matrices():
    draw = np.random.default_rng(1).standard_normal
    stacks = [np.float32(draw((2, 6, 8))) for _ in range(3)]
    models = [{"kernel": x} for x in stacks]
    base = {"kernel": np.zeros((2, 6, 8), np.float32)}
    got = jm.knots(base, models, stack_axes=1, fused={"kernel": [3, 5]})["kernel"]
    cuts = [(i, part) for i in (0, 1) for part in (slice(0, 3), slice(3, 8))]
    layers = [[np.float64(x[i, :, part].T) for x in stacks] for i, part in cuts]
    for (i, part), want in zip(cuts, knots_of_layers(layers, 0.2), strict=True):
        close(got[i, :, part].T, want)


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_one_task_and_equal_tasks_come_back_and_opposite_ones_cancel(scope):
    options = {"scope": scope, "density": 1.0}
    for shape in ((12, 9), (9, 12), (40, 3)):
        (task,) = random_matrices(1, shape)
        close(merged_matrix(jm.knots, [task], **options), task)
        close(merged_matrix(jm.knots, [task] * 3, **options), task)
        close(merged_matrix(jm.knots, [task, 2 * task], **options), 1.5 * task)
        assert not merged_matrix(jm.knots, [task, -task], **options).any()
        close(merged_matrix(jm.knots, [task, 0 * task], **options), task)


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_orthogonal_tasks_add_up(scope):
    tasks = orthogonal_tasks(count=3, rank=2, shape=(12, 9))
    # Two of the six rows of each task are its own; the others are zeros, but rounded.
    own = (2 * 9 - 0.5) / (6 * 9)
    close(merged_matrix(jm.knots, tasks, scope=scope, density=own), sum(tasks))


def test_rows_that_no_task_has_are_not_counted():
    tasks = random_matrices(2, (60, 50), rank=3)
    (want,) = knots_of_layers([tasks], 0.2)
    close(merged_matrix(jm.knots, tasks), want)
    base = {"a/kernel": np.zeros((50, 60), np.float32), "b/kernel": np.zeros((4, 4))}
    models = [
        {"a/kernel": np.float32(t.T), "b/kernel": np.zeros((4, 4))} for t in tasks
    ]
    close(jm.knots(base, models)["a/kernel"].T, want)


def test_a_shared_basis_of_outputs_is_more_than_ties():
    tasks = random_matrices(3)
    ties = merged_matrix(jm.ties, tasks, density=0.5)
    assert not np.allclose(merged_matrix(jm.knots, tasks, density=0.5), ties, atol=0.1)


def test_a_rotation_of_outputs_rotates_the_result():
    tasks = random_matrices(3)
    q, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))
    rotated = merged_matrix(jm.knots, [q @ t for t in tasks])
    close(rotated, q @ merged_matrix(jm.knots, tasks), rtol=1e-4)


def test_density_may_be_traced():
    base, models, _ = random_layers()
    merge = jax.jit(lambda density: jm.knots(base, models, density=density))
    for density in (0.2, 0.7):
        want = jm.knots(base, models, density=density)
        for path, leaf in merge(jnp.float32(density)).items():
            np.testing.assert_allclose(leaf, want[path], atol=1e-5)


def test_bad_options_are_refused():
    base, models, _ = random_layers()
    with pytest.raises(ValueError, match=r"knots: density is 0; it must be in"):
        jm.knots(base, models, density=0.0)
    with pytest.raises(ValueError, match=r"knots: density is .* must be one number"):
        jm.knots(base, models, density={".*": 0.2})
    with pytest.raises(ValueError, match="knots: scope is 'layer'"):
        jm.knots(base, models, scope="layer")
