"""Task matrices (outputs, inputs) that merges of matrices are tested on."""

import numpy as np


def merged_matrix(method, matrices, **options):
    """Merges task matrices (outputs, inputs) and returns the merged one."""
    base = {"kernel": np.zeros(matrices[0].T.shape, np.float32)}
    models = [{"kernel": np.float32(m.T)} for m in matrices]
    return np.asarray(method(base, models, **options)["kernel"]).T


def random_matrices(count=4, shape=(12, 9), rank=None, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    rank = rank or min(shape)
    return [draw((shape[0], rank)) @ draw((rank, shape[1])) for _ in range(count)]


def orthogonal_tasks(count=3, rank=2, shape=(12, 9), seed=0):
    """Tasks whose singular vectors are orthogonal, with distinct singular values."""
    draw = np.random.default_rng(seed).standard_normal
    u, v = (np.linalg.qr(draw((n, count * rank)))[0] for n in shape)
    spectra = np.arange(1, count * rank + 1.0).reshape(count, rank)
    blocks = [slice(t * rank, (t + 1) * rank) for t in range(count)]
    return [(u[:, b] * s) @ v[:, b].T for b, s in zip(blocks, spectra, strict=True)]


def close(got, want, rtol=2e-5):
    scale = np.abs(want).max() or 1.0
    np.testing.assert_allclose(got, want, atol=rtol * scale)
