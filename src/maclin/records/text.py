"""Records as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Config

Cell = str | float | None
"""One cell of a table: words, or a number that is shown with three figures; None is shown as n/a."""


def text_table(columns: tuple[str, ...], rows: Sequence[tuple[Cell, ...]]) -> str:
    """A table as lines of text: words to the left, numbers to the right with three figures, None as n/a."""
    body = [
        ["n/a" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *body, strict=True)]
    left = [all(isinstance(row[i], str | None) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if flush else cell.rjust(width)
            for cell, width, flush in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in [list(columns), *body]
    )


def shown_options(config: Config, brackets: bool = False) -> str:
    """Options as ``name=value``, by commas; with ``brackets`` as words to be put behind a name.

    Nested ones are left out: a hybrid is known by its window and sinks, and the rest is in the record.
    """
    shown = ", ".join(
        f"{name}={'+'.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in config.items()
        if not isinstance(value, dict)
    )
    return f" ({shown})" if brackets and shown else shown
