"""Where the results of the arena lie: one directory per task and preset, in it one per mechanism and seed.

``OUT/listops-quick`` holds ``task.json``, ``costs.json``, ``softmax/seed-0/result.json``, ``softmax/seed-0/model`` and
``softmax/seed-0/log.jsonl``, and while a model is being trained its checkpoints.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..bench import environment
from ..core.errors import InputError, OptionError
from ..records import (
    SCHEMA_VERSION,
    ArenaCost,
    ArenaResult,
    ArenaRun,
    ArenaTask,
    ArenaTaskResult,
    Config,
    from_json,
    to_json,
)
from ..training.checkpoint import write_result
from .specs import folder_of
from .task import PRESETS

TASK_NAME, COSTS_NAME, RESULT_NAME, MODEL_NAME = "task.json", "costs.json", "result.json", "model"

R = TypeVar("R")


@dataclass(frozen=True)
class TaskFile:
    """What ``task.json`` says.

    Args:
        task: and its data.
        settings: that all runs of the directory share.
    """

    task: ArenaTask
    settings: Config


@dataclass(frozen=True)
class CostsFile:
    """What ``costs.json`` says: rows that were measured side by side."""

    costs: tuple[ArenaCost, ...]


def write_record(path: Path, record: Any) -> None:
    """A record as JSON, whole or not at all."""
    write_result(path, (to_json(record) + "\n").encode())


def read_record(cls: type[R], path: Path) -> R:
    """The record that ``write_record`` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return from_json(cls, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"wanted results of the arena in {path}, got a file that cannot be read: {error}") from error


def costs_path(label: str, out: Path, preset: str = "quick") -> Path:
    """Where the tables look for the costs of a task.

    Args:
        label: of the task, as in ``ArenaJob.label``.
        out: of ``maclin arena run``.
        preset: of the runs.

    Raises:
        OptionError: an unknown preset.
    """
    if preset not in PRESETS:
        raise OptionError(f"unknown preset {preset!r}; known are {', '.join(PRESETS)}")
    return out / folder_of(f"{label}-{preset}") / COSTS_NAME


def keep_costs(result: ArenaTaskResult, path: Path) -> None:
    """Put costs where the tables find them; earlier rows of other lengths stay.

    Args:
        result: what ``run_costs`` measured.
        path: of ``costs_path``.

    Raises:
        InputError: earlier costs that are damaged.
    """
    earlier = read_record(CostsFile, path).costs if path.exists() else ()
    measured = {cost.length for cost in result.costs}
    kept = [cost for cost in earlier if cost.length not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, CostsFile((*kept, *result.costs)))


def load_results(out: Path) -> ArenaResult:
    """Everything that was run into a directory, for the tables.

    Args:
        out: of ``maclin arena run``, or one task's directory in it.

    Raises:
        InputError: there are no results, or damaged ones.
    """
    folders = sorted(path.parent for path in [*out.glob(TASK_NAME), *out.glob(f"*/{TASK_NAME}")])
    tasks = [found for found in map(load_task, folders) if found.runs]
    if not tasks:
        raise InputError(f"wanted results of `maclin arena run TASK --out {out}`, found none in {out}")
    return ArenaResult(SCHEMA_VERSION, environment(), tuple(tasks), _warnings(tasks))


def load_task(folder: Path) -> ArenaTaskResult:
    """Everything that was run on one task."""
    head = read_record(TaskFile, folder / TASK_NAME)
    runs = [read_record(ArenaRun, path) for path in sorted(folder.glob(f"*/seed-*/{RESULT_NAME}"))]
    order = head.settings.get("mechanisms", [])
    runs.sort(key=lambda run: (order.index(run.label) if run.label in order else len(order), run.label, run.seed))
    costs = read_record(CostsFile, folder / COSTS_NAME).costs if (folder / COSTS_NAME).exists() else ()
    return ArenaTaskResult(head.task, head.settings, tuple(runs), costs)


def _warnings(tasks: list[ArenaTaskResult]) -> tuple[str, ...]:
    found: list[str] = []
    for result in tasks:
        where = f"{result.task.name}, {result.task.preset}"
        done = {run.seed for run in result.runs}
        few = sorted(
            {run.label for run in result.runs if {r.seed for r in result.runs if r.label == run.label} != done}
        )
        if few:
            found.append(
                f"{where}: not every seed was run for {', '.join(few)}, so that spreads are of different seeds"
            )
        machines = {
            json.dumps([run.environment.processor, run.environment.num_threads, run.environment.dtype])
            for run in result.runs
            if run.environment is not None
        }
        if len(machines) > 1:
            found.append(
                f"{where}: runs of {len(machines)} machines or precisions stand in one table; compare no times"
            )
        skipped = sum(run.num_skipped_steps for run in result.runs)
        if skipped:
            found.append(f"{where}: {skipped} steps whose loss or gradient was not finite were skipped")
    return tuple(found)
