"""A task that is learned in a second: which of two tokens is the more frequent one; and a model for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from maclin.arena.objective import Batch, Objective
from maclin.arena.settings import TrainSettings
from maclin.arena.task import Example, Field, Preset, Splits, Task
from maclin.arena.train import Training
from maclin.progress import Progress
from maclin.training.machine import accelerator_for

torch.set_num_threads(1)


class Examples:
    """Sequences of 6 to 9 tokens from 1 to 4, made from the seed; y is 1 where there are more 1s than 2s."""

    def __init__(self, num: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self._x = [draw.integers(1, 5, draw.integers(6, 10)) for _ in range(num)]

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> Example:
        x = self._x[index]
        return {"x": x, "y": int((x == 1).sum() > (x == 2).sum())}


class Counting(Task):
    name = "counting"
    summary = "which of two tokens is the more frequent one"
    kind = "classify"
    field = Field("tokens", vocab_size=5)
    num_classes = 2
    presets: ClassVar = {name: Preset(9, 96, 32, 32) for name in ("quick", "standard", "paper")}

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        train, valid, test = (Examples(num, seed + i) for i, num in enumerate((96, 32, 32)))
        return Splits(train, valid, test, 9, ("a note",))


class Model(nn.Module):
    """Mean of embeddings through dropout; a buffer counts the calls in train mode, as running statistics do."""

    calls: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(5, 8)
            self.dropout = nn.Dropout(0.1)
            self.answer = nn.Linear(8, 2)
        self.idle = nn.Parameter(torch.ones(2, 2))  # as a mechanism may ignore some of what it is given
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        weight = mask[..., None] / mask.sum(1)[:, None, None]
        return self.answer(self.dropout((self.tokens(x) * weight).sum(1)))


def call(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"], batch["mask"])


@pytest.fixture
def task() -> Counting:
    return Counting()


@pytest.fixture
def accelerator() -> Accelerator:
    return accelerator_for("fp32", "cpu")


@pytest.fixture
def training(tmp_path: Path, task: Counting) -> Callable[..., Training]:
    def make(
        folder: str = "run", call: Callable[[nn.Module, Batch], Tensor] = call, seed: int = 0, **settings: Any
    ) -> Training:
        given = {"steps": 20, "batch_size": 8, "lr": 0.05, "save_every": 4, "evaluate_every": 5, **settings}
        splits = task.load("quick")
        return Training(
            Model(), Objective(task, call), splits, TrainSettings(**given), seed, tmp_path / folder, {"made": "so"}
        )

    return make
