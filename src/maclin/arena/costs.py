"""What a training step takes: latency and memory of forward and backward, mechanisms side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..bench import free_bytes, interleaved, peak_bytes
from ..core.errors import MaclinError
from ..records import ArenaCost
from .objective import Batch, Objective
from .settings import Precision
from .task import Field, Task

UNFUSED = "softmax (unfused)"
"""Softmax attention that has its matrix of weights in memory, as published comparisons have it."""

_COPIES = 4  # of the matrix of weights that are alive at a time: logits, weights, and the gradients of both


def step_costs(
    models: Mapping[str, Callable[[], nn.Module]],
    objective: Objective,
    length: int,
    *,
    batch_size: int = 4,
    num_layers: int = 2,
    num_heads: int = 2,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    seconds_per_model: float = 2.0,
) -> list[ArenaCost]:
    """Time and weigh one training step of each model, in turns, on sequences of full length.

    A step is the forward pass, the loss and the backward pass; the optimiser is the same for all and left out.
    "softmax" is measured as torch fuses it, and once more unfused where there is room for its matrices.

    Args:
        models: what builds each model, by label; a MaclinError it raises becomes the reason of its row.
        objective: of the task.
        length: of every sequence.
        batch_size: sequences of a step.
        num_layers: of the models, to foresee how much memory unfused softmax needs.
        num_heads: of attention, for the same.
        precision: "fp32", or "bf16" by autocast.
        device: where to measure.
        seconds_per_model: wall time for the runs of one of them.
    """
    device = torch.device(device)
    batch = {key: tensor.to(device) for key, tensor in random_batch(objective.task, length, batch_size).items()}
    steps: dict[str, Callable[[], object]] = {}
    reasons: dict[str, str] = {}
    for label, build in models.items():
        try:
            model = build().to(device).train()
            steps[label] = _step(model, objective, batch, precision, device)
            steps[label]()  # whether it can be done at all
        except (MaclinError, MemoryError, torch.OutOfMemoryError) as error:
            reasons[label] = str(error) or "out of memory"
            steps.pop(label, None)
    order = list(models)
    if "softmax" in steps:
        order.insert(order.index("softmax") + 1, UNFUSED)
        needed = _COPIES * num_layers * batch_size * num_heads * length**2 * 4
        free = free_bytes(device)
        if free is not None and needed > 0.5 * free:
            reasons[UNFUSED] = f"needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        else:
            steps[UNFUSED] = _unfused(steps["softmax"])
    stats = interleaved(steps, min_runs=3, max_runs=30, max_seconds=seconds_per_model * len(steps), device=device)
    return [
        ArenaCost(
            label=label,
            length=length,
            batch_size=batch_size,
            latency_ms=stats[label].median_ms if label in stats else None,
            latency_ms_low=stats[label].q1_ms if label in stats else None,
            latency_ms_high=stats[label].q3_ms if label in stats else None,
            num_runs=stats[label].runs if label in stats else 0,
            peak_bytes=peak_bytes(steps[label], device) if label in steps else None,
            reason=reasons.get(label),
        )
        for label in order
    ]


def random_batch(task: Task, length: int, batch_size: int, seed: int = 0) -> Batch:
    """A batch of the task's form in which every position is data and every answer is wanted."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch_size, length, dtype=torch.bool)

    def sequence() -> Tensor:
        return _sequence(task.field, length, batch_size, generator)

    if task.kind == "match":
        batch = {"x1": sequence(), "mask1": mask, "x2": sequence(), "mask2": mask}
    elif task.kind == "translate":
        return {"source": sequence(), "source_mask": mask, "target": sequence(), "target_mask": mask}
    else:
        batch = {"x": sequence(), "mask": mask}
    if task.kind != "language":
        shape = (batch_size, length) if task.kind == "tag" else (batch_size,)
        batch["y"] = torch.randint(task.num_classes, shape, generator=generator)
    return batch


def _sequence(field: Field, length: int, batch_size: int, generator: torch.Generator) -> Tensor:
    if field.kind == "tokens":
        return torch.randint(1, field.vocab_size or 2, (batch_size, length), generator=generator)
    return torch.randn(batch_size, length, field.channels or 1, generator=generator)


def _step(
    model: nn.Module, objective: Objective, batch: Batch, precision: Precision, device: torch.device
) -> Callable[[], None]:
    def step() -> None:
        # both measuring functions switch gradients off, for what they measure otherwise
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = objective(model, batch).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

    return step


def _unfused(step: Callable[[], object]) -> Callable[[], object]:
    def unfused() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return step()

    return unfused
