"""The readers of model files, on small files that are written here byte by byte."""

import importlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maclin.core.errors import InputError

gguf: Any = importlib.import_module("models.gguf")
ctranslate: Any = importlib.import_module("models.ctranslate")
onnx: Any = importlib.import_module("models.onnx")


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_file(tensors: list[tuple[str, tuple[int, ...], int, bytes]]) -> bytes:
    values = gguf_text("a.number") + struct.pack("<II", 4, 7)
    values += gguf_text("a.list") + struct.pack("<IIQ", 9, 8, 2) + gguf_text("é") + gguf_text("")
    values += gguf_text("a.flag") + struct.pack("<I?", 7, True)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 3) + values
    data = b""
    for name, shape, kind, content in tensors:
        data += bytes(-len(data) % 32)
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += gguf_text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, len(data))
        data += content
    return head + bytes(-len(head) % 32) + data


def test_gguf_values_and_plain_numbers(tmp_path: Path) -> None:
    numbers = np.arange(64, dtype="<f4").reshape(2, 32)
    path = tmp_path / "model.gguf"
    path.write_bytes(
        gguf_file([("half", (2, 32), 1, numbers.astype("<f2").tobytes()), ("w", (64,), 0, numbers.tobytes())])
    )
    found = gguf.read_gguf(path)
    assert found.values == {"a.number": 7, "a.list": ["é", ""], "a.flag": True}
    np.testing.assert_array_equal(found.tensors["half"], numbers)
    np.testing.assert_array_equal(found.tensors["w"], numbers.ravel())


def test_gguf_quantised_numbers(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    four, eight = generator.integers(0, 16, (3, 32)), generator.integers(-128, 128, (2, 32))
    scales, offsets = np.array([0.5, -2.0, 0.25]), np.array([1.0, 0.0, -3.5])
    packed = b"".join(
        struct.pack("<ee", d, m) + bytes(int(row[i]) | int(row[i + 16]) << 4 for i in range(16))
        for d, m, row in zip(scales, offsets, four, strict=True)
    )
    plain = b"".join(struct.pack("<e32b", d, *row.tolist()) for d, row in zip(scales, eight, strict=False))
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file([("four", (3, 32), 3, packed), ("eight", (64,), 8, plain)]))
    found = gguf.read_gguf(path).tensors
    np.testing.assert_array_equal(found["four"], scales[:, None] * four + offsets[:, None])
    np.testing.assert_array_equal(found["eight"], (scales[:2, None] * eight).ravel())


@pytest.mark.parametrize("damage", ["magic", "end", "kind"])
def test_gguf_that_cannot_be_read(tmp_path: Path, damage: str) -> None:
    content = gguf_file([("w", (32,), 99 if damage == "kind" else 0, bytes(128))])
    content = {"magic": b"GGML" + content[4:], "end": content[:-40], "kind": content}[damage]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match="wanted"):
        gguf.read_gguf(path)


def ctranslate_file(variables: dict[str, np.ndarray]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    kinds = {"float32": 0, "int8": 1, "float16": 4}
    content = struct.pack("<I", 6) + text("KindSpec") + struct.pack("<II", 3, len(variables))
    for name, x in variables.items():
        content += text(name) + struct.pack(f"<B{x.ndim}I", x.ndim, *x.shape)
        content += struct.pack("<BI", kinds[str(x.dtype)], x.nbytes) + x.tobytes()
    return content


def test_ctranslate_variables(tmp_path: Path) -> None:
    variables = {
        "layer/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "scale": np.array(0.5, dtype=np.float32),
        "flag": np.array([1], dtype=np.int8),
    }
    path = tmp_path / "model.bin"
    path.write_bytes(ctranslate_file(variables))
    found = ctranslate.read_variables(path)
    assert list(found) == list(variables)
    for name, x in variables.items():
        assert found[name].shape == x.shape
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)
    path.write_bytes(ctranslate_file(variables)[:-5])
    with pytest.raises(InputError, match="CTranslate2"):
        ctranslate.read_variables(path)


def varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def part(number: int, content: bytes | int | str) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    given = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(given)) + given


def onnx_tensor(name: str, x: np.ndarray, packed: bool) -> bytes:
    sizes = part(1, b"".join(map(varint, x.shape))) if packed else b"".join(part(1, n) for n in x.shape)
    return sizes + part(2, 1) + part(8, name) + part(9, x.astype("<f4").tobytes())


@pytest.mark.parametrize("packed", [False, True])
def test_onnx_constants_and_products(tmp_path: Path, packed: bool) -> None:
    weight, bias = np.arange(600, dtype=np.float32).reshape(200, 3), np.ones(3, np.float32)
    product = part(1, "x") + part(1, "onnx::7") + part(2, "y") + part(3, "/block/fc/MatMul") + part(4, "MatMul")
    of_two = part(1, "x") + part(1, "y") + part(3, "/block/scores/MatMul") + part(4, "MatMul")
    add = part(1, "y") + part(1, "fc.bias") + part(3, "/block/fc/Add") + part(4, "Add")
    graph = b"".join(part(1, node) for node in (product, of_two, add)) + part(2, "graph")
    graph += part(5, onnx_tensor("onnx::7", weight, packed)) + part(5, onnx_tensor("fc.bias", bias, packed))
    # a number, a fixed field of four bytes and one of eight stand between
    content = part(1, 8) + varint(20 << 3 | 5) + bytes(4) + varint(21 << 3 | 1) + bytes(8) + part(7, graph)
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    found = onnx.read_onnx(path)
    assert found.products == {"/block/fc/MatMul": "onnx::7"}
    np.testing.assert_array_equal(found.constants["onnx::7"], weight)
    np.testing.assert_array_equal(found.constants["fc.bias"], bias)
    for damaged in (content[:-10], b"", b"\xff\xff"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="ONNX"):
            onnx.read_onnx(path)
