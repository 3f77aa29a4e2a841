"""What a long job tells whoever waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """A listener; the command draws bars with it, a test records it, ``Silent`` does nothing."""

    def start(self, step: str, total: int | None) -> None:
        """A step begins; ``total`` counts its parts, None where that is not known."""

    def advance(self, text: str = "") -> None:
        """One part of the step is done, or, with a text only, something is worth saying."""

    def finish(self) -> None:
        """The step is done."""


class Silent:
    """Says nothing."""

    def start(self, step: str, total: int | None) -> None:
        """Nothing."""

    def advance(self, text: str = "") -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class Steps:
    """Steps of a job: announced to a listener, their wall time kept in ``seconds``."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Progress]:
        """Time one step; the listener is told of its end only where it ends well."""
        start = time.perf_counter()
        self.progress.start(name, total)
        yield self.progress
        self.progress.finish()
        self.seconds[name] = round(time.perf_counter() - start, 3)
