"""What a study has measured so far, on disk, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from maclin.progress import Progress
from maclin.records import Config


class Journal:
    """Measurements by their key, one JSON line each, written as soon as they are made.

    A line that a kill cut short is dropped; what it held is measured again.

    Args:
        path: file to read and append to; None keeps everything in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, Config] = {}
        self.num_resumed = 0
        if path is not None and path.exists():
            self._read(path)

    def measured(self, key: Config, measure: Callable[[], Config]) -> Config:
        """``{**key, **measure()}``, measured now or read from the file."""
        name = json.dumps(key, sort_keys=True)
        if name not in self._known:
            self._known[name] = {**key, **measure()}
            self._append(name)
        return self._known[name]

    def all_measured(
        self,
        keys: Iterable[Config],
        measure: Callable[[Config], Config],
        progress: Progress,
        text: Callable[[Config], str],
    ) -> list[Config]:
        """``measured`` for every key in turn; ``progress`` hears ``text`` of each when it is there."""
        cells: list[Config] = []
        for key in keys:
            cells.append(self.measured(key, partial(measure, key)))
            progress.advance(text(key))
        return cells

    def _append(self, name: str) -> None:
        if self._path is None:
            return
        line = json.dumps({"key": json.loads(name), "measurement": self._known[name]})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _read(self, path: Path) -> None:
        whole: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row: dict[str, Any] = json.loads(line)
                self._known[json.dumps(row["key"], sort_keys=True)] = row["measurement"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
            whole.append(line)
        self.num_resumed = len(whole)
        path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
