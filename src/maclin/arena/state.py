"""Where a training stands: what a checkpoint holds beside weights and moments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class State:
    """Counters of a training; numbers, strings, and lists and dicts of them.

    Args:
        step: done.
        seconds: of training.
        tokens: seen.
        skipped: steps whose loss or gradient was not finite.
        cause: of the last of them.
        best_step: with the best validation; 0 where there was none that is finite.
        best_key: what it scored, the larger the better.
        looks: at the validation split.
        resumed_at: steps where an interrupted training went on.
        log_bytes: of the log that belong to this state.
        window: sums and latest figures since the last line of the log.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0
    cause: str = ""
    best_step: int = 0
    best_key: list[float] | None = None
    looks: list[dict[str, Any]] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    log_bytes: int = 0
    window: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Since the beginning."""
        return self.tokens / max(self.seconds, 1e-9)

    def count(self, **sums: float) -> None:
        """Add to the window."""
        for name, value in sums.items():
            self.window[name] = self.window.get(name, 0.0) + value

    def is_best(self, key: list[float]) -> bool:
        """Whether no earlier look was as good; then this one is remembered."""
        if self.best_key is not None and key <= self.best_key:
            return False
        self.best_key, self.best_step = key, self.step
        return True

    def line(self) -> dict[str, Any]:
        """The window as a line of the log; the next one begins."""
        window, judged = self.window, self.window.get("judged", 0.0)
        self.window = {}
        return {
            "loss": window["loss"] / judged if judged else None,
            "accuracy": window["correct"] / judged if judged else None,
            "lr": window.get("lr"),
            "grad_norm": window.get("grad_norm"),
            "skipped": self.skipped,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
        }

    def text(self) -> str:
        """The state beside a progress bar."""
        words, judged = [], self.window.get("judged", 0.0)
        if judged:
            words.append(f"loss {self.window['loss'] / judged:.3f}, accuracy {self.window['correct'] / judged:.1%}")
        if self.seconds:
            words.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.looks and self.looks[-1]["score"] is not None:
            words.append(f"validation {self.looks[-1]['score']:.4g}")
        if self.skipped:
            words.append(f"{self.skipped} skipped")
        return ", ".join(words)
