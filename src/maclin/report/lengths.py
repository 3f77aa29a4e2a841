"""Request lengths from a file: plain text, CSV or JSON lines."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

COLUMN = "length"
"""Name of the column or key that holds the length."""


def read_lengths(path: str | Path) -> list[int]:
    """Lengths of requests in tokens, one for each request.

    Understood are: one whole number a line; CSV with a column ``length``, or with one column only; JSON lines,
    each a number or an object with ``length``. Empty lines and lines that start with ``#`` are left out.

    Args:
        path: the file, in UTF-8.

    Returns:
        The lengths in the order of the file; never empty.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a directory.
        ValueError: the file holds no length, or a line that is not a whole number of at least 1; the message
            names the line.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"wanted a file of request lengths, got the directory {path}; name a file in it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"wanted a file of request lengths, but there is no {path}; check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: wanted UTF-8 text with one length a line, got other bytes ({error.reason})"
        ) from error
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if not lines:
        raise ValueError(f"{path}: wanted request lengths in tokens, one a line, got a file without any")
    first = lines[0][1].strip()
    if first.startswith("{") or path.suffix.lower() in (".jsonl", ".ndjson"):
        return [_json_length(path, number, line) for number, line in lines]
    if path.suffix.lower() == ".csv" or "," in first or first.strip("\"'").lower() == COLUMN:
        return _csv_lengths(path, lines)
    return [_whole(path, number, line.strip()) for number, line in lines]


def _json_length(path: Path, number: int, line: str) -> int:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}, line {number}: wanted JSON such as {{"{COLUMN}": 128}}, got {line!r:.80}') from error
    if isinstance(value, dict):
        if COLUMN not in value:
            raise ValueError(f"{path}, line {number}: wanted the key {COLUMN!r}, got only {sorted(value)}")
        value = value[COLUMN]
    return _whole(path, number, value)


def _csv_lengths(path: Path, lines: list[tuple[int, str]]) -> list[int]:
    rows = [(number, [cell.strip() for cell in next(csv.reader([line]))]) for number, line in lines]
    header = [cell.lower() for cell in rows[0][1]]
    column, body = 0, rows
    if COLUMN in header:
        column, body = header.index(COLUMN), rows[1:]
    elif len(header) > 1:
        raise ValueError(f"{path}: wanted a column {COLUMN!r} or one column only, got the columns {rows[0][1]}")
    elif not _is_number(header[0]):
        body = rows[1:]  # one column under another name
    if not body:
        raise ValueError(f"{path}: wanted request lengths in tokens, got a header only")
    short = next((number for number, row in body if len(row) <= column), None)
    if short is not None:
        raise ValueError(f"{path}, line {short}: wanted {column + 1} columns or more, got fewer")
    return [_whole(path, number, row[column]) for number, row in body]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _whole(path: Path, number: int, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        length = float(value)
        if length < 1 or not length.is_integer():
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path}, line {number}: wanted a whole number of tokens, at least 1, got {value!r:.80}"
        ) from error
    return int(length)
