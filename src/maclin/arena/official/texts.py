"""ListOps and AAN of the Long Range Arena release, and IMDb as it is distributed."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...core.errors import InputError
from ...progress import Progress
from ..splits import Labelled, Ragged, sample
from ..task import Preset, Splits
from .find import find

Labelling = tuple[Ragged, np.ndarray]
AAN_COLUMNS = 5  # label, two ids, two texts


def imdb(folder: Path, progress: Progress) -> tuple[Labelling, Labelling]:
    """Reviews of ``aclImdb/{train,test}/{pos,neg}/*.txt`` as bytes, label 1 for the positive ones.

    Raises:
        InputError: a folder is not there, or has no reviews.
    """
    parts = []
    for part in ("train", "test"):
        rows: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(("neg", "pos")):
            place = find(folder, "the IMDb reviews", f"aclImdb/{part}/{name}", f"{part}/{name}")
            files = sorted(place.glob("*.txt"))
            if not files:
                raise InputError(f"wanted reviews *.txt in {place}, found none")
            progress.start(f"reading {part}/{name} of IMDb", None)
            rows += [file.read_bytes() for file in files]
            labels += [label] * len(files)
            progress.finish()
        parts.append((Ragged.of(rows), np.array(labels)))
    return parts[0], parts[1]


def listops_tsv(folder: Path, sizes: Preset, tokens: Sequence[str], seed: int) -> Splits:
    """``listops-1000/basic_{train,val,test}.tsv`` with the columns Source and Target.

    Args:
        folder: the release.
        sizes: how many to keep of each, and the longest.
        tokens: of each id.
        seed: of what is kept.

    Raises:
        InputError: a file is not there, or not of that form.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    kept, notes = [], ["ListOps of the Long Range Arena release"]
    longest, dropped = 0, 0
    for part, number in (("train", sizes.train), ("val", sizes.valid), ("test", sizes.test)):
        path = find(folder, "ListOps", f"listops-1000/basic_{part}.tsv", f"basic_{part}.tsv")
        rows, labels = [], []
        for line, (source, target) in enumerate(_pairs(path), 2):
            try:
                row = np.array([ids[token] for token in source.split() if token not in "()"], np.uint8)
                label = int(target)
            except (KeyError, ValueError) as error:
                raise InputError(f"wanted ListOps tokens and a digit in line {line} of {path}, got {error}") from error
            if not 0 <= label <= 9 or not len(row):
                raise InputError(f"wanted an expression and a label of 0 to 9 in line {line} of {path}, got {target!r}")
            if len(row) > sizes.length:
                dropped += 1
                continue
            rows.append(row)
            labels.append(label)
        if not rows:
            raise InputError(f"wanted expressions of at most {sizes.length} tokens in {path}, found none")
        longest = max(longest, *map(len, rows))
        kept.append(Labelled(Ragged.of(rows), np.array(labels), index=sample(len(rows), number, seed)))
    if dropped:
        notes.append(f"{dropped:,} expressions of more than {sizes.length:,} tokens left out")
    train, valid, test = kept
    return Splits(train, valid, test, longest, tuple(notes))


def aan(folder: Path, part: str) -> Iterator[tuple[int, str, str, bytes, bytes]]:
    """Label, ids and texts of the pairs in ``tsv_data/new_aan_pairs.{train,eval,test}.tsv``.

    Raises:
        InputError: the file is not there, or not of that form.
    """
    name = f"new_aan_pairs.{part}.tsv"
    path = find(folder, "the AAN pairs", f"tsv_data/{name}", name)
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for number, line in enumerate(file, 1):
            cells = [cell.strip().removeprefix('"').removesuffix('"') for cell in line.rstrip("\n").split("\t")]
            if len(cells) != AAN_COLUMNS or cells[0] not in ("0", "1", "0.0", "1.0"):
                raise InputError(
                    f"wanted a label of 0 or 1, two ids and two texts in line {number} of {path}, got "
                    f"{len(cells)} columns and {cells[0][:20]!r}"
                )
            yield int(float(cells[0])), cells[1], cells[2], cells[3].encode(), cells[4].encode()


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    limit = csv.field_size_limit(1 << 30)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            columns = reader.fieldnames or ()
            if not {"Source", "Target"} <= set(columns):
                raise InputError(f"wanted the columns Source and Target in {path}, got {', '.join(columns) or 'none'}")
            for row in reader:
                yield row["Source"], row["Target"] or ""
    finally:
        csv.field_size_limit(limit)
