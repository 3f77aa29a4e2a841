"""Retrieval: do two documents refer to each other? Read by two towers, byte by byte."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...core.errors import InputError
from ...progress import Progress
from ..archives import links, members
from ..cache import cached_arrays
from ..fetch import fetch
from ..official.texts import aan
from ..packages import MAN_PAGES
from ..splits import SAMPLED, Ragged, hold_out, sample
from ..task import Example, Field, Kind, Preset, Splits, Task, check_length
from .manual import Page, included, linked, neighbourhoods, page
from .text import BYTES

_MANUAL = "usr/share/man/"
_LONGEST = 16_000  # bytes of a page that are kept
_FAMILIES = ("bsd", "linux", "linux", "tcl")  # of each package
_GROUP = 20  # pages; larger ones make splits that are unlike each other
_TEST_SHARE, _VALID_SHARE = 0.2, 0.1  # of the pages
_TEST_SEED = 20  # the test split is the same for every split seed
_TRIES = 20  # draws for each pair without a link


class Retrieval(Task):
    """Pairs of manual pages, label 1 where one names the other under SEE ALSO, else of the same families and sections.

    SEE ALSO and the page's own names are left out of its text, and no page is in two splits.

    Args:
        length: bytes after which a document is cut; None is the preset's.
    """

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "whether two documents refer to each other: manual pages, or the AAN pairs"
    kind: ClassVar[Kind] = "match"

    def __init__(self, length: int | None = None) -> None:
        self.length = check_length(length)
        self.field = Field("tokens", vocab_size=BYTES)
        self.num_classes = 2
        self.presets = {
            "quick": Preset(length=512, train=None, valid=500, test=1_000),
            "standard": Preset(length=4_000, train=None, valid=1_000, test=None),
            "paper": Preset(length=4_000, train=None, valid=1_000, test=None),
        }

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        length = sizes.length if self.length is None else self.length
        arrays = cached_arrays(f"retrieval/manual-2-{MAN_PAGES[0].version}", lambda: _manual(progress))
        pages, kinds, pairs = Ragged(arrays["bytes"], arrays["ends"]), arrays["kinds"], arrays["links"]
        group = neighbourhoods(len(pages), pairs, _GROUP, np.random.default_rng(_TEST_SEED))
        rest, test = hold_out(len(pages), int(_TEST_SHARE * len(pages)), _TEST_SEED, group.tolist())
        fit, held = hold_out(len(rest), int(_VALID_SHARE * len(pages)), seed, group[rest].tolist())
        parts = []
        for stream, (index, number) in enumerate(
            ((rest[fit], sizes.train), (rest[held], sizes.valid), (test, sizes.test))
        ):
            both, labels = balanced(index, pairs, kinds, np.random.default_rng([seed, SAMPLED, stream]))
            kept = sample(len(both), number, seed, stream)
            parts.append(Pairs(pages, both[kept], labels[kept], length))
        notes = (
            f"manual pages stand in for AAN, which no package carries: {len(parts[0]):,} pairs to train on",
            f"documents cut at {length:,} bytes",
        )
        train, valid, test = parts
        return Splits(train, valid, test, length, notes)

    def _official(self, folder: Path, sizes: Preset, seed: int, progress: Progress) -> Splits:
        length = sizes.length if self.length is None else self.length
        parts = []
        for part, number in (("train", sizes.train), ("eval", sizes.valid), ("test", sizes.test)):
            progress.start(f"reading the {part} pairs of AAN", None)
            known: dict[str, int] = {}
            texts: list[bytes] = []
            pairs: list[tuple[int, int]] = []
            labels: list[int] = []
            for label, first, second, text1, text2 in aan(folder, part):
                for name, text in ((first, text1), (second, text2)):
                    if name not in known:
                        known[name] = len(texts)
                        texts.append(text[:length])
                pairs.append((known[first], known[second]))
                labels.append(label)
            if not pairs:
                raise InputError(f"wanted pairs in new_aan_pairs.{part}.tsv of {folder}, found none")
            kept = sample(len(pairs), number, seed)
            parts.append(Pairs(Ragged.of(texts), np.array(pairs)[kept], np.array(labels)[kept], length))
            progress.finish()
        train, valid, test = parts
        return Splits(train, valid, test, length, (f"AAN pairs, cut at {length:,} bytes",))


class Pairs:
    """Pairs of documents.

    Args:
        documents: bytes.
        pairs: two documents each, (number, 2).
        labels: of the pairs.
        length: bytes after which a document is cut.
    """

    def __init__(self, documents: Ragged, pairs: np.ndarray, labels: np.ndarray, length: int) -> None:
        self.documents, self.pairs, self.labels, self.length = documents, pairs, labels, length

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        x1, x2 = (self.documents[int(i)][: self.length].astype(np.int64) + 1 for i in self.pairs[index])
        return {"x1": x1, "x2": x2, "y": int(self.labels[index])}


def balanced(
    index: np.ndarray, linked_pairs: np.ndarray, kinds: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of these pages and their labels: the links among them, and as many pairs without a link.

    Of each two kinds there are as many pairs of either label; both pages of a pair without a link have links to others,
    and each stands in about as many pairs as it has links, so that neither the kinds nor one page by itself gives the
    label away.

    Args:
        index: pages that may be used.
        linked_pairs: all links, (number, 2).
        kinds: of each page.
        rng: draws the pairs and which page is the first.
    """
    usable = np.zeros(len(kinds), bool)
    usable[index] = True
    inside = linked_pairs[usable[linked_pairs].all(1)]
    known = {(i, j) for i, j in linked_pairs.tolist()}
    alike: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for i, j in inside.tolist():
        first, second = sorted((i, j), key=lambda page: int(kinds[page]))
        alike[int(kinds[first]), int(kinds[second])].append((first, second))
    pairs: list[tuple[int, int]] = []
    labels: list[int] = []
    for key in sorted(alike):
        near = np.array(alike[key])
        far: set[tuple[int, int]] = set()
        for _ in range(_TRIES * len(near)):
            if len(far) == len(near):
                break
            i, j = rng.choice(near[:, 0]), rng.choice(near[:, 1])
            if i != j and not any(pair in known or pair in far for pair in ((i, j), (j, i))):
                far.add((int(i), int(j)))
        chosen = rng.permutation(near)[: len(far)]
        pairs += [*map(tuple, chosen.tolist()), *sorted(far)]
        labels += [1] * len(chosen) + [0] * len(far)
    out = np.array(pairs, np.int64).reshape(-1, 2)
    swap = rng.random(len(out)) < 0.5
    out[swap] = out[swap, ::-1]
    order = rng.permutation(len(out))
    return out[order], np.array(labels, np.int64)[order]


def _manual(progress: Progress) -> dict[str, np.ndarray]:
    pages: dict[tuple[str, str, str], Page] = {}
    for family, package in zip(_FAMILIES, MAN_PAGES, strict=True):
        archive = fetch(package, progress)
        progress.start(f"reading {package.name}", None)
        files = dict(members(archive, _is_page))
        aliases: dict[str, list[str]] = defaultdict(list)
        for alias, target in links(archive, _is_page).items():
            aliases[target].append(alias)
        for path, content in files.items():
            target = included(content)
            if target is not None:
                aliases[f"{_MANUAL}{target}.gz"].append(path)
        for path, content in files.items():
            found = page(family, path, content, aliases[path])
            if found is not None:
                pages.setdefault((found.family, found.name, found.section), found)
        progress.finish()
    ordered = [pages[key] for key in sorted(pages)]
    rows = Ragged.of(one.text[:_LONGEST] for one in ordered)
    names = sorted({(one.family, one.section) for one in ordered})
    kinds = np.array([names.index((one.family, one.section)) for one in ordered])
    return {"bytes": rows.flat, "ends": rows.ends, "kinds": kinds, "links": linked(ordered)}


def _is_page(path: str) -> bool:
    return path.startswith(f"{_MANUAL}man") and path.endswith(".gz")
