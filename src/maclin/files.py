"""Files: the folder of what is kept between runs, and writing that leaves a file whole or as it was."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a disk or a quota that is full."""


def cache_dir() -> Path:
    """The folder of what is kept between runs: ``$MACLIN_CACHE``, or ``maclin`` in the cache folder of the system."""
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


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file so that a kill, a power cut or a full disk leaves the earlier one.

    Args:
        path: the file; folders above it are made.
        parts: written one after the other.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as (beside,), beside.open("xb") as file:
        for part in parts:
            file.write(part)


@contextlib.contextmanager
def written_whole(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Gives a path beside each of these to write to; at the end what is there takes their places, in this order.

    Everything is on the disk before the first takes its place. Whatever interrupts it, Ctrl-C included, earlier
    files are put back and new ones removed. A kill leaves each file as it was or as it will be, and may leave what
    was written beside it, in a hidden file.

    Args:
        paths: of files, in folders that exist.

    Raises:
        OSError: the disk is full, or another failure of it.
    """
    tag = secrets.token_hex(4)
    news = tuple(path.with_name(f".{path.name}.{tag}.new") for path in paths)
    olds = tuple(path.with_name(f".{path.name}.{tag}.old") for path in paths)
    earlier = {path for path in paths if os.path.lexists(path)}
    renaming = False
    try:
        yield news
        for new in news:
            with new.open("rb+") as file:
                os.fsync(file.fileno())
        renaming = True  # from here on every new file exists, or has taken its place
        for path, new, old in zip(paths, news, olds, strict=True):
            if path in earlier and len(paths) > 1:
                _keep(path, old)
            os.replace(new, path)
    except BaseException:
        for path, new, old in zip(paths, news, olds, strict=True):
            replaced = renaming and not new.exists()
            if os.path.lexists(old) and (replaced or not os.path.lexists(path)):
                os.replace(old, path)
            elif replaced and path not in earlier:
                path.unlink(missing_ok=True)
            _remove(new, old)
        raise
    _remove(*olds)
    for folder in {path.parent for path in paths}:
        _sync(folder)


def restated(error: OSError, sentence: str) -> OSError:
    """The same kind of error, with its number, and a sentence that says what to do."""
    clear = type(error)(sentence)
    clear.errno = error.errno
    return clear


def _keep(path: Path, old: Path) -> None:
    """A second name for a file; where the file system has none, another name."""
    try:
        os.link(path, old, follow_symlinks=False)
    except (OSError, NotImplementedError):
        os.replace(path, old)


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make a rename itself survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
