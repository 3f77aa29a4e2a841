"""Where the command prints: results to stdout, everything else to stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..core.errors import MaclinError, OptionError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

INTERRUPTED = 130
"""Exit status that shells report of a program that Ctrl-C ended."""


def error(sentence: str) -> None:
    """One sentence on stderr."""
    err.print(f"maclin: {sentence}", markup=False, style="red" if err.is_terminal else None)


def explain(problem: Exception) -> int:
    """Say what is wrong in one sentence; returns the exit status, 2 for a wrong call, 1 for a failure."""
    format_message = getattr(problem, "format_message", None)  # typer's own errors, whichever click it carries
    if callable(format_message):
        error(f"{format_message()} See --help.")
        return int(getattr(problem, "exit_code", 2))
    if isinstance(problem, OptionError | FileExistsError):
        error(str(problem))
        return 2
    if isinstance(problem, MaclinError | ValueError | OSError):
        error(str(problem))
        return 1
    if isinstance(problem, MemoryError):
        error("out of memory; pass shorter --lengths or a smaller --max-documents")
        return 1
    error(f"unexpected {type(problem).__name__}: {problem}; please report it, with what --debug shows")
    return 1


class Bars:
    """Progress of a job as one bar per step, with time left where the number of parts is known."""

    def __init__(self) -> None:
        self._bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("[dim]{task.fields[text]}", markup=True),
            console=err,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, step: str, total: int | None) -> None:
        """Draw the bar of a new step."""
        self._task = self._bars.add_task(step, total=total, text="")

    def advance(self, text: str = "") -> None:
        """Fill it by one part, and say what that was."""
        if self._task is not None:
            self._bars.update(self._task, advance=1, text=text.replace("[", "\\["))

    def finish(self) -> None:
        """Fill it up."""
        if self._task is not None:
            done = self._bars.tasks[self._task].completed or 1
            self._bars.update(self._task, total=done, completed=done, text="")
