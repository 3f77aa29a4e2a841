"""Distillation: hidden states and the final output of the converted model against those of the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from maclin.adopt.hosts.base import Batch
from maclin.progress import Progress
from maclin.training.schedule import mixed_seed

from .blocks import Model
from .losses import Comparison
from .settings import Budget, HealRecipe, learning_rate
from .state import HealState, is_mechanism
from .teacher import Teacher

if TYPE_CHECKING:
    from accelerate import Accelerator

_SEED = 29
_LOOK_SHARE = 0.1  # of the time that looks may take where minutes are the budget
_AHEAD = 64  # steps whose batches a teacher is told of


class Distillation:
    """Trains what has gradients switched on.

    Args:
        model: the converted model.
        trained: names and parameters that are trained.
        batches: to heal on.
        comparison: makes errors.
        teacher: gives targets.
        recipe: how.
        budget: how long.
        low_rank: whether the weights that are trained are adapters.
        seed: of the order.
        accelerator: takes the gradients.
    """

    def __init__(
        self,
        model: Model,
        trained: Sequence[tuple[str, nn.Parameter]],
        batches: Sequence[Batch],
        comparison: Comparison,
        teacher: Teacher,
        recipe: HealRecipe,
        budget: Budget,
        low_rank: bool,
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.batches, self.comparison, self.teacher = model, batches, comparison, teacher
        self.recipe, self.budget, self.seed, self.accelerator = recipe, budget, seed, accelerator
        self.parameters = [p for _, p in trained]
        self.optimizer = _optimizer(trained, recipe, low_rank)
        self._orders: dict[int, list[int]] = {}

    def through(
        self,
        state: HealState,
        look: Callable[[], None],
        save: Callable[[], None],
        stop: Callable[[], bool],
        progress: Progress,
    ) -> str:
        """To the end of the budget; returns why it ended.

        Args:
            state: moves.
            look: at the held-out batches; called where one is due.
            save: called after each step, for whoever thinks it is time.
            stop: asked after each step whether somebody wants to stop.
            progress: is told of each step.
        """
        recipe, budget = self.recipe, self.budget
        steps = budget.steps
        progress.start("distillation", None if steps is None else max(steps - state.step, 0))
        looked = state.step
        while True:
            done = budget.done(state.step, state.seconds, state.started, state.reserve)
            if done >= 1:
                reason = "budget"
            elif state.stale >= recipe.patience:
                reason = "no progress"
            elif state.skipped > recipe.max_skipped:
                reason = "not finite"
            elif stop():
                reason = "interrupted"
            else:
                reason = ""
            if reason:
                break
            start = state.tick()
            self._step(state, done)
            state.step += 1
            state.step_seconds = state.tick() - start
            progress.advance(self._text(state))
            if self._is_due(state, looked):
                look()
                looked = state.step
            save()
        progress.finish()
        return reason

    def _step(self, state: HealState, done: float) -> None:
        recipe = self.recipe
        torch.manual_seed(mixed_seed(self.seed, state.step))
        first = state.step * recipe.accumulation
        indices = self._upcoming(first, recipe.accumulation)
        total = 0.0
        for number, index in enumerate(indices):
            batch = self.batches[index]
            target = self.teacher.target(index, self._upcoming(first + number, _AHEAD)).to(self.model.device)
            with self.accelerator.autocast():
                run = self.model.run(batch)
                errors = self.comparison.errors(run, target, batch)
            loss = errors.loss(recipe.hidden_weight, recipe.output_weight) / len(indices)
            self.accelerator.backward(loss)
            total += float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_(self.parameters, recipe.clip))
        if math.isfinite(total) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = group["rate"] * learning_rate(done, recipe.warm_up)
            self.optimizer.step()
            state.loss, state.losses = state.loss + total, state.losses + 1
        else:
            state.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)

    def _is_due(self, state: HealState, looked: int) -> bool:
        recipe, budget = self.recipe, self.budget
        if recipe.evaluate_every is not None:
            return state.step % recipe.evaluate_every == 0
        if budget.steps is not None and budget.minutes is None:
            return state.step % max(budget.steps // recipe.num_looks, 1) == 0
        seen = sum(look["stage"] == "distillation" for look in state.looks)
        due = budget.done(state.step, state.seconds, state.started, state.reserve) >= (seen + 1) / recipe.num_looks
        cheap = state.look_seconds <= _LOOK_SHARE * (state.seconds - state.looked_at)
        return state.step > looked and due and cheap

    def _upcoming(self, first: int, number: int) -> list[int]:
        """The batches of steps from one on, epoch by epoch in an order that the seed and the epoch decide."""
        count = len(self.batches)
        found: list[int] = []
        while len(found) < number:
            epoch, place = divmod(first + len(found), count)
            if epoch not in self._orders:
                generator = torch.Generator().manual_seed(mixed_seed(self.seed, _SEED, epoch))
                self._orders = {**{e: o for e, o in self._orders.items() if e == epoch - 1}}
                self._orders[epoch] = torch.randperm(count, generator=generator).tolist()
            found += self._orders[epoch][place : place + number - len(found)]
        return found

    def _text(self, state: HealState) -> str:
        loss = "" if state.train_loss is None else f"loss {state.train_loss:.4g}"
        best = "" if state.best_error is None else f"best held-out {state.best_error:.4g}"
        return ", ".join(filter(None, (loss, best)))


def _optimizer(
    trained: Sequence[tuple[str, nn.Parameter]], recipe: HealRecipe, low_rank: bool
) -> torch.optim.Optimizer:
    weights = recipe.low_rank_lr if low_rank else recipe.lr
    features = recipe.lr if recipe.features_lr is None else recipe.features_lr
    own = [p for name, p in trained if is_mechanism(name)]
    rest = [p for name, p in trained if not is_mechanism(name)]
    groups = [
        {"params": own, "rate": features, "weight_decay": 0.0},
        {"params": [p for p in rest if p.dim() > 1], "rate": weights, "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "rate": weights, "weight_decay": 0.0},
    ]
    betas = (0.9, 0.98)  # a few hundred steps at most: the default second moment would remember all of them
    # one pass over weights and moments instead of eight; not there for every device
    fused = all(p.device.type in ("cpu", "cuda") for _, p in trained)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=betas, fused=fused)
