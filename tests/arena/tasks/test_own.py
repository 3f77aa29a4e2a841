"""A user's own data: what is read, how it is split, and what is said of everything that can be wrong with it."""

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maclin.arena.task import collate
from maclin.arena.tasks import task
from maclin.core.errors import InputError, MaclinError, OptionError


def texts(path: Path, number: int = 40) -> Path:
    lines = ["body,kind,day"]
    lines += [
        f'"a log, line {i}\nand more of {"ab"[i % 2] * 9}",{"up" if i % 2 else "down"},{i}' for i in range(number)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_of_texts(tmp_path: Path) -> None:
    made = task("csv", data=str(texts(tmp_path / "log.csv")), text_column="body", label_column="kind")
    splits = made.load("standard", seed=3)
    assert (made.num_classes, made.field.vocab_size) == (2, 257)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [28, 4, 8]
    seen = set()
    for part in (splits.train, splits.valid, splits.test):
        for i in range(len(part)):
            words = bytes(np.asarray(part[i]["x"]).astype(np.uint8) - 1).decode()
            # classes are in the order of the alphabet: down, up
            assert part[i]["y"] == int("b" in words)
            seen.add(words)
    assert len(seen) == 40
    assert made.trivial(splits).name == "majority"
    assert splits.length == max(len(word) for word in seen)
    again, other = made.load("standard", seed=3), made.load("standard", seed=4)
    first = [part.valid[0]["x"].tolist() for part in (splits, again)]  # type: ignore[union-attr]
    assert first[0] == first[1]
    held = [{part[i]["x"].tobytes() for i in range(4)} for part in (splits.valid, other.valid)]  # type: ignore[union-attr]
    assert held[0] != held[1]
    # what is judged does not depend on the split seed
    assert all(np.array_equal(splits.test[i]["x"], other.test[i]["x"]) for i in range(8))


def test_other_signs_between_columns(tmp_path: Path) -> None:
    for sign in ";\t|":
        path = tmp_path / "log.csv"
        path.write_text(
            "\ufeff" + "\n".join([sign.join(("label", "text")), *(f"{i % 3}{sign}word {i}" for i in range(12))])
        )
        assert task("csv", data=path).num_classes == 3


def test_a_table_of_steps_is_a_set_of_series(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, series = ["id,t,current,voltage,state"], {}
    for name in range(20):
        values = rng.standard_normal((5 + name % 3, 2)) * [3, 0.1] + [0, 230]
        series[name] = values
        rows += [f"m{name},{t},{a},{b},{'on' if name % 2 else 'off'}" for t, (a, b) in enumerate(values)]
    path = tmp_path / "meters.csv"
    path.write_text("\n".join(rows))
    made = task("csv", data=path, value_columns="current, voltage", id_column="id", label_column="state")
    splits = made.load("standard")
    assert (made.field.kind, made.field.channels) == ("values", 2)
    assert {len(np.asarray(splits.train[i]["x"])) for i in range(len(splits.train))} == {5, 6, 7}
    every = np.concatenate([np.asarray(splits.train[i]["x"]) for i in range(len(splits.train))])
    # standardised by what is trained on, channel by channel
    assert np.allclose(every.mean(0), 0, atol=1e-4)
    assert np.allclose(every.std(0), 1, atol=1e-4)
    batch = collate(made, [splits.train[i] for i in range(4)])
    assert batch["x"].shape[2] == 2


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}", "label": i % 2 == 0}) for i in range(12)) + "\n\n")
    assert task("jsonl", data=path).num_classes == 2
    path.write_text("\n".join(json.dumps({"x": [[i, j] for j in range(4)], "y": i % 3 + 5}) for i in range(12)))
    made = task("jsonl", data=path, text_column="x", label_column="y")
    assert (made.num_classes, made.field.channels) == (3, 2)
    path.write_text("\n".join(json.dumps({"text": [0.5] * (i + 1), "label": i % 2}) for i in range(12)))
    assert task("jsonl", data=path).presets["standard"].length == 12


def test_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    y = np.arange(30) % 3
    np.savez(path, x=np.arange(30 * 6).reshape(30, 6) % 7, y=y, lengths=np.arange(30) % 6 + 1)
    made = task("npz", data=path)
    splits = made.load("quick")
    assert made.field.vocab_size == 8
    assert min(np.asarray(splits.train[i]["x"]).min() for i in range(len(splits.train))) == 1
    assert splits.length == 6
    np.savez(path, signal=np.ones((30, 6)), y=y)
    assert task("npz", data=path, text_column="signal").field.channels == 1
    np.savez(path, signal=np.ones((30, 6, 4), np.float16), y=y.astype(float))
    made = task("npz", data=path, text_column="signal", length=3)
    assert made.field.channels == 4
    assert np.asarray(made.load("standard").test[0]["x"]).shape == (3, 4)
    assert any("cut at 3 positions" in note for note in made.load("standard").notes)


def sound(path: Path, rate: int = 8_000, samples: int = 100, channels: int = 1) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes((np.arange(samples * channels) % 50).astype("<i2").tobytes())


def test_recordings(tmp_path: Path) -> None:
    for i in range(12):
        sound(tmp_path / "xy"[i % 2] / f"{i}.wav", samples=50 + i)
    made = task("wavdir", data=tmp_path)
    assert (made.num_classes, made.field.channels, made.presets["standard"].length) == (2, 1, 61)
    sound(tmp_path / "y" / "later.WAV", rate=16_000)
    with pytest.raises(InputError, match=r"one sampling rate.*8000 Hz.*16000 Hz"):
        task("wavdir", data=tmp_path)
    sound(tmp_path / "y" / "later.WAV", channels=2)
    with pytest.raises(InputError, match="number of channels"):
        task("wavdir", data=tmp_path)
    (tmp_path / "y" / "later.WAV").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"later\.WAV"):
        task("wavdir", data=tmp_path)


def test_what_is_judged_can_be_a_file_of_its_own(tmp_path: Path) -> None:
    data, other = texts(tmp_path / "a.csv"), texts(tmp_path / "b.csv", 6)
    columns = {"text_column": "body", "label_column": "kind"}
    splits = task("csv", data=data, test_data=other, **columns).load("standard")
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [36, 4, 6]
    other.write_text("body,kind\nsome text,sideways\n")
    with pytest.raises(InputError, match=r"wanted labels among down, up in .*b\.csv, got 'sideways'"):
        task("csv", data=data, test_data=other, **columns)


CSV_ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("", {}, "empty file"),
    ("text,label\n", {}, "rows below the heading"),
    ("a,b\n1,2\n", {}, "wanted the column 'label' in .*, which has a, b"),
    ("text,label\nx,1\n,2\n", {}, "wanted a text in 'text' in line 3"),
    ("text,label\nx,1\ny,\n", {}, "wanted a label in line 3.*got none"),
    ("text,label\nx,1\ny\n", {}, "wanted a label in line 3"),
    ("text,label\n" + "x,1\n" * 20, {}, "at least 2 different labels"),
    ("text,label\nx,1\ny,2\n", {}, "at least 10 examples"),
    ("text,label\n" + "x,1\ny,7\n" * 9, {"num_classes": 3}, "wanted labels among 0, 1, 2.*got '7'"),
    ("id,v,label\nm,1,a\nm,2,b\n", {"value_columns": "v", "id_column": "id"}, "one label for the series 'm'"),
    ("id,v,label\nm,1,a\nm,nan,a\n", {"value_columns": "v", "id_column": "id"}, "finite number in 'v' in line 3"),
    ("id,v,label\nm,1,a\nm,,a\n", {"value_columns": "v", "id_column": "id"}, "finite number in 'v' in line 3"),
    ("id,v,label\nm,1,a\n", {"value_columns": "v,w", "id_column": "id"}, "the column 'w'.*which has id, v, label"),
]


@pytest.mark.parametrize(("content", "more", "message"), CSV_ERRORS)
def test_what_is_wrong_with_a_table_is_named(tmp_path: Path, content: str, more: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        task("csv", data=path, **more)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty file"),
        ('{"text": "a", "label": 1}\nno json\n', "JSON object in line 2"),
        ("[1]\n", "JSON object in line 1.*list"),
        ('{"body": "a", "label": 1}', "the column 'text' in line 1.*which has body, label"),
        ('{"text": "a", "label": null}', "a label in line 1"),
        ('{"text": "a", "label": 0.5}', "whole number in line 1"),
        ('{"text": [1, NaN], "label": 1}', "finite numbers"),
        ('{"text": [[1, 2], [3]], "label": 1}', "as many numbers each"),
        ('{"text": [], "label": 1}', "shape"),
        ('{"text": [[1, 2]], "label": 1}\n{"text": [1], "label": 1}', "as many channels"),
        ('{"text": "a", "label": 1}\n{"text": [1], "label": 1}', "a text in 'text' in line 2"),
    ],
)
def test_what_is_wrong_with_lines_of_json_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        task("jsonl", data=path)


GOOD_Y = np.arange(12) % 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((12, 3))}, "the column 'y' in .*, which has x"),
        ({"x": np.ones((12, 3)), "y": GOOD_Y[:-1]}, r"got \(12, 3\) and \(11,\)"),
        ({"x": np.ones(12), "y": GOOD_Y}, r"shape \(number, n\)"),
        ({"x": -np.ones((12, 3), int), "y": GOOD_Y}, "ids from 0 on.*got -1"),
        ({"x": np.full((12, 3), np.inf), "y": GOOD_Y}, "3 that are not"),
        ({"x": np.full((12, 3), "a"), "y": GOOD_Y}, "wanted numbers"),
        ({"x": np.ones((12, 3)), "y": GOOD_Y + 0.5}, "whole number in example 0"),
        ({"x": np.ones((12, 3)), "y": GOOD_Y, "lengths": np.full(12, 4)}, "lengths of 1 to 3"),
    ],
)
def test_what_is_wrong_with_arrays_is_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=message):
        task("npz", data=path)


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"\xff\xfe\x00")
    for name in ("csv", "jsonl", "npz", "wavdir"):
        with pytest.raises(MaclinError, match=r"a\.bin"):
            task(name, data=path)
        with pytest.raises(InputError, match="found nothing there"):
            task(name, data=tmp_path / "none")
    out = io.BytesIO()
    np.savez(out, x=np.array([{"an": "object"}], object), y=np.zeros(1))
    path.write_bytes(out.getvalue())
    with pytest.raises(InputError, match="plain arrays"):
        task("npz", data=path)
    with pytest.raises(InputError, match=r"<label>/\*\.wav"):
        task("wavdir", data=tmp_path)


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.csv")
    for more in (
        {"value_columns": "v"},
        {"value_columns": "v", "id_column": "i", "text_column": "t"},
        {"id_column": "i"},
        {"length": 0},
        {"value_columns": "v,v", "id_column": "i"},
        {"text_column": "body", "label_column": "kind", "num_classes": 1},
    ):
        with pytest.raises(OptionError, match="wanted"):
            task("csv", data=path, **more)
