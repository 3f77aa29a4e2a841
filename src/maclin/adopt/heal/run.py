"""``maclin.heal``: what is asked for, checked, and carried out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maclin.adopt.hosts.base import Batch
from maclin.core.errors import OptionError
from maclin.progress import Progress, Silent
from maclin.records import Config, HealResult
from maclin.training.stopping import StopSignals

from .blocks import Model
from .checks import as_before, check_model, check_output, check_train, checked_batches
from .dense import dense_hybrids
from .drift import drift
from .healing import LAST_NAME, Healing
from .losses import Read
from .settings import Budget, HealPrecision, HealRecipe, Readout, Train, chosen_precision
from .state import (
    digest,
    digest_batches,
    is_healed,
)


def heal(
    model: nn.Module,
    batches: Iterable[Batch],
    held_out: Iterable[Batch] | None = None,
    *,
    budget_minutes: float | None = None,
    steps: int | None = None,
    train: Train = "all",
    layers: Iterable[str] | None = None,
    output: Readout | Read = "auto",
    teacher: str | nn.Module = "auto",
    metric: Callable[[nn.Module], float] | None = None,
    recipe: HealRecipe | None = None,
    unknown_id: int | None = None,
    seed: int = 0,
    precision: HealPrecision = "auto",
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> HealResult:
    """Bring a converted model back to its original, in place: attention transfer, then distillation.

    1. Each converted layer's own parameters are trained against its exact output on the same q, k and v.
    2. The blocks' hidden states and the model's output are trained against those of the original, which is the same
       model with exact attention: where weights are trained, its targets are computed a chunk ahead with the
       original weights brought back from disk, so that no second copy is in memory.

    The model is judged on held-out batches all along, and ends as it was best: never worse than it came. It runs in
    evaluation mode, without dropout; modes and ``requires_grad`` are put back. Ctrl-C ends it early, with the best
    so far.

    Args:
        model: what ``maclin.convert_`` converted.
        batches: to heal on, keyword arguments of the model's forward, as to be served: their lengths and padding too.
        held_out: to judge by; None holds out every eighth batch.
        budget_minutes: of wall time, all included.
        steps: of distillation, besides ``recipe.transfer_steps``; 0 stops after the transfer. With both budgets, what
            is over first ends it.
        train: "all" (the weights of the blocks from the first converted layer on), "low_rank" (adapters, merged at the
            end; needs peft) or "features" (the mechanisms' own parameters only).
        layers: converted layers whose blocks' hidden states are compared; None is every block from the first one on.
        output: how the final output is compared: "embedding" (cosine of the mean of the last hidden states), "tokens"
            (cosine of each), "logits" (KL divergence), "none", or a function of output and batch that gives vectors
            (..., E); "auto" takes logits where the model gives them, the embedding of a text, or else each token.
        teacher: "auto", "copy" (a second copy of the model in memory, which saves the bringing back), or the original
            as a model of its own, for a converted one whose weights are not the original's any more.
        metric: your own figure of the model, taken at each look at the held-out batches; recorded, not decided by.
        recipe: learning rates and the like.
        unknown_id: what the tokenizer gives for what it does not know, to warn of text in another language.
        seed: of the order of the batches.
        precision: of distillation: "fp32", or "bf16" by autocast (weights, moments and sums stay in fp32); "auto" takes
            bf16 on a processor with matrix units for it, and fp32 elsewhere.
        out: directory of checkpoints; needed to resume.
        resume: go on from the checkpoint in ``out``, if there is one; the model is to be converted as it was then.
        progress: is told of each step.

    Returns:
        The learning curve, errors before and after, and what to know; ``result.warnings`` are to be read.

    Raises:
        InputError: no converted layer, no batches or empty ones, weights on the meta device, or a teacher of another
            make.
        OptionError: no budget, an unknown option, gradient checkpointing, no peft, or a checkpoint of other settings.
        OSError: the disk is full; the model is as it was best.

    Example:
        >>> maclin.convert_(model, "hybrid", window=64, batches=batches)
        >>> result = maclin.heal(model, batches, budget_minutes=15)
        >>> result.error_before, result.error_after
    """
    check_model(model)
    budget, recipe = Budget(budget_minutes, steps), recipe or HealRecipe()
    check_output(output)
    if isinstance(teacher, str) and teacher not in ("auto", "copy"):
        raise OptionError(f"teacher is {teacher!r}; wanted 'auto', 'copy', or the original as a model")
    found, held = checked_batches(batches, held_out)
    seen = Model(model, layers)
    chosen = chosen_precision(precision, seen.device)
    check_train(seen, train)
    if teacher == "auto" and is_healed(seen.root):
        raise OptionError(
            "this model was healed before and its weights were trained, so it is not its own original any more; pass "
            "teacher= with the original model"
        )
    if resume and out is None:
        raise OptionError("resume needs out, the directory that the checkpoint is in")
    identity: Config = {
        "model": digest(seen.root),
        "batches": digest_batches(found),
        "held_out": digest_batches(held),
        "train": train,
        "layers": list(seen.compared),
        "output": "own" if callable(output) else output,
        "teacher": teacher if isinstance(teacher, str) else digest(teacher),
        "seed": seed,
        "precision": chosen,
        "recipe": recipe.as_config(),
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if out is None else Path(out)
        if (folder / LAST_NAME).exists() and not resume:
            raise OptionError(f"{folder} holds a healing already: pass resume=True to go on, or another out")
        stack.enter_context(as_before(seen.root))
        stack.enter_context(dense_hybrids(seen.root))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        signals = stack.enter_context(StopSignals())
        healing = Healing(seen, found, held, train, output, metric, recipe, budget, seed, chosen, folder, identity)
        result = healing.through(teacher, signals, progress or Silent())
    return _finished(result, drift(found, held, unknown_id))


def _finished(result: HealResult, found: Any) -> HealResult:
    """The result with what to know about it."""
    warnings = [] if found is None else list(found.warnings)
    if result.best_stage == "converted":
        warnings.append("nothing that was tried is better on the held-out batches: the model is as it came")
    if result.num_skipped_steps:
        warnings.append(f"{result.num_skipped_steps} steps were left out, because loss or gradient was not finite")
    if result.num_held_out < 4:
        warnings.append(f"judged on {result.num_held_out} held-out batches only: pass more to trust the errors")
    return replace(result, drift=found, warnings=tuple(warnings))
