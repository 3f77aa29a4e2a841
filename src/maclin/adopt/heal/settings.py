"""How healing goes about it: a recipe with defaults that were tuned, and a budget."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch

from maclin.core.errors import OptionError
from maclin.records import Config
from maclin.training.machine import Precision
from maclin.training.schedule import rate

Train = Literal["all", "low_rank", "features"]
Readout = Literal["auto", "embedding", "tokens", "logits", "none"]
Inputs = Literal["teacher", "student"]
HealPrecision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class HealRecipe:
    """The steps of healing, and how large they are.

    Args:
        transfer_steps: optimiser steps of attention transfer; each layer is trained at each step.
        transfer_share: of ``budget_minutes`` that transfer may take at the most.
        transfer_lr: largest learning rate of a mechanism's own parameters during transfer.
        transfer_tokens: of one transfer step: sequences, or a part of a longer one.
        transfer_inputs: whose q, k and v the layers are trained on: "teacher" (exact attention before them) or
            "student" (the converted layers before them, as they are by then).
        calibrate: also try the closed form of mechanisms that have one, and keep what is better on held-out batches.
        lr: largest learning rate of the weights during distillation.
        features_lr: the same of the mechanisms' own parameters; None is ``lr``.
        low_rank_lr: the same of low-rank adapters.
        rank: of the low-rank adapters.
        weight_decay: of matrices.
        warm_up: share of the steps in which the learning rate rises; it falls along a cosine afterwards.
        clip: largest norm of the gradient.
        hidden_weight: of the hidden states' squared relative error in the loss.
        output_weight: of the final output's loss.
        accumulation: batches per step.
        evaluate_every: steps between looks at the held-out batches; None spreads ``num_looks`` over the budget.
        num_looks: at held-out batches during distillation.
        patience: looks without a better one after which distillation stops.
        max_skipped: steps whose loss or gradient is not finite after which it stops.
        cache_bytes: of the original's targets that are kept on disk at once.
        chunk: batches whose targets are computed at once where the original's weights have to be brought back for it.
        top_k: logits per token that are kept of the original's; the others count as one class.

    Raises:
        OptionError: a value that cannot be.
    """

    transfer_steps: int = 800
    transfer_share: float = 0.4
    transfer_lr: float = 0.02
    transfer_tokens: int = 512
    transfer_inputs: Inputs = "teacher"
    calibrate: bool = True
    lr: float = 5e-5
    features_lr: float | None = None
    low_rank_lr: float = 2e-3
    rank: int = 16
    weight_decay: float = 0.01
    warm_up: float = 0.1
    clip: float = 1.0
    hidden_weight: float = 1.0
    output_weight: float = 1.0
    accumulation: int = 1
    evaluate_every: int | None = None
    num_looks: int = 10
    patience: int = 6
    max_skipped: int = 20
    cache_bytes: int = 1 << 30
    chunk: int = 32
    top_k: int = 64

    def __post_init__(self) -> None:
        for name in ("transfer_steps", "max_skipped"):
            _at_least(name, getattr(self, name), 0)
        whole = ("transfer_tokens", "rank", "accumulation", "num_looks", "patience", "cache_bytes", "chunk", "top_k")
        for name in whole:
            _at_least(name, getattr(self, name), 1)
        if self.evaluate_every is not None:
            _at_least("evaluate_every", self.evaluate_every, 1)
        for name in ("transfer_lr", "lr", "low_rank_lr", "clip"):
            _positive(name, getattr(self, name))
        if self.features_lr is not None:
            _positive("features_lr", self.features_lr)
        for name in ("hidden_weight", "output_weight", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise OptionError(f"{name} is {value}; wanted a finite number of at least 0")
        for name in ("transfer_share", "warm_up"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; wanted a share from 0 to less than 1")
        check_one_of("transfer_inputs", self.transfer_inputs, get_args(Inputs))

    def as_config(self) -> Config:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Budget:
    """How long healing may take: minutes, steps of distillation, or whichever of both is over first.

    Args:
        minutes: of wall time, everything included, added up over resumed runs; None has no limit.
        steps: of distillation; None has no limit.

    Raises:
        OptionError: neither, or one that is not positive.
    """

    minutes: float | None
    steps: int | None

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise OptionError("wanted a budget: pass budget_minutes=, steps=, or both")
        if self.minutes is not None:
            _positive("budget_minutes", self.minutes)
        if self.steps is not None:
            _at_least("steps", self.steps, 0)

    def done(self, step: int, seconds: float, started: float, reserve: float = 0.0) -> float:
        """Share of the budget that is used, from 0 to 1.

        Args:
            step: of distillation.
            seconds: since the beginning.
            started: seconds at which distillation began.
            reserve: seconds that the end will take.
        """
        shares = [0.0]
        if self.minutes is not None:
            left = 60 * self.minutes - started - reserve
            shares.append((seconds - started) / left if left > 0 else 1.0)
        if self.steps is not None:
            shares.append(step / self.steps if self.steps else 1.0)
        return min(max(shares), 1.0)

    def transfer_over(self, seconds: float, share: float) -> bool:
        """Whether attention transfer has had its share of the minutes."""
        return self.minutes is not None and seconds >= 60 * self.minutes * share


def learning_rate(done: float, warm_up: float) -> float:
    """Factor of the learning rate where a share of the budget is used: a linear rise, then a cosine to 0."""
    fine = 10_000  # the schedule is a function of steps; a budget in minutes has none
    return rate(min(int(done * fine), fine - 1), fine, "cosine", warm_up)


def chosen_precision(wanted: HealPrecision, device: torch.device) -> Precision:
    """bf16 where "auto" finds a processor with matrix units for it, which multiply several times as fast as in fp32.

    Raises:
        OptionError: an unknown precision.
    """
    check_one_of("precision", wanted, get_args(HealPrecision))
    if wanted != "auto":
        return wanted
    has_units = device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return "bf16" if has_units else "fp32"


def check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse a value that is not among the known ones; raises OptionError."""
    if value not in known:
        raise OptionError(f"{name} is {value!r}; known are {', '.join(map(repr, known))}")


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name} is {value!r}; wanted a whole number of at least {least}")


def _positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise OptionError(f"{name} is {value!r}; wanted a positive finite number")
