"""Compile the kernels: a script of the standard library alone, so that it can go on without the process that wants it.

    python build.py TARGET COMPILER FLAG ...

Writes TARGET, whole or not at all, or TARGET with ".failed" behind it, which says why there is none. Several at once
are one: the first works, the others wait for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "kernels.cpp"
_SECONDS = 300
_CHECK = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
width = library.maclin_vector_width()
x = (ctypes.c_float * width)(*[0.5] * width)
y = (ctypes.c_float * width)()
library.maclin_exp(x, y, ctypes.c_int64(width))
sys.exit(not all(abs(found - 1.6487213) < 1e-6 for found in y))
"""


def build(target: Path, command: list[str]) -> str:
    """Compile, try, and move into place; why that failed, or ""."""
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        call = [*command, str(SOURCE), "-o", str(beside)]
        done = subprocess.run(call, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
        if done.returncode:
            return f"{command[0]} ended with status {done.returncode}: {done.stderr.strip()[-500:]}"
        # in a process of its own: what this processor cannot execute would end it
        tried = subprocess.run(
            [sys.executable, "-c", _CHECK, str(beside)], capture_output=True, timeout=60, check=False
        )
        if tried.returncode:
            return f"what {command[0]} made does not run here (status {tried.returncode})"
        beside.replace(target)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        beside.unlink(missing_ok=True)
    return ""


def main(arguments: list[str]) -> int:
    """Build under a lock, unless another process has."""
    import fcntl  # not everywhere; where it is missing nothing is built

    target, failed = Path(arguments[0]), Path(arguments[0] + ".failed")
    with open(f"{target}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system, however this process ends
        if target.exists() or failed.exists():
            return 0
        why = build(target, arguments[1:])
        if why:
            failed.write_text(why, encoding="utf-8")
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
