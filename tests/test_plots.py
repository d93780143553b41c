"""What is drawn: the numbers, the names, and that no text covers another."""

import itertools
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.image import imread
from matplotlib.text import Text

import jaxmerge as jm
from jaxmerge import plots
from jaxmerge.analysis import compare
from jaxmerge.evaluation import ResultTable
from jaxmerge.landscape import scan_plane
from jaxmerge.plots.canvas import MOST_LINES, contrast, natural, spread_out
from jaxmerge.spectra import singular_values

NAMES = ["cars", "digits", "signs"]
METHODS = ["average", "task_arithmetic", "ties", "tsv_merge"]


def make_table(tasks=6, seed=0, rows=METHODS):
    rng = np.random.default_rng(seed)
    names = ["aircraft", "textures", "digits", "house_numbers", "signs", "land_use"]
    accuracies = {name: rng.uniform(0.6, 0.9, tasks) for name in rows}
    return ResultTable(names[:tasks], rng.uniform(0.9, 1, tasks), accuracies)


@pytest.fixture(scope="module")
def trees():
    rng = np.random.default_rng(0)

    def tree():
        return {
            f"block_{i}": {
                "kernel": rng.normal(size=(6, 4)).astype(np.float32),
                "bias": rng.normal(size=4).astype(np.float32),
            }
            for i in (0, 1, 2, 10)
        }

    return tree(), [tree() for _ in NAMES]


@pytest.fixture(scope="module")
def merged(trees):
    base, models = trees
    return {"sum": jm.task_arithmetic(base, models), "mean": jm.average(models)}


def square(params):
    return sum(jnp.sum(layer["kernel"] ** 2) for layer in params.values())


def corners(text):
    """The corners of a text as it is drawn, (4, 2) in pixels."""
    turned = text.get_rotation() % 90
    if not turned:
        box = text.get_window_extent()
        return box.corners()[[0, 1, 3, 2]]
    assert text.get_rotation_mode() == "anchor"
    anchor = text.get_transform().transform(text.get_position())
    angle = np.radians(text.get_rotation())
    text.set_rotation(0)
    straight = text.get_window_extent().corners()[[0, 1, 3, 2]] - anchor
    text.set_rotation(np.degrees(angle))
    c, s = np.cos(angle), np.sin(angle)
    return straight @ np.array([[c, s], [-s, c]]) + anchor


def apart(a, b):
    """Whether an edge of one of two rectangles has the other one beyond it."""
    for box in (a, b):
        for edge in (box[1] - box[0], box[3] - box[0]):
            along, other = (np.sort(each @ edge) for each in (a, b))
            slack = 0.5 * np.linalg.norm(edge)  # Half a pixel.
            if along[-1] <= other[0] + slack or other[-1] <= along[0] + slack:
                return True
    return False


def check_texts(figure):
    """Checks that texts are in the figure, and none over another; returns them."""
    figure.draw_without_rendering()
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        draw = Text.draw

        def note(text, *arguments, **options):
            if text.get_visible() and text.get_text().strip():
                drawn.append(text)
            return draw(text, *arguments, **options)

        patch.setattr(Text, "draw", note)
        figure.draw_without_rendering()
    boxes = {text: corners(text) for text in drawn}
    for text, box in boxes.items():
        inside = (box >= -1).all() and (box <= figure.bbox.max + 1).all()
        assert inside, f"{text.get_text()!r} is cut off"
    for (one, box), (two, other) in itertools.combinations(boxes.items(), 2):
        assert apart(box, other), f"{one.get_text()!r} is over {two.get_text()!r}"
    return [text.get_text() for text in boxes]


def test_radar_is_relative_to_individual_models():
    table = make_table()
    figure = plots.radar(table, ["ties", "average"])
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    expected = 100 * table.rows["ties"] / table.individual
    np.testing.assert_allclose(lines["ties"].get_ydata()[:-1], expected)
    assert lines["ties"].get_ydata()[-1] == lines["ties"].get_ydata()[0]
    assert "tsv_merge" not in lines
    texts = check_texts(plots.radar(table))
    assert {*METHODS, *table.tasks, "100 %"} <= set(texts)
    assert figure.axes[0].get_rmin() < min(expected)


@pytest.mark.parametrize("tasks", [1, 3, 6])
def test_heat_map_is_the_table(tasks):
    table = make_table(tasks)
    figure = plots.heat_map(table)
    cells = figure.axes[0].get_images()[0].get_array()
    assert cells.shape == (len(METHODS) + 1, tasks + 1)
    np.testing.assert_allclose(cells[:-1, :-1], [100 * r for r in table.rows.values()])
    np.testing.assert_allclose(cells[-1, :-1], 100 * np.array(table.individual))
    np.testing.assert_allclose(cells[2, -1], 100 * table.rows["ties"].mean())
    texts = check_texts(figure)
    assert {*METHODS, *table.tasks, "individual", "mean", "accuracy, %"} <= set(texts)
    assert f"{100 * table.rows['ties'][0]:.1f}" in texts


def test_heat_map_has_tasks_held_out_and_own_after_the_mean():
    table = ResultTable(
        ["old", "a", "new", "b"],
        [0.9, 0.8, 0.7, 1.0],
        {"ties": [0.6, 0.7, 0.5, 0.8]},
        held_out=["new"],
        own=["old"],
    )
    figure = plots.heat_map(table)
    axes = figure.axes[0]
    titles = [label.get_text() for label in axes.get_xticklabels()]
    assert titles == ["a", "b", "mean", "new (held out)", "old (own)"]
    cells = axes.get_images()[0].get_array()
    np.testing.assert_allclose(cells, [[70, 80, 75, 50, 60], [80, 100, 90, 70, 90]])
    upright = [line.get_xdata()[0] for line in axes.get_lines()[:-1]]
    assert sorted(upright) == [1.5, 2.5, 3.5]
    check_texts(figure)


def test_cells_that_were_not_measured_are_empty():
    table = make_table(3)
    table.rows["ties"][1] = np.nan
    texts = check_texts(plots.heat_map(table))
    assert "nan" not in texts


def test_several_runs_are_averaged():
    table = make_table(3)
    runs = np.stack([table.rows["ties"], table.rows["average"]])
    both = table._replace(rows={"both": runs})
    cells = plots.heat_map(both).axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(cells[0], 100 * np.append(runs.mean(0), runs.mean()))
    line = plots.radar(both).axes[0].get_lines()[0]
    expected = 100 * runs.mean(0) / table.individual
    np.testing.assert_allclose(line.get_ydata()[:-1], expected)
    # Each run belongs to the individual models of the same run.
    paired = both._replace(individual=[[0.8, 0.9, 1.0], [1.0, 0.7, 0.9]])
    line = plots.radar(paired).axes[0].get_lines()[0]
    expected = 100 * (runs / paired.individual).mean(0)
    np.testing.assert_allclose(line.get_ydata()[:-1], expected)


@pytest.mark.parametrize(
    ("worst", "rings"),
    [(0.75, [76, 82, 88, 94, 100]), (0.02, [20, 40, 60, 80, 100])],
)
def test_rings_of_a_radar_are_where_they_say(worst, rings):
    table = ResultTable(["a", "b", "c"], [1, 1, 1], {"ties": [worst, 0.8, 0.9]})
    axes = plots.radar(table).axes[0]
    assert list(axes.get_yticks()) == rings
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"{r} %" for r in rings]


def test_a_radar_of_methods_above_all_individual_models():
    table = ResultTable(["a", "b", "c"], [0.5] * 3, {"ties": [0.6, 0.55, 0.53]})
    figure = plots.radar(table)
    assert figure.axes[0].get_rmin() < 100 < figure.axes[0].get_rmax()
    assert {"92 %", "100 %"} <= set(check_texts(figure))


def test_many_methods_and_long_names_have_room():
    rows = [f"method_{i}, calibrated" for i in range(24)]
    assert set(rows) <= set(check_texts(plots.heat_map(make_table(rows=rows))))


def test_accuracy_against_tasks_has_means_and_bands():
    tables = [make_table(2, 0), make_table(2, 1), make_table(6, 2)]
    figure = plots.accuracy_against_tasks(tables, ["ties", "average"])
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    of_two = [100 * table.normalised("ties") for table in tables[:2]]
    np.testing.assert_array_equal(lines["ties"].get_xdata(), [2, 6])
    expected = [np.mean(of_two), 100 * tables[2].normalised("ties")]
    np.testing.assert_allclose(lines["ties"].get_ydata(), expected)
    band = axes.collections[0].get_paths()[0].get_extents()
    assert band.y1 >= max(of_two) - 1e-9
    assert {"ties", "average", "individual"} <= set(check_texts(figure))


def test_rows_that_all_tables_have_are_drawn():
    tables = [make_table(2), make_table(3, rows=["ties"])]
    texts = check_texts(plots.accuracy_against_tasks(tables))
    assert "ties" in texts
    assert "average" not in texts


def test_tasks_held_out_are_not_among_those_merged():
    few, many = make_table(3), make_table(5, 1)
    table = make_table(5, 2)._replace(held_out=make_table(5).tasks[2:])
    (axes,) = plots.accuracy_against_tasks([table, many], ["ties"]).axes
    np.testing.assert_array_equal(axes.get_lines()[-1].get_xdata(), [2, 5])
    figure = plots.radar(many._replace(own=many.tasks[3:]))
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown == list(few.tasks)


def test_accuracy_against_bytes_labels_every_point():
    rows = [f"method_{i}" for i in range(12)]
    table = make_table(rows=rows)
    sizes = {name: 2_000_000 + 40_000 * i for i, name in enumerate(rows)}
    figure = plots.accuracy_against_bytes(table, sizes | {"individual": 12_000_000})
    (axes,) = figure.axes
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points[0], [2.0, 100 * table.normalised("method_0")])
    np.testing.assert_allclose(points[-1], [12.0, 100])
    front = axes.get_lines()[0].get_ydata()
    assert (np.diff(front) >= 0).all()
    assert front[-1] == pytest.approx(100)
    texts = check_texts(figure)
    assert {*rows, "individual", "stored for all 6 tasks, MB"} <= set(texts)


def test_cosine_matrix(trees):
    base, models = trees
    figure = plots.cosine_matrix(base, models, NAMES)
    image = figure.axes[0].get_images()[0]
    total = compare(base, models).total
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(image.get_array()[off], total.cosines[off])
    assert image.get_array().mask[~off].all()
    assert image.norm.vmin == -image.norm.vmax
    texts = check_texts(figure)
    assert f"|{total.norms[0]:.3g}|" in texts
    assert texts.count("signs") == 2


def test_cosines_of_nothing_are_drawn(trees):
    base, _ = trees
    check_texts(plots.cosine_matrix(base, [base, base], ["a", "b"]))


def test_sign_conflict(trees):
    base, models = trees
    figure = plots.sign_conflict(base, models)
    (axes,) = figure.axes
    result = compare(base, models)
    layers = ["block_0", "block_1", "block_2", "block_10"]
    widths = [bar.get_width() for bar in axes.patches]
    expected = [result.total, *(result.layers[layer] for layer in layers)]
    np.testing.assert_allclose(widths, [100 * part.sign_conflict for part in expected])
    assert axes.get_lines()[0].get_xdata()[0] == 75
    texts = check_texts(figure)
    assert texts.index("block_2") < texts.index("block_10")
    assert "random signs: 75.0 %" in texts
    agreeing = plots.sign_conflict(base, [models[0], models[0]])
    assert "0.0" in check_texts(agreeing)


def test_mask_overlap(trees):
    base, models = trees
    masks = jm.tall_masks(base, models)
    figure = plots.mask_overlap(masks, base=base, models=models)
    total = jm.mask_statistics(masks, base=base, models=models).total
    (axes,) = figure.axes
    first = [bars.patches[0] for bars in axes.containers]
    np.testing.assert_allclose([b.get_width() for b in first], 100 * total.agreement)
    np.testing.assert_allclose(first[-1].get_x() + first[-1].get_width(), 100)
    assert {"none", "1 task", "2", "all", "block_10"} <= set(check_texts(figure))


def test_the_legend_of_many_masks_is_read_along_its_lines():
    rng = np.random.default_rng(0)
    masks = [{"layer": {"kernel": rng.random((8, 8)) < 0.5}} for _ in range(20)]
    figure = plots.mask_overlap(masks)
    assert {"none", "1 task", "10", "19", "all"} <= set(check_texts(figure))
    texts = [t for legend in figure.legends for t in legend.get_texts()]
    place = {t.get_text(): t.get_window_extent().min for t in texts}
    assert place["none"][1] == pytest.approx(place["10"][1], abs=5)
    assert place["11"][1] == pytest.approx(place["all"][1], abs=5)
    assert place["none"][1] > place["11"][1] + 5
    assert place["1 task"][0] < place["2"][0] < place["10"][0]


def test_singular_spectra(trees, merged):
    base, models = trees
    options = {"panels": "matrix", "only": "block_1/.*"}
    figure = plots.singular_spectra(base, models, merged, **options)
    (axes,) = figure.axes
    found = singular_values(base, [*models, *merged.values()])["block_1/kernel"]
    drawn = [line.get_ydata() for line in axes.get_lines()]
    np.testing.assert_allclose(drawn, found)
    assert [line.get_label() for line in axes.get_lines()[-2:]] == ["sum", "mean"]
    by_layer = plots.singular_spectra(base, models, merged)
    assert [a.get_title() for a in by_layer.axes][-1] == "block_10"
    texts = check_texts(by_layer)
    assert {"each model", "sum", "mean", "singular value"} <= set(texts)


def test_spectra_of_several_ranks_are_averaged_and_zeros_left_out():
    base = {"a": {"up": np.zeros((4, 4)), "down": np.zeros((2, 2))}}
    model = {"a": {"up": np.diag([4.0, 4, 4, 0]), "down": np.diag([2.0, 2])}}
    rules = {".*": "io"}
    figure = plots.singular_spectra(base, [model], {"same": model}, matrices=rules)
    drawn = figure.axes[0].get_lines()[0].get_ydata()
    np.testing.assert_allclose(drawn, [3, 3, 3, 1])
    only = {"matrices": rules, "only": "a/up"}
    figure = plots.singular_spectra(base, [model], {"same": model}, **only)
    drawn = figure.axes[0].get_lines()[0].get_ydata()
    np.testing.assert_allclose(drawn, [4, 4, 4, np.nan])


@pytest.mark.parametrize(("best", "at"), [("max", 1.0), ("min", 2.0)])
def test_sweep_curves_mark_the_best(best, at):
    values, scores = [2.0, 0.0, 1.0], {"ties": [0.2, 0.5, 0.9], "sum": [0.1, 0.3, 0.8]}
    figure = plots.sweep_curves(values, scores, best=best, value="scale, 1")
    curve, mark = figure.axes[0].get_lines()[:2]
    np.testing.assert_array_equal(curve.get_xdata(), [0, 1, 2])
    np.testing.assert_array_equal(curve.get_ydata(), [0.5, 0.9, 0.2])
    assert mark.get_xdata()[0] == at
    texts = check_texts(figure)
    assert f"ties: {mark.get_ydata()[0]:#.3g} at {at:g}" in texts
    assert "scale, 1" in texts


def test_whole_scores_have_no_dot():
    texts = check_texts(plots.sweep_curves([0, 0.5], {"ties": [87.5, 100.0]}))
    assert "ties: 100 at 0.5" in texts


def test_sweeps_with_gaps_and_equal_ends():
    curve = [0.1, 0.5, np.nan]
    figure = plots.sweep_curves([0, 1, 2], {f"method {i}": curve for i in range(8)})
    assert len(check_texts(figure)) > 8


def test_coefficients_per_layer():
    coefficients = {"block_10": [0.1, -0.5], "block_2": np.array([[1, 0], [0.25, 2]])}
    figure = plots.coefficients_per_layer(coefficients, ["cars", "digits"])
    image = figure.axes[0].get_images()[0]
    np.testing.assert_array_equal(image.get_array(), [[1, 0], [0.25, 2], [0.1, -0.5]])
    assert (image.norm.vmin, image.norm.vmax) == (-2, 2)
    assert {"block_2[1]", "block_10", "cars", "-0.50"} <= set(check_texts(figure))


def test_learned_rules_are_coefficients():
    rules = {r"layers\.0\.w": np.float32(0.5), ".*": 1.0}
    texts = check_texts(plots.coefficients_per_layer(rules, ["scale"]))
    assert {"layers.0.w", ".*", "0.50", "scale"} <= set(texts)


def test_landscape_shows_the_scan_and_marks_models(trees, merged):
    base, (a, b, _) = trees
    names = ("start", "cars", "signs")
    options = {"names": names, "points": 4, "memory": "1MB"}
    figure = plots.landscape(square, base, a, b, merged, **options, label="loss")
    axes = figure.axes[0]
    scan = scan_plane(square, base, a, b, merged, **options)
    (surface,) = (c for c in axes.collections if isinstance(c, QuadMesh))
    np.testing.assert_allclose(surface.get_array(), scan.scores)
    dots = [c for c in axes.collections if isinstance(c, PathCollection)]
    places = [dot.get_offsets()[0] for dot in dots]
    np.testing.assert_allclose(places, [mark[:2] for mark in scan.marks.values()])
    own = [dot.get_array()[0] for dot in dots]
    np.testing.assert_allclose(own, [mark.score for mark in scan.marks.values()])
    assert axes.get_aspect() == 1
    assert {"start", "cars", "signs", "sum", "mean", "loss"} <= set(check_texts(figure))


def test_a_flat_landscape_is_drawn(trees):
    base, (a, b, _) = trees
    scan = scan_plane(lambda params: jnp.ones(()), base, a, b, points=2)
    assert {"base", "A", "B", "loss"} <= set(
        check_texts(plots.draw_landscape(scan, label="loss"))
    )


def test_pictures_are_transparent_and_show_themselves(tmp_path):
    figure = plots.heat_map(make_table())
    content, size = figure._repr_png_()
    (tmp_path / "heat.png").write_bytes(content)
    pixels = imread(tmp_path / "heat.png")
    assert pixels.shape[1] == pytest.approx(2 * size["width"], abs=2)
    assert pixels[0, 0, 3] == 0
    assert figure._repr_png_()[1] == size


def test_matplotlib_is_optional_and_left_as_it_was():
    code = """
import sys
import jaxmerge, jaxmerge.analysis, jaxmerge.landscape, jaxmerge.spectra
import jaxmerge.evaluation
assert "matplotlib" not in sys.modules
sys.modules["matplotlib"] = None
try:
    jaxmerge.plots
except ImportError as error:
    assert "pip install 'jaxmerge[plots]'" in str(error), error
else:
    raise AssertionError
del sys.modules["matplotlib"]
import matplotlib
before = matplotlib.rcParams.copy()
table = jaxmerge.evaluation.ResultTable(["a", "b", "c"], [1, 1, 1], {"m": [0, 1, 1]})
jaxmerge.plots.radar(table)
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams.copy() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ink_has_the_same_contrast_on_white_and_dark():
    def luminance(grey):
        return ((grey / 255 + 0.055) / 1.055) ** 2.4

    ink, dark = luminance(int(plots.canvas.INK[1:3], 16)), luminance(0x11)
    assert 1.05 / (ink + 0.05) > 4.2
    assert (ink + 0.05) / (dark + 0.05) > 4.2
    assert (contrast("yellow"), contrast("navy")) == ("black", "white")


def test_names_and_labels_keep_order():
    assert sorted(["b10", "b2", "a", "b2/x"], key=natural) == ["a", "b2", "b2/x", "b10"]
    moved = spread_out([3.0, 1.0, 1.2, 1.1], gap=1.0)
    np.testing.assert_allclose(np.sort(np.diff(np.sort(moved))), 1)
    assert np.argsort(moved).tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda t: plots.radar(t, ["pcb"]),
            "radar: the table has no row 'pcb'; it has",
        ),
        (lambda t: plots.radar(t, []), "radar: there are 0 lines to draw"),
        (
            lambda t: plots.radar(make_table(rows=map(str, range(MOST_LINES + 1)))),
            r"radar: there are 13 lines .* choose with rows=\[\.\.\.\]",
        ),
        (lambda t: plots.radar(make_table(2)), "radar: the table has 2 tasks"),
        (lambda t: plots.heat_map(t, ["pcb"]), "heat_map: the table has no row 'pcb'"),
        (lambda t: plots.accuracy_against_tasks([t]), r"the tables have \[6\] tasks"),
        (lambda t: plots.accuracy_against_tasks([]), r"the tables have \[\] tasks"),
        (
            lambda t: plots.accuracy_against_tasks([t, make_table(2)], ["pcb"]),
            "accuracy_against_tasks: the table has no row 'pcb'",
        ),
        (lambda t: plots.accuracy_against_bytes(t, {}), "nbytes is {}"),
        (lambda t: plots.accuracy_against_bytes(t, {"ties": 0}), "nbytes is"),
        (lambda t: plots.accuracy_against_bytes(t, {"pcb": 1}), "no row 'pcb'"),
        (lambda t: plots.cosine_matrix({}, [{}], ["a"]), "there are 1 models and 1"),
        (lambda t: plots.cosine_matrix({}, [{}, {}], ["a"]), "2 models and 1 names"),
        (lambda t: plots.sign_conflict({}, [{}]), "sign_conflict: 1 models have no"),
        (
            lambda t: plots.singular_spectra(
                {"kernel": np.zeros((2, 2))},
                [{"kernel": np.ones((2, 2))}],
                {"m": {"kernel": np.ones((2, 2))}},
                only="other",
            ),
            "only is 'other', which matches none of the matrices; they are kernel",
        ),
        (lambda t: plots.singular_spectra({}, [{}], {}), "there are 0 lines to draw"),
        (lambda t: plots.sweep_curves([1], {"m": [1, 2]}), r"'m'\] has shape \(2,\)"),
        (lambda t: plots.sweep_curves([1], {"m": [np.nan]}), "not all NaN"),
        (lambda t: plots.sweep_curves([1], {"m": [1]}, best="top"), "best"),
        (
            lambda t: plots.coefficients_per_layer({"up": [1, 2]}, ["a"]),
            r"those of 'up' have shape \(2,\), there are 1 names",
        ),
        (lambda t: plots.coefficients_per_layer({}, ["a"]), "there are none"),
    ],
)
def test_misuse_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw(make_table())
