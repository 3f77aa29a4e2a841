"""Pathfinder: are two discs on the ends of the same dashed curve? Pixel by pixel."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from ...core.errors import OptionError
from ...progress import Progress
from ..cache import cached_arrays
from ..official.images import pathfinder_release
from ..splits import GENERATED, Labelled, hold_out, sample
from ..task import Field, Kind, Preset, Splits, Task
from .image import GREYS
from .snakes import Rules, draw, render

RULES = {
    16: Rules(16, 1, 1, 2, 0.5, 1.0, 7, 6, 2, 2, 1.0),
    32: Rules(32, 1, 1, 2, 0.5, 1.5, 7, 14, 4, 5, 1.0),
    128: Rules(128, 1, 2, 5, 1.5, 3, 20, 14, 4, 8, 1.8),
}
"""Sizes by the pixels of a side: 32 and 128 as published (hard, 14 dashes), 16 our own small one."""

_GIVEN_AWAY = {16: 61, 32: 53, 128: 69}
"""Percent that boosted trees get right from the places of the discs alone, fitted on 2,000 drawings of ours."""

_CHUNK = 500  # drawings that are kept together, so that an interrupted job goes on
_VERSION = 2


class Pathfinder(Task):
    """Drawings of dashed curves, label 1 where both discs are on one curve.

    Args:
        size: pixels of a side: 16, 32 or 128; None is the preset's.
    """

    name: ClassVar[str] = "pathfinder"
    summary: ClassVar[str] = "whether a dashed curve joins two discs: Pathfinder, generated, 32 x 32 pixels"
    kind: ClassVar[Kind] = "classify"

    def __init__(self, size: int | None = None) -> None:
        if size is not None and size not in RULES:
            raise OptionError(f"wanted a size among {', '.join(map(str, RULES))}, got {size}")
        self.size = size
        self.field = Field("tokens", vocab_size=GREYS)
        self.num_classes = 2
        self.presets = {
            "quick": Preset(length=16**2, train=20_000, valid=1_000, test=2_000),
            "standard": Preset(length=32**2, train=20_000, valid=2_000, test=2_000),
            "paper": Preset(length=32**2, train=160_000, valid=20_000, test=20_000),
        }

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        side = round(sizes.length**0.5) if self.size is None else self.size
        # what is judged comes first, so that it is the same whatever the number to train on
        counts = sizes.numbers[::-1]
        images, labels = generate(RULES[side], sum(counts), seed, progress)
        every = Labelled(images.reshape(-1, side * side), labels, shift=1)
        test, valid, train = (every.only(part) for part in np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1]))
        notes = [f"drawings of {side} x {side} pixels with curves of {RULES[side].length} dashes"]
        notes.append(f"the places of the discs alone give {_GIVEN_AWAY[side]} % of the labels")
        if side == 16:
            notes.append("our own small version: 256 tokens where 1,024 are published")
        if len(train) < 160_000:
            notes.append(f"{len(train):,} drawings to train on, the published number is 160,000")
        return Splits(train, valid, test, side * side, tuple(notes))

    def _official(self, folder: Path, sizes: Preset, seed: int, progress: Progress) -> Splits:
        side = self.size or 32
        images, labels = pathfinder_release(folder, side, progress)
        every = Labelled(images.reshape(-1, side * side), labels, shift=1)
        rest, test = hold_out(len(labels), len(labels) // 10, 0)
        fit, held = hold_out(len(rest), len(labels) // 10, seed)
        train, valid, test = (
            every.only(index[sample(len(index), number, seed)])
            for index, number in ((rest[fit], sizes.train), (rest[held], sizes.valid), (test, sizes.test))
        )
        return Splits(
            train, valid, test, side * side, (f"Pathfinder of the Long Range Arena release, {side} x {side} pixels",)
        )


class PathX(Pathfinder):
    """The same with 128 x 128 pixels, 16,384 tokens."""

    name: ClassVar[str] = "pathx"
    summary: ClassVar[str] = "the same with 128 x 128 pixels, 16,384 tokens"

    def __init__(self) -> None:
        super().__init__(128)
        length = 128**2
        self.presets = {
            "quick": Preset(length=length, train=2_000, valid=200, test=400),
            "standard": Preset(length=length, train=20_000, valid=2_000, test=2_000),
            "paper": Preset(length=length, train=160_000, valid=20_000, test=20_000),
        }


def generate(rules: Rules, number: int, seed: int, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """So many images (number, size, size) and their labels; what was made before is taken from the cache.

    Args:
        rules: of the drawings.
        number: of them.
        seed: of all of them.
        progress: is told after each part.
    """
    chunks = -(-number // _CHUNK)
    progress.start(f"drawing {number:,} images of {rules.size} x {rules.size}", chunks)
    parts = []
    for chunk in range(chunks):
        key = f"pathfinder/{rules.size}-{rules.length}-v{_VERSION}-{seed}/{chunk:05d}"
        parts.append(cached_arrays(key, lambda chunk=chunk: _chunk(rules, seed, chunk)))
        progress.advance()
    progress.finish()
    images, labels = (np.concatenate([part[name] for part in parts])[:number] for name in ("images", "labels"))
    return images, labels


def _chunk(rules: Rules, seed: int, chunk: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, GENERATED, chunk])
    drawings = [draw(rules, rng) for _ in range(_CHUNK)]
    return {
        "images": np.stack([render(rules, drawing) for drawing in drawings]),
        "labels": np.array([drawing.label for drawing in drawings]),
    }
