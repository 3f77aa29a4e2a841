"""Model and optimiser for the machine a training runs on, and judging on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..training.machine import placed, summed
from .objective import Objective, num_judged
from .task import Example, Split

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepared(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    examples: Sequence[Example],
    accelerator: Accelerator,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimiser for this machine: on the device, and with gradients that are averaged over processes.

    Args:
        model: moves to the device.
        optimizer: of its parameters.
        objective: of the task.
        examples: a few, to find out whether some parameters get no gradient, which processes must know before.
        accelerator: device, precision and processes.
    """
    if accelerator.num_processes > 1:
        model.to(accelerator.device)
        buffers = [buffer.clone() for buffer in model.buffers()]
        objective(model, placed(objective.collate(examples), accelerator)).loss.backward()
        unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
        model.zero_grad(set_to_none=True)
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        assert accelerator.ddp_handler is not None
        accelerator.ddp_handler.find_unused_parameters = unused
    return accelerator.prepare(model, optimizer)


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, objective: Objective, accelerator: Accelerator, batch_size: int
) -> tuple[float, float]:
    """Mean cross entropy and share of right answers over a split, in eval mode; train mode is put back.

    Args:
        model: not wrapped for several processes, each of which judges its share of the examples.
        split: what to judge on.
        objective: of the task.
        accelerator: device, precision and processes.
        batch_size: examples at once.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    mine = range(accelerator.process_index, len(split), accelerator.num_processes)
    for start in range(0, len(mine), batch_size):
        batch = objective.collate([split[i] for i in mine[start : start + batch_size]])
        with accelerator.autocast():
            outcome = objective(model, placed(batch, accelerator))
        judged = num_judged(objective.task.kind, batch)
        sums += torch.tensor([outcome.loss.item(), outcome.num_correct.item(), judged], dtype=torch.float64)
    model.train(was_training)
    loss, correct, total = summed(sums, accelerator).tolist()
    return loss / max(total, 1.0), correct / max(total, 1.0)
