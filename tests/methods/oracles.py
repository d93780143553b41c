"""Slow and obvious float64 versions of the methods, for one leaf or a whole model.

A model is a dict of arrays; every function takes the base and a list of models.
"""

import numpy as np


def deltas_of(base, models):
    return [{k: np.float64(m[k]) - np.float64(base[k]) for k in base} for m in models]


def apply(base, delta):
    return {k: np.float64(base[k]) + delta[k] for k in base}


def flatten(tree):
    return np.concatenate([np.ravel(tree[k]) for k in sorted(tree)])


def trim_count(flat, count):
    """Keeps the `count` largest magnitudes, and those that tie with the last."""
    return np.where(np.abs(flat) >= np.sort(np.abs(flat))[-count], flat, 0)


def trim_authors(flat, density):
    """The TIES authors' trim: a threshold at the (d - int(d * density))-th smallest."""
    d = flat.size
    k = min(d - 1, d - int(d * density)) if density < 1 else 1
    return np.where(np.abs(flat) >= np.sort(np.abs(flat))[max(k, 1) - 1], flat, 0)


def elect(flats, tie):
    signs = np.sign(np.sum(flats, 0))
    majority = 1 if signs.sum() > 0 else -1
    fill = {"drop": 0, "positive": 1, "negative": -1, "majority": majority}
    return np.where(signs == 0, fill[tie], signs)


def disjoint(flats, signs, aggregate):
    kept = np.where((np.sign(flats) == signs) & (np.array(flats) != 0), flats, 0)
    if aggregate == "sum":
        return kept.sum(0)
    if aggregate == "max":
        return signs * np.abs(kept).max(0)
    return kept.sum(0) / np.maximum((kept != 0).sum(0), 1)


def ties(base, models, *, density, scope, tie, aggregate):
    deltas = deltas_of(base, models)
    if scope == "model":
        flats = [trim_authors(flatten(d), density) for d in deltas]
        merged = disjoint(flats, elect(flats, tie), aggregate)
        result, start = {}, 0
        for k in sorted(base):
            size = base[k].size
            result[k] = merged[start : start + size].reshape(base[k].shape)
            start += size
        return apply(base, result)
    result = {}
    for k in base:
        size = base[k].size
        count = max(1, int(density * size))
        flats = [trim_count(d[k].ravel(), count) for d in deltas]
        merged = disjoint(flats, elect(flats, tie), aggregate)
        result[k] = merged.reshape(base[k].shape)
    return apply(base, result)


def breadcrumbs(base, models, *, density, gamma):
    result = {k: np.zeros(base[k].shape) for k in base}
    for delta in deltas_of(base, models):
        for k, d in delta.items():
            flat, n = d.ravel(), d.size
            keep = max(1, int(density * n))
            drop = min(int(gamma * n), n - keep)
            order = np.argsort(-np.abs(flat), kind="stable")
            mask = np.zeros(n, bool)
            mask[order[drop : drop + keep]] = True
            result[k] += (flat * mask).reshape(d.shape)
    return apply(base, result)


def model_stock(base, models, *, angle="mean_cosine"):
    result = {}
    deltas = deltas_of(base, models)
    n = len(models)
    for k in base:
        flats = [d[k].ravel() for d in deltas]
        cosines = [
            a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
            for i, a in enumerate(flats)
            for b in flats[i + 1 :]
        ]
        c = np.mean(cosines)
        if angle == "mean_angle":
            c = np.cos(np.mean(np.arccos(cosines)))
        t = n * c / (1 + (n - 1) * c)
        result[k] = t * np.mean(flats, 0).reshape(base[k].shape)
    return apply(base, result)


def slerp(u, v, t):
    a, b = np.float64(u).ravel(), np.float64(v).ravel()
    omega = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    mixed = (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)
    return mixed.reshape(u.shape)
