"""Classification of a user's own long sequences: texts, logs, ids, sensor series, recordings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...core.errors import InputError, OptionError
from ...progress import Progress
from ..splits import Labelled, Ragged, hold_out, sample
from ..task import Field, Kind, Preset, Splits, Task
from .readers import Table, columns_of, read_csv, read_jsonl, read_npz, read_wavdir
from .text import BYTES

_TEST_SEED = 20  # the test split is the same for every split seed
_VALID_SHARE, _TEST_SHARE = 0.1, 0.2
_FEWEST = 10  # examples
_QUICK = 512  # positions


class Own(Task):
    """Labelled sequences from a file; a tenth is held out to choose on, and a fifth to judge on where no test file is.

    Args:
        data: the file or directory.
        test_data: one of the same kind to judge on; None holds out a part of ``data``.
        length: positions after which a sequence is cut.
        num_classes: labels are then the whole numbers below it; None takes the labels that there are.
    """

    kind: ClassVar[Kind] = "classify"

    def __init__(
        self,
        data: str | Path,
        test_data: str | Path | None = None,
        length: int = 4_096,
        num_classes: int | None = None,
    ) -> None:
        if length < 1:
            raise OptionError(f"wanted a length of at least 1, got {length}")
        self.table = self._read(_existing(data))
        self.test_table = None if test_data is None else self._read(_existing(test_data))
        self.classes = _classes(self.table, num_classes)
        self.num_classes = len(self.classes)
        if len(self.table.rows) < _FEWEST:
            raise InputError(f"wanted at least {_FEWEST} examples in {self.table.source}, got {len(self.table.rows)}")
        self.field = _field(self.table, self.test_table)
        self._labels = self._numbers(self.table)
        self._test_labels = None if self.test_table is None else self._numbers(self.test_table)
        tables = [self.table] if self.test_table is None else [self.table, self.test_table]
        self._longest = max(len(row) for table in tables for row in table.rows)
        standard = min(length, self._longest)
        valid = max(round(_VALID_SHARE * len(self.table.rows)), 1)
        self.presets = {
            "quick": Preset(length=min(standard, _QUICK), train=5_000, valid=min(valid, 500), test=1_000),
            "standard": Preset(length=standard, train=None, valid=valid, test=None),
            "paper": Preset(length=standard, train=None, valid=valid, test=None),
        }

    @abstractmethod
    def _read(self, path: Path) -> Table: ...

    def _numbers(self, table: Table) -> np.ndarray:
        known = {name: i for i, name in enumerate(self.classes)}
        for i, label in enumerate(table.labels):
            if label not in known:
                advice = "add such examples to train on" if table is self.test_table else "correct it, or num_classes"
                raise InputError(
                    f"wanted labels among {', '.join(self.classes[:12])} in {table.source}, got {label!r} for example "
                    f"{i}; {advice}"
                )
        return np.array([known[label] for label in table.labels])

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        index = np.arange(len(self.table.rows))
        test_rows = [] if self.test_table is None else self.test_table.rows
        if self.test_table is None:
            index, test = hold_out(len(index), max(round(_TEST_SHARE * len(index)), 1), _TEST_SEED)
        else:
            test = np.arange(len(test_rows))
        fit, held = hold_out(len(index), sizes.valid, seed)
        fit, held = index[fit[sample(len(fit), sizes.train, seed)]], index[held]
        mean, spread = self._scale(fit)
        every = self._split(self.table.rows, self._labels, sizes.length, mean, spread)
        judged = every
        if self._test_labels is not None:
            judged = self._split(test_rows, self._test_labels, sizes.length, mean, spread)
        notes = [f"{len(fit):,} examples of {self.table.source} to train on, {self.num_classes} classes"]
        if sizes.length < self._longest:
            notes.append(f"sequences cut at {sizes.length:,} positions; the longest has {self._longest:,}")
        kept = test[sample(len(test), sizes.test, seed)]
        return Splits(every.only(fit), every.only(held), judged.only(kept), sizes.length, tuple(notes))

    def _scale(self, fit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.field.kind == "tokens":
            return np.zeros(1), np.ones(1)
        rows = np.concatenate([self.table.rows[i] for i in fit]).astype(np.float64)
        return rows.mean(0), np.maximum(rows.std(0), 1e-12)

    def _split(
        self, rows: Sequence[np.ndarray], labels: np.ndarray, length: int, mean: np.ndarray, spread: np.ndarray
    ) -> Labelled:
        cut = [row[:length] for row in rows]
        if self.field.kind == "values":
            cut = [((row - mean) / spread).astype(np.float32) for row in cut]
            return Labelled(Ragged.of(cut), labels)
        return Labelled(Ragged.of(cut), labels, shift=1)


class Csv(Own):
    """A table: one text per row, or with ``value_columns`` one time step per row.

    Args:
        data: the file, with a heading.
        text_column: of the texts.
        label_column: of the labels.
        value_columns: of the numbers of a series, as a list or with commas between, instead of texts.
        id_column: which series a row belongs to, with value_columns.
        test_data: a file to judge on.
        length: positions after which a sequence is cut.
        num_classes: of labels that are numbers.
    """

    name: ClassVar[str] = "csv"
    summary: ClassVar[str] = "your own table: a column of texts, or columns of numbers with an id per series"

    def __init__(
        self,
        data: str | Path,
        text_column: str | None = None,
        label_column: str = "label",
        value_columns: str | Iterable[str] | None = None,
        id_column: str | None = None,
        test_data: str | Path | None = None,
        length: int = 4_096,
        num_classes: int | None = None,
    ) -> None:
        self.value_columns = columns_of(value_columns)
        if self.value_columns and (text_column is not None or id_column is None):
            raise OptionError(
                "wanted id_column and no text_column with value_columns: the rows of one id are one series"
            )
        if id_column is not None and not self.value_columns:
            raise OptionError("wanted value_columns with id_column: the columns of the numbers")
        self.text_column = None if self.value_columns else text_column or "text"
        self.label_column, self.id_column = label_column, id_column
        super().__init__(data, test_data, length, num_classes)

    def _read(self, path: Path) -> Table:
        return read_csv(path, self.text_column, self.label_column, self.value_columns, self.id_column)


class Jsonl(Own):
    """One JSON object per line, with a text or numbers and a label.

    Args:
        data: the file.
        text_column: the key of the text, of the numbers (n,), or of lists of numbers (n, channels).
        label_column: the key of the label.
        test_data: a file to judge on.
        length: positions after which a sequence is cut.
        num_classes: of labels that are numbers.
    """

    name: ClassVar[str] = "jsonl"
    summary: ClassVar[str] = "your own .jsonl: a text or lists of numbers, and a label, per line"

    def __init__(
        self,
        data: str | Path,
        text_column: str = "text",
        label_column: str = "label",
        test_data: str | Path | None = None,
        length: int = 4_096,
        num_classes: int | None = None,
    ) -> None:
        self.text_column, self.label_column = text_column, label_column
        super().__init__(data, test_data, length, num_classes)

    def _read(self, path: Path) -> Table:
        return read_jsonl(path, self.text_column, self.label_column)


class Npz(Own):
    """Arrays of sequences and labels: ids (number, n), or values (number, n) or (number, n, channels).

    Args:
        data: the file.
        text_column: name of the array of sequences.
        label_column: name of the array of labels.
        test_data: a file to judge on.
        length: positions after which a sequence is cut.
        num_classes: of labels that are numbers.
    """

    name: ClassVar[str] = "npz"
    summary: ClassVar[str] = "your own .npz: an array of ids or values and an array of labels"

    def __init__(
        self,
        data: str | Path,
        text_column: str = "x",
        label_column: str = "y",
        test_data: str | Path | None = None,
        length: int = 4_096,
        num_classes: int | None = None,
    ) -> None:
        self.text_column, self.label_column = text_column, label_column
        super().__init__(data, test_data, length, num_classes)

    def _read(self, path: Path) -> Table:
        return read_npz(path, self.text_column, self.label_column)


class WavDir(Own):
    """A directory with one folder of .wav files per label.

    Args:
        data: the directory.
        test_data: one to judge on.
        length: samples after which a recording is cut.
        num_classes: of labels that are numbers.
    """

    name: ClassVar[str] = "wavdir"
    summary: ClassVar[str] = "your own recordings: one folder of .wav files per label"

    def __init__(
        self,
        data: str | Path,
        test_data: str | Path | None = None,
        length: int = 8_000,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(data, test_data, length, num_classes)

    def _read(self, path: Path) -> Table:
        return read_wavdir(path)


def _existing(path: str | Path) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise InputError(f"wanted data at {found}, found nothing there")
    return found


def _classes(table: Table, num_classes: int | None) -> tuple[str, ...]:
    names = set(table.labels)
    if num_classes is not None:
        if num_classes < 2:
            raise OptionError(f"wanted num_classes of at least 2, got {num_classes}")
        return tuple(map(str, range(num_classes)))
    if len(names) < 2:
        raise InputError(f"wanted at least 2 different labels in {table.source}, got only {', '.join(names)}")
    whole = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=int if whole else str))


def _field(table: Table, test: Table | None) -> Field:
    rows = table.rows if test is None else [*table.rows, *test.rows]
    kinds = {(row.dtype, row.shape[1:]) for row in rows}
    if len(kinds) > 1:
        raise InputError(f"wanted sequences of one kind, got different ones in {table.source} and its test data")
    row = rows[0]
    if row.dtype == np.uint8:
        return Field("tokens", vocab_size=BYTES)
    if row.dtype == np.int64:
        return Field("tokens", vocab_size=int(max(row.max() for row in rows)) + 2)
    return Field("values", channels=row.shape[1])
