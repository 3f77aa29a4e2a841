"""Which tasks there are, as rows of a table."""

from __future__ import annotations

from typing import Any

from .specs import options_of_own
from .task import PRESETS
from .tasks import TASKS, options, task


def task_rows() -> list[dict[str, Any]]:
    """Name, summary, metric, length by preset, and options with their defaults, of every task.

    Metric and lengths are None of the tasks that are made of a user's own data.
    """
    return [_row(name) for name in TASKS]


def _row(name: str) -> dict[str, Any]:
    known, needed = options(name), options_of_own(name)
    made = None if needed else task(name)
    return {
        "name": name,
        "summary": TASKS[name].summary,
        "metric": None if made is None else made.metric,
        "lengths": None if made is None else {preset: made.preset(preset).length for preset in PRESETS},
        "needs": list(needed),
        "options": {option: default for option, default in known.items() if option not in needed},
    }
