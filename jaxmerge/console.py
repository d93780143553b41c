"""What commands share: tables, bars, sizes and names as people read them."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

# As in the command line itself, rich is loaded when it is needed.
if TYPE_CHECKING:
    from rich.console import Console


class CommandError(ValueError):
    """A command that cannot be carried out."""


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[int, int, str], None]]:
    """Shows a bar on a terminal, elsewhere a line per tenth of the output."""
    console = _console()
    if not console.is_terminal:
        tenth = -1

        def show(done: int, total: int, name: str) -> None:
            nonlocal tenth
            if 10 * done // max(total, 1) > tenth:
                tenth = 10 * done // max(total, 1)
                print(f"{readable_size(done)} of {readable_size(total)}: {name}")

        yield show
        return

    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", markup=False),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", name="")
        yield lambda done, total, name: bar.update(
            task, completed=done, total=total, name=name[-40:]
        )


def short_names(command: str, paths: Sequence[str]) -> list[str]:
    """The last parts of paths; whole paths where these are not distinct."""
    from pathlib import Path

    if len(set(paths)) < len(paths):
        raise CommandError(f"{command}: a model is given twice")
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def _console() -> "Console":
    from rich.console import Console

    # Where no terminal sets a width, rich would break lines at 80 characters.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
    return Console(width=width, highlight=False, markup=False)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table with a line under its header."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def parse_size(option: str, size: str) -> int:
    """The number of bytes that an option of a command gives.

    Raises:
        CommandError: it is no size.
    """
    from jaxmerge.recipe_syntax import size_in_bytes

    try:
        return size_in_bytes(size)
    except ValueError as error:
        raise CommandError(f"{option} is {error}") from None


def readable_size(nbytes: int) -> str:
    """A number of bytes as people say it, such as "1.2 GB"."""
    from rich.filesize import decimal

    return decimal(nbytes)
