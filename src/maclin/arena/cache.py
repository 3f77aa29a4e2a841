"""What was fetched or generated, kept in the user's cache: written whole or not at all, and checked when it is read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..core.errors import InputError
from ..files import cache_dir, write_whole

_MAGIC = b"maclin arena 1\n"
_DIGEST = 32  # bytes of a SHA-256


def write_cached(path: Path, *parts: bytes | memoryview) -> None:
    """``files.write_whole`` with an error that says what to do.

    Raises:
        InputError: it cannot be written; what was there before is untouched.
    """
    try:
        write_whole(path, *parts)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free some space, or set MACLIN_CACHE to another folder"
        ) from error


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
    write_cached(path, _MAGIC, hashlib.sha256(body).digest(), body)
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
