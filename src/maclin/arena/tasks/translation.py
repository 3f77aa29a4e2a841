"""Translation of messages of programs, byte by byte: from English into a language of their catalogues."""

from __future__ import annotations

import gettext
import io
import struct
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ...core.errors import InputError, OptionError
from ...progress import Progress
from ..archives import members
from ..cache import cached_arrays
from ..fetch import Package, fetch
from ..packages import DJANGO, GRAMPS, PLONE, WAGTAIL
from ..scores import bleu
from ..splits import Ragged, hold_out
from ..task import Example, Field, Kind, Preset, Split, Splits, Task, check_length

LANGUAGES = ("de", "es", "fr", "it", "nl", "pt_BR", "ru")
BEGIN, END = 257, 258
"""Ids that a target begins and ends with; bytes are 1 to 256, padding is 0."""

_CATALOGUES: tuple[Package, ...] = (DJANGO, WAGTAIL, PLONE, GRAMPS)
_SHORTEST = 4  # bytes
_TEST_SEED = 20  # the test split is the same for every split seed


class Translation(Task):
    """Messages of Django, Wagtail, Plone and Gramps, from English; a message is in one split only.

    Args:
        language: of the target, as catalogues name it.
        length: bytes of the longest message kept; None is the preset's.
    """

    name: ClassVar[str] = "translation"
    summary: ClassVar[str] = "English messages of programs into German or another language, byte by byte"
    kind: ClassVar[Kind] = "translate"

    def __init__(self, language: str = "de", length: int | None = None) -> None:
        if language not in LANGUAGES:
            raise OptionError(f"wanted language among {', '.join(LANGUAGES)}, got {language!r}")
        self.language = language
        self.length = check_length(length)
        self.field = Field("tokens", vocab_size=END + 1)
        self.num_classes = END + 1
        self.presets = {
            "quick": Preset(length=48, train=None, valid=300, test=500),
            "standard": Preset(length=128, train=None, valid=500, test=1_000),
            "paper": Preset(length=256, train=None, valid=500, test=1_000),
        }

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        length = sizes.length if self.length is None else self.length
        versions = "-".join(package.version for package in _CATALOGUES)
        arrays = cached_arrays(f"translation/{self.language}-{versions}", lambda: _pairs(self.language, progress))
        sources, targets = (Ragged(arrays[f"{side}_bytes"], arrays[f"{side}_ends"]) for side in ("source", "target"))
        # the marks take two places of the target
        short = np.flatnonzero(np.maximum(sources.lengths, targets.lengths + 2) <= length)
        if len(short) < 8:
            raise OptionError(f"wanted a length that messages have, got {length}")
        # what a message looks like in lower case, so that "Save" and "save" are never on two sides
        groups = [sources[i].tobytes().lower() for i in short.tolist()]
        rest, test = hold_out(len(short), min(sizes.test or 0, len(short) // 4), _TEST_SEED, groups)
        valid = min(sizes.valid, len(rest) // 4)
        fit, held = hold_out(len(rest), valid, seed, [groups[i] for i in rest])
        train, valid, judged = (Messages(sources, targets, short[index]) for index in (rest[fit], rest[held], test))
        notes = (
            f"{len(fit):,} messages of Django, Wagtail, Plone and Gramps into {self.language} to train on, up to "
            f"{length} bytes: a small task",
        )
        return Splits(train, valid, judged, length, notes)

    def decode(self, ids: np.ndarray) -> str:
        """The text of a target: what stands before the end, without the marks; bytes that are no text are replaced."""
        kept = []
        for i in np.asarray(ids).tolist():
            if i == END:
                break
            if 1 <= i <= 256:
                kept.append(i - 1)
        return bytes(kept).decode("utf-8", "replace")

    def _copied(self, split: Split) -> float:
        examples = [split[i] for i in range(len(split))]
        sources, targets = ([self.decode(np.asarray(e[side])) for e in examples] for side in ("source", "target"))
        return bleu(sources, targets)


class Messages:
    """Pairs of messages as ids; a target begins with ``BEGIN`` and ends with ``END``.

    Args:
        sources: bytes of all messages.
        targets: bytes of their translations.
        index: which of them.
    """

    def __init__(self, sources: Ragged, targets: Ragged, index: np.ndarray) -> None:
        self.sources, self.targets, self.index = sources, targets, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Example:
        place = int(self.index[index])
        target = self.targets[place].astype(np.int64) + 1
        return {
            "source": self.sources[place].astype(np.int64) + 1,
            "target": np.concatenate([[BEGIN], target, [END]]),
        }


def catalogue(content: bytes) -> dict[str, str]:
    """Messages and translations of a compiled catalogue (.mo); plural forms and empty ones are left out.

    Raises:
        InputError: it is not one.
    """
    try:
        found: Mapping[object, str] = gettext.GNUTranslations(io.BytesIO(content))._catalog  # type: ignore[attr-defined]
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise InputError(
            f"wanted a compiled catalogue of messages (.mo), got a file that cannot be read: {error}"
        ) from error
    # the context of a message stands before it, with the sign 4 between
    pairs = ((key.rpartition("\x04")[2], text) for key, text in found.items() if isinstance(key, str))
    return {message: text for message, text in pairs if message.strip() and text.strip()}


def _pairs(language: str, progress: Progress) -> dict[str, np.ndarray]:
    ending = f"/{language}/LC_MESSAGES/"
    merged: dict[str, str] = {}
    for package in _CATALOGUES:
        for _, content in members(fetch(package, progress), lambda name: ending in name and name.endswith(".mo")):
            for message, text in catalogue(content).items():
                if message != text and len(message.encode()) >= _SHORTEST:
                    merged.setdefault(" ".join(message.split()), " ".join(text.split()))
    if not merged:
        raise InputError(f"wanted catalogues of {language} in {', '.join(p.file for p in _CATALOGUES)}, found none")
    order = sorted(merged)
    sources, targets = Ragged.of(m.encode() for m in order), Ragged.of(merged[m].encode() for m in order)
    return {
        "source_bytes": sources.flat,
        "source_ends": sources.ends,
        "target_bytes": targets.flat,
        "target_ends": targets.ends,
    }
