"""Pictures of tables of accuracies: `jaxmerge.evaluation.ResultTable`."""

import functools
import itertools
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from jaxmerge.evaluation import ResultTable
from jaxmerge.plots.canvas import (
    COLOURS,
    INK,
    SIZE,
    axes_of,
    check_lines,
    draw_heat,
    grid,
    heat_picture,
    label_ends,
    label_points,
    line_style,
    picture,
)

_CHOOSE = "choose with rows=[...]"


def radar(table: ResultTable, rows: Sequence[str] | None = None) -> Figure:
    """Accuracy on each task, relative to the task's own model, one line per method.

    The ring at 100 % is the individual models. The centre is not zero but the next
    multiple of ten that is clearly lower than the worst value: compare distances to the
    ring, not areas.

    Args:
        table: of three tasks or more.
        rows: which methods; all by default.

    Raises:
        ValueError: fewer than three tasks, rows that the table has not got, or more
            than can be told apart.
    """
    names = _rows("radar", table, rows)
    check_lines("radar", names, _CHOOSE)
    if len(table.seen) < 3:
        raise ValueError(
            f"radar: the table has {len(table.seen)} tasks, a radar needs three or "
            "more; take heat_map."
        )
    angles = np.linspace(0, 2 * np.pi, len(table.seen), endpoint=False)
    seen = [i for i, task in enumerate(table.tasks) if task in table.seen]
    shares = {
        name: 100 * table.relative_runs(name).mean(axis=0)[seen] for name in names
    }
    lowest = min(100.0, *map(min, shares.values()))
    highest = max(100.0, *map(max, shares.values()))
    centre = max(0.0, 10 * np.floor(lowest / 10 - 0.2))
    figure = picture(6.4, 4.6)
    axes = axes_of(figure, projection="polar")
    axes.set(theta_offset=np.pi / 2, theta_direction=-1)
    closed = np.append(angles, angles[0])
    for i, (name, values) in enumerate(shares.items()):
        axes.plot(closed, np.append(values, values[0]), **line_style(i, label=name))
    around = np.linspace(0, 2 * np.pi, 200)
    axes.plot(around, np.full(200, 100.0), color=INK, lw=1.2, ls=":")
    axes.set_ylim(centre, highest + 0.02 * (highest - centre))
    rings = np.linspace(centre, 100, 6)[1:]  # A fifth of tens is a whole number.
    axes.set_yticks(rings, [f"{ring:.0f} %" for ring in rings])
    # Between the two spokes where the lines leave most room.
    means = np.mean(list(shares.values()), axis=0)
    gap = int(np.argmin(means + np.roll(means, -1)))
    axes.set_rlabel_position(np.degrees(angles[gap] + angles[1] / 2))  # pyright: ignore
    # The layout of round axes leaves little room beside them.
    wrap = functools.partial(textwrap.fill, width=10, break_long_words=False)
    axes.set_xticks(angles, [wrap(task) for task in table.seen])
    for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
        side = np.sin(angle)
        to = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
        text.set_horizontalalignment(to)
    axes.tick_params(axis="x", pad=2)
    axes.tick_params(axis="y", labelsize=SIZE - 1.5)
    axes.spines["polar"].set_visible(False)
    axes.grid(color=INK, alpha=0.3, linewidth=0.6)
    figure.legend(
        loc="outside right upper", frameon=False, labelcolor=INK, fontsize=SIZE
    )
    axes.set_xlabel("accuracy, % of each task's own model (dotted)", labelpad=8)
    return figure


def heat_map(table: ResultTable, rows: Sequence[str] | None = None) -> Figure:
    """Accuracy of each method on each task, in per cent, and its mean over tasks.

    Columns are those of the table: the seen tasks and their mean, then tasks held out
    and the start's own. The individual models, one for each task, are the last row.

    Args:
        table: of any number of tasks.
        rows: which methods; all by default.

    Raises:
        ValueError: rows that the table has not got.
    """
    names = [*_rows("heat_map", table, rows), "individual"]
    columns = table._replace(summaries=["mean"]).columns()
    if table.own:
        del columns["forgetting"]  # A difference, on no scale of accuracies.
    cells = np.array(
        [[100 * values(name).mean() for values in columns.values()] for name in names]
    )
    figure = heat_picture(names, list(columns))
    axes = axes_of(figure)
    limits = (float(np.nanmin(cells)), float(np.nanmax(cells)))
    draw_heat(
        axes,
        cells,
        names,
        list(columns),
        colours="viridis",
        limits=limits,
        form="{:.1f}",
        label="accuracy, %",
    )
    # Apart: tasks of another kind, what is no task, and what is no merge.
    groups = [len(table.seen), 1, len(table.held_out), len(table.own)]
    for end in {*itertools.accumulate(groups)} - {len(columns)}:
        axes.axvline(end - 0.5, color=INK, linewidth=3)
    axes.axhline(len(names) - 1.5, color=INK, linewidth=3)
    return figure


def accuracy_against_tasks(
    tables: Sequence[ResultTable], rows: Sequence[str] | None = None
) -> Figure:
    """How accuracy falls with the number of tasks that are merged.

    Relative to the individual models, which are at 100 %: absolute accuracies of
    different sets of tasks do not compare.

    Args:
        tables: one or more for each number of tasks. Of several with the same number,
            such as those of several seeds or choices of tasks, the mean is drawn, and a
            band from the lowest to the highest.
        rows: which methods; by default all that every table has.

    Raises:
        ValueError: tables of a single number of tasks, or of none, rows that a table
            has not got, or more than can be told apart.
    """
    method = "accuracy_against_tasks"
    numbers = sorted({len(table.seen) for table in tables})
    if len(numbers) < 2:
        raise ValueError(
            f"{method}: the tables have {numbers} tasks; give tables of two different "
            "numbers of tasks or more."
        )
    shared = [n for n in tables[0].rows if all(n in table.rows for table in tables)]
    names = shared if rows is None else list(rows)
    for table in tables:
        _rows(method, table, names)
    check_lines(method, names, _CHOOSE)
    figure = picture(6.4, 4.0)
    axes = axes_of(figure)
    grid(axes, "y")
    axes.plot(numbers, [100.0] * len(numbers), color=INK, lw=1.2, ls=":")
    ends = [(numbers[-1], 100.0, "individual", INK)]
    for i, name in enumerate(names):
        spread = [
            [100 * t.normalised(name) for t in tables if len(t.seen) == number]
            for number in numbers
        ]
        style = line_style(i, label=name)
        means = [float(np.mean(values)) for values in spread]
        axes.plot(numbers, means, **style)
        if max(map(len, spread)) > 1:
            low, high = list(map(min, spread)), list(map(max, spread))
            axes.fill_between(numbers, low, high, color=style["color"], alpha=0.15)
        ends.append((numbers[-1], means[-1], name, style["color"]))
    axes.set_xticks(numbers)
    axes.set_xlabel("number of tasks merged")
    axes.set_ylabel("accuracy, % of individual models (mean of tasks)")
    label_ends(axes, ends)
    return figure


def accuracy_against_bytes(table: ResultTable, nbytes: Mapping[str, int]) -> Figure:
    """What accuracy costs in storage: one point for each way to keep all tasks.

    The line is the best accuracy of anything up to a size.

    Args:
        table: accuracies. The individual models are "individual".
        nbytes: what is stored altogether, by row, such as `store.sizes().store`; only
            rows named here are drawn.

    Raises:
        ValueError: names that are no rows, sizes that are not positive, or none.
    """
    method = "accuracy_against_bytes"
    _rows(method, table, [name for name in nbytes if name != "individual"])
    if not nbytes or min(nbytes.values()) <= 0:
        raise ValueError(
            f"{method}: nbytes is {dict(nbytes)}; give the positive number of bytes of "
            "at least one row."
        )
    unit, name_of_unit = _unit(max(nbytes.values()))
    points = sorted(
        (size / unit, 100 * table.normalised(name), name)
        for name, size in nbytes.items()
    )
    figure = picture(6.4, 4.2)
    axes = axes_of(figure)
    grid(axes)
    sizes, accuracies, _ = zip(*points, strict=True)
    # A staircase: nothing of a size between two models is known.
    best = np.repeat(np.maximum.accumulate(accuracies), 2)[:-1]
    front = np.repeat(sizes, 2)[1:], best
    axes.plot(*front, color=COLOURS[0], lw=1.2, alpha=0.6)
    axes.scatter(sizes, accuracies, color=COLOURS[0], s=28, zorder=3)
    axes.margins(0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"stored for all {len(table.seen)} tasks, {name_of_unit}")
    axes.set_ylabel("accuracy, % of individual models (mean of tasks)")
    label_points(axes, points, lines=[front], color=INK)
    return figure


def _rows(
    function: str, table: ResultTable, rows: Sequence[str] | None
) -> Sequence[str]:
    names = list(table.rows) if rows is None else list(rows)
    unknown = [name for name in names if name not in table.rows]
    if unknown:
        raise ValueError(
            f"{function}: the table has no row {unknown[0]!r}; it has "
            f"{', '.join(map(repr, table.rows))}."
        )
    return names


def _unit(nbytes: float) -> tuple[float, str]:
    for power, name in ((9, "GB"), (6, "MB"), (3, "kB")):
        if nbytes >= 10**power:
            return 10.0**power, name
    return 1.0, "bytes"
