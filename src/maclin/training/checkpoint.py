"""Checkpoints: written whole or not at all, and refused where they belong to something else."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import InputError, OptionError
from ..files import NO_SPACE, restated, write_whole, written_whole
from ..records import Config


def write_result(path: Path, content: bytes) -> None:
    """``files.write_whole`` with an error that says what is left.

    Raises:
        OSError: the disk is full or fails; the sentence says whether the earlier file is still there.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        kept = "the last one is still there" if path.exists() else "there is none yet"
        if error.errno in NO_SPACE:
            text = (
                f"no space left for {path}, which needs {len(content):,} bytes; {kept}: free some, then pass --resume"
            )
        else:
            text = f"{path} could not be written ({error.strerror or error}); {kept}"
        raise restated(error, text) from error


def save_checkpoint(path: Path, state: Mapping[str, Any], identity: Config) -> None:
    """Write tensors and numbers, with what they belong to.

    Args:
        path: the file.
        state: tensors, numbers, strings, and dicts and lists of them.
        identity: settings that a run must share to go on from here; JSON values.

    Raises:
        OSError: as ``write_result``.
    """
    buffer = io.BytesIO()  # torch's own writer tells of a full disk in other words, and late
    torch.save({"identity": json.dumps(identity, sort_keys=True), "state": dict(state)}, buffer)
    write_result(path, buffer.getvalue())


def load_checkpoint(path: Path, identity: Config) -> dict[str, Any]:
    """The state that ``save_checkpoint`` wrote, on the CPU.

    Args:
        path: the file.
        identity: of the run that wants to go on.

    Raises:
        FileNotFoundError: there is none.
        InputError: the file is damaged.
        OptionError: it belongs to a run with other settings; the message names them.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        theirs = json.loads(found["identity"])
        state = found["state"]
    except FileNotFoundError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise InputError(
            f"wanted a checkpoint in {path}, got a file that cannot be read ({type(error).__name__}); "
            "pass --force to begin again"
        ) from error
    check_same(theirs, identity, path)
    return state


def check_same(theirs: Config, ours: Config, path: Path) -> None:
    """Refuse what belongs to other settings.

    Raises:
        OptionError: naming every setting that differs, with both values.
    """
    ours = json.loads(json.dumps(ours))
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    if names:
        differences = ", ".join(
            f"{name} {json.dumps(theirs.get(name))}, now {json.dumps(ours.get(name))}" for name in names
        )
        raise OptionError(
            f"{path} belongs to a run with other settings ({differences}); pass the same ones, choose another --out, "
            "or pass --force to begin again"
        )


def save_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors straight to the disk, without a copy in memory; whole or not at all.

    Args:
        path: the file.
        tensors: tensors, numbers, strings, and dicts and lists of them.

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as (beside,), beside.open("xb") as file:
            torch.save(dict(tensors), file)
    except OSError as error:
        reason = "no space left" if error.errno in NO_SPACE else error.strerror or str(error)
        raise restated(
            error, f"{path} could not be written ({reason}); free some space, or choose another --out"
        ) from (error)


def load_tensors(path: Path) -> dict[str, Any]:
    """What ``save_tensors`` wrote, read from the disk where it is used.

    Raises:
        FileNotFoundError: there is none.
        InputError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise InputError(
            f"wanted tensors in {path}, got a file that cannot be read ({type(error).__name__})"
        ) from error
