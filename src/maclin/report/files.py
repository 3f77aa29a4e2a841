"""Reports on disk: checked before the work, written whole or not at all, read back with clear errors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..files import NO_SPACE, restated, written_whole
from ..records import SCHEMA_VERSION, Report, from_json, to_json
from . import words
from .html import render_html
from .markdown import render_markdown

NAMES = ("report.html", "report.md", "report.json")
"""The files that ``write_report`` makes."""

R = TypeVar("R")


def check_out_dir(
    out_dir: str | Path, force: bool = False, *, names: Sequence[str] = NAMES, noun: str = "report"
) -> Path:
    """Whether a report can be written there, asked before any long work; creates nothing.

    Args:
        out_dir: directory of the report; it may not exist yet.
        force: whether an earlier report may be replaced.
        names: the files that will be written.
        noun: what messages call them together.

    Returns:
        The directory as a path.

    Raises:
        NotADirectoryError: the path, or a part of it, is a file.
        FileExistsError: a report is there already, and ``force`` is False; or one of its names is a directory.
        PermissionError: the directory cannot be written to.
    """
    out_dir = Path(out_dir)
    nearest = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"wanted a directory for the {noun}, but {nearest} is a file; choose another directory"
        )
    for name in names:
        if (out_dir / name).is_dir():
            raise FileExistsError(f"wanted to write {out_dir / name}, which is a directory; choose another directory")
    existing = [name for name in names if os.path.lexists(out_dir / name)]
    if existing and not force:
        raise FileExistsError(
            f"{out_dir} already holds {', '.join(existing)}; choose another directory, or pass --force to replace "
            f"{'it' if len(existing) == 1 else 'them'}"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"wanted to write the {noun} to {out_dir}, but {nearest} is not writable; choose another")
    return out_dir


def write_report(report: Report, out_dir: str | Path, *, force: bool = False) -> dict[str, Path]:
    """Write ``report.html``, ``report.md`` and ``report.json``: all three, or none.

    Everything is rendered first, then written to temporary files beside the targets, then renamed. Whatever
    interrupts it, Ctrl-C included, earlier files are put back and temporary ones removed.

    Args:
        report: what was found.
        out_dir: directory; made if it is not there.
        force: replace an earlier report.

    Returns:
        The paths by the keys ``html``, ``md`` and ``json``.

    Raises:
        FileExistsError: a report is there already, and ``force`` is False.
        NotADirectoryError: the path is a file.
        PermissionError: the directory cannot be written to.
        OSError: no space left for the report, or another failure of the disk; one sentence.
    """
    texts = {"report.html": render_html(report), "report.md": render_markdown(report), "report.json": to_json(report)}
    return write_texts(texts, check_out_dir(out_dir, force), noun="report")


def load_report(path: str | Path) -> Report:
    """Read a ``report.json`` back.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a directory; the message names the file in it, if there is one.
        PermissionError: it cannot be read.
        ValueError: not JSON, not a report, or a report of another schema.
    """
    return load_record(Report, path, noun="report")


def write_texts(texts: Mapping[str, str], out_dir: Path, *, noun: str) -> dict[str, Path]:
    """Write the texts by their file names into a directory that ``check_out_dir`` accepted: all of them, or none.

    Returns:
        The paths by the suffixes of the names.

    Raises:
        OSError: no space left, or another failure of the disk; one sentence.
    """
    contents = {name: text.encode("utf-8") for name, text in texts.items()}
    made = [path for path in (out_dir, *out_dir.parents) if not path.exists()]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with written_whole(*(out_dir / name for name in contents)) as beside:
            for path, content in zip(beside, contents.values(), strict=True):
                path.write_bytes(content)
    except BaseException as error:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # only what was made here and is empty
        if isinstance(error, OSError):
            raise _sentence(error, out_dir, sum(map(len, contents.values())), noun) from error
        raise
    return {name.rpartition(".")[2]: out_dir / name for name in contents}


def load_record(cls: type[R], path: str | Path, *, noun: str) -> R:
    """The record in a file named after ``noun``, such as ``report.json``; raises as ``load_report`` does."""
    path, name = Path(path), f"{noun}.json"
    if path.is_dir():
        hint = f"pass {path / name}" if (path / name).is_file() else f"pass the path of a {name}"
        raise IsADirectoryError(f"wanted a {name}, got the directory {path}; {hint}")
    try:
        return from_json(cls, path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"wanted a {name}, but there is no {path}; check the path") from error
    except PermissionError as error:
        raise PermissionError(f"wanted to read {path}, but may not; change its permissions") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted a {name} in UTF-8, got other bytes; check the path") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a {noun} of schema {SCHEMA_VERSION}: {error}") from error


def _sentence(error: OSError, out_dir: Path, needed: int, noun: str) -> OSError:
    """The same error with one sentence that says what to do; the kind of the error is kept."""
    if error.errno in NO_SPACE:
        text = f"no space left for the {noun} in {out_dir}: it needs {words.size(needed)}; free some, or choose another"
    else:
        text = f"the {noun} could not be written to {out_dir} ({error.strerror or error}); choose another directory"
    return restated(error, text)
