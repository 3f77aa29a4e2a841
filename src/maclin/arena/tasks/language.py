"""Language modelling, byte by byte: speeches, or a novel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...core.errors import OptionError
from ...progress import Progress
from ..archives import members
from ..cache import cached_arrays
from ..fetch import fetch
from ..packages import STDLIB
from ..splits import Ragged, hold_out, sample
from ..task import Example, Field, Kind, Preset, Splits, Task, check_length
from .text import BYTES, windows

_FILES = {
    "sotu": re.compile(r"package/sotu/data/\d{4}_\w+\.txt$"),
    "moby-dick": re.compile(r"package/moby-dick/data/(chapter_\d+|epilogue)\.txt$"),
}
_TEST_EVERY = 10  # of the documents


class Language(Task):
    """The next byte of a text.

    Args:
        data: ``sotu``, the addresses of 231 years to the congress of the United States, or ``moby-dick``.
        length: bytes of a stretch; None is the preset's.
    """

    name: ClassVar[str] = "language"
    summary: ClassVar[str] = "the next byte of speeches (State of the Union) or of a novel (Moby Dick)"
    kind: ClassVar[Kind] = "language"
    causal: ClassVar[bool] = True

    def __init__(self, data: str = "sotu", length: int | None = None) -> None:
        if data not in _FILES:
            raise OptionError(f"wanted data among {', '.join(_FILES)}, got {data!r}")
        self.data = data
        self.length = check_length(length)
        self.field = Field("tokens", vocab_size=BYTES)
        self.num_classes = BYTES
        self.presets = {
            "quick": Preset(length=256, train=None, valid=400, test=1_000),
            "standard": Preset(length=1_024, train=None, valid=400, test=None),
            "paper": Preset(length=4_096, train=None, valid=100, test=None),
        }

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        length = sizes.length if self.length is None else self.length
        arrays = cached_arrays(f"language/{self.data}-{STDLIB.version}", lambda: _texts(self.data, progress))
        documents = Ragged(arrays["bytes"], arrays["ends"])
        parts: dict[str, list[tuple[bytes, int]]] = {"train": [], "test": []}
        for i in range(len(documents)):
            part = "test" if i % _TEST_EVERY == _TEST_EVERY - 1 else "train"
            parts[part] += [(stretch, i) for stretch in windows(documents[i].tobytes(), length)]
        if not parts["train"] or not parts["test"]:
            raise OptionError(f"wanted a length that documents of {self.data} have, got {length}")
        stretches = [text for text, _ in parts["train"]]
        valid = min(sizes.valid, len(stretches) // 8)
        fit, held = hold_out(len(stretches), valid, seed, [document for _, document in parts["train"]])
        test = [parts["test"][i][0] for i in sample(len(parts["test"]), sizes.test, seed)]
        return Splits(
            Bytes([stretches[i] for i in fit]),
            Bytes([stretches[i] for i in held]),
            Bytes(test),
            length,
            (f"stretches of {length:,} bytes of {self.data}; no document is in two splits",),
        )


class Bytes:
    """Stretches of bytes as ids.

    Args:
        texts: the stretches.
    """

    def __init__(self, texts: list[bytes]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Example:
        return {"x": np.frombuffer(self.texts[index], np.uint8).astype(np.int64) + 1}


def _texts(data: str, progress: Progress) -> dict[str, np.ndarray]:
    found = dict(members(fetch(STDLIB, progress), lambda name: bool(_FILES[data].match(name))))
    names = sorted(found, key=lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", Path(name).name)])
    rows = Ragged.of(found[name] for name in names)
    return {"bytes": rows.flat, "ends": rows.ends}
