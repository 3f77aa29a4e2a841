"""CIFAR-10 as it is distributed, and Pathfinder of the Long Range Arena release."""

from __future__ import annotations

import io
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import InputError
from ...progress import Progress
from .find import find

_PIXELS = 3 * 32 * 32
_GREY = np.array([0.2989, 0.587, 0.114], np.float32)  # of red, green and blue
_PNG = b"\x89PNG\r\n\x1a\n"


class _Arrays(pickle.Unpickler):
    """Reads arrays and plain values, and nothing else that a pickle could name."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def cifar10(folder: Path) -> dict[str, np.ndarray]:
    """Grey images (number, 32, 32) and labels of ``cifar-10-batches-py`` or ``cifar-10-batches-bin``.

    Raises:
        InputError: a file is not there, or not of that form.
    """
    parts = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    out: dict[str, np.ndarray] = {}
    for part, names in parts.items():
        images, labels = [], []
        for name in names:
            layouts = (f"cifar-10-batches-py/{name}", f"cifar-10-batches-bin/{name}.bin", name, f"{name}.bin")
            path = find(folder, "CIFAR-10", *layouts)
            image, label = _binary(path) if path.suffix == ".bin" else _pickled(path)
            if label.size and not 0 <= label.min() <= label.max() <= 9:
                raise InputError(f"wanted labels of 0 to 9 in {path}, got {label.min()} to {label.max()}")
            images.append(image)
            labels.append(label)
        pixels = np.concatenate(images).reshape(-1, 3, 32, 32)
        out[f"{part}_images"] = np.rint(np.einsum("ncij,c->nij", pixels, _GREY)).astype(np.uint8)
        out[f"{part}_labels"] = np.concatenate(labels).astype(np.int64)
    return out


def pathfinder_release(folder: Path, size: int, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Images (number, size, size) and labels of ``pathfinder<size>/curv_contour_length_14``.

    Raises:
        InputError: a file is not there, or not of that form.
    """
    name = "curv_contour_length_14"
    base = find(folder, "Pathfinder", f"pathfinder{size}/{name}", f"lra_release/pathfinder{size}/{name}", name)
    tables = sorted((base / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    if not tables:
        raise InputError(f"wanted metadata/*.npy in {base}, found none")
    images, labels = [], []
    progress.start(f"reading Pathfinder of {size} x {size}", len(tables))
    for table in tables:
        # the release writes lines of text into files with that suffix: folder, file, number, label, ...
        for number, line in enumerate(table.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            cells = line.split()
            if len(cells) < 4 or cells[3] not in ("0", "1"):
                raise InputError(f"wanted a folder, a file, a number and a label in line {number} of {table}")
            path = base / cells[0] / cells[1]
            try:
                image = grey_png(path.read_bytes())
            except (OSError, ValueError) as error:
                raise InputError(f"wanted a grey PNG of 8 bits at {path}: {error}") from error
            if image.shape != (size, size):
                raise InputError(f"wanted {size} x {size} pixels in {path}, got {image.shape}")
            images.append(image)
            labels.append(int(cells[3]))
        progress.advance()
    progress.finish()
    return np.stack(images), np.array(labels)


def grey_png(content: bytes) -> np.ndarray:
    """The pixels of a grey PNG of 8 bits without interlacing, (height, width) uint8.

    Raises:
        ValueError: it is another kind of file.
    """
    if not content.startswith(_PNG):
        raise ValueError("it is no PNG file")
    at, body, width, height = len(_PNG), b"", 0, 0
    while at + 12 <= len(content):
        size, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        chunk = content[at + 8 : at + 8 + size]
        at += 12 + size
        if kind == b"IHDR":
            width, height = int.from_bytes(chunk[:4], "big"), int.from_bytes(chunk[4:8], "big")
            if chunk[8] != 8 or chunk[9] != 0 or chunk[12] != 0:
                raise ValueError(f"it has depth {chunk[8]}, colour type {chunk[9]} and interlacing {chunk[12]}")
        elif kind == b"IDAT":
            body += chunk
    try:
        data = np.frombuffer(zlib.decompress(body), np.uint8)
    except zlib.error as error:
        raise ValueError(f"its pixels cannot be read ({error})") from error
    if not width or data.size != height * (width + 1):
        raise ValueError(f"it has {data.size} bytes of pixels for {height} rows of {width}")
    return _unfiltered(data.reshape(height, width + 1))


def _unfiltered(rows: np.ndarray) -> np.ndarray:
    height, width = rows.shape[0], rows.shape[1] - 1
    out = np.zeros((height + 1, width + 1), np.int64)  # a row and a column of zeros before the image
    for y in range(height):
        kind, line = int(rows[y, 0]), rows[y, 1:].astype(np.int64)
        above = out[y]
        if kind == 0:
            out[y + 1, 1:] = line
        elif kind == 1:
            out[y + 1, 1:] = np.cumsum(line) % 256
        elif kind == 2:
            out[y + 1, 1:] = (line + above[1:]) % 256
        elif kind in (3, 4):
            for x in range(width):
                left, up, corner = int(out[y + 1, x]), int(above[x + 1]), int(above[x])
                guess = (left + up) // 2 if kind == 3 else _paeth(left, up, corner)
                out[y + 1, x + 1] = (line[x] + guess) % 256
        else:
            raise ValueError(f"row {y} has the unknown filter {kind}")
    return out[1:, 1:].astype(np.uint8)


def _paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    distances = abs(guess - left), abs(guess - up), abs(guess - corner)
    return (left, up, corner)[distances.index(min(distances))]


def _pickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels = np.asarray(content[b"data"], np.uint8).reshape(-1, _PIXELS)
        labels = np.asarray(content[b"labels"], np.int64)
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(f"wanted a batch of CIFAR-10 in {path}, got a file that cannot be read: {error}") from error
    if len(pixels) != len(labels):
        raise InputError(f"wanted one label per image in {path}, got {len(labels)} for {len(pixels)}")
    return pixels, labels


def _binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    data = np.frombuffer(path.read_bytes(), np.uint8)
    if not data.size or data.size % (_PIXELS + 1):
        raise InputError(f"wanted rows of {_PIXELS + 1} bytes in {path}, got {data.size} bytes")
    rows = data.reshape(-1, _PIXELS + 1)
    return rows[:, 1:], rows[:, 0].astype(np.int64)
