"""What a batch is worth: the loss that is trained on, and how many answers were right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .task import NOT_JUDGED, Example, Kind, Task, collate

Batch = dict[str, Tensor]
Call = Callable[[nn.Module, Batch], Tensor]
"""Logits of a batch: (B, classes), or (B, N, classes) where every position has an answer."""


@dataclass(frozen=True)
class Outcome:
    """Sums over the judged answers of a batch."""

    loss: Tensor  # of the cross entropies
    num_correct: Tensor


@dataclass(frozen=True)
class Objective:
    """Cross entropy of a task's answers.

    Args:
        task: whose examples are judged.
        call: how a model is asked for logits.
        length: positions to pad every batch to; None pads to the longest of its examples.
    """

    task: Task
    call: Call
    length: int | None = None

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Examples as one batch."""
        return collate(self.task, examples, self.length)

    def __call__(self, model: nn.Module, batch: Batch) -> Outcome:
        """Loss and number of right answers."""
        logits = self.call(model, batch).float()
        target = targets(self.task.kind, batch)
        if self.task.kind == "language":
            logits = logits[:, :-1]
        logits, target = logits.flatten(0, -2), target.flatten()
        loss = F.cross_entropy(logits, target, ignore_index=NOT_JUDGED, reduction="sum")
        return Outcome(loss, (logits.detach().argmax(-1) == target).sum())  # NOT_JUDGED is no class


def targets(kind: Kind, batch: Batch) -> Tensor:
    """What is to be answered: (B,), or (B, N) with ``NOT_JUDGED``."""
    if kind == "language":
        return batch["x"][:, 1:].masked_fill(~batch["mask"][:, 1:], NOT_JUDGED)
    if kind == "translate":
        return batch["target"][:, 1:].masked_fill(~batch["target_mask"][:, 1:], NOT_JUDGED)
    return batch["y"]


def num_judged(kind: Kind, batch: Batch) -> int:
    """How many answers are wanted."""
    return int((targets(kind, batch) != NOT_JUDGED).sum())


def num_tokens(batch: Batch) -> int:
    """Positions that are not padding."""
    return sum(int(tensor.sum()) for key, tensor in batch.items() if "mask" in key)


def watched(task: Task) -> str:
    """What is looked at during training: accuracy, or where every token is an answer, perplexity."""
    return "perplexity" if task.kind in ("language", "translate") else "accuracy"


def score_of(task: Task, loss: float, accuracy: float) -> float | None:
    """The watched score of a mean cross entropy and a share of right answers; None where it is not finite."""
    if watched(task) == "accuracy":
        return accuracy if math.isfinite(loss) else None
    return math.exp(loss) if math.isfinite(loss) and loss < 700 else None
