"""Reading the variables of a CTranslate2 model.bin: names, shapes and numbers, in the order of the file.

After the version and the name of the model's kind comes the number of variables; each is a name, a rank and its
sizes, the kind of its numbers, their length in bytes, and themselves. A text is its length, a closing zero
included, and its bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from maclin.core.errors import InputError

_KINDS = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """All variables of a file, by name.

    Args:
        path: of the file.

    Raises:
        InputError: it cannot be read as such.
    """
    content = memoryview(path.read_bytes())
    at = 0

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from(layout, content, at)
        at += struct.calcsize(layout)
        return values

    def text() -> str:
        nonlocal at
        (length,) = take("<H")
        at += length
        return bytes(content[at - length : at - 1]).decode()

    found: dict[str, np.ndarray] = {}
    try:
        take("<I")  # version of the file
        text()  # kind of model
        _, count = take("<II")  # version of the kind
        for _ in range(count):
            name = text()
            (rank,) = take("<B")
            shape = take(f"<{rank}I")
            kind, length = take("<BI")
            numbers = np.dtype(_KINDS[kind])
            found[name] = np.frombuffer(content, numbers, length // numbers.itemsize, at).reshape(shape)
            at += length
    except (struct.error, UnicodeDecodeError, ValueError, KeyError) as error:
        raise InputError(
            f"wanted a CTranslate2 model that can be read, got {path}: {error!r}; fetch it again"
        ) from error
    return found
