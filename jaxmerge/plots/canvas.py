"""What all pictures share: paper, ink, colours, and labels that keep clear of others.

A picture is drawn once and looked at on light and on dark pages, in a notebook whose
theme changes or in a README. So the paper is transparent and the ink of text and axes
is the grey that has the same contrast, 4.3 to 1, on white and on #111. Taking the style
of the surroundings instead would freeze that of the moment. Lines have the colours of
Okabe and Ito that show on both, told apart by markers and dashes as well.
"""

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure

INK = "#7a7a7a"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SIZE = 9.0
MOST_LINES = 2 * len(COLOURS)

_CHARACTER = 0.075
"""About the width of a letter of SIZE, in inches."""


class Picture(Figure):
    """A figure that a notebook shows without pyplot's help."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=2 * self.dpi)
        width, height = (round(n) for n in self.get_size_inches() * self.dpi)
        return file.getvalue(), {"width": width, "height": height}


def picture(width: float, height: float) -> Picture:
    """An empty, transparent figure; sizes in inches."""
    return Picture(figsize=(width, height), facecolor="none", layout="constrained")


def axes_of(figure: Picture, *place: int, **options: Any) -> Axes:
    """Axes in the common style, at a place as of `add_subplot`."""
    return tidy(figure.add_subplot(*place, facecolor="none", **options))


def tidy(axes: Axes) -> Axes:
    """Grey ink, small text, no box."""
    axes.tick_params(which="both", color=INK, labelcolor=INK, labelsize=SIZE)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set(color=INK, fontsize=SIZE)
    for name, spine in axes.spines.items():
        spine.set(color=INK, visible=name not in ("top", "right"))
    return axes


def grid(axes: Axes, axis: Any = "both") -> None:
    """Faint lines to read values by, behind everything."""
    axes.grid(axis=axis, color=INK, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def write(axes: Axes, x: float, y: float, text: str, colour: Any = INK) -> None:
    """A number in the middle of a cell or bar."""
    centre: Any = {"ha": "center", "va": "center"}
    axes.text(x, y, text, color=colour, fontsize=SIZE - 1, **centre)


def line_style(index: int, **changes: Any) -> dict[str, Any]:
    """How the line of this number looks, of `MOST_LINES`; with some changes."""
    style = {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": "-" if index < len(COLOURS) else (0, (4, 1.5)),
        "marker": "osD^vP"[index % len(COLOURS)],
        "markersize": 4,
        "linewidth": 1.6,
    }
    return style | changes


def check_lines(function: str, names: Sequence[str], remedy: str) -> None:
    """Raises ValueError if there are none, or more than can be told apart."""
    if not 1 <= len(names) <= MOST_LINES:
        raise ValueError(
            f"{function}: there are {len(names)} lines to draw, of which 1 to "
            f"{MOST_LINES} can be told apart; {remedy}."
        )


def text_width(texts: Iterable[str]) -> float:
    """About how wide the longest of some labels is, in inches."""
    return _CHARACTER * max(map(len, texts), default=0)


def natural(name: str) -> list[Any]:
    """Sorts layer 2 before layer 10."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
    ]


def draw_heat(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    colours: str,
    limits: tuple[float, float],
    form: str,
    label: str,
) -> None:
    """Draws a matrix with its numbers; columns are named above, as in a table.

    Cells that are masked stay empty.
    """
    norm = Normalize(*limits)
    image = axes.imshow(values, cmap=colormaps[colours], norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(np.ma.filled(values, np.nan)):
        if np.isfinite(value):
            ink = contrast(image.cmap(norm(value)))
            write(axes, column, row, form.format(value), ink)
    axes.xaxis.tick_top()
    turned = text_width(columns) > CELL_WIDTH
    how = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if turned else {}
    axes.set_xticks(range(len(columns)), columns, **how)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    colour_bar(axes, image, label, width=0.15 / (CELL_WIDTH * len(columns)))


def colour_bar(axes: Axes, image: Any, label: str, width: float) -> None:
    """What the colours of an image mean, beside it: as high, and `width` of its width.

    Only the colours that occur: of a map centred on zero, often one half.
    """
    values = np.ma.masked_invalid(image.get_array())
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1 + width, 0, width, 1)))
    if values.min() < values.max():
        bar.ax.set_ylim(values.min(), values.max())
    bar.outline.set_visible(False)  # pyright: ignore
    bar.set_label(label)
    tidy(bar.ax).spines[:].set_visible(False)
    figure: Any = axes.figure
    figure.draw_without_rendering()  # The layout learns how wide the bar is.


CELL_WIDTH = 0.62
"""That of a cell of `draw_heat`, in inches."""


def heat_picture(
    rows: Sequence[str], columns: Sequence[str], height: float = 0.27
) -> Picture:
    """A figure in which the cells of `draw_heat` have about this height, in inches."""
    above = text_width(columns)
    above = 0.65 * above + 0.1 if above > CELL_WIDTH else 0.25
    width = text_width(rows) + CELL_WIDTH * len(columns) + 0.9
    # The label of the colours needs its height, however few the rows are.
    return picture(width, max(height * len(rows) + above + 0.1, 1.8))


def contrast(colour: Any) -> str:
    """Black or white, whichever is easier to read on a colour."""
    channels = np.array(to_rgb(colour))
    linear = np.where(
        channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
    )
    return "black" if linear @ [0.2126, 0.7152, 0.0722] > 0.18 else "white"


def spread_out(places: Sequence[float] | np.ndarray, gap: float) -> np.ndarray:
    """Moves numbers as little as possible so that no two are nearer than `gap`.

    Least squares: an isotonic regression, by pooling neighbours that are too near.

    Example:
        >>> spread_out([1.0, 1.0, 5.0], gap=2.0).tolist()
        [0.0, 2.0, 5.0]
    """
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(order))
    pools: list[list[float]] = []
    for value in np.asarray(places, float)[order] - steps:
        pools.append([value])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    moved = np.empty(len(order))
    moved[order] = np.repeat([np.mean(p) for p in pools], [len(p) for p in pools])
    moved[order] += steps
    return moved


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Writes names beside the right ends of lines, one above the other.

    Args:
        axes: with everything else drawn already.
        ends: x and y of the end of each line, in data units, its name and colour.
    """
    texts = [
        axes.annotate(
            name,
            (x, y),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=SIZE,
            annotation_clip=False,
        )
        for x, y, name, colour in ends
    ]
    figure: Any = axes.figure
    figure.draw_without_rendering()  # Only then is it known where the lines end.
    per_point = figure.dpi / 72
    heights = axes.transData.transform([(x, y) for x, y, *_ in ends])[:, 1] / per_point
    for text, move in zip(
        texts, spread_out(heights, gap=1.3 * SIZE) - heights, strict=True
    ):
        text.set_position((7, move))


def label_points(
    axes: Axes,
    points: Sequence[tuple[float, float, str]],
    *,
    lines: Sequence[tuple[Any, Any]] = (),
    **style: Any,
) -> None:
    """Writes names beside points, each where it covers no point, line or other name.

    Args:
        axes: with everything else drawn already.
        points: x and y in data units, and the name.
        lines: the x and y of the corners of lines to keep clear of.
        style: of the texts.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()
    per_point = figure.dpi / 72
    middles = axes.transData.transform([(x, y) for x, y, _ in points]) / per_point
    frame = axes.get_window_extent().extents / per_point
    taken = np.hstack([middles - 5, middles + 5])
    for x, y in lines:
        corners = axes.transData.transform(np.c_[x, y]) / per_point
        steps = np.linspace(0, len(corners) - 1, 60 * len(corners))
        along = [np.interp(steps, range(len(corners)), c) for c in corners.T]
        dots = np.transpose(along)
        taken = np.vstack([taken, np.hstack([dots - 1, dots + 1])])
    for (x, y, name), middle in zip(points, middles, strict=True):
        text = axes.annotate(
            name,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SIZE,
            **style,
        )
        extent = text.get_window_extent()
        half = np.array([extent.width, extent.height]) / per_point / 2
        boxes = [np.r_[middle + way - half, middle + way + half] for way in _ways(half)]
        best = min(boxes, key=lambda box: _covered(box, taken, frame))
        taken = np.vstack([taken, best])
        text.set_position(tuple((best[:2] + best[2:]) / 2 - middle))


def _ways(half: np.ndarray) -> list[np.ndarray]:
    """Where a label of this half width and height may go, the best places first."""
    sides = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    return [
        np.array(side) * (half + away) for away in (7, 13, 20, 30) for side in sides
    ]


def _covered(box: np.ndarray, taken: np.ndarray, frame: np.ndarray) -> float:
    """The area that a box has in common with others, or outside of the frame.

    Boxes are left, bottom, right and top; `taken` is one for each row.
    """

    def common(others: np.ndarray) -> float:
        low = np.maximum(box[:2], others[:, :2])
        sides = np.minimum(box[2:], others[:, 2:]) - low
        return float(np.prod(np.maximum(sides, 0), axis=1).sum())

    outside = float(np.prod(box[2:] - box[:2])) - common(frame[None])
    return common(taken) + outside
