"""The machine a training runs on: device, precision and processes, through accelerate."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..core.errors import OptionError

if TYPE_CHECKING:
    from accelerate import Accelerator

Precision = Literal["fp32", "bf16"]


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
        raise OptionError("training needs accelerate: pip install 'maclin[arena]'") from error
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


def is_main_process() -> bool:
    """Whether this process is the only one, or the first of those that were launched together."""
    return os.environ.get("RANK", "0") == "0"


def placed(batch: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """The batch on the device."""
    return {key: tensor.to(accelerator.device) for key, tensor in batch.items()}


def summed(figures: Tensor, accelerator: Accelerator) -> Tensor:
    """Numbers added up over all processes, on the CPU."""
    if accelerator.num_processes == 1:
        return figures
    total = accelerator.reduce(figures.to(accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return total.cpu()
