"""One healing: its stages, looks at held-out batches, checkpoints, and the best of it all at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maclin.adopt.hosts.base import Batch
from maclin.core.errors import InputError, OptionError
from maclin.progress import Progress
from maclin.records import Config, HealLayer, HealLook, HealResult
from maclin.training.checkpoint import check_same, load_tensors, save_tensors
from maclin.training.machine import Precision, accelerator_for
from maclin.training.stopping import StopSignals

from .blocks import Model, converted_layers
from .checks import choose_trained, trained_names
from .distil import Distillation
from .losses import Comparison, Read, chosen_readout
from .low_rank import add_adapters, remove_adapters, switched_off
from .settings import Budget, HealRecipe, Readout, Train
from .state import (
    HealState,
    is_mechanism,
    mark_healed,
    mechanisms_of,
    put_mechanisms,
    put_weights,
    weights_of,
)
from .teacher import DiskTeacher, LiveTeacher, Teacher, check_alike, copied, load_target, other_model, save_target
from .transfer import Transfer

LAST_NAME = "last.pt"
"""The checkpoint that healing goes on from, in the directory of ``out``."""
_SAVE_SECONDS, _SAVE_SHARE = 60.0, 0.05  # a checkpoint at most so often, and for at most this share of the time


class Healing:
    """One healing of one model; see ``heal``."""

    def __init__(
        self,
        model: Model,
        batches: Sequence[Batch],
        held_out: Sequence[Batch],
        train: Train,
        output: Readout | Read,
        metric: Callable[[nn.Module], float] | None,
        recipe: HealRecipe,
        budget: Budget,
        seed: int,
        precision: Precision,
        folder: Path,
        identity: Config,
    ) -> None:
        self.model, self.batches, self.held_out, self.train = model, batches, held_out, train
        self.metric, self.recipe, self.budget, self.seed = metric, recipe, budget, seed
        self.folder, self.identity = folder, identity
        self.accelerator = accelerator_for(precision, model.device.type)
        if self.accelerator.num_processes > 1:
            raise OptionError("healing runs in one process; start it without a launcher")
        self.state = HealState()
        self.readout = output
        self.comparison = Comparison("none", recipe.top_k)  # until the first run shows what there is
        self.transfer = Transfer(model, batches, held_out, recipe, budget, self.state, seed, self.accelerator)
        self.distillation: Distillation | None = None
        self.has_adapters = False
        self.frozen = False  # the checkpoint stays as it is
        self.saved_at, self.save_took = time.monotonic(), 0.0

    def through(self, teacher: str | nn.Module, signals: StopSignals, progress: Progress) -> HealResult:
        """Both stages, and the best state at the end, whatever happens."""
        source = self._source(teacher)
        self._keep_original(source)
        found = self._restored()
        self.transfer.state = self.state
        self.frozen = self.state.stage == "done"
        try:
            if self.state.stage == "transfer":
                self._transfer(found, signals, progress)
            if self.state.stage == "distillation":
                self._distil(found, source, signals, progress)
        finally:
            self._end()
        return self._result()

    # the stages

    def _transfer(self, found: dict[str, Any] | None, signals: StopSignals, progress: Progress) -> None:
        state = self.state
        if found is None:
            self._look("converted", 0)
            self.transfer.begin()
        else:
            self.transfer.best = found["best_mechanisms"]
            self.transfer.resume(found["optimizers"])

        def save(stopping: bool) -> None:
            if stopping:
                self._freeze()
            else:
                self._save_if_due()

        self.transfer.through(save, lambda: signals.asked, progress)
        self._look("transfer", state.transfer_step)
        if self.frozen:
            return
        state.stage, state.started, state.stale = "distillation", state.tick(), 0
        if self.budget.steps == 0 or self.budget.done(0, state.seconds, state.started, state.reserve) >= 1:
            state.stage, state.stopped = "done", "budget"

    def _distil(
        self, found: dict[str, Any] | None, source: Teacher | None, signals: StopSignals, progress: Progress
    ) -> None:
        state = self.state
        if self.train == "low_rank":
            torch.manual_seed(self.seed)
            add_adapters(self.model, self.recipe.rank)
            self.has_adapters = True
        trained = choose_trained(self.model, self.train)
        if not trained:
            state.stage, state.stopped = "done", "nothing to train"
            return
        low_rank = self.train == "low_rank"
        arguments = (self.recipe, self.budget, low_rank, self.seed, self.accelerator)
        made = source or self._own_teacher()
        self.distillation = Distillation(self.model, trained, self.batches, self.comparison, made, *arguments)
        if found is not None and found["state"]["stage"] == "distillation":
            put_weights(self.model.root, found["weights"])
            self.distillation.optimizer.load_state_dict(found["optimizer"])
        else:
            self._save()

        def look() -> None:
            self._look("distillation", state.step)
            self._save()

        reason = self.distillation.through(state, look, self._save_if_due, lambda: signals.asked, progress)
        if reason == "interrupted":
            self._freeze()
        if (state.looks[-1]["stage"], state.looks[-1]["step"]) != ("distillation", state.step):
            self._look("distillation", state.step)
        if not self.frozen:
            state.stage, state.stopped = "done", reason

    def _own_teacher(self) -> Teacher:
        """The model itself as its original."""
        autocast = self._autocast
        if self.train == "all":
            options = (self._initial, self.folder / "targets", self.recipe.chunk, self.recipe.cache_bytes, autocast)
            return DiskTeacher(self.model, self.batches, self.comparison, *options)
        if self.has_adapters:
            off = partial(switched_off, self.model.root)
            return LiveTeacher(self.model, self.batches, self.comparison, off, autocast)
        return LiveTeacher(self.model, self.batches, self.comparison, autocast=autocast)

    def _autocast(self) -> AbstractContextManager[None]:
        return self.accelerator.autocast()

    # looking

    @torch.no_grad()
    def _look(self, stage: str, step: int) -> None:
        """At the held-out batches; keeps the state where it is the best."""
        state, start = self.state, self.state.tick()
        figures = []
        for number, batch in enumerate(self.held_out):
            target = load_target(self._held(number)).to(self.model.device)
            with self.accelerator.autocast():
                figures.append(self.comparison.errors(self.model.run(batch), target, batch).figures())
        error, hidden = (sum(column) / len(figures) for column in zip(*figures, strict=True))
        value = None if self.metric is None else float(self.metric(self.model.given))
        state.looked_at = state.tick()
        state.look_seconds = state.looked_at - start
        look = HealLook(stage, step, round(state.seconds, 3), error, hidden, state.train_loss, value)
        state.looks.append(asdict(look))
        state.loss, state.losses = 0.0, 0
        state.stale += 1
        if math.isfinite(error) and (state.best_error is None or error < state.best_error):
            state.best_error, state.best_stage, state.best_step, state.stale = error, stage, step, 0
            save_tensors(self._best, {"mechanisms": mechanisms_of(self.model), "weights": self._weights()})

    # files

    @property
    def _best(self) -> Path:
        return self.folder / f"best-{self.state.best_stage}-{self.state.best_step}.pt"

    @property
    def _initial(self) -> Path:
        return self.folder / "original.pt"

    def _held(self, number: int) -> Path:
        return self.folder / "held-out" / f"target-{number}.pt"

    def _weights(self) -> dict[str, torch.Tensor]:
        """What distillation changes, the mechanisms left out; nothing before it begins."""
        if self.distillation is None:
            return {}
        names = [n for n, p in self.model.root.named_parameters() if p.requires_grad and not is_mechanism(n)]
        return weights_of(self.model.root, names)

    def _keep_original(self, source: Teacher | None) -> None:
        """What the original gives on the held-out batches; and its weights, where they will change."""
        model = self.model
        for number, batch in enumerate(self.held_out):
            watched = source.model if isinstance(source, LiveTeacher) else model
            run = watched.run_exact(batch)
            if number == 0:
                readout = chosen_readout(run.output, batch) if self.readout == "auto" else self.readout
                self.comparison.readout = readout
            target = self.comparison.target(run, batch)
            if number == 0:
                check_alike(target, [x for _, x in self._first_run(batch)], batch)
            save_target(self._held(number), target)
        if self.train == "all":
            save_tensors(self._initial, weights_of(model.root, trained_names(model)))

    @torch.no_grad()
    def _first_run(self, batch: Batch) -> list[tuple[str, torch.Tensor]]:
        return self.model.run(batch).hidden

    def _source(self, teacher: str | nn.Module) -> LiveTeacher | None:
        """The original where it is a model of its own."""
        if teacher == "auto":
            return None
        watched = copied(self.model) if isinstance(teacher, str) else other_model(teacher, self.model)
        return LiveTeacher(watched, self.batches, self.comparison, autocast=self._autocast)

    def _save_if_due(self) -> None:
        if time.monotonic() - self.saved_at > max(_SAVE_SECONDS, self.save_took / _SAVE_SHARE):
            self._save()

    def _freeze(self) -> None:
        """Somebody wants to stop: the checkpoint is to go on from here, whatever is looked at before the end."""
        self._save()
        self.frozen, self.state.stopped = True, "interrupted"

    def _save(self) -> None:
        start = time.monotonic()
        self.state.tick()
        optimizer = None if self.distillation is None else self.distillation.optimizer.state_dict()
        content = {
            "identity": self.identity,
            "state": asdict(self.state),
            "mechanisms": mechanisms_of(self.model),
            "best_mechanisms": self.transfer.best,
            "optimizers": {name: made.state_dict() for name, made in self.transfer.optimizers.items()},
            "weights": self._weights(),
            "optimizer": optimizer,
        }
        if self.state.stage != "transfer":
            content |= {"best_mechanisms": {}, "optimizers": {}}
        if self.state.stage == "done":
            content |= {"weights": {}, "optimizer": None}
        save_tensors(self.folder / LAST_NAME, content)
        for path in self.folder.glob("best-*.pt"):
            if path != self._best:
                path.unlink()
        self.saved_at, self.save_took = time.monotonic(), time.monotonic() - start

    def _restored(self) -> dict[str, Any] | None:
        """Go on from the checkpoint, where there is one."""
        path = self.folder / LAST_NAME
        if not path.exists():
            return None
        found = load_tensors(path)
        if not isinstance(found.get("state"), dict) or "identity" not in found:
            raise InputError(f"wanted a checkpoint of healing in {path}, got another file; choose another out")
        check_same(found["identity"], self.identity, path)
        self.state = HealState(**found["state"])
        put_mechanisms(self.model, found["mechanisms"])
        if self.state.stage != "done":
            self.state.resumed_at.append(round(self.state.seconds, 3))
        return found

    def _end(self) -> None:
        """Leave the model as it was best."""
        state, root = self.state, self.model.root
        if state.stage == "done" and not self.frozen:
            self._save()
        distilled = state.best_stage == "distillation"
        if self.train == "low_rank" and distilled and not self.has_adapters:
            add_adapters(self.model, self.recipe.rank)
            self.has_adapters = True
        if state.best_error is not None:
            best = load_tensors(self._best)
            put_mechanisms(self.model, best["mechanisms"])
            if self.train == "all" and (self.distillation is not None or distilled):
                put_weights(root, best["weights"] if distilled else load_tensors(self._initial))
            elif distilled:
                put_weights(root, best["weights"])
        if self.has_adapters:
            remove_adapters(root, merge=distilled)
            self.has_adapters = False
        if distilled and self.train != "features":
            mark_healed(root)
        for path in (self.folder / "targets").glob("*.pt"):
            path.unlink()

    def _result(self) -> HealResult:
        state = self.state
        looks = tuple(HealLook(**look) for look in state.looks)
        best = next(look for look in looks if (look.stage, look.step) == (state.best_stage, state.best_step))
        names = {id(p) for layer in converted_layers(self.model.root) for p in layer.mechanism.parameters()}
        if self.train == "all":
            known = dict(self.model.root.named_parameters())
            names |= {id(known[name]) for name in trained_names(self.model)}
        sizes = {id(p): p.numel() for p in self.model.root.parameters()}
        return HealResult(
            measure=self.comparison.measure,
            error_before=looks[0].error,
            error_after=best.error,
            best_stage=best.stage,
            best_step=best.step,
            stopped=state.stopped,
            looks=looks,
            layers=tuple(HealLayer(**row) for row in state.layers),
            settings={
                "train": self.train,
                "output": self.identity["output"],
                "budget_minutes": self.budget.minutes,
                "steps": self.budget.steps,
                "seed": self.seed,
                **self.recipe.as_config(),
            },
            num_batches=len(self.batches),
            num_held_out=len(self.held_out),
            num_trained=sum(sizes[i] for i in names),
            transfer_steps=state.transfer_step,
            distillation_steps=state.step,
            num_skipped_steps=state.skipped,
            resumed_at_seconds=tuple(state.resumed_at),
            seconds=round(state.seconds, 3),
            metric_before=looks[0].metric,
            metric_after=best.metric,
        )
