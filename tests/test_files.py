"""Files are written whole or stay as they were, whatever interrupts it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maclin import files
from maclin.files import NO_SPACE, cache_dir, restated, write_whole, written_whole


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def three(folder: Path) -> tuple[Path, ...]:
    return folder / "a", folder / "b", folder / "c"


def write_three(folder: Path) -> None:
    with written_whole(*three(folder)) as beside:
        for path, target in zip(beside, three(folder), strict=True):
            path.write_text(f"new {target.name}")


@pytest.mark.parametrize(
    ("name", "value"), [("MACLIN_CACHE", "there"), ("XDG_CACHE_HOME", "there/maclin")], ids=["own", "system"]
)
def test_the_cache_is_where_it_was_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.delenv("MACLIN_CACHE", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv(name, str(tmp_path / "there"))
    assert cache_dir() == tmp_path / value


def test_one_file_is_there_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "kept"
    write_whole(path, b"first ", memoryview(b"version"))
    write_whole(path, b"second")
    assert contents(path.parent) == {"kept": "second"}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_whole(path, b"third")
    assert contents(path.parent) == {"kept": "second"}


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write(error: type[BaseException] | None) -> None:
        with written_whole(tmp_path / "a", tmp_path / "b") as (first, _):
            first.write_text("half of it")
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt)
    with pytest.raises(FileNotFoundError):
        write(None)  # the other file was forgotten
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("earlier", ["", "b", "abc"])
def test_several_files_are_replaced_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: str, call: int, after: bool, links: bool
) -> None:
    for name in earlier:
        (tmp_path / name).write_text(f"old {name}")
    before = contents(tmp_path)
    real, calls = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if after:
            real(source, target)
        if len(calls) == call:
            raise KeyboardInterrupt
        if not after:
            real(source, target)

    def no_links(*args: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        if not links:
            patch.setattr(os, "link", no_links)
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_three(tmp_path)
    assert contents(tmp_path) == before
    write_three(tmp_path)
    assert contents(tmp_path) == {name: f"new {name}" for name in "abc"}


def test_a_disk_that_renames_nothing_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in three(tmp_path):
        path.write_text("old")

    def broken(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_three(tmp_path)
    assert contents(tmp_path) == dict.fromkeys("abc", "old")


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_kill_never_leaves_a_place_empty(tmp_path: Path, call: int) -> None:
    for path in three(tmp_path):
        path.write_text("old")
    program = f"""
import importlib.util, os, pathlib
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
left, real = [{call}], os.replace
def killed(source, target):
    left[0] -= 1
    if not left[0]:
        os._exit(9)
    real(source, target)
os.replace = killed
targets = [pathlib.Path({str(tmp_path)!r}) / name for name in "abc"]
with files.written_whole(*targets) as beside:
    for path in beside:
        path.write_text("new")
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert [path.read_text() for path in three(tmp_path)] == ["new"] * (call - 1) + ["old"] * (4 - call)


def test_a_sentence_keeps_the_kind_of_an_error() -> None:
    clear = restated(PermissionError(errno.EACCES, "Permission denied"), "choose another folder")
    assert type(clear) is PermissionError
    assert (str(clear), clear.errno) == ("choose another folder", errno.EACCES)
    assert errno.ENOSPC in NO_SPACE
