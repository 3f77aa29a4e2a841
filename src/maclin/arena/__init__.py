"""Arena: tasks with long sequences, and the trainer that compares mechanisms on them.

Every mechanism gets the same model, data, seeds and recipe; what can be had without looking at the sequence stands
beside the scores. ``docs/arena.md`` says how to run it, also on data of one's own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..training.machine import is_main_process
    from .listing import task_rows
    from .results import costs_path, keep_costs, load_results
    from .runs import ArenaJob, run, run_costs
    from .settings import ModelSettings, TrainSettings
    from .tasks import TASKS

__all__ = [
    "TASKS",
    "ArenaJob",
    "ModelSettings",
    "TrainSettings",
    "costs_path",
    "is_main_process",
    "keep_costs",
    "load_results",
    "run",
    "run_costs",
    "task_rows",
]

# Loaded at first use: a task needs no trainer, and a trainer no task.
_HOMES = {
    "ArenaJob": "runs",
    "ModelSettings": "settings",
    "TASKS": "tasks",
    "TrainSettings": "settings",
    "costs_path": "results",
    "is_main_process": ".training.machine",
    "keep_costs": "results",
    "load_results": "results",
    "run": "runs",
    "run_costs": "runs",
    "task_rows": "listing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'maclin.arena' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
