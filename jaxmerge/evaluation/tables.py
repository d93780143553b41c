"""Tables of accuracies: models by tasks, absolute and relative to individual models."""

import csv
import functools
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Values = Sequence[float] | Sequence[Sequence[float]] | np.ndarray
"""Accuracies on all tasks, (T,), or those of several runs, (runs, T)."""


class ResultTable(NamedTuple):
    """Accuracies of models on tasks.

    Runs are repetitions, of other seeds, say. Where there are several, numbers are
    means over them, with the standard deviation of a single run beside. NaN is what was
    not measured.

    Names must not stand for two things: no row is called "individual", and no task or
    note like another column. What is computed or written of other tables raises
    ValueError.

    Attributes:
        tasks: the names of all tasks, T of them.
        individual: the accuracy on each task of the model fine-tuned on it alone, (T,)
            or (runs, T). On the start's own tasks, that of the start.
        rows: the accuracies, (T,) or (runs, T), of each other model, by name, in the
            order shown.
        notes: further columns by title, such as the coefficient chosen: what to say of
            each row, by its name. Columns without an entry are not shown.
        data: what data each method was allowed to see, by the name of its row: a column
            "data", if there is an entry.
        held_out: those of the tasks that no merged model was fine-tuned on. They show
            how a merge generalises, and do not count in the summaries.
        own: those of the tasks that the start was trained on. They show what a merge
            forgets, and do not count in the summaries.
        references: rows that are no competitors, such as the start: none is marked as
            the best.
        summaries: the columns that sum up all other tasks: "mean", "norm." (the mean of
            accuracies divided by those of the individual models) and "worst" (the least
            of these).
    """

    tasks: Sequence[str]
    individual: Values
    rows: Mapping[str, Values]
    notes: Mapping[str, Mapping[str, str]] = {}
    data: Mapping[str, str] = {}
    held_out: Sequence[str] = ()
    own: Sequence[str] = ()
    references: Sequence[str] = ()
    summaries: Sequence[str] = ("mean", "norm.", "worst")

    @property
    def seen(self) -> list[str]:
        """The tasks that the merged models were fine-tuned on."""
        return [task for task in self.tasks if task not in (*self.held_out, *self.own)]

    def runs(self, name: str) -> np.ndarray:
        """The accuracies of a row in each of its runs, (runs, T).

        Raises:
            ValueError: the row has not one accuracy for each task.
        """
        self._check_names()
        values = self.individual if name == "individual" else self.rows[name]
        runs = np.atleast_2d(np.asarray(values, float))
        if runs.shape[1:] != (len(self.tasks),):
            raise ValueError(
                f"row {name!r} has accuracies of shape {np.shape(values)}; give one "
                f"for each of {len(self.tasks)} tasks, or such rows by run."
            )
        return runs

    def relative_runs(self, name: str) -> np.ndarray:
        """`runs` divided by the individual models', run by run if there are as many.

        Raises:
            ValueError: both have several runs, of different number.
        """
        runs, individual = self._paired(name)
        return runs / individual

    def mean(self, name: str) -> float:
        """The mean accuracy of a row over the seen tasks, and over runs."""
        return _centre(self._summary(name, "mean"))

    def normalised(self, name: str) -> float:
        """The mean over the seen tasks of accuracy by the individual model's."""
        return _centre(self._summary(name, "norm."))

    def worst(self, name: str) -> float:
        """The least, over the seen tasks, of what `normalised` averages."""
        return _centre(self._summary(name, "worst"))

    def spread(self, name: str, summary: str = "mean") -> float:
        """The standard deviation of a summary over runs; NaN for a single one."""
        return _spread(self._summary(name, summary))

    def forgetting(self, name: str) -> float:
        """By how much a row is below the start on its own tasks, in the mean.

        Run by run as in `relative_runs`, with its errors.
        """
        return _centre(self._forgetting(name))

    def relative(self) -> "ResultTable":
        """The same table with all accuracies divided by those of individual models."""
        rows = {name: self.relative_runs(name) for name in self.rows}
        ones = np.ones(len(self.tasks))
        return self._replace(rows=rows, individual=ones)

    def columns(self) -> dict[str, Callable[[str], np.ndarray]]:
        """The columns of numbers by title, in the order of `cells`.

        Each is a function from the name of a row to its values by run, (runs,).
        """
        self._check_names()

        def of(tasks: Sequence[str]) -> dict[str, Callable[[str], np.ndarray]]:
            return {
                self._title(task): lambda row, place=place: self.runs(row)[:, place]
                for task, place in zip(tasks, self._places(tasks), strict=True)
            }

        columns = of(self.seen)
        for summary in self.summaries:
            columns[summary] = functools.partial(self._summary, summary=summary)
        columns |= of(self.held_out) | of(self.own)
        if self.own:
            columns["forgetting"] = self._forgetting
        return columns

    def cells(self) -> list[list[str]]:
        """The table as text: a header, a row per model, the individual models last.

        All in per cent. First the seen tasks and their `summaries`, then held-out
        tasks and the start's own, and how much of these is forgotten.
        """
        return self._cells(lambda text, rank: text)

    def markdown(self, *, marks: bool = True) -> str:
        """The table in Markdown, in per cent.

        Args:
            marks: whether the best of each column is bold, the second underlined, by
                the digits that are shown.

        Example:
            >>> rows = {"start": [0.45, 0.7], "merged": [0.81, 0.9]}
            >>> print(ResultTable(["a", "b"], [0.9, 1.0], rows).markdown(marks=False))
            | model | a | b | mean | norm. | worst |
            |---|---:|---:|---:|---:|---:|
            | start | 45.0 | 70.0 | 57.5 | 60.0 | 50.0 |
            | merged | 81.0 | 90.0 | 85.5 | 90.0 | 90.0 |
            | individual | 90.0 | 100.0 | 95.0 | 100.0 | 100.0 |
        """
        styles = {1: "**{}**", 2: "<u>{}</u>"} if marks else {}
        header, *rows = self._cells(
            lambda text, rank: _styled(styles, _as_markdown(text), rank)
        )
        ruler = "|---|" + "---:|" * (len(header) - 1)
        cells = [[*map(_as_markdown, header)], *rows]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        return "\n".join([lines[0], ruler, *lines[1:]])

    def latex(self, *, marks: bool = True) -> str:
        r"""The table as a LaTeX `tabular` with the rules of booktabs, in per cent.

        Args:
            marks: as in `markdown`.

        Example:
            >>> table = ResultTable(["a_b"], [0.8], {"x": [0.4]}, summaries=["mean"])
            >>> print(table.latex())
            \begin{tabular}{lrr}
            \toprule
            model & a\_b & mean \\
            \midrule
            x & \textbf{40.0} & \textbf{40.0} \\
            \midrule
            individual & 80.0 & 80.0 \\
            \bottomrule
            \end{tabular}
        """
        styles = {1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"} if marks else {}
        header, *rows = self._cells(
            lambda text, rank: _styled(styles, _as_latex(text), rank)
        )
        lines = [" & ".join(row) + r" \\" for row in ([*map(_as_latex, header)], *rows)]
        return "\n".join(
            [
                rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:-1],
                r"\midrule",
                lines[-1],
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )

    def csv(self) -> str:
        """Every run of every row, as fractions in full precision, with all columns."""
        columns = self.columns()
        notes = self._texts()
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "run", *columns, *notes])
        for name in [*self.rows, "individual"]:
            values = [column(name) for column in columns.values()]
            said = [of_rows.get(name, "") for of_rows in notes.values()]
            for run in range(len(self.runs(name))):
                numbers = [
                    "" if np.isnan(x[run]) else repr(float(x[run])) for x in values
                ]
                writer.writerow([name, run, *numbers, *said])
        return file.getvalue()

    def json(self) -> str:
        """All of the table, for `from_json`."""
        self._check_names()
        fields = self._asdict()
        fields["individual"] = _as_lists(self.individual)
        fields["rows"] = {name: _as_lists(row) for name, row in self.rows.items()}
        plain = {
            name: dict(value) if isinstance(value, Mapping) else list(value)
            for name, value in fields.items()
        }
        plain["notes"] = {title: dict(rows) for title, rows in self.notes.items()}
        return json.dumps(plain, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "ResultTable":
        """The table that `json` has written.

        Raises:
            ValueError: it has not.

        Example:
            >>> table = ResultTable(["a"], [1.0], {"start": [0.5]})
            >>> ResultTable.from_json(table.json()).rows
            {'start': [0.5]}
        """
        try:
            fields = json.loads(text)
            fields["individual"] = _as_values(fields["individual"])
            rows = {name: _as_values(row) for name, row in fields["rows"].items()}
            return cls(**fields | {"rows": rows})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no table that json() wrote: {error}") from error

    def _cells(self, style: Callable[[str, int], str]) -> list[list[str]]:
        """The table as text, each number as `style` has it by its rank in its column.

        The rank is 1 for the best, 2 for the next and 0 for all others.
        """
        columns, notes = self.columns(), self._texts()
        names = [*self.rows, "individual"]
        shown = []
        for title, column in columns.items():
            values = {name: column(name) for name in names}
            numbers = {name: round(100 * _centre(x), 1) for name, x in values.items()}
            sign = 1 if title == "forgetting" else -1
            competing = {
                sign * x
                for name, x in numbers.items()
                if name not in ("individual", *self.references) and not np.isnan(x)
            }
            ranked = sorted(competing)[:2]
            shown.append([title])
            for name in names:
                best = sign * numbers[name] in ranked and name not in self.references
                rank = ranked.index(sign * numbers[name]) + 1 if best else 0
                rank = 0 if name == "individual" else rank
                shown[-1].append(style(_text(values[name]), rank))
        said = [
            [title, *(style(of_rows.get(name, ""), 0) for name in names)]
            for title, of_rows in notes.items()
        ]
        first = ["model", *(style(name, 0) for name in names)]
        return [list(row) for row in zip(first, *shown, *said, strict=True)]

    def _texts(self) -> dict[str, Mapping[str, str]]:
        """The columns of text by title, those that say something."""
        texts = {"data": self.data, **self.notes}
        return {title: of_rows for title, of_rows in texts.items() if of_rows}

    def _summary(self, name: str, summary: str) -> np.ndarray:
        """A summary of each run, (runs,)."""
        places = self._places(self.seen)
        if summary == "mean":
            return self.runs(name)[:, places].mean(axis=1)
        relative = self.relative_runs(name)[:, places]
        if summary == "norm.":
            return relative.mean(axis=1)
        if summary == "worst":
            return relative.min(axis=1)
        raise ValueError(
            f"unknown summary {summary!r}; there are 'mean', 'norm.' and 'worst'."
        )

    def _places(self, tasks: Sequence[str]) -> list[int]:
        if unknown := [task for task in tasks if task not in self.tasks]:
            raise ValueError(
                f"{unknown[0]!r}, held out or the start's own, is none of the tasks: "
                f"{', '.join(self.tasks)}."
            )
        return [list(self.tasks).index(task) for task in tasks]

    def _forgetting(self, name: str) -> np.ndarray:
        places = self._places(self.own)
        runs, start = self._paired(name)
        return (start - runs)[:, places].mean(axis=1)

    def _paired(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The runs of a row, and as many of the individual models or one for all."""
        runs, individual = self.runs(name), self.runs("individual")
        if 1 < len(individual) != len(runs) > 1:
            raise ValueError(
                f"row {name!r} has {len(runs)} runs, the individual models have "
                f"{len(individual)}; give as many, or one."
            )
        if len(individual) != len(runs):
            individual = individual.mean(axis=0, keepdims=True)
        return runs, individual

    def _title(self, task: str) -> str:
        if task in self.held_out:
            return f"{task} (held out)"
        return f"{task} (own)" if task in self.own else task

    def _check_names(self) -> None:
        if "individual" in self.rows:
            raise ValueError(
                "a row is called 'individual', as the individual models are; rename it."
            )
        titles = ["model", "run", "data", "forgetting", *self.summaries, *self.notes]
        titles += map(self._title, [*self.seen, *self.held_out, *self.own])
        for name, times in (Counter(titles) | Counter(self.tasks)).items():
            if times > 1:
                raise ValueError(
                    f"{name!r} would be the title of {times} columns; give each task "
                    f"and note a name of its own, other than {', '.join(titles[:4])} "
                    "and those of the summaries, and let a task be of one kind."
                )


def _centre(runs: np.ndarray) -> float:
    return float(np.mean(runs))


def _spread(runs: np.ndarray) -> float:
    return float(np.std(runs, ddof=1)) if len(runs) > 1 else float("nan")


def _text(runs: np.ndarray) -> str:
    """A number, or the mean of several and their spread, in per cent."""
    centre, spread = _centre(runs), _spread(runs)
    if np.isnan(centre):
        return ""
    number = f"{100 * centre:.1f}"
    return number if np.isnan(spread) else f"{number} ± {100 * spread:.1f}"


def _styled(styles: Mapping[int, str], text: str, rank: int) -> str:
    return styles[rank].format(text) if text and rank in styles else text


def _as_markdown(text: str) -> str:
    return text.replace("|", r"\|")


def _as_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}"}
    special |= {"^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)


def _as_lists(values: Values) -> Any:
    """Numbers as JSON has them, which knows no NaN."""
    plain = np.asarray(values, float)
    numbers = plain.astype(object)
    numbers[np.isnan(plain)] = None
    return numbers.tolist()


def _as_values(lists: Any) -> Any:
    """Those that `_as_lists` made JSON of."""
    return np.asarray(lists, float).tolist()
