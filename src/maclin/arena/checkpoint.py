"""Checkpoints: written whole or not at all, and refused where they belong to something else."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import InputError, OptionError
from ..records import Config


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a kill, a power cut or a full disk leaves the earlier one: write, fsync, rename.

    Args:
        path: the file; its directory is made if it is not there.
        content: what it will hold.

    Raises:
        OSError: the disk is full or fails; the sentence says that the earlier file is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _sentence(error, path, len(content)) from error


def save_checkpoint(path: Path, state: Mapping[str, Any], identity: Config) -> None:
    """Write tensors and numbers, with what they belong to.

    Args:
        path: the file.
        state: tensors, numbers, strings, and dicts and lists of them.
        identity: settings that a run must share to go on from here; JSON values.

    Raises:
        OSError: as ``write_whole``.
    """
    buffer = io.BytesIO()  # torch's own writer tells of a full disk in other words, and late
    torch.save({"identity": json.dumps(identity, sort_keys=True), "state": dict(state)}, buffer)
    write_whole(path, buffer.getvalue())


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
            f"wanted a checkpoint of the arena in {path}, got a file that cannot be read ({type(error).__name__}); "
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


def _sync_directory(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sentence(error: OSError, path: Path, needed: int) -> OSError:
    kept = "the last one is still there" if path.exists() else "there is none yet"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"no space left for {path}, which needs {needed:,} bytes; {kept}: free some, then pass --resume"
    else:
        text = f"{path} could not be written ({error.strerror or error}); {kept}"
    clear = type(error)(text)
    clear.errno = error.errno
    return clear
