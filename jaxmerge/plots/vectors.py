"""Pictures of task vectors: angles, sign conflicts, masks, singular values."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from jaxmerge.analysis import compare, layer_of
from jaxmerge.matrices import MatrixRules
from jaxmerge.options import PerLeaf, choice
from jaxmerge.overlap import mask_statistics
from jaxmerge.plots.canvas import (
    COLOURS,
    INK,
    SIZE,
    axes_of,
    check_lines,
    contrast,
    draw_heat,
    grid,
    heat_picture,
    line_style,
    natural,
    picture,
    write,
)
from jaxmerge.spectra import singular_values
from jaxmerge.tree import Params


def cosine_matrix(
    base: Params, models: Sequence[Params], names: Sequence[str]
) -> Figure:
    """The cosines between task vectors, and on the diagonal their lengths.

    Task vectors at right angles (0) add up without harm. The colours reach as far as
    the largest cosine, as those of real task vectors are small.

    Args:
        base: the shared starting point, a pytree of arrays.
        models: two or more trees like `base`.
        names: of the models.

    Raises:
        ValueError: fewer than two models, other than one name for each, or trees that
            are not alike.
    """
    method = "cosine_matrix"
    if len(models) < 2 or len(names) != len(models):
        raise ValueError(
            f"{method}: there are {len(models)} models and {len(names)} names; give "
            "two models or more and a name for each."
        )
    total = compare(base, models, names=names).total
    cosines = np.ma.array(total.cosines, mask=np.eye(len(models), dtype=bool))
    reach = max(0.05, float(np.abs(cosines).max()))
    figure = heat_picture(names, names, height=0.5)
    axes = axes_of(figure)
    draw_heat(
        axes,
        cosines,
        names,
        names,
        colours="RdBu_r",
        limits=(-reach, reach),
        form="{:z.2f}",
        label="cosine (diagonal: length)",
    )
    for i, norm in enumerate(total.norms):
        write(axes, i, i, f"|{norm:.3g}|")
    return figure


def sign_conflict(base: Params, models: Sequence[Params]) -> Figure:
    r"""In each layer, the share of parameters that models pull in opposite directions.

    Of the entries that two or more models have changed. The dotted line is what
    independent random signs would give where all $T$ models have: $1 - 2^{1 - T}$.

    Args:
        base: the shared starting point, a pytree of arrays.
        models: two or more trees like `base`.

    Raises:
        ValueError: fewer than two models, or trees that are not alike.
    """
    if len(models) < 2:
        raise ValueError(
            f"sign_conflict: {len(models)} models have no conflict; give two or more."
        )
    result = compare(base, models)
    layers = {name: result.layers[name] for name in sorted(result.layers, key=natural)}
    shares = {"whole model": result.total, **layers}
    names, values = list(shares), [100 * part.sign_conflict for part in shares.values()]
    chance = 100 * (1 - 2.0 ** (1 - len(models)))
    figure, axes = _bars(names)
    colours = [COLOURS[1], *[COLOURS[0]] * len(layers)]
    axes.barh(range(len(names)), values, color=colours, height=0.7)
    for i, value in enumerate(values):
        short = value < 12
        write(
            axes,
            value + 4 if short else 4,
            i,
            f"{value:.1f}",
            INK if short else "white",
        )
    axes.axvline(chance, color=INK, ls=":", lw=1.4)
    axes.annotate(
        f"random signs: {chance:.1f} %",
        (chance, 1),
        xytext=(0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if chance > 50 else "left",
        color=INK,
        fontsize=SIZE,
    )
    axes.set_xlim(0, 100)
    axes.set_xlabel("parameters with conflicting signs, %")
    return figure


def mask_overlap(
    masks: Sequence[Params],
    *,
    base: Params | None = None,
    models: Sequence[Params] | None = None,
) -> Figure:
    """In each layer, how many parameters no task needs, one, several or all.

    Args:
        masks: one pytree of boolean arrays per task, as of `jaxmerge.tall_masks`.
        base: as in `jaxmerge.mask_statistics`, to leave out what no model has moved.
        models: belongs to `base`.

    Raises:
        ValueError: as `jaxmerge.mask_statistics`.
    """
    overlap = mask_statistics(masks, base=base, models=models)
    layers = {n: overlap.layers[n] for n in sorted(overlap.layers, key=natural)}
    shares = {"whole model": overlap.total, **layers}
    figure, axes = _bars(list(shares), width=7.2)
    left = np.zeros(len(shares))
    for times, colour in enumerate(_steps(len(masks))):
        widths = np.array([100 * part.agreement[times] for part in shares.values()])
        label = {0: "none", 1: "1 task", len(masks): "all"}.get(times, f"{times}")
        axes.barh(
            range(len(shares)),
            widths,
            left=left,
            color=colour,
            height=0.74,
            label=label,
        )
        for row, width in enumerate(widths):
            if width > 5:
                ink = contrast(colour)
                write(axes, left[row] + width / 2, row, f"{width:.0f}", ink)
        left += widths
    axes.set_xlim(0, 100)
    axes.set_xlabel("parameters in the masks of so many tasks, %")
    # Legends go down their columns; numbers are read along lines.
    keys, columns = axes.containers, min(11, len(masks) + 1)
    figure.legend(
        handles=[key for i in range(columns) for key in keys[i::columns]],
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=SIZE,
        handlelength=1,
        columnspacing=1.2,
    )
    return figure


def singular_spectra(
    base: Params,
    models: Sequence[Params],
    merged: Mapping[str, Params],
    *,
    panels: Literal["layer", "matrix"] = "layer",
    only: str = ".*",
    matrices: MatrixRules | None = None,
    stack_axes: PerLeaf = 0,
) -> Figure:
    """Singular values of task matrices before a merge, and of what merges add.

    A sum of task vectors has few strong directions, which the tasks share, and many
    weak ones; methods on subspaces raise the weak ones.

    Args:
        base: the shared starting point, a pytree of arrays.
        models: fine-tuned models, trees like `base`, drawn thin and grey.
        merged: merged models by name.
        panels: one for each `"layer"`, with the mean over its matrices, or one for each
            `"matrix"`, of which stacked layers are several.
        only: a regular expression, which must match the whole path of a leaf, of what
            to show.
        matrices: as in `jaxmerge.spectra.singular_values`.
        stack_axes: as in `jaxmerge.spectra.singular_values`.

    Raises:
        ValueError: as `singular_values`, no matrix that `only` matches, or more merged
            models than can be told apart.
    """
    method = "singular_spectra"
    choice(method, "panels", panels, ("layer", "matrix"))
    check_lines(method, list(merged), "choose which to give in `merged`")
    found = singular_values(
        base,
        [*models, *merged.values()],
        matrices=matrices,
        stack_axes=stack_axes,
    )
    groups: dict[str, list[np.ndarray]] = {}
    for path, values in found.items():
        if re.fullmatch(only, path):
            for place in np.ndindex(values.shape[:-2]):
                name = "".join([path, *(f"[{i}]" for i in place)])
                group = name if panels == "matrix" else layer_of(name)
                groups.setdefault(group, []).append(values[place])
    if not groups:
        raise ValueError(
            f"{method}: only is {only!r}, which matches none of the matrices; they are "
            f"{', '.join(found)}."
        )
    names = sorted(groups, key=natural)
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = picture(1.2 + 2.3 * columns, 0.8 + 2.1 * lines)
    first = None
    for i, name in enumerate(names):
        share, spectra = _mean_spectrum(groups[name])
        axes = axes_of(figure, lines, columns, i + 1, sharex=first, sharey=first)
        first = first or axes
        grid(axes)
        axes.set_yscale("log")
        axes.set_title(name, color=INK, fontsize=SIZE)
        for k, spectrum in enumerate(spectra[: len(models)]):
            label = "each model" if k == 0 else None
            axes.plot(share, spectrum, color=INK, lw=0.8, alpha=0.7, label=label)
        for k, (label, spectrum) in enumerate(
            zip(merged, spectra[len(models) :], strict=True)
        ):
            axes.plot(share, spectrum, **line_style(k, marker="", label=label))
        axes.label_outer()
    figure.supxlabel("index of the direction, % of full rank", color=INK, fontsize=SIZE)
    figure.supylabel("singular value", color=INK, fontsize=SIZE)
    handles, labels = first.get_legend_handles_labels()  # pyright: ignore
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(5, len(labels)),
        frameon=False,
        labelcolor=INK,
        fontsize=SIZE,
    )
    return figure


def _mean_spectrum(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean spectra (models, points) of matrices of any rank, over the share of it."""
    points = max(part.shape[-1] for part in parts)
    share = (np.arange(points) + 0.5) / points

    def at_shares(spectrum: np.ndarray) -> np.ndarray:
        own = (np.arange(len(spectrum)) + 0.5) / len(spectrum)
        return np.interp(share, own, spectrum)

    spectra = np.mean([[at_shares(s) for s in part] for part in parts], axis=0)
    # What is zero up to rounding would stretch a logarithmic axis by many decades.
    floor = 1e-5 * spectra.max(axis=1, keepdims=True)
    return 100 * share, np.where(spectra > floor, spectra, np.nan)


def _bars(names: Sequence[str], width: float = 6.4) -> tuple[Any, Any]:
    """Axes for a bar for each layer, the first layer at the top, below that of all."""
    figure = picture(width, 0.9 + 0.27 * len(names))
    axes = axes_of(figure)
    grid(axes, "x")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure, axes


def _steps(tasks: int) -> list[Any]:
    """Colours for 0, 1, ... all tasks: grey for none, then darker and darker."""
    scale = colormaps["viridis"](np.linspace(0.98, 0.05, tasks))
    return [(0.55, 0.55, 0.55, 1.0), *map(tuple, scale)]
