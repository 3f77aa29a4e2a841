"""Text, byte by byte: which newsgroup a post is from, or of which genre a stretch of prose is."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...core.errors import OptionError
from ...progress import Progress
from ..archives import members
from ..cache import cached_arrays
from ..fetch import fetch
from ..official.texts import imdb
from ..packages import BROWN, NEWSGROUPS
from ..splits import Labelled, Ragged, hold_out, sample
from ..task import Field, Kind, Preset, Splits, Task, check_length

BYTES = 257
"""Ids of bytes: each one plus 1, and 0 for padding."""

GENRES = tuple("abcdefghjklmnpr")
_BROWN_FILE = re.compile(r"package/c[a-r]\d\d")
_NEWSGROUPS = "orangecontrib/text/datasets/20newsgroups-{}.tab"
_HEADER_ROWS = 3
_TEST_EVERY = 5  # of the files of a genre
_SHORTEST = 16  # bytes; below that there is nothing to read


class Text(Task):
    """Documents as bytes, one class each.

    Args:
        data: ``20newsgroups``, or the harder ``brown``; what is in ``data_dir`` is IMDb.
        length: bytes after which a document is cut; None is the preset's.
    """

    name: ClassVar[str] = "text"
    summary: ClassVar[str] = "documents byte by byte: newsgroup (20), genre of the Brown corpus (15), or IMDb (2)"
    kind: ClassVar[Kind] = "classify"

    def __init__(self, data: str = "20newsgroups", length: int | None = None) -> None:
        classes = {"20newsgroups": 20, "brown": len(GENRES), "imdb": 2}
        if data not in classes:
            raise OptionError(f"wanted data among {', '.join(classes)}, got {data!r}")
        self.data = data
        self.length = check_length(length)
        self.field = Field("tokens", vocab_size=BYTES)
        self.num_classes = classes[data]
        self.presets = {
            "quick": Preset(length=128, train=None, valid=1_000, test=2_000),
            "standard": Preset(length=4_000, train=None, valid=1_000, test=None),
            "paper": Preset(length=4_000, train=None, valid=1_000, test=None),
        }

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        if self.data == "imdb":
            raise OptionError(
                "IMDb is read from the user's copy: pass --data-dir with aclImdb/train/pos and so on in it, "
                "or choose data among 20newsgroups, brown"
            )
        length = sizes.length if self.length is None else self.length
        if self.data == "brown":
            return _brown(sizes, length, seed, progress)
        return _newsgroups(sizes, length, seed, progress)

    def _official(self, folder: Path, sizes: Preset, seed: int, progress: Progress) -> Splits:
        if self.data != "imdb":
            raise OptionError(f"wanted data imdb with --data-dir, got {self.data!r}; {self.data} is fetched by itself")
        length = sizes.length if self.length is None else self.length
        (train, train_labels), (test, test_labels) = imdb(folder, progress)
        fit, held = hold_out(len(train_labels), sizes.valid, seed)
        every = _documents(train, train_labels, length)
        kept = sample(len(test_labels), sizes.test, seed)
        return Splits(
            every.only(fit),
            every.only(held),
            _documents(test, test_labels, length).only(kept),
            length,
            (f"IMDb reviews, cut at {length:,} bytes",),
        )


def _documents(rows: Ragged, labels: np.ndarray, length: int) -> Labelled:
    return Labelled(rows, labels, length=length, shift=1)


def _newsgroups(sizes: Preset, length: int, seed: int, progress: Progress) -> Splits:
    def made() -> dict[str, np.ndarray]:
        archive = fetch(NEWSGROUPS, progress)
        files = dict(members(archive, {_NEWSGROUPS.format(part) for part in ("train", "test")}.__contains__))
        tables = {part: orange_table(files[_NEWSGROUPS.format(part)]) for part in ("train", "test")}
        names = sorted({name for name, _ in tables["train"]})
        out: dict[str, np.ndarray] = {}
        for part, table in tables.items():
            rows = Ragged.of(text for _, text in table)
            labels = np.array([names.index(name) for name, _ in table])
            out |= {f"{part}_bytes": rows.flat, f"{part}_ends": rows.ends, f"{part}_labels": labels}
        return out

    arrays = cached_arrays(f"text/20newsgroups-{NEWSGROUPS.version}", made)
    parts = {p: (Ragged(arrays[f"{p}_bytes"], arrays[f"{p}_ends"]), arrays[f"{p}_labels"]) for p in ("train", "test")}
    train, test = (_documents(rows, labels, length) for rows, labels in parts.values())
    fit, held = hold_out(len(train), sizes.valid, seed)
    lengths = parts["train"][0].lengths
    notes = (
        "20 Newsgroups stands in for IMDb, which no package carries: 20 classes, letters and spaces only",
        f"documents cut at {length:,} bytes; their median is {int(np.median(lengths)):,}, "
        f"{(lengths > length).mean():.0%} of them are longer",
    )
    return Splits(train.only(fit), train.only(held), test.only(sample(len(test), sizes.test, seed)), length, notes)


def orange_table(content: bytes) -> list[tuple[str, bytes]]:
    """Class and text of each row of a two-column .tab file, which has three rows of headings."""
    limit = csv.field_size_limit(1 << 30)
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8"), newline=""), delimiter="\t"))[_HEADER_ROWS:]
    finally:
        csv.field_size_limit(limit)
    return [(row[0], row[1].encode()) for row in rows if len(row) == 2 and len(row[1]) >= _SHORTEST]


def _brown(sizes: Preset, length: int, seed: int, progress: Progress) -> Splits:
    texts = brown_files(progress)
    chunks: dict[str, list[tuple[bytes, int, str]]] = {"train": [], "test": []}
    for genre in GENRES:
        names = sorted(name for name in texts if name[1] == genre)
        for i, name in enumerate(names):
            part = "test" if i % _TEST_EVERY == _TEST_EVERY - 1 or (len(names) < _TEST_EVERY and i == 0) else "train"
            for chunk in windows(texts[name], length):
                chunks[part].append((chunk, GENRES.index(genre), name))
    train, test = (
        _documents(Ragged.of(row for row, _, _ in rows), np.array([label for _, label, _ in rows]), length)
        for rows in chunks.values()
    )
    valid = min(sizes.valid, len(train) // 8)
    fit, held = hold_out(len(train), valid, seed, [name for _, _, name in chunks["train"]])
    notes = (
        f"genre of stretches of {length:,} bytes of the Brown corpus stands in for IMDb, which no package carries; "
        "no file is in two splits",
    )
    return Splits(train.only(fit), train.only(held), test.only(sample(len(test), sizes.test, seed)), length, notes)


def brown_files(progress: Progress) -> dict[str, bytes]:
    """Plain text of the 500 files of the Brown corpus by name, without its tags."""
    found = members(fetch(BROWN, progress), lambda name: _BROWN_FILE.fullmatch(name) is not None)
    return {Path(name).name: untagged(content.decode("utf-8", "replace")).encode() for name, content in found}


def untagged(text: str) -> str:
    """The words of a text whose words are written ``word/tag``."""
    return " ".join(word.rpartition("/")[0] for word in text.split())


def windows(text: bytes, length: int) -> list[bytes]:
    """Stretches of ``length`` bytes, one after the other; the rest is left out."""
    return [text[i : i + length] for i in range(0, len(text) - length + 1, length)]
