"""Tables: known means, marks, runs, and back from JSON."""

import csv
import io

import numpy as np
import pytest

from jaxmerge.evaluation import ResultTable

TASKS = ["a", "b", "new", "old"]
TABLE = ResultTable(
    TASKS,
    individual=[0.8, 0.5, 0.9, 0.6],
    rows={
        "start": [0.2, 0.3, 0.4, 0.6],
        "plain": [0.4, 0.4, 0.5, 0.5],
        "better": [[0.6, 0.4, 0.5, 0.4], [0.7, 0.3, 0.7, 0.2]],
    },
    notes={"scale": {"plain": "0.3"}, "never": {}},
    data={"better": "16 inputs"},
    held_out=["new"],
    own=["old"],
    references=["start"],
)


def test_summaries_are_of_seen_tasks_only():
    assert TABLE.seen == ["a", "b"]
    assert TABLE.mean("plain") == pytest.approx(0.4)
    assert TABLE.normalised("plain") == pytest.approx((0.5 + 0.8) / 2)
    assert TABLE.worst("plain") == pytest.approx(0.5)
    assert TABLE.forgetting("plain") == pytest.approx(0.1)
    assert TABLE.forgetting("start") == 0
    assert np.isnan(TABLE.spread("plain"))


def test_runs_are_summed_up_one_by_one_and_then_averaged():
    assert TABLE.mean("better") == pytest.approx(0.5)
    assert TABLE.spread("better") == pytest.approx(0, abs=1e-12)
    assert TABLE.worst("better") == pytest.approx((0.75 + 0.6) / 2)
    assert TABLE.spread("better", "worst") == pytest.approx(0.15 / np.sqrt(2))
    assert TABLE.forgetting("better") == pytest.approx((0.2 + 0.4) / 2)
    # Each run belongs to the individual models of the same run.
    paired = TABLE._replace(individual=[[0.6, 0.4, 1, 1], [0.7, 0.3, 1, 1]])
    assert paired.normalised("better") == 1
    assert paired.worst("better") == 1
    assert paired.normalised("plain") == pytest.approx((0.4 / 0.65 + 0.4 / 0.35) / 2)


def test_markdown():
    assert TABLE.markdown().splitlines() == [
        "| model | a | b | mean | norm. | worst | new (held out) | old (own) "
        "| forgetting | data | scale |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| start | 20.0 | 30.0 | 25.0 | 42.5 | 25.0 | 40.0 | 60.0 | 0.0 |  |  |",
        "| plain | <u>40.0</u> | **40.0** | <u>40.0</u> | <u>65.0</u> | <u>50.0</u> "
        "| <u>50.0</u> | **50.0** | **10.0** |  | 0.3 |",
        "| better | **65.0 ± 7.1** | <u>35.0 ± 7.1</u> | **50.0 ± 0.0** "
        "| **75.6 ± 2.7** | **67.5 ± 10.6** | **60.0 ± 14.1** | <u>30.0 ± 14.1</u> "
        "| <u>30.0 ± 14.1</u> | 16 inputs |  |",
        "| individual | 80.0 | 50.0 | 65.0 | 100.0 | 100.0 | 90.0 | 60.0 | 0.0 |  |  |",
    ]
    plain = TABLE.markdown(marks=False)
    assert "*" not in plain
    assert "<u>" not in plain
    assert plain == TABLE.markdown().replace("*", "").replace("<u>", "").replace(
        "</u>", ""
    )


def test_equals_are_marked_together_by_the_digits_shown():
    table = ResultTable(
        ["a"],
        [1.0],
        {"x": [0.70001], "y": [0.7], "z": [0.6], "w": [0.5]},
        summaries=[],
    )
    assert table.markdown().splitlines()[2:] == [
        "| x | **70.0** |",
        "| y | **70.0** |",
        "| z | <u>60.0</u> |",
        "| w | 50.0 |",
        "| individual | 100.0 |",
    ]


def test_the_relative_table_is_in_shares_of_individual_models():
    relative = TABLE.relative()
    assert relative.runs("plain").tolist() == pytest.approx(
        np.array([[0.5, 0.8, 0.5 / 0.9, 0.5 / 0.6]])
    )
    assert relative.mean("better") == pytest.approx(TABLE.normalised("better"))
    assert relative.cells()[-1][1:5] == ["100.0"] * 4


def test_bars_in_names_are_escaped_in_markdown():
    notes = {"p|q": {"x|y": "1|2"}}
    table = ResultTable(["a|b"], [1.0], {"x|y": [0.5]}, notes, summaries=[])
    assert table.markdown().splitlines() == [
        r"| model | a\|b | p\|q |",
        "|---|---:|---:|",
        r"| x\|y | **50.0** | 1\|2 |",
        "| individual | 100.0 |  |",
    ]


def test_latex():
    table = TABLE._replace(notes={"scale": {"plain": "10 % & #1_a"}})
    lines = table.latex().splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrrrrrrr}"
    assert lines[2].startswith("model & a & b & mean & norm. & worst & new (held out)")
    assert r"\underline{40.0} & \textbf{40.0} &" in lines[5]
    assert lines[5].endswith(r"10 \% \& \#1\_a \\")
    assert r"\textbf{65.0 $\pm$ 7.1}" in lines[6]
    assert lines[7:] == [r"\midrule", lines[8], r"\bottomrule", r"\end{tabular}"]
    assert all(line.count(" & ") == 10 for line in lines if line.endswith(r"\\"))


def test_csv_has_every_run_in_full_precision():
    rows = list(csv.DictReader(io.StringIO(TABLE.csv())))
    assert [(row["model"], row["run"]) for row in rows] == [
        ("start", "0"),
        ("plain", "0"),
        ("better", "0"),
        ("better", "1"),
        ("individual", "0"),
    ]
    assert float(rows[3]["a"]) == 0.7
    assert float(rows[2]["worst"]) == 0.6 / 0.8
    assert rows[3]["data"] == "16 inputs"
    assert rows[1]["scale"] == "0.3"


def test_json_comes_back(tmp_path):
    rows = dict(TABLE.rows) | {"partly": np.array([0.1, np.nan, 0.2, 0.3])}
    table = TABLE._replace(rows=rows)
    again = ResultTable.from_json(table.json())
    assert "NaN" not in table.json()
    assert again.markdown() == table.markdown()
    assert again.csv() == table.csv()
    assert again.json() == table.json()
    for text in ("[]", "{}", "no", '{"tasks": []}', table.json()[:-5]):
        with pytest.raises(ValueError, match="this is no table that json"):
            ResultTable.from_json(text)


def test_what_was_not_measured_is_left_blank_and_not_averaged_over():
    table = ResultTable(["a", "b"], [1, 1], {"x": [0.5, np.nan], "y": [0.4, 0.3]})
    assert table.cells()[1] == ["x", "50.0", "", "", "", ""]
    assert table.markdown().splitlines()[3].startswith("| y | <u>40.0</u> | **30.0** |")


def test_errors():
    with pytest.raises(ValueError, match=r"row 'x' has accuracies of shape \(1,\)"):
        ResultTable(["a", "b"], [1, 1], {"x": [1]}).markdown()
    with pytest.raises(ValueError, match=r"row 'better' has 2 runs, .* 3"):
        TABLE._replace(individual=np.ones((3, 4))).markdown()
    with pytest.raises(ValueError, match=r"'nw', held out .* none of the tasks: a, b"):
        TABLE._replace(held_out=["nw"]).markdown()
    with pytest.raises(ValueError, match=r"row 'better' has 2 runs, .* 3"):
        TABLE._replace(individual=np.ones((3, 4))).forgetting("better")
    with pytest.raises(ValueError, match="unknown summary 'median'"):
        TABLE._replace(summaries=["median"]).markdown()


@pytest.mark.parametrize("ask", ["markdown", "latex", "cells", "csv", "json"])
def test_names_stand_for_one_thing(ask):
    def check(message, **changes):
        with pytest.raises(ValueError, match=message):
            getattr(TABLE._replace(**changes), ask)()

    check("row is called 'individual', .* rename it", rows={"individual": [1.0] * 4})
    for title in ("mean", "norm.", "worst", "forgetting", "data", "model", "run", "b"):
        tasks = [title, *TASKS[1:]]
        check(f"'{title}' would be the title of 2 columns; give each", tasks=tasks)
        if title != "b":
            check(f"'{title}' would be", notes={title: {"plain": "1"}})
    check(r"'new \(held out\)' would be", tasks=["new (held out)", *TASKS[1:]])
    check(r"'new \(held out\)' would be", own=["new", "old"])
    check("'new' would be", tasks=["new", *TASKS[1:]])
    # A summary that is not shown leaves its title free.
    tasks = ["worst", *TASKS[1:]]
    getattr(TABLE._replace(tasks=tasks, summaries=["mean"]), ask)()


def test_tasks_of_equal_names_have_no_numbers():
    table = ResultTable(["a", "a"], [1, 1], {"x": [0.5, 0.7]})
    for number in (table.mean, table.normalised, table.worst, table.runs):
        with pytest.raises(ValueError, match="'a' would be the title of 2 columns"):
            number("x")
