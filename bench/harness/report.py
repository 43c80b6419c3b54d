"""How a benchmark shows its findings: tables on the screen and in Markdown, and a bar meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

TABLE_WIDTH = 110
NO_GPU = 2  # exit status

Titled = tuple[str, Sequence[str], Iterable[Iterable[Sequence[str]]]]  # as `table` and `markdown` take it


def show(*renderables: Any) -> None:
    """Print at a fixed width, so that a file reads like the terminal."""
    Console(width=TABLE_WIDTH, highlight=False, force_terminal=False).print(*renderables, sep="\n")


def table(title: str, columns: Sequence[str], sections: Iterable[Iterable[Sequence[str]]]) -> Table:
    """A table of sections of rows. The first two columns are words, the others figures."""
    result = Table(title=title, title_justify="left", title_style="bold", expand=True)
    for place, column in enumerate(columns):
        result.add_column(column, justify="left" if place < 2 else "right")
    for section in sections:
        for row in section:
            result.add_row(*row)
        result.add_section()
    return result


def markdown(title: str, columns: Sequence[str], sections: Iterable[Iterable[Sequence[str]]]) -> str:
    """The table of :func:`table` in Markdown."""
    return f"**{title}**\n\n" + markdown_table(columns, [row for section in sections for row in section])


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 2) -> str:
    """A table in Markdown without a title. The first columns are words, the others figures."""
    rules = ["---" if place < words else "---:" for place in range(len(columns))]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(rules) + "|"]
    for row in rows:
        cells = [*row, *[""] * (len(columns) - len(row))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def one_line(error: Exception) -> str:
    """An error of other software, as long as a table has room for it."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def progress(rank: int, title: str, total: int) -> tqdm:
    """A bar on rank 0's stderr.

    tqdm redraws with a bare carriage return. mpirun makes stderr a pipe, where rich would show
    nothing until the end.
    """
    return tqdm(total=total, desc=title, disable=rank != 0, mininterval=0.5, leave=False)
