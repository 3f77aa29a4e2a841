"""The cost of a training step of every mechanism of a job, without any training and without the data of the task."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..bench.specs import Spec
from ..core.errors import OptionError
from ..core.native import wait_for_kernels
from ..nn.model import MacformerModel
from ..progress import Progress, Silent
from ..records import ArenaCost
from .costs import random_batch, step_costs
from .models import build_model, calibrated_, objective_of
from .settings import Recipe
from .task import Task

BATCH_SIZE = 4
"""Sequences of a step whose cost is measured."""


def measured_costs(
    task: Task,
    specs: Sequence[Spec],
    recipe: Recipe,
    lengths: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    batch_size: int = BATCH_SIZE,
    seconds_per_model: float = 2.0,
    progress: Progress | None = None,
) -> tuple[ArenaCost, ...]:
    """Latency and memory of forward and backward, all mechanisms in turns, at each length.

    Args:
        task: whose models are measured, on drawn numbers.
        specs: the mechanisms; without softmax among them there is nothing to compare with.
        recipe: sizes of the model, and the precision.
        lengths: of the sequences.
        device: where to measure.
        batch_size: sequences of a step.
        seconds_per_model: wall time for the runs of one mechanism at one length.
        progress: is told of every length.

    Raises:
        OptionError: no lengths, or one below 1.
    """
    if not lengths or min(lengths) < 1:
        raise OptionError(f"wanted lengths of at least 1 position, got {', '.join(map(str, lengths)) or 'none'}")
    if torch.device(device).type == "cpu":
        wait_for_kernels()  # compiled now, rather than between two figures
    progress = progress or Silent()
    progress.start("cost of a training step", len(lengths))
    costs: list[ArenaCost] = []
    for length in lengths:
        models = {
            spec.text: (lambda spec=spec, length=length: _built(task, spec, recipe, length, batch_size))
            for spec in specs
        }
        costs += step_costs(
            models,
            objective_of(task),
            length,
            batch_size=batch_size,
            num_layers=recipe.model.num_layers,
            num_heads=recipe.model.num_heads,
            precision=recipe.train.precision,
            device=device,
            seconds_per_model=seconds_per_model,
        )
        progress.advance(f"{length:,} positions")
    progress.finish()
    return tuple(costs)


def _built(task: Task, spec: Spec, recipe: Recipe, length: int, batch_size: int) -> MacformerModel:
    """The model as it is trained."""
    model = build_model(task, spec, recipe.model, length, 0)
    if recipe.train.calibrate:
        calibrated_(model, random_batch(task, length, batch_size))
    return model
