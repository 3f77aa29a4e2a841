"""The tasks that read packages, on small packages of the same form."""

import contextlib
import csv
import gettext
import gzip
import io
import struct
import wave
from collections.abc import Callable

import numpy as np
import pytest

from maclin.arena.packages import (
    BROWN,
    DJANGO,
    FASHION_MNIST,
    GRAMPS,
    NEWSGROUPS,
    PLONE,
    PROMPTS,
    SKTIME,
    STDLIB,
    WAGTAIL,
)
from maclin.arena.task import Preset, Split, collate
from maclin.arena.tasks import audio, image, language, sensors, task, text, translation
from maclin.core.errors import InputError, OptionError
from maclin.progress import Silent


def contents(split: Split, key: str = "x") -> list[bytes]:
    return [bytes(np.asarray(split[i][key]).astype(np.uint8) - 1) for i in range(len(split))]


def test_newsgroups(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    def table(number: int, word: str) -> bytes:
        out = io.StringIO()
        writer = csv.writer(out, delimiter="\t")
        writer.writerows([["category", "text"], ["discrete", "string"], ["class", "meta"]])
        writer.writerows([[f"group{i % 20:02}", f"{word} number {i} of a group"] for i in range(number)])
        return out.getvalue().encode()

    name = "orangecontrib/text/datasets/20newsgroups-{}.tab"
    files = {name.format("train"): table(60, "post"), name.format("test"): table(20, "other")}
    monkeypatch.setattr(text, "NEWSGROUPS", packed(NEWSGROUPS, files))
    made = task("text", length=12)
    made.presets = {"quick": Preset(12, None, 15, None)}
    splits = made.load("quick")
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (45, 15, 20)
    train, valid = contents(splits.train), contents(splits.valid)
    assert all(row.startswith(b"post number ") for row in train + valid)
    assert contents(splits.test)[3] == b"other number"
    assert splits.test[3]["y"] == 3
    assert made.field.vocab_size == 257
    # the same seed holds out the same; the cache is enough the second time
    NEWSGROUPS.path.unlink()
    assert contents(made.load("quick").valid) == valid
    assert any("stands in for IMDb" in note for note in splits.notes)


def test_brown_keeps_files_apart(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        f"package/c{genre}{i:02}": f"\n\n\tThe/at {genre}{i:02}/np says/vbz ``/`` and/or/cc ./.\n".encode() * 8
        for genre in text.GENRES
        for i in range(1, 11)
    }
    monkeypatch.setattr(text, "BROWN", packed(BROWN, {**files, "package/readme": b"no text"}))
    made = task("text", data="brown", length=23)
    made.presets = {"quick": Preset(23, None, 40, None)}
    splits = made.load("quick")
    assert contents(splits.train)[0].decode().startswith("The a01 says `` and/or ")
    parts = [{row.split()[1] for row in contents(part)} for part in (splits.train, splits.valid, splits.test)]
    names = [{word for word in part if len(word) == 3 and word[1:].isdigit()} for part in parts]
    assert all(names)
    assert not names[0] & names[1]
    assert not names[0] & names[2]
    assert not names[1] & names[2]
    # every genre is judged
    assert {int(splits.test[i]["y"]) for i in range(len(splits.test))} == set(range(15))


def test_language(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"package/moby-dick/data/chapter_{i}.txt": f"<{i:03}>".encode() * 20 for i in range(1, 31)}
    files |= {"package/moby-dick/data/contents.txt": b"no chapter", "package/sotu/data/1790_x_n.txt": b"no novel"}
    monkeypatch.setattr(language, "STDLIB", packed(STDLIB, files))
    made = task("language", data="moby-dick", length=10)
    made.presets = {"quick": Preset(10, None, 20, None)}
    splits = made.load("quick")
    parts = [contents(part) for part in (splits.train, splits.valid, splits.test)]
    assert all(len(row) == 10 for part in parts for row in part)
    chapters = [{row[:5] for row in part} for part in parts]
    assert not chapters[0] & chapters[1]
    assert chapters[2] == {b"<010>", b"<020>", b"<030>"}
    assert len(set.union(*chapters)) == 30
    assert made.causal
    assert 1 < made.trivial(splits).value < 257
    with pytest.raises(OptionError, match="length that documents"):
        task("language", data="moby-dick", length=1_000).load("quick")


def mo(pairs: dict[str, str]) -> bytes:
    """A compiled catalogue, by its published layout: magic, version, count, two tables of (length, offset), hash."""
    pairs = {"": "Content-Type: text/plain; charset=UTF-8\n", **pairs}
    keys = sorted(pairs)
    at = 28 + 16 * len(keys)
    tables, body = [[], []], b""
    for side, table in enumerate(tables):
        for key in keys:
            item = (key if side == 0 else pairs[key]).encode()
            table += [len(item), at + len(body)]
            body += item + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(keys), 28, 28 + 8 * len(keys), 0, at)
    return head + struct.pack(f"<{4 * len(keys)}I", *tables[0], *tables[1]) + body


def test_translation(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    content = mo({"month\x04May": "Mai", "Save": "Sichern", "same": "same", "%d day\0%d days": "%d Tag\0%d Tage"})
    assert gettext.GNUTranslations(io.BytesIO(content)).gettext("Save") == "Sichern"
    assert translation.catalogue(content) == {"May": "Mai", "Save": "Sichern", "same": "same"}
    with pytest.raises(InputError, match=r"\.mo"):
        translation.catalogue(b"none")
    numbered = {f"word number {i} of all": f"wört number {i} of all" for i in range(40)} | {
        f"Word number {i} of all": f"Wört number {i} of all" for i in range(40)
    }
    package = packed(
        DJANGO,
        {"django/conf/locale/de/LC_MESSAGES/django.mo": mo(numbered), "django/conf/locale/fr/LC_MESSAGES/x.mo": b""},
    )
    others = [packed(other, {"a/locale/de/LC_MESSAGES/b.mo": content}) for other in (WAGTAIL, PLONE, GRAMPS)]
    monkeypatch.setattr(translation, "_CATALOGUES", (package, *others))
    made = task("translation")
    assert isinstance(made, translation.Translation)
    made.presets = {"quick": Preset(48, None, 10, 10)}
    splits = made.load("quick")
    parts = [contents(part, "source") for part in (splits.train, splits.valid, splits.test)]
    assert sorted(row for part in parts for row in part) == sorted([b"Save", *(k.encode() for k in numbered)])
    # a message in other letters is the same message
    lowered = [{row.lower() for row in part} for part in parts]
    assert not lowered[0] & lowered[1]
    assert not (lowered[0] | lowered[1]) & lowered[2]
    example = next(splits.train[i] for i in range(len(splits.train)) if parts[0][i] != b"Save")
    target = np.asarray(example["target"])
    assert (target[0], target[-1]) == (translation.BEGIN, translation.END)
    assert made.decode(target).lower().startswith("wört ")
    assert made.decode(np.array([translation.BEGIN, 98, translation.END, 99])) == "a"
    assert target.max() < (made.field.vocab_size or 0)
    copied = made.trivial(splits)
    assert copied.name == "copied source"
    # of "wört number 7 of all" all but the first word is right: 4 of 5 words, 3 of 4 pairs, 2 of 3, 1 of 2
    assert copied.value == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, rel=0.05)
    assert set(collate(made, [example])) == {"source", "source_mask", "target", "target_mask"}


def tone(frequency: float, samples: int, rate: int = 8_000, width: int = 2, channels: int = 1) -> bytes:
    wave_form = np.sin(2 * np.pi * frequency * np.arange(samples) / rate)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        scaled = np.rint(wave_form * 0.5 * 2 ** (8 * width - 1)).astype({1: "i1", 2: "<i2", 4: "<i4"}[width])
        body = scaled if width > 1 else (scaled.astype(np.int16) + 128).astype(np.uint8)
        file.writeframes(np.repeat(body, channels).tobytes())
    return out.getvalue()


def test_audio(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {}
    for label, language_name in enumerate(sorted(PROMPTS)):
        # the frequency tells the prompt, and its tens the language
        files = {
            f"usr/share/asterisk/sounds/{language_name}_x/digits/{i}.wav": tone(100 + 100 * i + 10 * label, 900)
            for i in range(20)
        }
        files[f"usr/share/asterisk/sounds/{language_name}_x/silence.wav"] = tone(0, 900)
        packages[language_name] = packed(PROMPTS[language_name], files)
    monkeypatch.setattr(audio, "PROMPTS", packages)
    made = task("audio", length=400)
    splits = made.load("quick")
    assert made.num_classes == 5
    prompts: list[set[int]] = []
    for part in (splits.train, splits.valid, splits.test):
        found = set()
        for i in range(len(part)):
            x = np.asarray(part[i]["x"])
            assert x.shape == (400, 1)
            assert np.square(x).mean() == pytest.approx(1, rel=1e-3)
            peak = np.abs(np.fft.rfft(x[:, 0], 8_000)).argmax()
            frequency = round(float(peak) / 10) * 10
            assert frequency % 100 // 10 == part[i]["y"]
            found.add(frequency // 100)
        prompts.append(found)
    assert all(prompts)
    assert not prompts[0] & prompts[1]
    assert not (prompts[0] | prompts[1]) & prompts[2]
    # two stretches of each prompt, in five languages; nothing of what is silent
    assert sum(len(part) for part in (splits.train, splits.valid, splits.test)) == 20 * 5 * 2


def test_wave_files_of_every_width() -> None:
    for width in (1, 2, 4):
        samples, rate = audio.read_wave(tone(440, 50, rate=16_000, width=width, channels=2), "a.wav")
        assert (samples.shape, rate) == ((50, 2), 16_000)
    with pytest.raises(InputError, match="got 24"):
        audio.read_wave(tone(1, 9).replace(b"\x02\x00\x10\x00data", b"\x03\x00\x18\x00data"), "deep.wav")
    with pytest.raises(InputError, match=r"none\.wav"):
        audio.read_wave(b"RIFF", "none.wav")


def test_sensors(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def file(number: int) -> bytes:
        head = "# about\n@problemName PLAID\n@classLabel true " + " ".join(map(str, range(11))) + "\n@data\n"
        rows = [
            ",".join(f"{v:.6g}" for v in 10.0 ** (i % 11 - 8) * rng.standard_normal(100 + i)) + f":{i % 11}"
            for i in range(number)
        ]
        return (head + "\n".join(rows)).encode()

    names = {f"sktime/datasets/data/PLAID/PLAID_{part}.ts": file(150) for part in ("TRAIN", "TEST")}
    monkeypatch.setattr(sensors, "SKTIME", packed(SKTIME, names))
    splits = task("sensors").load("standard")
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (50, 100, 150)
    x = np.asarray(splits.test[14]["x"])
    assert splits.test[14]["y"] == 3
    assert x.shape == (114, 2)
    assert x[:, 0].mean() == pytest.approx(0, abs=1e-5)
    assert x[:, 0].std() == pytest.approx(1, rel=1e-4)
    # the size that standardising takes away stands in the second channel
    assert np.allclose(x[:, 1], -5, atol=0.2)
    assert np.ptp(x[:, 1]) == 0
    assert np.asarray(task("sensors").load("quick").test[14]["x"]).shape == (114 // 4, 2)
    for wrong, message in (
        ("@classLabel true 0 1\n@data\n1,2:3\n", "label among 0, 1 in line 3"),
        ("@classLabel true 0 1\n@data\n1,x:0\n", "numbers in line 3"),
        ("", "none"),
    ):
        with pytest.raises(InputError, match=message):
            sensors.series_file(wrong)


def test_image(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pixels = {part: rng.integers(0, 256, (number, 28, 28), np.uint8) for part, number in (("train", 50), ("t10k", 9))}
    files = {}
    for part, array in pixels.items():
        head = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        folder = "usr/share/datasets/fashion-mnist"
        files[f"{folder}/{part}-images-idx3-ubyte.gz"] = gzip.compress(head + array.tobytes())
        labels = bytes(i % 10 for i in range(len(array)))
        files[f"{folder}/{part}-labels-idx1-ubyte.gz"] = gzip.compress(
            bytes([0, 0, 8, 1]) + len(labels).to_bytes(4, "big") + labels
        )
    monkeypatch.setattr(image, "FASHION_MNIST", packed(FASHION_MNIST, files))
    made = task("image")
    made.presets = {"quick": Preset(256, 30, 10, None), "standard": Preset(1_024, None, 10, None)}
    splits = made.load("standard")
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (40, 10, 9)
    picture = np.asarray(splits.test[4]["x"]).reshape(32, 32) - 1
    assert np.array_equal(picture[2:30, 2:30], pixels["t10k"][4])
    assert picture.sum() == pixels["t10k"][4].sum()
    assert splits.test[4]["y"] == 4
    small = made.load("quick")
    assert len(small.train) == 30
    corner = np.asarray(small.test[4]["x"]).reshape(16, 16)[1, 1] - 1
    assert corner == round(float(pixels["t10k"][4][:2, :2].mean()))
    assert any("16 x 16" in note for note in small.notes)
    for wrong in (b"none", gzip.compress(b"odd file"), gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1]))):
        with pytest.raises(InputError, match="IDX"):
            image.idx(wrong)


def test_what_cannot_be_fetched_is_said_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="dataset-fashion-mnist"):
        task("image").load("quick", progress=Silent())


@pytest.mark.parametrize(
    ("whole", "read"),
    [
        (tone(440, 60), lambda content: audio.read_wave(content, "a.wav")),
        (gzip.compress(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(6)), image.idx),
        (bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(6), lambda content: image.idx(gzip.compress(content))),
        (mo({"a b": "c d", "e": "f"}), translation.catalogue),
        (b"@classLabel true 0 1\n@data\n1,2:0\n3,4:1\n", lambda c: sensors.series_file(c.decode("latin-1"))),
    ],
    ids=["wav", "idx.gz", "idx", "mo", "ts"],
)
def test_a_damaged_file_is_read_or_refused(whole: bytes, read: Callable[[bytes], object]) -> None:
    rng = np.random.default_rng(0)
    read(whole)
    for i in range(150):
        content = bytearray(whole[: int(rng.integers(1, len(whole)))] if i % 3 == 0 else whole)
        for place in rng.integers(0, min(len(content), 60), 3):
            content[place] = rng.integers(256)
        with contextlib.suppress(InputError):
            read(bytes(content))
