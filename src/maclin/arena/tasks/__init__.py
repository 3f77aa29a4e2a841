"""The registry of tasks: one literal row each. A new task is its file, its row here, its row in the docs."""

from __future__ import annotations

import inspect
from typing import Any

from ...core.errors import OptionError
from ..task import Task
from .audio import Audio
from .image import Image
from .language import Language
from .listops import ListOps
from .own import Csv, Jsonl, Npz, Own, WavDir
from .pathfinder import Pathfinder, PathX
from .recall import Recall
from .retrieval import Retrieval
from .sensors import Sensors
from .text import Text
from .translation import Translation

__all__ = ["TASKS", "Own", "options", "task"]

TASKS: dict[str, type[Task]] = {
    "listops": ListOps,
    "text": Text,
    "retrieval": Retrieval,
    "image": Image,
    "pathfinder": Pathfinder,
    "pathx": PathX,
    "audio": Audio,
    "sensors": Sensors,
    "recall": Recall,
    "translation": Translation,
    "language": Language,
    "csv": Csv,
    "jsonl": Jsonl,
    "npz": Npz,
    "wavdir": WavDir,
}


def task(name: str, **options: Any) -> Task:
    """The task of that name.

    Args:
        name: in ``TASKS``.
        options: of the task; those of the user's own data need at least ``data``.

    Raises:
        OptionError: no such task, or an option that it does not have.
        InputError: the user's own data cannot be read.
    """
    if name not in TASKS:
        raise OptionError(f"wanted a task among {', '.join(TASKS)}, got {name!r}")
    known = inspect.signature(TASKS[name]).parameters
    unknown = [option for option in options if option not in known]
    missing = [option for option, p in known.items() if p.default is p.empty and option not in options]
    if unknown:
        raise OptionError(f"wanted options of {name} among {', '.join(known) or 'none'}, got {', '.join(unknown)}")
    if missing:
        raise OptionError(f"wanted {', '.join(missing)} for {name}, got none; pass it as an option")
    return TASKS[name](**options)


def options(name: str) -> dict[str, Any]:
    """Names of a task's options with their defaults; ``inspect.Parameter.empty`` where one is needed.

    Raises:
        OptionError: no such task.
    """
    if name not in TASKS:
        raise OptionError(f"wanted a task among {', '.join(TASKS)}, got {name!r}")
    return {option: p.default for option, p in inspect.signature(TASKS[name]).parameters.items()}
