"""Reading the weights in an ONNX file: its constants by name, and which of them each product multiplies by.

An ONNX file is a protocol-buffer message: fields, each a key (number and wire type) and a number, eight or four
bytes, or a length with as many bytes. The few fields that are wanted are named below; all others are stepped over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maclin.core.errors import InputError

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_CONSTANT = 1, 5
_NODE_INPUT, _NODE_NAME, _NODE_KIND = 1, 3, 4
_TENSOR_SIZES, _TENSOR_KIND, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_KINDS = {1: "<f4", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"}


@dataclass(frozen=True)
class Onnx:
    """What is read of a file.

    Attributes:
        constants: by name.
        products: from the name of each matrix product to the name of the constant it multiplies by.
    """

    constants: dict[str, np.ndarray]
    products: dict[str, str]


def read_onnx(path: Path) -> Onnx:
    """Read a file.

    Args:
        path: of the file.

    Raises:
        InputError: it cannot be read as such.
    """
    constants: dict[str, np.ndarray] = {}
    products: dict[str, str] = {}
    try:
        for number, graph in _fields(memoryview(path.read_bytes())):
            if number != _MODEL_GRAPH or isinstance(graph, int):
                continue
            for part, content in _fields(graph):
                if isinstance(content, int):
                    continue
                if part == _GRAPH_CONSTANT:
                    name, tensor = _tensor(content)
                    constants[name] = tensor
                elif part == _GRAPH_NODE:
                    name, kind, inputs = _node(content)
                    if kind == "MatMul":
                        products[name] = inputs[1]
    except (IndexError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise InputError(f"wanted an ONNX file that can be read, got {path}: {error!r}; fetch it again") from error
    if not constants:
        raise InputError(f"wanted an ONNX file with constants, got {path} without; fetch it again")
    return Onnx(constants, {name: constant for name, constant in products.items() if constant in constants})


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and content of each field of a message."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(content, at)
            yield number, value
            continue
        if wire == _BYTES:
            length, at = _varint(content, at)
        elif wire in (_EIGHT, _FOUR):
            length = 8 if wire == _EIGHT else 4
        else:
            raise ValueError(f"a field of wire type {wire}")
        if at + length > len(content):
            raise ValueError("it ends too early")
        yield number, content[at : at + length]
        at += length


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and the place behind it."""
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _tensor(content: memoryview) -> tuple[str, np.ndarray]:
    name, kind, raw = "", 0, memoryview(b"")
    sizes: list[int] = []
    for number, value in _fields(content):
        if number == _TENSOR_SIZES:
            sizes.extend([value] if isinstance(value, int) else _packed(value))
        elif number == _TENSOR_KIND and isinstance(value, int):
            kind = value
        elif not isinstance(value, int) and number == _TENSOR_NAME:
            name = bytes(value).decode()
        elif not isinstance(value, int) and number == _TENSOR_RAW:
            raw = value
    return name, np.frombuffer(raw, _KINDS[kind]).reshape(sizes)


def _packed(content: memoryview) -> list[int]:
    at, found = 0, []
    while at < len(content):
        value, at = _varint(content, at)
        found.append(value)
    return found


def _node(content: memoryview) -> tuple[str, str, list[str]]:
    name = kind = ""
    inputs: list[str] = []
    for number, value in _fields(content):
        if isinstance(value, int):
            continue
        if number == _NODE_INPUT:
            inputs.append(bytes(value).decode())
        elif number == _NODE_NAME:
            name = bytes(value).decode()
        elif number == _NODE_KIND:
            kind = bytes(value).decode()
    return name, kind, inputs
