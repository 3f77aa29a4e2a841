"""How the models of the arena are built and trained: one recipe for every mechanism."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..core.errors import OptionError
from ..nn.config import POOLINGS
from ..nn.positions import POSITIONS
from ..training.machine import Precision
from ..training.schedule import SCHEDULES, Schedule

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of the model, the same for every mechanism.

    Args:
        num_layers: of the encoder; and of the decoder, where there is one.
        width: of the model; a multiple of ``num_heads``.
        feedforward: width within the feed-forward part.
        num_heads: of attention.
        dropout: within the layers; attention weights are not dropped, because most mechanisms have none.
        pooling: "mean", "cls" or "last", where a sequence gets one answer.
        position: "learned", "sinusoidal", "rotary" or "none".
        qk_gain: factor of the weights that make q and k, at the start. 1 begins so near to averaging that the first
            some hundred steps are spent on getting away from it, under every mechanism that looks at q and k.

    Raises:
        OptionError: a size that cannot be.
    """

    num_layers: int = 2
    width: int = 64
    feedforward: int = 128
    num_heads: int = 2
    dropout: float = 0.1
    pooling: Literal["mean", "cls", "last"] = "mean"
    position: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"
    qk_gain: float = 1.6

    def __post_init__(self) -> None:
        for name in ("num_layers", "width", "feedforward", "num_heads"):
            if getattr(self, name) < 1:
                raise OptionError(f"wanted {name} of at least 1, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise OptionError(f"wanted a width that num_heads divides, got {self.width} and {self.num_heads}")
        for name, known in (("pooling", POOLINGS), ("position", POSITIONS)):
            if getattr(self, name) not in known:
                raise OptionError(f"wanted {name} among {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.qk_gain > 0:
            raise OptionError(f"wanted a qk_gain above 0, got {self.qk_gain}")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"wanted a dropout from 0 to below 1, got {self.dropout}")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.num_heads


@dataclass(frozen=True)
class TrainSettings:
    """One training.

    Args:
        steps: of the optimiser, AdamW.
        batch_size: examples of a step, over all processes and parts.
        lr: the largest learning rate.
        schedule: "linear" or "cosine" (down to 0), "one_cycle" or "constant"; see ``rate``.
        warm_up: share of the steps in which the rate rises.
        weight_decay: of AdamW; not of vectors (biases, norms, temperatures).
        clip: largest norm of the gradient; None does not clip.
        accumulation: parts that each process makes of its share of a batch, one after the other, to save memory.
        precision: "fp32", or "bf16" by autocast.
        evaluate_every: steps between looks at the validation split; None is a tenth of the steps.
        save_every: steps between checkpoints; None is a twentieth of the steps.
        log_every: steps between lines of the log; None is a hundredth of the steps.
        max_skipped: steps whose loss or gradient is not finite before the training stops.
        calibrate: whether mechanisms that can learn from data do so once, from the first batch, before the first step:
            features and temperature then fit the q and k that the weights begin with.

    Raises:
        OptionError: a setting that cannot be.
    """

    steps: int = 2000
    batch_size: int = 32
    lr: float = 1e-3
    schedule: Schedule = "cosine"
    warm_up: float = 0.1
    weight_decay: float = 0.01
    clip: float | None = 1.0
    accumulation: int = 1
    precision: Precision = "fp32"
    evaluate_every: int | None = None
    save_every: int | None = None
    log_every: int | None = None
    max_skipped: int = 20
    calibrate: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "evaluate_every", "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"wanted {name} of at least 1, got {value}")
        if self.lr <= 0 or (self.clip is not None and self.clip <= 0):
            raise OptionError(f"wanted a positive lr and clip, got {self.lr} and {self.clip}")
        if not 0 <= self.warm_up < 1 or self.weight_decay < 0 or self.max_skipped < 0:
            raise OptionError(
                f"wanted warm_up from 0 to below 1, weight_decay and max_skipped from 0 on, got {self.warm_up}, "
                f"{self.weight_decay} and {self.max_skipped}"
            )
        if self.schedule not in SCHEDULES:
            raise OptionError(f"wanted a schedule among {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.precision not in PRECISIONS:
            raise OptionError(f"wanted a precision among {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.batch_size % self.accumulation:
            raise OptionError(
                f"wanted a batch_size that accumulation divides, got {self.batch_size} and {self.accumulation}"
            )

    def every(self, what: Literal["evaluate", "save", "log"]) -> int:
        """Steps between two looks, checkpoints or lines of the log."""
        parts = {"evaluate": 10, "save": 20, "log": 100}[what]
        given: int | None = getattr(self, f"{what}_every")
        return max(self.steps // parts, 1) if given is None else given


@dataclass(frozen=True)
class Recipe:
    """Model and training of one task under one preset."""

    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)


@dataclass(frozen=True)
class _Sizes:
    """batch_size, lr and steps of a task, under "quick" and under the others."""

    batch_size: int
    lr: float
    standard: int
    paper: int
    quick: tuple[int, float, int]


# Batches are those commonly used on these tasks, halved where a model of width 64 on two cores gains more from steps.
# Those of "quick" were chosen on the validation splits by what softmax and macformer score within a minute of one core.
_SIZES: dict[str, _Sizes] = {
    "listops": _Sizes(32, 1e-3, 5_000, 20_000, (64, 3e-3, 150)),
    "text": _Sizes(32, 1e-3, 5_000, 20_000, (32, 3e-3, 1_200)),
    "retrieval": _Sizes(16, 1e-3, 5_000, 20_000, (16, 3e-3, 300)),
    "image": _Sizes(64, 1e-3, 10_000, 40_000, (64, 3e-3, 150)),
    "pathfinder": _Sizes(64, 1e-3, 20_000, 60_000, (32, 3e-3, 300)),
    "audio": _Sizes(16, 1e-3, 5_000, 20_000, (32, 3e-3, 1_000)),
    "sensors": _Sizes(16, 1e-3, 3_000, 10_000, (16, 3e-3, 200)),
    "recall": _Sizes(32, 2e-3, 10_000, 40_000, (32, 1e-3, 1_000)),
    "translation": _Sizes(32, 1e-3, 10_000, 40_000, (32, 3e-3, 4_000)),
    "language": _Sizes(16, 1e-3, 10_000, 40_000, (16, 3e-3, 600)),
}
_OTHER = _Sizes(16, 1e-3, 3_000, 10_000, (16, 1e-3, 600))
_STEADY: dict[str, float] = {"recall": 0.0, "language": 0.0}  # dropout, where it is not 0.1
# what is wanted is a few tokens away, which learned positions take long to tell
_BY_DISTANCE = ("recall", "language", "translation", "audio")
_LOOKS = 5  # at the validation split, under "quick"


def recipe(task: str, preset: str) -> Recipe:
    """The published sizes of the model, and what to train it with.

    Args:
        task: name in the registry; a user's own data has the recipe of any other small set.
        preset: "quick", "standard" or "paper"; they differ in the number of steps. What is made within some hundred
            steps sees hardly an example twice, so "quick" drops nothing.
    """
    name = task if task in _SIZES else next((known for known in _SIZES if task.startswith(known)), "")
    sizes = _SIZES.get(name, _OTHER)
    position: Literal["learned", "rotary"] = "rotary" if name in _BY_DISTANCE else "learned"
    if preset == "quick":
        batch_size, lr, steps = sizes.quick
        settings = TrainSettings(steps=steps, batch_size=batch_size, lr=lr, evaluate_every=max(steps // _LOOKS, 1))
        return Recipe(ModelSettings(dropout=0.0 if name else 0.1, position=position), settings)
    steps = sizes.standard if preset == "standard" else sizes.paper
    return Recipe(
        ModelSettings(dropout=_STEADY.get(name, 0.1), position=position),
        TrainSettings(steps=steps, batch_size=sizes.batch_size, lr=sizes.lr),
    )
