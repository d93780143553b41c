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


def multi_task_vector(base, models, multi_task, scope="leaf"):
    if multi_task == "ties":
        options = {"density": 0.2, "tie": "majority", "aggregate": "sum"}
        merged = ties(base, models, scope=scope, **options)
        return deltas_of(base, [merged])[0]
    return {k: sum(delta[k] for delta in deltas_of(base, models)) for k in base}


def tall_masks(base, models, *, threshold, multi_task, strict=True, scope="leaf"):
    vector = multi_task_vector(base, models, multi_task, scope)
    masks = []
    for delta, t in zip(deltas_of(base, models), threshold, strict=True):
        gaps = {k: abs(d) - t * abs(vector[k] - d) for k, d in delta.items()}
        masks.append({k: gap > 0 if strict else gap >= 0 for k, gap in gaps.items()})
    return masks


def consensus(base, models, *, threshold, multi_task, agreement, scope="leaf"):
    options = {"threshold": threshold, "multi_task": multi_task, "scope": scope}
    masks = tall_masks(base, models, **options)
    vector = multi_task_vector(base, models, multi_task, scope)
    votes = {k: sum(mask[k].astype(int) for mask in masks) for k in base}
    return apply(base, {k: v * (votes[k] >= agreement) for k, v in vector.items()})


def emr(base, models, *, rescale="sums"):
    """The unified vector, masks and scales."""
    deltas = deltas_of(base, models)
    vector = {}
    for k in base:
        flats = np.array([delta[k] for delta in deltas])
        signs = np.where(flats.sum(0) > 0, 1, -1)
        vector[k] = signs * np.where(flats * signs > 0, abs(flats), 0).max(0)
    masks = [{k: d[k] * vector[k] > 0 for k in base} for d in deltas]
    total = {"sums": np.sum, "means": np.mean}[rescale]
    scales = [
        sum(total(abs(d[k])) for k in base)
        / sum(total(abs(m[k] * vector[k])) for k in base)
        for d, m in zip(deltas, masks, strict=True)
    ]
    return vector, masks, scales


def unit(x):
    return x / np.linalg.norm(x)


def multislerp(vectors, weights):
    """As published: a mean in the tangent space at the mean of the directions."""
    flats = [np.float64(v).ravel() for v in vectors]
    at = unit(sum(w * unit(x) for w, x in zip(weights, flats, strict=True)))
    tangents = [unit(x) - (unit(x) @ at) * at for x in flats]
    step = sum(w * tangent for w, tangent in zip(weights, tangents, strict=True))
    angle = np.linalg.norm(step) + 1e-30
    mean = np.cos(angle) * at + np.sin(angle) / angle * step
    length = sum(w * np.linalg.norm(x) for w, x in zip(weights, flats, strict=True))
    return (length * mean).reshape(vectors[0].shape)


def karcher(vectors, weights):
    """Gradient descent on the sum of squared angles, until it stands still."""
    flats = [np.float64(v).ravel() for v in vectors]
    weights = np.array(weights) / np.sum(weights)
    mean = unit(sum(w * unit(x) for w, x in zip(weights, flats, strict=True)))
    for _ in range(1000):
        step = 0
        for w, x in zip(weights, flats, strict=True):
            across = unit(x) - (unit(x) @ mean) * mean
            angle = np.arctan2(np.linalg.norm(across), unit(x) @ mean)
            step = step + w * angle * across / (np.linalg.norm(across) + 1e-30)
        angle = np.linalg.norm(step)
        mean = unit(np.cos(angle) * mean + np.sinc(angle / np.pi) * step)
    length = sum(w * np.linalg.norm(x) for w, x in zip(weights, flats, strict=True))
    return (length * mean).reshape(vectors[0].shape)


def nearswap(base, model, t):
    """The published formula, for entries that differ."""
    share = np.minimum(1, t / np.abs(np.float64(model) - base))
    return share * model + (1 - share) * base


def softmax(x):
    powers = np.exp(np.float64(x))
    return powers / powers.sum(-1, keepdims=True)


def arcee_fusion(base, model):
    """With the last axis as rows."""
    p, q = softmax(model), softmax(base)
    divergence = (p * np.log(p / q)).sum(-1, keepdims=True)
    importance = np.abs(np.float64(model) - np.float64(base)) * divergence
    ranked = np.sort(importance.ravel())
    lower, median, upper = (
        ranked[int(q * (ranked.size - 1))] for q in (0.25, 0.5, 0.75)
    )
    return np.where(importance >= median + 1.5 * (upper - lower), model, base)


def whole(tree):
    return {"all": flatten(tree)}


def split(flat, like):
    ends = np.cumsum([like[k].size for k in sorted(like)])
    parts = zip(sorted(like), np.split(flat, ends[:-1]), strict=True)
    return {k: part.reshape(like[k].shape) for k, part in parts}


def by_scope(flat_method):
    """A method of models, from one of arrays (models, entries)."""

    def method(base, models, *, scope="leaf", **options):
        deltas = deltas_of(base, models)
        if scope == "model":
            merged = flat_method(np.array([flatten(d) for d in deltas]), **options)
            return apply(base, split(merged, base))
        merged = {
            k: flat_method(np.array([d[k].ravel() for d in deltas]), **options)
            for k in base
        }
        return apply(base, {k: v.reshape(base[k].shape) for k, v in merged.items()})

    return method


def clamp(x, low, high):
    """Cuts rows off at the authors' indices, which are not quantiles quite."""
    n, rising = x.shape[1], np.sort(x, 1)
    ends = int(n * low), int(n * (1 - high) - 1)
    return np.clip(x, *(rising[:, end, None] for end in ends))


def span(x):
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    return (x - low) / (high - low)


@by_scope
def pcb(deltas, *, density, agreement="raw"):
    cut = {"raw": 1e-4, "normalized": 1e-2}[agreement]
    sizes = clamp(np.abs(deltas), cut, cut)
    voices = deltas if agreement == "raw" else np.sign(deltas) * span(sizes)
    scores = np.exp(len(deltas) * span(sizes) ** 2) * np.tanh(deltas * voices.sum(0))
    shares = span(clamp(scores, 1 - density, 0))
    merged = (np.sign(deltas) * sizes * shares).sum(0)
    return merged / np.maximum(shares.sum(0), 1e-12)


@by_scope
def sce(deltas, *, density, mask_values):
    variance = deltas.var(0)
    keep = max(1, int(density * np.count_nonzero(variance)))
    mask = np.ones(deltas.shape[1], bool)
    if density < 1:
        mask[np.argsort(-variance, kind="stable")[keep:]] = False
    weights = np.square(deltas * mask).mean(1)
    values = deltas * mask if mask_values else deltas
    signs = np.where(values.sum(0) >= 0, 1, -1)
    shares = weights[:, None] * (np.sign(values) == signs)
    total = shares.sum(0)
    return (shares * values).sum(0) / np.where(total == 0, 1, total)


@by_scope
def ram(deltas, *, epsilon=1e-5, boost=0.0, limit=0.2):
    changed = np.abs(deltas) > epsilon
    users = changed.sum(0)
    together, alone = (
        (changed & (users > 1)).sum(1),
        (changed & (users == 1)).sum(1),
    )
    gain = 1 + boost * np.clip(together / np.maximum(alone, 1e-9), 0, limit)
    gains = np.where(users > 1, 1, gain[:, None])
    return (gains * deltas * changed).sum(0) / np.maximum(users, 1)


@by_scope
def localize_and_stitch(deltas, *, density):
    keep = max(1, int(density * deltas.shape[1]))
    kept = np.array([trim_count(delta, keep) for delta in deltas])
    return kept.sum(0) / np.maximum((kept != 0).sum(0), 1)


@by_scope
def tatr(deltas, *, quantile, sensitivity=None):
    moves = np.abs(deltas)
    slopes = moves if sensitivity is None else sensitivity
    pairs = [(i, j) for i in range(len(deltas)) for j in range(len(deltas)) if i != j]
    conflict = sum(slopes[i] * moves[j] for i, j in pairs)
    n = len(conflict)
    threshold = np.sort(conflict)[min(int(quantile * n), n - 1)]
    return np.where(conflict < threshold, deltas.sum(0), 0)
