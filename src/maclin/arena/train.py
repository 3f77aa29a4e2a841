"""One training: seeded, checkpointed, chosen on the validation split, judged once on the test split."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import MaclinError, OptionError
from ..progress import Progress, Silent
from ..records import ArenaLook, Config
from ..training.checkpoint import load_checkpoint, save_checkpoint
from ..training.machine import placed, summed
from ..training.schedule import mixed_seed, rate
from ..training.stopping import StopSignals
from .log import TrainLog
from .machine import evaluate, prepared
from .objective import Objective, num_judged, num_tokens, score_of, watched
from .schedule import Order
from .settings import TrainSettings
from .state import State
from .task import Split, Splits

if TYPE_CHECKING:
    from accelerate import Accelerator

LAST_NAME = "last.pt"
"""The checkpoint that a training goes on from, in the directory of the run."""


_SAVE_SECONDS = 60  # after which a checkpoint is written between those of the settings


class TrainingError(MaclinError):
    """A training that cannot go on, such as one whose loss is not finite any more."""


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and where its files go.

    Args:
        model: moves in place; ends with the weights that were best on the validation split.
        objective: what it is trained on.
        splits: the data.
        settings: of the training.
        seed: of the order of the examples and of dropout; the model was built before.
        folder: directory of the run.
        identity: settings that a checkpoint must share, JSON values.
        name: in front of the progress bar.
    """

    model: nn.Module
    objective: Objective
    splits: Splits
    settings: TrainSettings
    seed: int
    folder: Path
    identity: Config
    name: str = "training"


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Args:
        test_loss: mean cross entropy on the test split; None where it is not finite.
        test_accuracy: share of right answers on it.
        best_step: the step whose weights were best on the validation split, and were judged.
        looks: at the validation split.
        num_skipped_steps: whose loss or gradient was not finite.
        resumed_at_steps: where the training went on after an interruption.
        seconds: of training, validation and checkpoints left out.
        tokens_per_second: of training.
        interrupted: whether Ctrl-C came so late that the training ended all the same.
    """

    test_loss: float | None
    test_accuracy: float
    best_step: int
    looks: tuple[ArenaLook, ...]
    num_skipped_steps: int
    resumed_at_steps: tuple[int, ...]
    seconds: float
    tokens_per_second: float
    interrupted: bool = False


def train(
    job: Training,
    accelerator: Accelerator,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    tensorboard: bool = False,
) -> Trained:
    """Train a model, and judge what was best on the validation split once on the test split.

    Whatever happens at a step depends on the seed and the number of the step alone, so a training that was killed at
    any moment and goes on from its checkpoint ends in the same weights, to the bit on a CPU with as many threads and
    processes. A step whose loss or gradient is not finite changes nothing but a counter.

    Args:
        job: what to train.
        accelerator: device, precision and processes.
        resume: go on from the checkpoint in the directory of the run, if there is one.
        progress: is told of every step.
        tensorboard: also write TensorBoard's files.

    Raises:
        OptionError: a batch that does not fit the training split or the processes, or a checkpoint of other settings.
        TrainingError: more steps than ``max_skipped`` were not finite; names the cause.
        OSError: a checkpoint could not be written; the last good one is still there.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; the step was finished and a checkpoint written.
    """
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), StopSignals() as signals:
        run = _Run(job, accelerator, resume, tensorboard, progress or Silent(), signals)
        try:
            return run.through()
        finally:
            run.close()


class _Run:
    def __init__(
        self,
        job: Training,
        accelerator: Accelerator,
        resume: bool,
        tensorboard: bool,
        progress: Progress,
        signals: StopSignals,
    ) -> None:
        self.job, self.accelerator, self.signals = job, accelerator, signals
        self.settings = job.settings
        self.is_main = accelerator.is_main_process
        self.progress = progress if self.is_main else Silent()
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        if self.settings.batch_size % (self.world * self.settings.accumulation):
            raise OptionError(
                f"wanted a batch_size that {self.world} processes times accumulation {self.settings.accumulation} "
                f"divides, got {self.settings.batch_size}"
            )
        self.order = Order(len(job.splits.train), self.settings.batch_size, job.seed)
        self.raw = job.model
        few = [job.splits.train[i] for i in range(min(2, len(job.splits.train)))]
        made = _optimizer(self.raw, self.settings)
        self.model, self.optimizer = prepared(self.raw, made, job.objective, few, accelerator)
        self.parameters = [parameter for parameter in self.raw.parameters() if parameter.requires_grad]
        self.state = State()
        self.last = job.folder / LAST_NAME
        self.saved_at = time.monotonic()
        if resume and self.last.exists():
            self._restore()
        self.log = TrainLog(job.folder, self.state.log_bytes, self.state.step, tensorboard) if self.is_main else None
        if self.state.resumed_at:
            self._write("resumed", resumed_at_step=self.state.step)
        else:
            self._write("start", settings=job.identity, num_processes=self.world)

    def through(self) -> Trained:
        """To the end."""
        settings, state = self.settings, self.state
        left = settings.steps - state.step
        self.progress.start(self.job.name if not state.step else f"{self.job.name}, on from {state.step}", max(left, 1))
        self.model.train()
        while state.step < settings.steps:
            start = time.perf_counter()
            stop, due = self._step()
            state.seconds += time.perf_counter() - start
            self.progress.advance(state.text())
            done = state.step = state.step + 1
            if state.skipped > settings.max_skipped:
                raise TrainingError(self._why_stopped())
            if done % settings.every("log") == 0 or done == settings.steps:
                self._write("train", **state.line())
            look = done % settings.every("evaluate") == 0 or done == settings.steps
            if look:
                self._look()
            if look or stop or due or done % settings.every("save") == 0:
                self._save()
            if stop and done < settings.steps:
                raise KeyboardInterrupt
        self.progress.finish()
        return self._judge()

    def close(self) -> None:
        """Close the log, and let go of the model."""
        if self.log is not None:
            self.log.close()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # with its own forward again
        self.accelerator.free_memory()

    # one step

    def _step(self) -> tuple[bool, bool]:
        """Train on one batch; whether somebody wants to stop, and whether the last checkpoint is old."""
        job, state, settings = self.job, self.state, self.settings
        torch.manual_seed(mixed_seed(job.seed, state.step, self.rank))
        examples = [job.splits.train[i] for i in self.order.batch(state.step)[self.rank :: self.world]]
        share = len(examples) // settings.accumulation
        parts = [job.objective.collate(examples[i : i + share]) for i in range(0, len(examples), share)]
        counts = torch.tensor(
            [
                sum(num_judged(job.objective.task.kind, part) for part in parts),
                sum(num_tokens(part) for part in parts),
                int(self.signals.asked),
                int(self.is_main and time.monotonic() - self.saved_at > _SAVE_SECONDS),
            ],
            dtype=torch.float64,
        )
        judged, tokens, stop, due = summed(counts, self.accelerator).tolist()  # all processes do the same
        buffers = [buffer.clone() for buffer in self.raw.buffers()]
        figures = torch.zeros(2, dtype=torch.float64)
        for number, part in enumerate(parts):
            is_last = number + 1 == len(parts)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    outcome = job.objective(self.model, placed(part, self.accelerator))
                # gradients are averaged over processes, and the mean is over the answers of all of them
                self.accelerator.backward(outcome.loss * (self.world / max(judged, 1.0)))
            figures += torch.stack([outcome.loss.detach().double(), outcome.num_correct.double()]).cpu()
        loss, correct = summed(figures, self.accelerator).tolist()
        self._update(loss / max(judged, 1.0), buffers)
        if math.isfinite(loss):
            state.count(loss=loss, correct=correct, judged=judged)
        state.tokens += int(tokens)
        return stop > 0, due > 0

    def _update(self, loss: float, buffers: list[Tensor]) -> None:
        """Move the weights, or, where something is not finite, undo what the step did to the buffers."""
        state, settings = self.state, self.settings
        lr = settings.lr * rate(state.step, settings.steps, settings.schedule, settings.warm_up)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        value = norm.item()
        if math.isfinite(loss) and math.isfinite(value):
            if settings.clip is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, settings.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            state.window["grad_norm"] = value
        else:
            state.skipped += 1
            state.cause = f"{self._broken(loss)} at step {state.step + 1}, with a learning rate of {lr:.3g}"
            self._write("skipped", cause=state.cause)
            for buffer, before in zip(self.raw.buffers(), buffers, strict=True):
                buffer.copy_(before)
        state.window["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)

    def _broken(self, loss: float) -> str:
        if not math.isfinite(loss):
            return f"the loss was {loss}"
        names = (n for n, p in self.raw.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
        return f"the gradient of {next(names, 'the weights')} was not finite"

    def _why_stopped(self) -> str:
        state = self.state
        return (
            f"stopped after {state.step} of {self.settings.steps} steps, because {state.skipped} of them were not "
            f"finite, the last time {state.cause}. Pass a lower --lr, or --precision fp32"
        )

    # looking, saving, judging

    def _look(self) -> None:
        state, task = self.state, self.job.objective.task
        loss, accuracy = self._evaluate(self.job.splits.valid)
        score = score_of(task, loss, accuracy)
        look = {"seconds": round(state.seconds, 3), "loss": _finite(loss), "score": score}
        state.looks.append({"step": state.step, **look})
        self._write("valid", **look)
        if score is None:
            return
        key = [accuracy, -loss] if watched(task) == "accuracy" else [-loss]
        if state.is_best(key) and self.is_main:
            save_checkpoint(self._best(state.step), {"model": self.raw.state_dict()}, self.job.identity)

    def _save(self) -> None:
        if self.log is not None:
            self.state.log_bytes = self.log.num_bytes
            moving = {"model": self.raw.state_dict(), "optimizer": self.optimizer.state_dict()}
            save_checkpoint(self.last, {**moving, **asdict(self.state)}, self.job.identity)
            for path in self.job.folder.glob("best-*.pt"):
                if path != self._best(self.state.best_step):
                    path.unlink()
        self.saved_at = time.monotonic()
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        found = load_checkpoint(self.last, self.job.identity)
        self.raw.load_state_dict(found.pop("model"))
        self.optimizer.load_state_dict(found.pop("optimizer"))
        self.state = State(**found)
        self.state.resumed_at.append(self.state.step)

    def _judge(self) -> Trained:
        state = self.state
        if state.best_key is not None:
            self.raw.load_state_dict(load_checkpoint(self._best(state.best_step), self.job.identity)["model"])
        loss, accuracy = self._evaluate(self.job.splits.test)
        self._write("test", loss=_finite(loss), accuracy=accuracy, best_step=state.best_step or state.step)
        return Trained(
            test_loss=_finite(loss),
            test_accuracy=accuracy,
            best_step=state.best_step or state.step,
            looks=tuple(ArenaLook(**look) for look in state.looks),
            num_skipped_steps=state.skipped,
            resumed_at_steps=tuple(state.resumed_at),
            seconds=round(state.seconds, 3),
            tokens_per_second=round(state.tokens_per_second, 1),
            interrupted=self.signals.asked,
        )

    # small things

    def _evaluate(self, split: Split) -> tuple[float, float]:
        size = max(self.settings.batch_size // (self.settings.accumulation * self.world), 1)
        return evaluate(self.raw, split, self.job.objective, self.accelerator, size)

    def _write(self, event: str, **figures: Any) -> None:
        if self.log is not None:
            self.log.write(event, self.state.step, **figures)

    def _best(self, step: int) -> Path:
        return self.job.folder / f"best-{step}.pt"


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
