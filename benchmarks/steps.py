"""What do steps of MaTS do to its objective, and to accuracy?

    python benchmarks/steps.py [--trained DIRECTORY] [--seeds 0 1 2]

On the models of `jaxmerge demo`, which are trained if DIRECTORY has none: the value of
the quadratic objective of K-FAC factors, as a share of what it is at the average, and
the mean accuracy on test images, after so many steps from several starts. The closed
forms of the same statistics stand beside them. Writes results/steps.md and, of the
first seed, results/steps.png.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import numpy as np
from common import RESULTS, machine, write_table
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import Progress

import jaxmerge
from jaxmerge.demo import experiment, merges
from jaxmerge.methods.matching import matching_objective

STEPS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 200)
COLOURS = ("#0072b2", "#d55e00", "#009e73")


def measure(directory, seed):
    """By name, the objective and the accuracy: of each step, and of closed forms."""
    with Progress() as progress:
        trained = experiment.train(directory, seed, progress)
    start, models = trained.start, list(trained.tuned.values())
    known = merges.collect_statistics(trained)
    closed = {
        "average": jaxmerge.average(models),
        "fisher_average": jaxmerge.fisher_average(models, known),
        "regmean": jaxmerge.regmean(models, known),
    }
    arithmetic = jaxmerge.task_arithmetic(start, models)
    scale = merges.best_scale(trained, arithmetic)
    arithmetic = jaxmerge.task_arithmetic(start, models, scale=scale)

    @jax.jit
    def objective(params):
        values = matching_objective(models, known, params, metric="kronecker")
        return sum(value.sum() for value in values.values())

    worst = objective(closed["average"])

    def judge(params):
        return float(objective(params) / worst), float(trained.test(params).mean())

    starts = {
        "the average": closed["average"],
        "task arithmetic": arithmetic,
        "RegMean": closed["regmean"],
    }
    options = {"metric": "kronecker", "stop": "steps"}
    paths = {
        name: np.array(
            [
                judge(jaxmerge.mats(models, known, init=init, steps=steps, **options))
                for steps in STEPS
            ]
        )
        for name, init in starts.items()
    }
    return {name: judge(params) for name, params in closed.items()}, paths


def draw(closed, paths):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for column, (axes, title) in enumerate(
        zip(
            figure.subplots(1, 2),
            ("objective, as a share of the average's", "mean test accuracy, %"),
            strict=True,
        )
    ):
        factor = 100 if column else 1
        for (name, path), colour in zip(paths.items(), COLOURS, strict=True):
            label = f"MaTS from {name}"
            values = factor * path[:, column]
            axes.plot(STEPS, values, ".-", color=colour, label=label)
        for (name, values), style in zip(
            closed.items(), (":", "-.", "--"), strict=True
        ):
            value = factor * values[column]
            axes.axhline(value, color="0.4", ls=style, lw=1, label=name)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)
        axes.set_xticks((0, 1, 10, 100), ("0", "1", "10", "100"))
        axes.set_xlabel("steps of conjugate gradients")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if not column:
            axes.set_yscale("log")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    FigureCanvasAgg(figure).print_png(str(RESULTS / "steps.png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trained", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        directory = args.trained or Path(directory)
        found = [measure(directory, seed) for seed in args.seeds]
    draw(*found[0])

    def cells(name, values):
        return [name, *(f"{v[0]:.3g} / {100 * v[1]:.1f}" for v in values)]

    rows = [cells(name, [f[0][name] for f in found]) for name in found[0][0]]
    rows += [
        cells(f"MaTS from {name}, {steps} steps", [f[1][name][i] for f in found])
        for name in found[0][1]
        for i, steps in enumerate(STEPS)
        if steps in (1, 10, 100)
    ]
    write_table(
        "steps",
        "Objective and accuracy after steps of MaTS",
        ["merge", *(f"seed {seed}" for seed in args.seeds)],
        rows,
        "Objective of K-FAC factors as a share of the average's / mean accuracy on the "
        f"six test sets, %. {merges.IMAGES} unlabelled training images per task.\n\n"
        f"![](steps.png)\n\n{machine()}",
    )


if __name__ == "__main__":
    main()
