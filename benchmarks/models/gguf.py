"""Reading GGUF, version 3: what a file says of a model, and its tensors with their quantisation undone.

A file is a header, pairs of key and value, a directory of tensors, and from the next multiple of the alignment on
their data; all numbers are little-endian, a text is its length in bytes and its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maclin.core.errors import InputError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9
_BLOCK = 32  # numbers that share a scale


@dataclass(frozen=True)
class Gguf:
    """What a file holds.

    Attributes:
        values: by key.
        tensors: by name, float32, in row-major order of their shape (out, in).
    """

    values: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read_gguf(path: Path) -> Gguf:
    """Read a file whole.

    Args:
        path: of the file.

    Raises:
        InputError: it is no such file, ends too early, or holds a kind of tensor that is not read here.
    """
    content = memoryview(path.read_bytes())
    try:
        return _read(content, path)
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"wanted a GGUF file that can be read, got {path}: {error}; fetch it again") from error


def _read(content: memoryview, path: Path) -> Gguf:
    cursor = _Cursor(content)
    magic, version = bytes(content[:4]), struct.unpack_from("<I", content, 4)[0]
    if magic != b"GGUF" or version != 3:
        raise InputError(f"wanted a GGUF file of version 3, got {path}, which begins with {magic!r}")
    cursor.at = 8
    num_tensors, num_values = cursor.take("<Q"), cursor.take("<Q")
    values: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.text()
        values[key] = cursor.value(cursor.take("<I"))
    directory = []
    for _ in range(num_tensors):
        name = cursor.text()
        shape = tuple(cursor.take("<Q") for _ in range(cursor.take("<I")))[::-1]  # the innermost comes first
        directory.append((name, shape, cursor.take("<I"), cursor.take("<Q")))
    alignment = int(values.get("general.alignment", 32))
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in directory:
        if kind not in _KINDS:
            raise InputError(f"wanted tensors of kind {sorted(_KINDS)} in {path}, got {name} of kind {kind}")
        size, unpack = _KINDS[kind]
        count = int(np.prod(shape))
        length = count // _BLOCK * size
        raw = np.frombuffer(content, np.uint8, length, start + offset).reshape(-1, size)
        tensors[name] = unpack(raw).reshape(shape)
    return Gguf(values, tensors)


class _Cursor:
    """A place in the file."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.at = content, 0

    def take(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.content, self.at)
        self.at += struct.calcsize(layout)
        return value

    def text(self) -> str:
        length = self.take("<Q")
        self.at += length
        return bytes(self.content[self.at - length : self.at]).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.take("<I"), self.take("<Q")
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value of kind {kind}")
        return self.take(_SCALARS[kind])


def _half(raw: np.ndarray) -> np.ndarray:
    """Two bytes at a time as float32: (blocks, n)."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _float32(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f4").astype(np.float32)


def _q8_0(raw: np.ndarray) -> np.ndarray:
    """Scale d, 32 signed bytes q: d q."""
    return _half(raw[:, :2]) * np.ascontiguousarray(raw[:, 2:]).view(np.int8)


def _q4_1(raw: np.ndarray) -> np.ndarray:
    """Scale d, offset m, 16 bytes of two 4-bit numbers q, the lower halves first: d q + m."""
    q = np.concatenate((raw[:, 4:] & 15, raw[:, 4:] >> 4), axis=1)
    return _half(raw[:, :2]) * q + _half(raw[:, 2:4])


_KINDS: dict[int, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    0: (4 * _BLOCK, _float32),
    1: (2 * _BLOCK, _half),
    3: (2 + 2 + _BLOCK // 2, _q4_1),
    8: (2 + _BLOCK, _q8_0),
}
"""By kind: bytes that 32 numbers take, and what makes them float32."""
