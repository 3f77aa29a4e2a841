"""Published data in its official layout, in small; and what is said where it is not there."""

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from maclin.arena.official.images import grey_png
from maclin.arena.task import Preset
from maclin.arena.tasks import task
from maclin.core.errors import InputError, OptionError


def test_listops(tmp_path: Path) -> None:
    folder = tmp_path / "lra_release" / "listops-1000"
    folder.mkdir(parents=True)
    for part in ("train", "val", "test"):
        rows = ["Source\tTarget", "( ( ( [MAX 4 ) 7 ) ] )\t7", "( ( ( [SM 9 ) 2 ) ] )\t1"]
        (folder / f"basic_{part}.tsv").write_text("\n".join(rows))
    made = task("listops")
    splits = made.load("paper", data_dir=tmp_path)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [2, 2, 2]
    # [MAX 4 7 ] in the ids of the task: digits are 1 to 10, MAX 11, the end 15
    assert np.asarray(splits.train[0]["x"]).tolist() == [11, 5, 8, 15]
    assert [splits.train[i]["y"] for i in range(2)] == [7, 1]
    made.presets = {"quick": Preset(3, 2, 2, 2)}
    with pytest.raises(InputError, match="at most 3 tokens"):
        made.load("quick", data_dir=tmp_path)
    for wrong, message in (
        ("Source\tTarget\n[MAX 4 ]\tx", "line 2"),
        ("Source\tTarget\n[MAX q ]\t3", "line 2"),
        ("Source\tTarget\n[MAX 4 ]\t11", "label of 0 to 9"),
        ("a\tb\n1\t2", "columns Source and Target.*got a, b"),
    ):
        (folder / "basic_val.tsv").write_text(wrong)
        with pytest.raises(InputError, match=message):
            task("listops").load("paper", data_dir=tmp_path)
    (folder / "basic_val.tsv").unlink()
    with pytest.raises(InputError, match=r"listops-1000/basic_val\.tsv"):
        task("listops").load("paper", data_dir=tmp_path)


def test_imdb(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("pos", "neg"):
            folder = tmp_path / "aclImdb" / part / name
            folder.mkdir(parents=True)
            for i in range(10):
                (folder / f"{i}_7.txt").write_text(f"{part} {name} review {i}")
    made = task("text", data="imdb")
    made.presets = {"quick": Preset(30, None, 4, 12)}
    splits = made.load("quick", data_dir=tmp_path)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [16, 4, 12]
    for part, name in ((splits.train, b"train"), (splits.valid, b"train"), (splits.test, b"test")):
        for i in range(len(part)):
            words = bytes(np.asarray(part[i]["x"]).astype(np.uint8) - 1).split()
            assert words[:2] == [name, b"pos" if part[i]["y"] else b"neg"]
    with pytest.raises(OptionError, match="--data-dir"):
        made.load("quick")
    with pytest.raises(OptionError, match="imdb"):
        task("text").load("quick", data_dir=tmp_path)
    (tmp_path / "aclImdb" / "test" / "neg").rename(tmp_path / "aclImdb" / "test" / "bad")
    with pytest.raises(InputError, match="aclImdb/test/neg"):
        made.load("quick", data_dir=tmp_path)


def test_aan(tmp_path: Path) -> None:
    folder = tmp_path / "tsv_data"
    folder.mkdir()
    for part in ("train", "eval", "test"):
        lines = [f'"{i % 2}"\t"A{i}"\t"B{i % 3}"\t"{part} text {i}"\t"text of B{i % 3}"' for i in range(8)]
        (folder / f"new_aan_pairs.{part}.tsv").write_text("\n".join(lines))
    splits = task("retrieval", length=12).load("standard", data_dir=tmp_path)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [8, 8, 8]
    example = splits.valid[5]
    texts = [bytes(np.asarray(example[key]).astype(np.uint8) - 1) for key in ("x1", "x2")]
    assert texts == [b"eval text 5", b"text of B2"]
    assert example["y"] == 1
    (folder / "new_aan_pairs.eval.tsv").write_text("0\ta\tb\tonly four\n")
    with pytest.raises(InputError, match="line 1"):
        task("retrieval").load("standard", data_dir=tmp_path)


def cifar(pixels: np.ndarray, labels: list[int]) -> tuple[bytes, bytes]:
    rows = pixels.reshape(len(pixels), -1)
    binary = b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, rows, strict=True))
    return pickle.dumps({b"data": rows, b"labels": labels}), binary


@pytest.mark.parametrize("layout", ["py", "bin"])
def test_cifar10(tmp_path: Path, layout: str) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / f"cifar-10-batches-{layout}"
    folder.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    pixels = {name: rng.integers(0, 256, (4, 3, 32, 32), np.uint8) for name in names}
    for name in names:
        pickled, binary = cifar(pixels[name], [0, 9, 3, 1])
        (folder / (name if layout == "py" else f"{name}.bin")).write_bytes(pickled if layout == "py" else binary)
    made = task("image")
    made.presets = {"standard": Preset(1_024, None, 5, None)}
    splits = made.load("standard", data_dir=tmp_path)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [15, 5, 4]
    red, green, blue = pixels["test_batch"][1].astype(float)
    grey = 0.2989 * red + 0.587 * green + 0.114 * blue
    x = np.asarray(splits.test[1]["x"]).reshape(32, 32) - 1
    assert np.abs(x - grey).max() <= 0.501
    assert splits.test[1]["y"] == 9
    path = folder / ("test_batch" if layout == "py" else "test_batch.bin")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="test_batch"):
        made.load("standard", data_dir=tmp_path)


class Harmful:
    def __reduce__(self):
        return (print, ("run by a pickle",))


def test_a_pickle_that_names_anything_but_arrays_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Harmful(), b"labels": []}))
    with pytest.raises(InputError, match="print, which is no array"):
        task("image").load("standard", data_dir=tmp_path)
    assert capsys.readouterr().out == ""


def png(image: np.ndarray, kinds: list[int]) -> bytes:
    """Every row filtered in its own way, by the definition of the format."""
    height, width = image.shape
    full = np.zeros((height + 1, width + 1), int)
    full[1:, 1:] = image
    raw = b""
    for y in range(height):
        row = bytearray()
        for x in range(width):
            left, up, corner = full[y + 1, x], full[y, x + 1], full[y, x]
            p = left + up - corner
            nearest = min((abs(p - left), 0, left), (abs(p - up), 1, up), (abs(p - corner), 2, corner))[2]
            guess = [0, left, up, (left + up) // 2, nearest][kinds[y % len(kinds)]]
            row.append(int(image[y, x] - guess) % 256)
        raw += bytes([kinds[y % len(kinds)]]) + bytes(row)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packed = zlib.compress(raw)
    parts = chunk(b"IDAT", packed[:9]) + chunk(b"IDAT", packed[9:])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + parts + chunk(b"IEND", b"")


def test_pictures_are_read_whatever_their_filters() -> None:
    image = np.random.default_rng(0).integers(0, 256, (10, 7), np.uint8)
    for kinds in ([0], [1], [2], [3], [4], [4, 3, 2, 1, 0]):
        assert np.array_equal(grey_png(png(image, kinds)), image)
    whole = png(image, [0])
    for wrong, message in (
        (b"GIF89a", "no PNG"),
        (whole.replace(b"IHDR" + whole[16:24] + b"\x08\x00", b"IHDR" + whole[16:24] + b"\x08\x02"), "colour type 2"),
        (png(image, [0]).replace(b"IDAT", b"IDAX"), "pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            grey_png(wrong)


def test_pathfinder(tmp_path: Path) -> None:
    base = tmp_path / "pathfinder32" / "curv_contour_length_14"
    (base / "metadata").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 32, 32), np.uint8)
    for folder in range(2):
        (base / "imgs" / str(folder)).mkdir(parents=True)
        lines = []
        for i in range(10):
            number = 10 * folder + i
            (base / "imgs" / str(folder) / f"sample_{i}.png").write_bytes(png(images[number], [1]))
            lines.append(f"imgs/{folder} sample_{i}.png {i} {number % 2} 0.5 14")
        (base / "metadata" / f"{folder}.npy").write_text("\n".join(lines))
    made = task("pathfinder")
    splits = made.load("standard", data_dir=tmp_path)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [16, 2, 2]
    known = {image.tobytes(): i % 2 for i, image in enumerate(images)}
    for part in (splits.train, splits.valid, splits.test):
        for i in range(len(part)):
            pixels = (np.asarray(part[i]["x"]) - 1).astype(np.uint8)
            assert known.pop(pixels.tobytes()) == part[i]["y"]
    assert not known
    (base / "metadata" / "0.npy").write_text("imgs/0 none.png 0 1")
    with pytest.raises(InputError, match=r"none\.png"):
        made.load("standard", data_dir=tmp_path)
