"""Tables of accuracies: models by tasks, absolute and relative to individual models."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class ResultTable(NamedTuple):
    """Accuracies of models on tasks.

    Attributes:
        tasks: the names of the tasks, T of them.
        individual: the accuracy on each task of the model fine-tuned on it alone, (T,).
        rows: the accuracies (T,) of each other model, by name, in the order shown.
        notes: further columns by title, such as the coefficient chosen: what to say of
            each row, by its name. Columns without an entry are not shown.
    """

    tasks: Sequence[str]
    individual: Sequence[float] | np.ndarray
    rows: Mapping[str, Sequence[float] | np.ndarray]
    notes: Mapping[str, Mapping[str, str]] = {}

    def mean(self, name: str) -> float:
        """The mean accuracy of a row over tasks."""
        return float(np.mean(self.rows[name]))

    def normalised(self, name: str) -> float:
        """The mean over tasks of accuracy divided by the individual model's."""
        return float(np.mean(np.divide(self.rows[name], self.individual)))

    def cells(self) -> list[list[str]]:
        """The table as text: a header, a row per model, the individual models last.

        All in per cent; "norm." is `normalised`.
        """
        notes = {title: of_rows for title, of_rows in self.notes.items() if of_rows}
        header = ["model", *self.tasks, "mean", "norm.", *notes]
        everything = self._replace(rows={**self.rows, "individual": self.individual})
        return [header] + [
            [
                name,
                *(f"{100 * accuracy:.1f}" for accuracy in accuracies),
                f"{100 * everything.mean(name):.1f}",
                f"{100 * everything.normalised(name):.1f}",
                *(of_rows.get(name, "") for of_rows in notes.values()),
            ]
            for name, accuracies in everything.rows.items()
        ]

    def markdown(self) -> str:
        """The table in Markdown, in per cent.

        Example:
            >>> table = ResultTable(["a", "b"], [0.9, 1.0], {"start": [0.45, 0.7]})
            >>> print(table.markdown())
            | model | a | b | mean | norm. |
            |---|---:|---:|---:|---:|
            | start | 45.0 | 70.0 | 57.5 | 60.0 |
            | individual | 90.0 | 100.0 | 95.0 | 100.0 |
        """
        header, *rows = self.cells()
        ruler = "|---|" + "---:|" * (len(header) - 1)
        lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
        return "\n".join([lines[0], ruler, *lines[1:]])
