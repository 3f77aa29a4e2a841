"""What was fetched or generated, kept in the user's cache: written whole or not at all, and checked when it is read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..core.errors import InputError

_MAGIC = b"maclin arena 1\n"
_DIGEST = 32  # bytes of a SHA-256


def cache_dir() -> Path:
    """The folder that everything is kept in: ``$MACLIN_CACHE``, or ``maclin`` in the cache folder of the system."""
    own = os.environ.get("MACLIN_CACHE")
    if own:
        return Path(own).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "maclin"


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file so that it is there whole or not at all, whatever happens: write, fsync, rename.

    Args:
        path: the file; folders above it are made.
        parts: written one after the other.

    Raises:
        InputError: it cannot be written; what was there before is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free some space, or set MACLIN_CACHE to another folder"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # gone already where all went well


def cached_arrays(key: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays that are made once; a file that is not what was written is made again.

    Args:
        key: a path below the cache's ``arena`` folder, without suffix; it must name everything the arrays depend on.
        make: makes them, where they are not in the cache.
    """
    path = cache_dir() / "arena" / f"{key}.arrays"
    found = _read(path)
    if found is not None:
        return found
    made = dict(make())
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **made)
    body = buffer.getbuffer()
    write_atomic(path, _MAGIC, hashlib.sha256(body).digest(), body)
    return made


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + _DIGEST
    body = memoryview(content)[head:]
    if content[:head] != _MAGIC + hashlib.sha256(body).digest():
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
