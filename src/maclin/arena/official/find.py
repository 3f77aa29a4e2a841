"""Where in the user's directory the published files are."""

from __future__ import annotations

from pathlib import Path

from ...core.errors import InputError


def find(folder: Path, what: str, *relative: str) -> Path:
    """The first of several paths below a directory, or below ``lra_release`` in it, that is there.

    Args:
        folder: what the user named.
        what: it is, for people.
        relative: the paths, the official one first; ``.`` is the directory itself.

    Raises:
        InputError: none of them is there; the message names them.
    """
    for path in relative:
        for base in (folder, folder / "lra_release", folder / "lra_release" / "lra_release"):
            if (base / path).exists():
                return base / path
    raise InputError(f"wanted {what} in {folder} as {' or '.join(relative)}, found none of them")
