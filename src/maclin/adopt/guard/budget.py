"""How much of the forward the guard may take: time is measured, and layers are checked in turn where it is short."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import torch


class Clock:
    """Seconds between two points of the program, on the device where it runs behind the host."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._start.record(self._stream)
        self._began = time.perf_counter()

    def seconds(self) -> float:
        """Since the clock was made."""
        if self._stream is None:
            return time.perf_counter() - self._began
        self._stop.record(self._stream)
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1e3


@dataclass
class Forward:
    """One forward pass of the model in one thread.

    Attributes:
        began: on the clock of this process.
        first: index of the first layer whose turn it is.
        number: how many layers from there on, past the last one from the first again.
        guard_s: time that the guard took in it.
        exact_s: time of exact attention that the guard asked for.
        depth: passes that this one contains and is in.
    """

    began: float
    first: int
    number: int
    guard_s: float = 0.0
    exact_s: float = 0.0
    depth: int = 1


class Budget:
    """Time that the guard took and may take.

    What it may still take is ``max_share`` of all forward passes so far, less what it took. From it and the mean cost
    of a check follows how many layers are checked in the next pass, beginning after the last one that was. The first
    pass checks all: without it no cost is known.

    Args:
        num_layers: guarded layers.
        max_share: of the model's own time; None checks every layer of every pass.
    """

    def __init__(self, num_layers: int, max_share: float | None) -> None:
        self.num_layers = num_layers
        self.max_share = max_share
        self._lock = threading.Lock()
        self._local = threading.local()
        self._next = 0
        self.clear()

    def clear(self) -> None:
        """Back to zero."""
        self.forwards = 0
        self.forward_s = 0.0
        self.guard_s = 0.0
        self.exact_s = 0.0
        self.checks = 0
        self.checks_s = 0.0

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_local")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._local = threading.local()

    def begin(self) -> None:
        """A forward pass of the model begins in this thread."""
        current = self.current
        if current is not None:
            current.depth += 1
            return
        with self._lock:
            number = self._affordable()
            self._local.forward = Forward(time.perf_counter(), self._next, number)
            self._next = (self._next + number) % self.num_layers

    def end(self) -> None:
        """It ends, well or not."""
        current = self.current
        if current is None:
            return
        current.depth -= 1
        if current.depth:
            return
        self._local.forward = None
        elapsed = time.perf_counter() - current.began
        with self._lock:
            self.forwards += 1
            self.forward_s += max(elapsed - current.guard_s - current.exact_s, 0.0)

    @property
    def current(self) -> Forward | None:
        """The forward pass that this thread is in."""
        return getattr(self._local, "forward", None)

    def has_turn(self, layer: int) -> bool:
        """Whether a layer is checked in this pass; outside of one every layer is."""
        current = self.current
        return current is None or (layer - current.first) % self.num_layers < current.number

    def spent(self, guard_s: float, exact_s: float, checked: bool) -> None:
        """Time that one call of a layer took beyond its mechanism's; outside of a pass it is not compared to anything.

        Args:
            guard_s: of the guard.
            exact_s: of exact attention in place of the mechanism's output.
            checked: whether rows were computed.
        """
        current = self.current
        if current is None:
            return
        current.guard_s += guard_s
        current.exact_s += exact_s
        with self._lock:
            self.guard_s += guard_s
            self.exact_s += exact_s
            if checked:
                self.checks += 1
                self.checks_s += guard_s

    @property
    def share(self) -> float | None:
        """Time of the guard over that of the model alone; None before the first pass."""
        return self.guard_s / self.forward_s if self.forward_s > 0 else None

    def _affordable(self) -> int:
        if self.max_share is None or not self.checks:
            return self.num_layers
        left = self.max_share * self.forward_s - self.guard_s
        return min(max(int(left * self.checks / self.checks_s), 0), self.num_layers)
