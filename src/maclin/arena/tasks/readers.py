"""A user's own labelled sequences, read from .csv, .jsonl, .npz, or folders of .wav files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import InputError, OptionError
from .audio import read_wave

_SHOWN = 12  # names in a message


@dataclass(frozen=True)
class Table:
    """Sequences and their labels, as they were read.

    Args:
        rows: of each example: bytes as uint8 (n,), ids (n,) of int64, or values (n, channels) of float32.
        labels: of each example, as written.
        source: where they come from, for people.
    """

    rows: list[np.ndarray]
    labels: list[str]
    source: str


def read_csv(
    path: Path, text_column: str | None, label_column: str, value_columns: Sequence[str], id_column: str | None
) -> Table:
    """A table with a heading: one text per row, or one time step per row and the rows of one id as a series.

    Args:
        path: of the file; the sign between columns is taken from its first line.
        text_column: of the texts.
        label_column: of the labels.
        value_columns: of the numbers, instead of a text.
        id_column: which series a row belongs to; with value_columns only.

    Raises:
        InputError: a column, a label or a number is missing or wrong; the message names the line.
    """
    lines = _text(path)
    heading = lines.partition("\n")[0]
    sign = max(",;\t|", key=heading.count)
    limit = csv.field_size_limit(1 << 30)
    try:
        reader = csv.DictReader(io.StringIO(lines, newline=""), delimiter=sign)
        columns = [name for name in reader.fieldnames or () if name]
        _known(path, columns, [label_column, *value_columns, *(c for c in (text_column, id_column) if c)])
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(f"wanted a table in {path}, got a file that cannot be read as one: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise InputError(f"wanted rows below the heading of {path}, got none")
    if not value_columns:
        assert text_column is not None
        texts = [(f"line {n}", row.get(text_column), row.get(label_column)) for n, row in rows]
        return _texts(path, texts, text_column)
    series: dict[str, tuple[list[list[float]], str]] = {}
    for n, row in rows:
        where = f"line {n} of {path}"
        label = _label(row.get(label_column), where)
        name = str(row.get(id_column)) if id_column else label
        values = [_number(row.get(column), column, where) for column in value_columns]
        steps, known = series.setdefault(name, ([], label))
        if known != label:
            raise InputError(f"wanted one label for the series {name!r}, got {known!r} and, in {where}, {label!r}")
        steps.append(values)
    arrays = [np.array(steps, np.float32) for steps, _ in series.values()]
    return Table(arrays, [label for _, label in series.values()], str(path))


def read_jsonl(path: Path, text_column: str, label_column: str) -> Table:
    """One object per line, with a text, a list of numbers, or a list of lists of numbers, and a label.

    Args:
        path: of the file.
        text_column: the key of the sequence.
        label_column: the key of the label.

    Raises:
        InputError: a line is no such object; the message names it.
    """
    rows: list[tuple[str, Any, Any]] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"wanted one JSON object in line {number} of {path}, got: {error}") from error
        if not isinstance(item, dict):
            raise InputError(f"wanted one JSON object in line {number} of {path}, got {type(item).__name__}")
        _known(f"line {number} of {path}", list(item), [text_column, label_column])
        rows.append((f"line {number}", item[text_column], item[label_column]))
    if not rows:
        raise InputError(f"wanted JSON objects in {path}, got none")
    if isinstance(rows[0][1], str):
        return _texts(path, rows, text_column)
    arrays = [_values(value, f"{text_column!r} in {where} of {path}") for where, value, _ in rows]
    _same_channels(arrays, path)
    return Table(arrays, [_label(label, f"{where} of {path}") for where, _, label in rows], str(path))


def read_npz(path: Path, text_column: str, label_column: str) -> Table:
    """Arrays of examples and labels: ids (number, n) of whole numbers, or values (number, n) or (number, n, channels).

    An array ``lengths`` (number,), where there is one, says how much of each row is data.

    Args:
        path: of the file.
        text_column: name of the array of sequences.
        label_column: name of the array of labels.

    Raises:
        InputError: an array is missing, of another form, or has numbers that are not finite.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            names = file.files
            _known(path, names, [text_column, label_column])
            x, y = file[text_column], file[label_column]
            lengths = file["lengths"] if "lengths" in names else None
    except InputError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise InputError(
            f"wanted an .npz file of plain arrays in {path}, got a file that cannot be read: {error}"
        ) from error
    if x.ndim not in (2, 3) or y.ndim != 1 or len(x) != len(y) or not len(x):
        raise InputError(
            f"wanted {text_column!r} of shape (number, n) or (number, n, channels) and {label_column!r} of shape "
            f"(number,) in {path}, got {x.shape} and {y.shape}"
        )
    lengths = np.full(len(x), x.shape[1]) if lengths is None else np.asarray(lengths)
    if lengths.shape != y.shape or lengths.min() < 1 or lengths.max() > x.shape[1]:
        raise InputError(f"wanted lengths of 1 to {x.shape[1]}, one for each example, in {path}")
    if np.issubdtype(x.dtype, np.integer) and x.ndim == 2:
        if x.min() < 0:
            raise InputError(f"wanted ids from 0 on in {text_column!r} of {path}, got {x.min()}")
        rows = [row[:n].astype(np.int64) for row, n in zip(x, lengths, strict=True)]
    elif np.issubdtype(x.dtype, np.number):
        x = x.astype(np.float32)[..., None] if x.ndim == 2 else x.astype(np.float32)
        rows = [row[:n] for row, n in zip(x, lengths, strict=True)]
        for i, row in enumerate(rows):
            _finite(row, f"{text_column!r} of example {i} in {path}")
    else:
        raise InputError(f"wanted numbers in {text_column!r} of {path}, got {x.dtype}")
    return Table(rows, [_label(label.item(), f"example {i} of {path}") for i, label in enumerate(y)], str(path))


def read_wavdir(path: Path) -> Table:
    """``<label>/*.wav`` in a directory: samples between -1 and 1, with the file's channels.

    Raises:
        InputError: no such folders, a file that is no PCM, or files of different rates or channels.
    """
    if not path.is_dir():
        raise InputError(f"wanted a directory with one folder of .wav files per label, got {path}")
    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() == ".wav")
    if not files:
        raise InputError(f"wanted <label>/*.wav in {path}, found none")
    rows: list[np.ndarray] = []
    first: tuple[int, int] | None = None
    for file in files:
        samples, rate = read_wave(file.read_bytes(), str(file))
        if not len(samples):
            raise InputError(f"wanted samples in {file}, got none")
        form = (rate, samples.shape[1])
        first = form if first is None else first
        if form != first:
            raise InputError(
                f"wanted one sampling rate and number of channels, got {first[0]} Hz with {first[1]} in {files[0]} and "
                f"{form[0]} Hz with {form[1]} in {file}; convert them to one"
            )
        full = 2.0 ** (8 * samples.itemsize - 1)
        middle = full if samples.dtype == np.uint8 else 0.0
        rows.append(((samples.astype(np.float32) - middle) / full).astype(np.float32))
    return Table(rows, [file.parent.name for file in files], str(path))


def columns_of(given: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names of columns, given as a list or in one string with commas."""
    if given is None:
        return ()
    names = given.split(",") if isinstance(given, str) else list(given)
    kept = tuple(name.strip() for name in names if name.strip())
    if len(set(kept)) < len(kept):
        raise OptionError(f"wanted each column once, got {', '.join(kept)}")
    return kept


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"wanted UTF-8 text in {path}, got other bytes at {error.start}; convert it first") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if not text.strip():
        raise InputError(f"wanted data in {path}, got an empty file")
    return text


def _texts(path: Path, rows: Sequence[tuple[str, Any, Any]], column: str) -> Table:
    arrays: list[np.ndarray] = []
    labels: list[str] = []
    for where, text, label in rows:
        if not isinstance(text, str) or not text:
            raise InputError(f"wanted a text in {column!r} in {where} of {path}, got {text!r}")
        arrays.append(np.frombuffer(text.encode(), np.uint8))
        labels.append(_label(label, f"{where} of {path}"))
    return Table(arrays, labels, str(path))


def _known(where: Path | str, columns: Sequence[str], wanted: Iterable[str]) -> None:
    for name in wanted:
        if name not in columns:
            more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
            shown = ", ".join(columns[:_SHOWN]) or "none"
            raise InputError(f"wanted the column {name!r} in {where}, which has {shown}{more}")


def _label(value: Any, where: str) -> str:
    if value is None or isinstance(value, list | dict) or not str(value).strip():
        raise InputError(f"wanted a label in {where}, got {'none' if value in (None, '') else repr(value)}")
    if isinstance(value, float):
        if not value.is_integer():
            raise InputError(f"wanted a label that is a name or a whole number in {where}, got {value}")
        return str(int(value))
    return str(value).strip()


def _number(value: str | None, column: str, where: str) -> float:
    try:
        number = float(value or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"wanted a finite number in {column!r} in {where}, got {value or 'none'!r}")
    return number


def _values(value: Any, where: str) -> np.ndarray:
    try:
        array = np.array(value, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"wanted a text, numbers, or lists of as many numbers each as {where}, got {error}") from error
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size:
        raise InputError(f"wanted numbers (n,) or (n, channels) as {where}, got the shape {array.shape}")
    _finite(array, where)
    return array


def _finite(array: np.ndarray, where: str) -> None:
    wrong = array.size - int(np.isfinite(array).sum())
    if wrong:
        raise InputError(f"wanted finite numbers in {where}, got {wrong} that are not; fill or remove them")


def _same_channels(arrays: Iterable[np.ndarray], path: Path) -> None:
    widths = sorted({array.shape[1] for array in arrays})
    if len(widths) > 1:
        raise InputError(f"wanted as many channels in every example of {path}, got {widths[0]} and {widths[-1]}")
