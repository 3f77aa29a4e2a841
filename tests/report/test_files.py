from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from pathlib import Path

import pytest

from maclin.records import SCHEMA_VERSION, Report, from_json, to_json
from maclin.report import NAMES, check_out_dir, load_report, write_report


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["go", "go-after-healing", "no-go"])
def test_json_is_read_back_equal(make_report, kind: str, tmp_path: Path) -> None:
    report = make_report(kind)
    paths = write_report(report, tmp_path / "a" / "b")
    assert set(paths) == {"html", "md", "json"}
    assert names(tmp_path / "a" / "b") == sorted(NAMES)
    assert load_report(paths["json"]) == report


def test_a_figure_that_is_not_finite_does_not_make_a_report_unreadable(report: Report, tmp_path: Path) -> None:
    points = (*report.frontier[:-1], dataclasses.replace(report.frontier[-1], cosine_mean=math.nan))
    paths = write_report(dataclasses.replace(report, frontier=points), tmp_path)
    assert math.isnan(load_report(paths["json"]).frontier[-1].cosine_mean)
    assert "nan" not in paths["md"].read_text(encoding="utf-8").lower().split()


def test_an_earlier_report_is_refused_and_force_replaces_it(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    (tmp_path / "other.txt").write_text("kept")
    with pytest.raises(FileExistsError, match=r"already holds report\.md.*--force"):
        check_out_dir(tmp_path)
    with pytest.raises(FileExistsError, match="--force"):
        write_report(report, tmp_path)
    assert names(tmp_path) == ["other.txt", "report.md"]
    assert (tmp_path / "report.md").read_text() == "mine"
    write_report(report, tmp_path, force=True)
    assert names(tmp_path) == sorted(["other.txt", *NAMES])
    assert (tmp_path / "other.txt").read_text() == "kept"


def test_check_creates_nothing(tmp_path: Path) -> None:
    assert check_out_dir(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert names(tmp_path) == []


def test_a_file_in_the_way_is_named(report: Report, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    for path in (tmp_path / "x", tmp_path / "x" / "y"):
        with pytest.raises(NotADirectoryError, match="wanted a directory for the report"):
            check_out_dir(path)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(FileExistsError, match="is a directory"):
        write_report(report, tmp_path, force=True)


def test_a_directory_that_is_not_writable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(PermissionError, match="is not writable"):
        check_out_dir(tmp_path / "new")


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_ctrl_c_leaves_what_was_there_before(
    report: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    call: int,
    earlier: bool,
    after: bool,
) -> None:
    folder = tmp_path / "new" / "out"
    if earlier:
        folder.mkdir(parents=True)
        for name in NAMES:
            (folder / name).write_text(f"earlier {name}")
    real, calls = getattr(os, function), []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == call:
            if after:
                real(*args)
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(os, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(report, folder, force=True)
    if earlier:
        assert {path.name: path.read_text() for path in folder.iterdir()} == {n: f"earlier {n}" for n in NAMES}
    else:
        assert names(tmp_path) == []  # the folders that were made are gone, too


def test_no_space_is_said_in_one_sentence(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"^no space left for the report in .*: it needs \d.* MiB") as caught:
        write_report(report, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_another_failure_of_the_disk_keeps_its_kind(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=r"could not be written to .* \(Input/output error\)"):
        write_report(report, tmp_path)


def test_loading_says_what_is_wrong(report: Report, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*missing\.json"):
        load_report(tmp_path / "missing.json")
    with pytest.raises(IsADirectoryError, match="pass the path of a report"):
        load_report(tmp_path)
    path = tmp_path / "report.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        load_report(path)
    with pytest.raises(IsADirectoryError, match=r"pass .*report\.json"):
        load_report(tmp_path)
    path.write_text("<html>")
    with pytest.raises(ValueError, match=r"report\.json: not a report .*not JSON"):
        load_report(path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="not a report of schema"):
        load_report(path)
    path.write_text(json.dumps({**json.loads(to_json(report)), "schema_version": "9.0"}))
    with pytest.raises(ValueError, match=rf"schema {SCHEMA_VERSION}.*'9\.0'"):
        load_report(path)
    data = json.loads(to_json(report))
    del data["verdict"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="'verdict' is missing"):
        load_report(path)


def test_a_later_minor_version_of_the_schema_is_read(report: Report) -> None:
    data = {**json.loads(to_json(report)), "schema_version": SCHEMA_VERSION.split(".")[0] + ".9"}
    assert from_json(Report, json.dumps(data)).verdict == report.verdict
