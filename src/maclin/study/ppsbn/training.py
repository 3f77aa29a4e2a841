"""One training run of the study of ppSBN: how stable it was, and what is left of its accuracy on shifted data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, median

import torch
from torch import Tensor, nn

from ...core.mechanisms import Mechanism
from ...core.norms import BatchStatistics
from ...records import Config
from ..source_text import SourceTask
from ..tiny import Attention, Examples, TinyClassifier, evaluate, train

SHIFTS = {
    "shorter": "a quarter of the words",
    "longer": "twice the words; the positions beyond those of training are untrained for every mechanism alike",
    "prose": "docstrings and comments only",
    "replaced": "a fifth of the words replaced by random ones",
    "scaled": "q and k three times as long",
}
"""How the held-out examples or the model differ from training."""
OWN_BATCHES = (64, 2)
"""Sizes of the held-out batches whose own statistics replace the running ones."""
CURVE = 20
"""Parts of a run, of which the mean losses are kept; fewer where there are fewer steps."""

_REPLACED, _SCALED = 0.2, 3.0
_GUESSING = 0.95  # of the loss of guessing: from there on nothing has been learned


def training_run(
    data: SourceTask,
    factory: Callable[[int], Mechanism],
    *,
    width: int,
    num_heads: int,
    num_layers: int,
    num_examples: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> Config:
    """Train on ``num_examples`` examples, in as many steps as the batch size makes of them, and judge the model.

    Gradients are not clipped: clipping would hide what is measured.

    Returns:
        accuracy, held_out_loss; one accuracy per row of ``SHIFTS``; own_statistics_64 and _2, accuracies with the
        statistics of held-out batches of that size (None without batch statistics); final_loss (mean over the last
        twentieth of the steps), worst_loss, losses (means over ``CURVE`` parts); gradient_spike and gradient_p99
        (largest norm of a gradient and its 99th percentile, over the median); num_steps, num_nonfinite_steps (of loss
        or gradient); failed (some step was not finite, or the final loss is at least 0.95 of that of guessing);
        seconds. None where a figure is not finite.
    """
    task = data.task
    classes = len(task.classes)
    longest = data.longer.ids.shape[1]
    model = TinyClassifier(task.vocab, width, num_heads, num_layers, longest, classes, factory, seed)
    steps = num_examples // batch_size
    norms: list[float] = []

    def watch(step: int, loss: float) -> None:
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())

    found = train(model, task, steps, batch_size, lr, seed, clip=None, on_step=watch)
    losses: list[float] = found["losses"]
    finite = sorted(norm for norm in norms if math.isfinite(norm))
    typical = median(finite) if finite else 0.0
    broken = len(norms) - len(finite) + (found["diverged_at_step"] is not None)
    final = fmean(losses[-max(steps // CURVE, 1) :]) if losses and not broken else None
    failed = final is None or final >= _GUESSING * math.log(classes)
    return {
        "accuracy": found["accuracy"],
        "held_out_loss": found["held_out_loss"],
        **(dict.fromkeys(SHIFTS) if broken else shifted_accuracies(model, data, seed)),
        **(dict.fromkeys(map(_own, OWN_BATCHES)) if broken else own_accuracies(model, task.held_out)),
        "final_loss": final,
        "worst_loss": max(losses, default=None),
        "losses": _curve(losses, steps),
        "gradient_spike": finite[-1] / typical if typical > 0 else None,
        "gradient_p99": finite[int(0.99 * (len(finite) - 1))] / typical if typical > 0 else None,
        "num_steps": found["num_steps"],
        "num_nonfinite_steps": broken,
        "failed": failed,
        "seconds": found["seconds"],
    }


def shifted_accuracies(model: TinyClassifier, data: SourceTask, seed: int) -> dict[str, float | None]:
    """Accuracy under each row of ``SHIFTS``; the model stays as it is."""
    held_out = data.task.held_out
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(data.task.vocab, held_out.ids.shape, generator=generator)
    replaced = torch.rand(held_out.ids.shape, generator=generator) < _REPLACED
    shifted = {
        "shorter": Examples(held_out.ids[:, : max(held_out.ids.shape[1] // 4, 1)], held_out.labels),
        "longer": data.longer,
        "prose": data.prose,
        "replaced": Examples(torch.where(replaced, noise, held_out.ids), held_out.labels),
        "scaled": held_out,
    }
    models = {name: scaled(model, _SCALED) if name == "scaled" else model for name in shifted}
    return {name: evaluate(models[name], examples)["accuracy"] for name, examples in shifted.items()}


@torch.no_grad()
def scaled(model: TinyClassifier, factor: float) -> TinyClassifier:
    """A copy whose q and k are ``factor`` times as long."""
    model = copy.deepcopy(model)
    for attention in model.modules():
        if isinstance(attention, Attention):
            rows = slice(0, 2 * attention.qkv.out_features // 3)
            attention.qkv.weight[rows] *= factor
            attention.qkv.bias[rows] *= factor
    return model


def own_accuracies(model: TinyClassifier, examples: Examples) -> dict[str, float | None]:
    """Accuracy with the statistics of the held-out batches themselves, by their size; None without batch statistics."""
    model = copy.deepcopy(model).eval()
    statistics = [module for module in model.modules() if isinstance(module, BatchStatistics)]
    if not statistics:
        return dict.fromkeys(map(_own, OWN_BATCHES))
    for module in statistics:
        module.train()
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))  # labels stand in turn
    return {_own(size): _accuracy(model, examples.take(order), size) for size in OWN_BATCHES}


@torch.no_grad()
def _accuracy(model: TinyClassifier, examples: Examples, batch_size: int) -> float:
    answers: list[Tensor] = [model(part).argmax(-1) for part in examples.ids.split(batch_size)]
    return (torch.cat(answers) == examples.labels).double().mean().item()


def _curve(losses: list[float], steps: int) -> list[float]:
    """Means over the parts of a run that it got through."""
    parts = min(CURVE, steps)
    ends = [round(i * steps / parts) for i in range(parts + 1)]
    return [fmean(losses[a:b]) for a, b in pairwise(ends) if b <= len(losses)]


def _own(batch_size: int) -> str:
    return f"own_statistics_{batch_size}"
