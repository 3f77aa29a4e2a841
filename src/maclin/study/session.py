"""A study and its directory: what was measured stays there until the study is whole, and then makes way for it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from .._version import __version__
from ..records import Config, Study
from ..report import JOURNAL_NAME, check_study_dir, write_study
from .journal import Journal


class Session:
    """Runs a study in a directory, so that an interrupted one goes on where it stopped.

    The first line of the journal says which study it is, with which settings and version. A journal with the same is
    continued, whatever ``force`` says; it is removed when the study is written, because ``study.json`` then holds the
    measurements. Used as a context: leaving it without a single measurement leaves the directory as it was.

    Args:
        name: of the study.
        job: its settings, a dataclass.
        out_dir: directory of the study; made if it is not there.
        force: replace an earlier study, or measurements of another study or with other settings.

    Attributes:
        journal: to be passed to ``run``.
        num_resumed: measurements that an interrupted run has left.

    Raises:
        FileExistsError: a finished study, or measurements that do not fit, are there, and ``force`` is False.
        NotADirectoryError, PermissionError: as ``maclin.report.check_out_dir``.
    """

    def __init__(self, name: str, job: Any, out_dir: str | Path, force: bool = False) -> None:
        self.name, self.force = name, force
        self.out_dir = check_study_dir(out_dir, name, force)
        self.path = self.out_dir / JOURNAL_NAME
        self._key: Config = {"study": name}
        self._head: Config = {"maclin_version": __version__, "settings": _settings(job)}
        self._made = [path for path in (self.out_dir, *self.out_dir.parents) if not path.exists()]
        fits = self._fits()
        if not fits and not force:
            raise FileExistsError(
                f"{self.path} holds measurements of another run ({self._difference()}); pass the same settings to go "
                "on with it, choose another directory, or pass --force to drop them"
            )
        self.out_dir.mkdir(parents=True, exist_ok=True)
        if not fits:
            self.path.unlink()
        self.journal = Journal(self.path)
        self.num_resumed = self.num_measured
        self.journal.measured(self._key, lambda: self._head)

    @property
    def num_measured(self) -> int:
        """Measurements in the journal."""
        return max(len(_lines(self.path)) - 1, 0)

    def write(self, study: Study) -> dict[str, Path]:
        """Write the study and remove the journal; raises as ``maclin.report.write_study``."""
        paths = write_study(study, self.out_dir, force=self.force)
        self.path.unlink(missing_ok=True)
        return paths

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.num_measured == 0:
            self.path.unlink(missing_ok=True)
            for path in self._made:
                with contextlib.suppress(OSError):
                    path.rmdir()  # only what was made here and is empty

    def _fits(self) -> bool:
        lines = _lines(self.path)
        return not lines or _measurement(lines[0]) == {**self._key, **self._head}

    def _difference(self) -> str:
        """What distinguishes the run in the journal from this one, in words."""
        there = _measurement(_lines(self.path)[0])
        if "settings" not in there:
            return "it does not say with which settings"
        if there.get("maclin_version") != self._head["maclin_version"]:
            return f"made by maclin {there.get('maclin_version')}, this is {__version__}"
        old, new = there["settings"], self._head["settings"]
        names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        return ", ".join(f"{name} {json.dumps(old.get(name))}, now {json.dumps(new.get(name))}" for name in names)


def _settings(job: Any) -> Config:
    return json.loads(json.dumps(dataclasses.asdict(job), default=str))


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _measurement(line: str) -> Config:
    try:
        found = json.loads(line)["measurement"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
