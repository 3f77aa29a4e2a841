"""Images, pixel by pixel: one token a pixel, row after row, and no idea of two dimensions."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...core.errors import InputError, OptionError
from ...progress import Progress
from ..archives import members
from ..cache import cached_arrays
from ..fetch import fetch
from ..official.images import cifar10
from ..packages import FASHION_MNIST
from ..splits import Labelled, hold_out, sample
from ..task import Field, Kind, Preset, Splits, Task

GREYS = 257
"""Ids of 8-bit pixels: each one plus 1, and 0 for padding."""

_FOLDER = "usr/share/datasets/fashion-mnist/"
_SIZES = {8: 4, 16: 2, 32: 1}


class Image(Task):
    """Greyscale images of 32 x 32 pixels as sequences of 1,024 tokens.

    Args:
        size: pixels of a side, 32, or 16 or 8 by averaging squares; None is the preset's.
    """

    name: ClassVar[str] = "image"
    summary: ClassVar[str] = "grey images pixel by pixel: Fashion-MNIST padded to 32 x 32, or CIFAR-10 (10 classes)"
    kind: ClassVar[Kind] = "classify"

    def __init__(self, size: int | None = None) -> None:
        if size is not None and size not in _SIZES:
            raise OptionError(f"wanted a size among {', '.join(map(str, _SIZES))}, got {size}")
        self.size = size
        self.field = Field("tokens", vocab_size=GREYS)
        self.num_classes = 10
        self.presets = {
            "quick": Preset(length=64, train=20_000, valid=1_000, test=2_000),
            "standard": Preset(length=1_024, train=None, valid=5_000, test=None),
            "paper": Preset(length=1_024, train=None, valid=5_000, test=None),
        }

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        arrays = cached_arrays(f"image/fashion-mnist-{FASHION_MNIST.sha256[:8]}", lambda: _fashion(progress))
        note = "Fashion-MNIST, 28 x 28 padded to 32 x 32, stands in for CIFAR-10, which no package carries"
        return self._splits(arrays, sizes, seed, note)

    def _official(self, folder: Path, sizes: Preset, seed: int, progress: Progress) -> Splits:
        return self._splits(cifar10(folder), sizes, seed, "CIFAR-10 in grey")

    def _splits(self, arrays: dict[str, np.ndarray], sizes: Preset, seed: int, note: str) -> Splits:
        side = round(sizes.length**0.5) if self.size is None else self.size
        train, test = (
            Labelled(pooled(arrays[f"{part}_images"], _SIZES[side]).reshape(-1, side * side), labels, shift=1)
            for part, labels in (("train", arrays["train_labels"]), ("test", arrays["test_labels"]))
        )
        fit, held = hold_out(len(train), sizes.valid, seed)
        fit = fit[sample(len(fit), sizes.train, seed)]
        notes = [note]
        if side != 32:
            notes.append(f"averaged to {side} x {side} pixels, {side * side} tokens where 1,024 are published")
        if sizes.train is not None and len(fit) == sizes.train:
            notes.append(f"{len(fit):,} of {len(train) - len(held):,} images to train on")
        kept = sample(len(test), sizes.test, seed)
        return Splits(train.only(fit), train.only(held), test.only(kept), side * side, tuple(notes))


def pooled(images: np.ndarray, factor: int) -> np.ndarray:
    """Means of squares of ``factor`` x ``factor`` pixels, rounded: (number, side, side) uint8 to uint8."""
    if factor == 1:
        return images
    number, side, _ = images.shape
    squares = images.reshape(number, side // factor, factor, side // factor, factor)
    return np.rint(squares.mean((2, 4), dtype=np.float32)).astype(np.uint8)


def idx(content: bytes) -> np.ndarray:
    """The array of an IDX file, compressed by gzip: two zeros, 8 for bytes, the dimensions, their sizes, the data.

    Raises:
        InputError: it is not one.
    """
    try:
        data = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"wanted an IDX file compressed by gzip, got one that cannot be read: {error}") from error
    if data[:3] != b"\0\0\x08" or len(data) < 4:
        raise InputError(f"wanted an IDX file of bytes, got one that begins with {data[:4].hex()}")
    if len(data) < 4 + 4 * data[3]:
        raise InputError(f"wanted the sizes of {data[3]} dimensions in an IDX file, got {len(data)} bytes in all")
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != np.prod(shape):
        raise InputError(f"wanted {np.prod(shape)} bytes in an IDX file of shape {shape}, got {body.size}")
    return body.reshape(shape)


def _fashion(progress: Progress) -> dict[str, np.ndarray]:
    names = {
        f"{_FOLDER}{prefix}-{kind}.gz": f"{part}_{ours}"
        for part, prefix in (("train", "train"), ("test", "t10k"))
        for kind, ours in (("images-idx3-ubyte", "images"), ("labels-idx1-ubyte", "labels"))
    }
    arrays = {
        names[name]: idx(content) for name, content in members(fetch(FASHION_MNIST, progress), names.__contains__)
    }
    for part in ("train", "test"):
        arrays[f"{part}_images"] = np.pad(arrays[f"{part}_images"], ((0, 0), (2, 2), (2, 2)))
    return arrays
