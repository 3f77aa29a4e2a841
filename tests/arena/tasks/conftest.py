import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from maclin.arena.fetch import Package


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the cache of whoever runs it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MACLIN_CACHE", str(folder))
    return folder


@pytest.fixture
def packed() -> Callable[[Package, Mapping[str, bytes]], Package]:
    """Puts a small archive where a package's own would be kept; gives the package with that archive's digest."""

    def pack(package: Package, files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> Package:
        buffer = io.BytesIO()
        if package.file.endswith(".whl"):
            with zipfile.ZipFile(buffer, "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
        else:
            with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
                for name, content in files.items():
                    info = tarfile.TarInfo(f"./{name}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                for name, target in (links or {}).items():
                    info = tarfile.TarInfo(f"./{name}")
                    info.type, info.linkname = tarfile.LNKTYPE, f"./{target}"
                    archive.addfile(info)
        content = buffer.getvalue()
        if package.file.endswith(".deb"):
            content = deb(content)
        package.path.parent.mkdir(parents=True, exist_ok=True)
        package.path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        return Package(package.tool, package.name, package.version, package.file, digest)

    return pack


def deb(data: bytes) -> bytes:
    out = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data)):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}".encode() + b"`\n"
        assert len(header) == 60
        out += header + content + b"\n" * (len(content) % 2)
    return out
