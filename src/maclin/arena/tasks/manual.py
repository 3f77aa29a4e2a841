"""Manual pages as plain documents, and which of them name each other under SEE ALSO."""

from __future__ import annotations

import gzip
import re
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

SHORTEST = 400  # bytes of a page that is kept
MASK = "#"
_SEE_ALSO = re.compile(r'\n\.S[hH] "?SEE ALSO"?\s*\n(.*?)(?=\n\.S[hH] |\Z)', re.S | re.I)
_NAME = re.compile(r'\n\.S[hH] "?NAME"?\s*\n(.*?)(?=\n\.S[hH] |\Z)', re.S | re.I)
_REFERENCE = re.compile(r'([\w.\-:]+)\s*\(?\s*"?([1-9])[a-zA-Z]*\)?')
_ESCAPE = re.compile(r"\\f(?:\[\w*\]|\(..|.)|\\s[-+]?\d|\\[&/,^|]|\\\*?\(..|\\\*?\[\w+\]")
_REQUEST = re.compile(r"^[.'][ \t]*[A-Za-z]{1,3}\b[ \t]*", re.M)
_COMMENT = re.compile(r"^[.']?[ \t]*\\\".*$\n?|\\\".*$", re.M)
_SPACE = re.compile(r"[ \t]+|\n\s*\n+")
_INCLUDE = re.compile(rb"(?:\.\\\".*\n)*\.so +(\S+)\s*(?:\.\\\".*\n?)*\Z")
_WORD = re.compile(r"[\w.\-:]+")

Key = tuple[str, str]
"""Name and section of a page."""


@dataclass(frozen=True)
class Page:
    """One manual page.

    Args:
        family: whose pages its links are among.
        name: of the page.
        section: of the manual.
        text: of the page, without its own names and without SEE ALSO.
        links: names and sections that stand under SEE ALSO.
        aliases: other names and sections of the same page.
    """

    family: str
    name: str
    section: str
    text: bytes
    links: frozenset[Key]
    aliases: tuple[Key, ...] = ()


def key(path: str) -> Key:
    """Name and section of ``.../<name>.<section>.gz``; what follows the digit of the section is left out."""
    name, _, section = PurePosixPath(path).name.removesuffix(".gz").rpartition(".")
    return name, section[:1]


def page(family: str, path: str, content: bytes, aliases: Sequence[str] = ()) -> Page | None:
    """A page from its compressed source, or None where there is too little of it.

    Args:
        family: whose pages these are.
        path: where the page is.
        content: roff source, compressed by gzip.
        aliases: paths that are links to it.
    """
    try:
        source = gzip.decompress(content).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error):
        return None
    others = tuple(key(alias) for alias in aliases)
    name, section = key(path)
    text = plain(_SEE_ALSO.sub("\n", source))
    text = masked(text, {name, *own_names(source), *(other for other, _ in others)})
    if not name or not section.isdigit() or len(text.encode()) < SHORTEST:
        return None
    return Page(family, name, section, text.encode(), references(source), others)


def included(content: bytes) -> str | None:
    """The path, below the manual, of the page that this one is nothing but a reference to, or None."""
    try:
        source = gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        return None
    found = _INCLUDE.match(source)
    return found[1].decode() if found else None


def references(source: str) -> frozenset[Key]:
    """Names and sections under SEE ALSO."""
    found = _SEE_ALSO.search(source)
    if found is None:
        return frozenset()
    return frozenset(_REFERENCE.findall(_ESCAPE.sub("", found[1].replace("\\-", "-"))))


def own_names(source: str) -> set[str]:
    """Words that the section NAME lists before the dash."""
    found = _NAME.search(source)
    if found is None:
        return set()
    listed = re.split(r"\\-|\n\.Nd|\\\(em| - ", found[1].replace("\n.Nm", " "))[0]
    return {word for word in _WORD.findall(_REQUEST.sub("", _ESCAPE.sub("", listed))) if len(word) > 1}


def plain(source: str) -> str:
    """The words of roff source: comments, requests and changes of font left out."""
    text = _COMMENT.sub("", source)
    text = _ESCAPE.sub("", text.replace("\\-", "-").replace("\\e", "\\"))
    text = _REQUEST.sub("", text).replace('"', "")
    return _SPACE.sub(lambda found: "\n" if "\n" in found[0] else " ", text).strip()


def masked(text: str, names: Iterable[str]) -> str:
    """The text with every one of these words replaced, in whatever case it is written."""
    ordered = sorted({name for name in names if name}, key=len, reverse=True)
    if not ordered:
        return text
    words = "|".join(map(re.escape, ordered))
    return re.sub(rf"(?<![A-Za-z0-9_])(?:{words})(?![A-Za-z0-9_])", MASK, text, flags=re.I)


def linked(pages: Sequence[Page]) -> np.ndarray:
    """Pairs of pages (number, 2) of which one names the other, each once, the smaller number first."""
    index: dict[tuple[str, str, str], int] = {}
    for i, one in enumerate(pages):
        for name, section in one.aliases:
            index[one.family, name, section] = i
    for i, one in enumerate(pages):
        index[one.family, one.name, one.section] = i
    pairs = set()
    for i, one in enumerate(pages):
        for name, section in one.links:
            j = index.get((one.family, name, section))
            if j is not None and j != i:
                pairs.add((min(i, j), max(i, j)))
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)


def neighbourhoods(number: int, pairs: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A group for each page, of at most ``size`` pages that are near each other by their links.

    A split by groups of neighbours keeps more pairs on one side than a split by single pages.

    Args:
        number: of pages.
        pairs: links, (links, 2).
        size: of a group.
        rng: where groups begin.
    """
    near: list[list[int]] = [[] for _ in range(number)]
    for i, j in pairs.tolist():
        near[i].append(j)
        near[j].append(i)
    group = np.full(number, -1)
    current = 0
    for start in rng.permutation(number).tolist():
        if group[start] >= 0:
            continue
        queue, taken = deque([start]), 0
        while queue and taken < size:
            i = queue.popleft()
            if group[i] >= 0:
                continue
            group[i] = current
            taken += 1
            queue.extend(j for j in near[i] if group[j] < 0)
        current += 1
    return group
