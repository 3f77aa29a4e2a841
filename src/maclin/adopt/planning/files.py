"""Plans as files."""

from __future__ import annotations

import os
from pathlib import Path

from maclin.core.errors import InputError, MaclinError
from maclin.files import write_whole
from maclin.records import Plan, from_json, to_json


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan as JSON; folders above it are made.

    Raises:
        MaclinError: the file cannot be written; what was there before is kept.
    """
    try:
        write_whole(Path(path), to_json(plan).encode())
    except OSError as error:
        raise MaclinError(
            f"cannot write the plan to {path}: {error.strerror or error}; choose another place"
        ) from error


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan that ``save_plan`` wrote.

    Raises:
        InputError: the file cannot be read or is not a plan; the message names the field.
    """
    try:
        return from_json(Plan, Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read a plan from {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"wanted a plan that maclin.save_plan wrote, got {path}: {error}") from error
