"""Files inside package archives, read without unpacking or installing: wheels, npm's .tgz, Debian's .deb."""

from __future__ import annotations

import io
import lzma
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ..core.errors import InputError

_DAMAGED = (OSError, EOFError, ValueError, zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error)
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


def members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files in an archive, in its order; links are left out.

    Args:
        archive: a .whl or .zip, .tgz, or .deb.
        wanted: which names, written without a leading ``./``.

    Raises:
        InputError: another kind of file, or a damaged one.
    """
    try:
        if archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as opened:
                for name in opened.namelist():
                    if not name.endswith("/") and wanted(name):
                        yield name, opened.read(name)
            return
        with tarfile.open(fileobj=_tar(archive), mode="r:*") as opened:
            for member in opened:
                name = member.name.removeprefix("./")
                if member.isfile() and wanted(name):
                    content = opened.extractfile(member)
                    assert content is not None  # it is a file
                    yield name, content.read()
    except _DAMAGED as error:
        raise _unreadable(archive, error) from error


def links(archive: Path, wanted: Callable[[str], bool]) -> dict[str, str]:
    """Names of the links in a .tgz or .deb, and of what they point to.

    Args:
        archive: the package.
        wanted: which names, written without a leading ``./``.

    Raises:
        InputError: another kind of file, or a damaged one.
    """
    found: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=_tar(archive), mode="r:*") as opened:
            for member in opened:
                name = member.name.removeprefix("./")
                if (member.islnk() or member.issym()) and wanted(name):
                    # a hard link names its target from the root, a symbolic one from its own folder
                    base = "" if member.islnk() else posixpath.dirname(name)
                    found[name] = posixpath.normpath(posixpath.join(base, member.linkname))
    except _DAMAGED as error:
        raise _unreadable(archive, error) from error
    return found


def _unreadable(archive: Path, error: Exception) -> InputError:
    return InputError(f"wanted an archive that can be read, got {archive}: {error}; remove it and try again")


def _tar(archive: Path) -> io.BytesIO:
    content = archive.read_bytes()
    if archive.suffix != ".deb":
        return io.BytesIO(content)
    # an ar archive: headers of 60 bytes (name 16, ..., size at 48 in 10 digits), contents padded to even length
    at = len(_AR_MAGIC)
    while content.startswith(_AR_MAGIC) and at + _AR_HEADER <= len(content):
        header = content[at : at + _AR_HEADER]
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        at += _AR_HEADER
        if name.startswith("data.tar"):
            return io.BytesIO(content[at : at + size])
        at += size + size % 2
    raise InputError(f"wanted a Debian package, got {archive}; remove it and try again")
