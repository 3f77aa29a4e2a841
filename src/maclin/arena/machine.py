"""The machine a training runs on: device, precision and processes, through accelerate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.errors import OptionError
from .objective import Batch, Objective, num_judged
from .settings import Precision
from .task import Example, Split

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_for(precision: Precision = "fp32", device: str = "auto") -> Accelerator:
    """What prepares models for this device, this precision and as many processes as were launched.

    Args:
        precision: "fp32", or "bf16" by autocast.
        device: "auto" takes CUDA where there is one.

    Raises:
        OptionError: accelerate is not installed, or the device is not there.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState, PartialState
    except ImportError as error:
        raise OptionError("the arena trains with accelerate: pip install 'maclin[arena]'") from error
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"wanted --device auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("wanted --device cuda, but torch sees no CUDA device; pass cpu")
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier one in this process had its own precision
    return Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs()],
    )


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


def is_main_process() -> bool:
    """Whether this process is the only one, or the first of those that were launched together."""
    return os.environ.get("RANK", "0") == "0"


def placed(batch: Batch, accelerator: Accelerator) -> Batch:
    """The batch on the device."""
    return {key: tensor.to(accelerator.device) for key, tensor in batch.items()}


def summed(figures: Tensor, accelerator: Accelerator) -> Tensor:
    """Numbers added up over all processes, on the CPU."""
    if accelerator.num_processes == 1:
        return figures
    total = accelerator.reduce(figures.to(accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return total.cpu()


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
