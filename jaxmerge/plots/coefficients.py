"""Pictures of coefficients: sweeps, learned ones, and the plane of two task vectors."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from jaxmerge.landscape import Landscape, Score, scan_plane
from jaxmerge.options import choice
from jaxmerge.plots.canvas import (
    INK,
    axes_of,
    check_lines,
    colour_bar,
    draw_heat,
    grid,
    heat_picture,
    label_ends,
    label_points,
    line_style,
    natural,
    picture,
)
from jaxmerge.tree import Params


def sweep_curves(
    values: Sequence[float] | np.ndarray,
    scores: Mapping[str, Sequence[float] | np.ndarray],
    *,
    best: Literal["max", "min"] = "max",
    value: str = "scale",
    score: str = "accuracy on validation data",
) -> Figure:
    """The score of each method over a coefficient, with its best value marked.

    Args:
        values: the coefficients, shape (n,), in any order.
        scores: by method, shape (n,). NaN where there is none.
        best: whether the highest score is the best one, or the lowest.
        value: what the coefficient is called, with its unit if it has one.
        score: what the score is called, with its unit.

    Raises:
        ValueError: scores of another shape or all NaN, or more methods than can be told
            apart.
    """
    method = "sweep_curves"
    choice(method, "best", best, ("max", "min"))
    check_lines(method, list(scores), "choose which to give in `scores`")
    order = np.argsort(values)
    along = np.asarray(values, np.float64)[order]
    figure = picture(7.2, 4.0)
    axes = axes_of(figure)
    grid(axes)
    ends = []
    for i, (name, of_method) in enumerate(scores.items()):
        heights = np.asarray(of_method, np.float64)
        if heights.shape != along.shape or np.isnan(heights).all():
            raise ValueError(
                f"{method}: scores[{name!r}] has shape {heights.shape}, values have "
                f"{along.shape}; give one number for each value, not all NaN."
            )
        heights = heights[order]
        at = int(np.nanargmax(heights) if best == "max" else np.nanargmin(heights))
        axes.plot(along, heights, **line_style(i, marker="", label=name))
        mark = line_style(i, markersize=8, markeredgecolor=INK, linestyle="")
        axes.plot(along[at], heights[at], **mark)
        last = np.flatnonzero(~np.isnan(heights))[-1]
        height = f"{heights[at]:#.3g}".removesuffix(".")
        title = f"{name}: {height} at {along[at]:.3g}"
        ends.append((along[last], heights[last], title, mark["color"]))
    axes.set_xlabel(value)
    axes.set_ylabel(score)
    label_ends(axes, ends)
    return figure


def coefficients_per_layer(
    coefficients: Mapping[str, Sequence[float] | np.ndarray], names: Sequence[str]
) -> Figure:
    """How much of each task vector each layer takes; 0 is none of it.

    Args:
        coefficients: by layer, leaf or submodule, as `jaxmerge.submodule_coefficients`
            gives them or as rules are: of shape (models,), a scalar for one, or with
            further axes in front, such as that of heads.
        names: of the models, or of what else the coefficients multiply.

    Raises:
        ValueError: other than one coefficient per name, or none at all.
    """
    rows: dict[str, np.ndarray] = {}
    for layer in sorted(coefficients, key=natural):
        of_layer = np.atleast_1d(np.asarray(coefficients[layer], np.float64))
        if of_layer.shape[-1:] != (len(names),):
            raise ValueError(
                f"coefficients_per_layer: those of {layer!r} have shape "
                f"{of_layer.shape}, there are {len(names)} names; the last axis must "
                "be that of the models."
            )
        name = re.sub(r"\\(.)", r"\1", layer)  # Rules escape the dots of paths.
        for place in np.ndindex(of_layer.shape[:-1]):
            rows["".join([name, *(f"[{i}]" for i in place)])] = of_layer[place]
    if not rows:
        raise ValueError("coefficients_per_layer: there are none.")
    values = np.array(list(rows.values()))
    reach = float(np.nanmax(np.abs(values))) or 1.0
    figure = heat_picture(list(rows), names)
    draw_heat(
        axes_of(figure),
        values,
        list(rows),
        names,
        colours="RdBu_r",
        limits=(-reach, reach),
        form="{:z.2f}",
        label="coefficient",
    )
    return figure


def landscape(
    score: Score,
    base: Params,
    a: Params,
    b: Params,
    merged: Mapping[str, Params] | None = None,
    *,
    names: tuple[str, str, str] = ("base", "A", "B"),
    points: int = 25,
    memory: int | str = "1GB",
    label: str = "score",
) -> Figure:
    """The score of all models on the plane through a base and two models.

    Distances and angles are those between parameters. Merged models are marked at
    their nearest points on the plane; the colour inside of a mark is the model's own
    score, which is another than that of the plane where the model is far off it.

    Args:
        score: as in `jaxmerge.landscape.scan_plane`, and so are `base`, `a`, `b`,
            `merged`, `names`, `points`, `memory` and the errors.
        label: what the score is called, with its unit.
    """
    scan = scan_plane(
        score, base, a, b, merged, names=names, points=points, memory=memory
    )
    return draw_landscape(scan, label=label)


def draw_landscape(scan: Landscape, *, label: str = "score") -> Figure:
    """The picture of `landscape`, of scores that are there already.

    Args:
        scan: from `jaxmerge.landscape.scan_plane`.
        label: what the score is called, with its unit.
    """
    first, towards, aside = list(scan.marks)[:3]
    wide, high = np.ptp(scan.x), np.ptp(scan.y)
    figure = picture(6.2, 0.6 + 4.9 * high / wide)
    axes = axes_of(figure)
    own = [mark.score for mark in scan.marks.values()]
    everything = np.append(scan.scores, own)
    colours: Any = {
        "cmap": "viridis",
        "norm": Normalize(np.nanmin(everything), np.nanmax(everything)),
    }
    surface = axes.pcolormesh(scan.x, scan.y, scan.scores, shading="gouraud", **colours)
    if np.nanmin(scan.scores) < np.nanmax(scan.scores):
        axes.contour(scan.x, scan.y, scan.scores, 10, colors="white", linewidths=0.4)
    axes.set_aspect("equal")
    origin = scan.marks[first]
    ends = [scan.marks[name] for name in (towards, aside)]
    lines = [([origin.x, end.x], [origin.y, end.y]) for end in ends]
    for line in lines:
        axes.plot(*line, color="white", lw=1, ls="--")
    for i, mark in enumerate(scan.marks.values()):
        axes.scatter(
            *(mark.x, mark.y),
            c=[mark.score],
            **colours,
            marker="o" if i < 3 else "D",
            edgecolors="white",
            linewidths=1.5,
            s=55,
            zorder=3,
        )
    halo: Any = [withStroke(linewidth=2.5, foreground="#222222")]
    colour_bar(axes, surface, label, width=0.03)
    axes.set_xlabel(f"distance of parameters from {first}, towards {towards}")
    axes.set_ylabel(f"at right angles, towards {aside}")
    marks = [(m.x, m.y, name) for name, m in scan.marks.items()]
    label_points(axes, marks, lines=lines, color="white", path_effects=halo)
    return figure
