"""Scores on the plane through a base and two models, and where merges lie on it.

Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs",
NeurIPS 2018, arXiv:1802.10026, whose plane through three sets of weights this is.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmerge.analysis import compare
from jaxmerge.methods.arithmetic import task_arithmetic
from jaxmerge.options import whole_number
from jaxmerge.tree import Params, named_leaves, rebuild
from jaxmerge.tuning.batching import batch
from jaxmerge.tuning.sweeping import bytes_of

Score = Callable[[Params], Any]
"""A JAX function from parameters to one number: an accuracy or a loss."""


class Mark(NamedTuple):
    """A model seen from the plane.

    Attributes:
        x: how far it is from the base in the direction of A.
        y: how far at right angles to that, on the side of B.
        distance: how far off the plane; 0 for base, A and B.
        score: its own, not that of the point of the plane below it.
    """

    x: float
    y: float
    distance: float
    score: float


class Landscape(NamedTuple):
    """Scores on a plane; lengths are Euclidean, over all floating-point parameters.

    Attributes:
        x: coordinates in the direction of A, shape (points,).
        y: coordinates at right angles to it, shape (points,).
        scores: shape (points, points), of y and then x.
        marks: models by name: base, A, B and then the merged ones.
    """

    x: np.ndarray
    y: np.ndarray
    scores: np.ndarray
    marks: dict[str, Mark]


def scan_plane(
    score: Score,
    base: Params,
    a: Params,
    b: Params,
    merged: Mapping[str, Params] | None = None,
    *,
    names: tuple[str, str, str] = ("base", "A", "B"),
    points: int = 25,
    margin: float = 0.25,
    memory: int | str = "1GB",
) -> Landscape:
    r"""Scores models on a grid of the plane through `base`, `a` and `b`.

    With orthonormal $u \propto \tau_A$ and $v \propto \tau_B - \langle \tau_B, u
    \rangle u$, the model at $(x, y)$ is $\theta_0 + x u + y v$: distances and angles
    on the plane are those between parameters.

    Args:
        score: a JAX function from parameters to one number.
        base: $\theta_0$, a pytree of arrays of any shape.
        a: $\theta_0 + \tau_A$, a pytree like `base`.
        b: $\theta_0 + \tau_B$, a pytree like `base`.
        merged: further models by name, whose nearest points on the plane are marked.
        names: of `base`, `a` and `b`.
        points: how many points there are along each axis, at least 2.
        margin: how far the grid goes beyond all marks, as a share of its width.
        memory: bytes, or a size such as "4GB", on each device, for models of the grid
            and what their scores need; as many are scored at a time.

    Returns:
        The scores, from one compiled function for the whole grid, and the marks.

    Raises:
        ValueError: trees that are not alike, three models on one line, a score that is
            not one number, names that occur twice, or an invalid option.

    Example:
        >>> base = {"w": jnp.zeros(2)}
        >>> a, b = {"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([1.0, 1.0])}
        >>> loss = lambda params: jnp.sum(params["w"] ** 2)
        >>> plane = scan_plane(loss, base, a, b, points=3, margin=0.0)
        >>> plane.scores.round(2).tolist()
        [[0.0, 1.0, 4.0], [0.25, 1.25, 4.25], [1.0, 2.0, 5.0]]
    """
    method = "scan_plane"
    whole_number(method, "points", points, least=2)
    bytes_ = bytes_of(method, memory)
    merged = dict(merged or {})
    if len({*names, *merged}) < 3 + len(merged):
        raise ValueError(
            f"{method}: of the names {[*names, *merged]} one occurs twice; give each "
            "model a name of its own."
        )
    try:
        places, corners = _places(base, a, b, list(merged.values()))
    except ValueError as error:
        raise ValueError(f"{method}: {error}") from None
    shape = jax.tree.map(np.shape, jax.eval_shape(score, base))
    if shape != ():
        raise ValueError(
            f"{method}: the score is of shape {shape}; it must be one number, such as "
            "the mean over tasks."
        )
    x, y = (_ticks(along, points, margin) for along in places[:, :2].T)
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    weights = np.linalg.solve(corners.T, grid.T).T.astype(np.float32)

    def score_at(shares: Array) -> Array:
        merged = task_arithmetic(base, [a, b], weights=[shares[0], shares[1]])
        return jnp.asarray(score(merged))

    scores = batch(score_at, 2, bytes_).run(jnp.asarray(weights))
    alone = jax.jit(score)
    marks = {}
    everyone = zip([*names, *merged], [base, a, b, *merged.values()], strict=True)
    for (along, aside, off), (name, model) in zip(places, everyone, strict=True):
        own = float(alone(rebuild(base, named_leaves(model))))
        marks[name] = Mark(float(along), float(aside), float(off), own)
    return Landscape(x, y, np.asarray(scores).reshape(points, points), marks)


def _places(
    base: Params, a: Params, b: Params, others: list[Params]
) -> tuple[np.ndarray, np.ndarray]:
    """Where base, a, b and others are (models, 3), and the plane's corners a and b."""
    total = compare(base, [a, b, *others]).total
    gram = total.cosines * np.outer(total.norms, total.norms)
    cosine = total.cosines[0, 1]
    sine = np.sqrt(max(0.0, 1 - cosine**2))
    # Cosines are of products in float32: what is nearer to a line is not known.
    if min(total.norms[:2]) == 0 or sine < 1e-3:
        raise ValueError(
            "the base and the two models lie on one line, which spans no plane; choose "
            "models that were fine-tuned apart."
        )
    corners = np.array(
        [[total.norms[0], 0], [cosine * total.norms[1], sine * total.norms[1]]]
    )
    on_plane = np.linalg.solve(corners, gram[:2]).T
    on_plane[:2] = corners
    squares = total.norms**2 - np.sum(on_plane**2, axis=1)
    distances = np.sqrt(np.maximum(squares, 0))
    distances[:2] = 0
    return np.vstack([np.zeros(3), np.c_[on_plane, distances]]), corners


def _ticks(along: np.ndarray, points: int, margin: float) -> np.ndarray:
    low, high = along.min(), along.max()
    beyond = margin * (high - low)
    return np.linspace(low - beyond, high + beyond, points)
