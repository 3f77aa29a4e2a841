"""The compiled kernels of this machine: made once, in the background, and loaded when they are there.

Until then, and where there is no compiler, everything runs in torch. ``MACLIN_NATIVE=0`` turns the kernels off;
``MACLIN_NATIVE=wait`` lets the first call wait for them. ``CXX`` names the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-w")
_COMPILERS = ("g++", "clang++", "c++")
_SOURCES = ("*.cpp", "*.h", "build.py")
_POLL_SECONDS = 0.1
_RETRY_SECONDS = 86_400  # after a failure, which may have been one of the moment


@dataclass(frozen=True)
class NativeStatus:
    """Whether compiled kernels run, and why not.

    Args:
        state: "ready"; "building", the torch path runs meanwhile; "off", by ``MACLIN_NATIVE=0``; "unavailable".
        reason: why they are not ready, or "".
        path: of the library, or "".
        compiler: the command, or "".
    """

    state: str
    reason: str = ""
    path: str = ""
    compiler: str = ""


class _Loader:
    """The one library of this process."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.status: NativeStatus | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._next_look = 0.0
        self._lock = threading.Lock()

    def find(self, wait: float = 0.0) -> ctypes.CDLL | None:
        """The library; None as long as there is none. Waits that many seconds for a compilation."""
        if self.library is not None:
            return self.library
        status = self.status
        if status is not None and status.state != "building":
            return None
        if wait <= 0.0 and time.monotonic() < self._next_look:
            return None
        with self._lock:
            if self.library is None and (self.status is None or self.status.state == "building"):
                self._look(wait)
            return self.library

    def _look(self, wait: float) -> None:
        mode = os.environ.get("MACLIN_NATIVE", "1")
        if self.status is None:
            if mode == "0":
                self.status = NativeStatus("off", "MACLIN_NATIVE=0")
                return
            self.status = self._start()
        if mode == "wait":
            wait = max(wait, 300.0)
        if self._process is not None:
            try:
                self._process.wait(wait if wait > 0.0 else 1e-6)
            except subprocess.TimeoutExpired:
                self._next_look = time.monotonic() + _POLL_SECONDS
                return
            self._process = None
            self.status = self._finished(self.status)

    def _start(self) -> NativeStatus:
        from ...files import cache_dir  # not loaded with the package

        compiler = _compiler()
        if compiler is None:
            return NativeStatus("unavailable", f"no C++ compiler among {', '.join(_COMPILERS)}")
        try:
            target = cache_dir() / "native" / f"kernels-{_key(compiler)}.so"
            status = NativeStatus("building", "being compiled", str(target), compiler)
            failed = Path(f"{target}.failed")
            if failed.exists() and time.time() - failed.stat().st_mtime > _RETRY_SECONDS:
                failed.unlink(missing_ok=True)
            if target.exists() or failed.exists():
                return self._finished(status)
            target.parent.mkdir(parents=True, exist_ok=True)
            script = Path(__file__).with_name("build.py")
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(script), str(target), compiler, *_FLAGS],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt of this process is not one of the compiler
            )
        except (OSError, RuntimeError) as error:
            return NativeStatus("unavailable", f"{type(error).__name__}: {error}", compiler=compiler)
        return status

    def _finished(self, status: NativeStatus) -> NativeStatus:
        path, failed = Path(status.path), Path(f"{status.path}.failed")
        try:
            if path.exists():
                if path.stat().st_uid not in (os.getuid(), 0):
                    reason = f"{path} belongs to another user"
                    return NativeStatus("unavailable", reason, compiler=status.compiler)
                self.library = ctypes.CDLL(str(path))
                return NativeStatus("ready", "", status.path, status.compiler)
            reason = failed.read_text(encoding="utf-8") if failed.exists() else "the compilation was interrupted"
        except OSError as error:
            reason = f"{type(error).__name__}: {error}"
        return NativeStatus("unavailable", reason, compiler=status.compiler)


def _compiler() -> str | None:
    if sys.platform == "win32":
        return None
    named = os.environ.get("CXX", "").split()
    found = (shutil.which(name) for name in (*named[:1], *_COMPILERS))
    return next((path for path in found if path), None)


def _key(compiler: str) -> str:
    """Of everything that the library depends on: sources, flags, compiler, processor."""
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(Path(__file__).parent.glob(pattern)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    stat = os.stat(compiler)
    digest.update(repr((_FLAGS, os.path.realpath(compiler), stat.st_size, stat.st_mtime_ns)).encode())
    digest.update(repr((platform.machine(), _processor())).encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What the first core can do, as the system says it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "features", "cpu part", "cpu implementer", "model", "stepping")
    first = text.split("\n\n")[0].splitlines()
    return "\n".join(line for line in first if line.split(":")[0].strip().lower() in wanted)


_LOADER = _Loader()


def library() -> ctypes.CDLL | None:
    """The loaded kernels; None where the torch path is to run. Starts their compilation at the first call."""
    return _LOADER.library or _LOADER.find()


def wait_for_kernels(seconds: float = 300.0) -> bool:
    """Wait until the kernels are compiled; whether they are ready."""
    return _LOADER.find(seconds) is not None


def native_status() -> NativeStatus:
    """Whether compiled kernels run on this machine, and why not; starts their compilation."""
    _LOADER.find()
    return _LOADER.status or NativeStatus("unavailable", "not looked for yet")


def use_native(on: bool) -> None:
    """Turn the kernels off, or on again, for this process."""
    with _LOADER._lock:  # pyright: ignore[reportPrivateUsage]
        _LOADER.library = None
        _LOADER.status = None if on else NativeStatus("off", "use_native(False)")
