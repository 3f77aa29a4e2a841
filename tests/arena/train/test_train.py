"""The trainer: learns, resumes to the bit, skips what is not finite, loses nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from maclin.arena import train as train_module
from maclin.arena.objective import Batch
from maclin.arena.train import LAST_NAME, Trained, Training, TrainingError, train
from maclin.core.errors import InputError, OptionError
from maclin.training.machine import accelerator_for

Make = Callable[..., Training]


class Killed(BaseException):
    """As a kill would: nothing catches it, nothing is saved on the way out."""


def events(job: Training, kind: str) -> list[dict[str, Any]]:
    lines = (job.folder / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == kind]


def weights(job: Training) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in job.model.state_dict().items()}


def comparable(found: Trained) -> Trained:
    looks = tuple(replace(look, seconds=0.0) for look in found.looks)
    return replace(found, seconds=0.0, tokens_per_second=0.0, resumed_at_steps=(), looks=looks)


def after(calls: int, action: Callable[[], None]) -> Callable[[nn.Module, Batch], Tensor]:
    """A call of the model that does something once, after so many calls in train mode."""
    count = 0

    def call(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal count
        count += model.training
        if model.training and count == calls + 1:
            action()
        return model(batch["x"], batch["mask"])

    return call


def test_it_learns(training: Make, accelerator: Accelerator) -> None:
    job = training(steps=150, evaluate_every=50, save_every=50)
    found = train(job, accelerator)
    assert found.test_accuracy > 0.8
    assert found.test_loss is not None
    assert found.test_loss < 0.5
    assert [look.step for look in found.looks] == [50, 100, 150]


def test_what_was_best_on_validation_is_judged_and_left_in_the_model(training: Make, accelerator: Accelerator) -> None:
    job = training(steps=40, lr=0.3, schedule="constant", evaluate_every=1)
    found = train(job, accelerator)
    scores = [(look.score, -(look.loss or 0)) for look in found.looks]
    assert found.best_step == scores.index(max(scores)) + 1
    assert found.best_step < 40
    job.model.eval()
    batch = job.objective.collate([job.splits.test[i] for i in range(32)])
    right = (job.model(batch["x"], batch["mask"]).argmax(-1) == batch["y"]).double().mean().item()
    assert found.test_accuracy == pytest.approx(right)


@pytest.mark.parametrize("calls", [1, 5, 11, 19])
def test_a_killed_training_goes_on_to_the_same_end(training: Make, accelerator: Accelerator, calls: int) -> None:
    whole = training("whole")
    expected = train(whole, accelerator)

    def kill() -> None:
        raise Killed

    job = training("killed", call=after(calls, kill))
    with pytest.raises(Killed):
        train(job, accelerator)
    again = training("killed")
    found = train(again, accelerator, resume=True)
    assert comparable(found) == comparable(expected)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    saved = max((step for step in (4, 5, 8, 10, 12, 15, 16) if step <= calls), default=0)
    assert found.resumed_at_steps == ((saved,) if saved else ())
    assert [line["resumed_at_step"] for line in events(again, "resumed")] == list(found.resumed_at_steps)
    for kind in ("train", "valid", "test"):  # no line twice, none lost
        lines = [[{**line, "seconds": 0, "tokens_per_second": 0} for line in events(j, kind)] for j in (whole, again)]
        assert lines[0] == lines[1]


def test_it_does_not_depend_on_anybody_elses_draws(training: Make, accelerator: Accelerator) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = train(training("one"), accelerator)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert comparable(train(training("two"), accelerator)) == comparable(one)
    assert comparable(train(training("three", seed=1), accelerator)) != comparable(one)


def test_parts_of_a_batch_add_up_to_it(training: Make, accelerator: Accelerator) -> None:
    runs = [training(str(parts), accumulation=parts) for parts in (1, 4)]
    for job in runs:
        assert isinstance(job.model.dropout, nn.Dropout)
        job.model.dropout.p = 0.0
        train(job, accelerator)
    for name, value in weights(runs[0]).items():
        if name != "calls":
            torch.testing.assert_close(value, weights(runs[1])[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_saves_and_goes_on(
    training: Make, accelerator: Accelerator, kind: signal.Signals
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    expected = train(training("whole"), accelerator)
    job = training("run", call=after(6, lambda: os.kill(os.getpid(), kind)), save_every=100, evaluate_every=100)
    with pytest.raises(KeyboardInterrupt):
        train(job, accelerator)
    found = train(training("run"), accelerator, resume=True)
    assert found.resumed_at_steps == (8,)  # asked for in step 7, heard before step 8, which is then made whole
    assert found.test_loss == expected.test_loss
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def broken_in(steps: set[int], where: str) -> Callable[[nn.Module, Batch], Tensor]:
    count = 0

    def call(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal count
        logits = model(batch["x"], batch["mask"])
        if not model.training:
            return logits
        count += 1
        if count not in steps:
            return logits
        if where == "loss":
            model.get_buffer("calls").fill_(torch.nan)
            return logits * torch.nan
        logits.register_hook(lambda gradient: gradient * torch.inf)
        return logits

    return call


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    training: Make, accelerator: Accelerator, where: str
) -> None:
    job = training(call=broken_in({3, 7}, where), clip=None)
    found = train(job, accelerator)
    assert found.num_skipped_steps == 2
    assert all(value.isfinite().all() for value in weights(job).values())
    assert int(job.model.get_buffer("calls")) == found.best_step - sum(step <= found.best_step for step in (3, 7))
    causes = [(line["step"], line["cause"]) for line in events(job, "skipped")]
    assert [step for step, _ in causes] == [2, 6]
    wanted = "the loss was nan" if where == "loss" else "the gradient of tokens.weight was not finite"
    assert all(cause.startswith(wanted) for _, cause in causes)


def test_too_many_of_them_stop_it_with_the_cause(training: Make, accelerator: Accelerator) -> None:
    job = training(call=broken_in(set(range(4, 30)), "loss"), max_skipped=3)
    with pytest.raises(TrainingError, match=r"stopped after 7 of 20 .*4 of them.*loss was nan at step 7.*--lr"):
        train(job, accelerator)


def test_slow_steps_are_saved_by_the_clock(
    training: Make, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        raise Killed

    monkeypatch.setattr(train_module, "_SAVE_SECONDS", 0)
    job = training(call=after(7, kill), save_every=1000, evaluate_every=1000)
    with pytest.raises(Killed):
        train(job, accelerator)
    assert train(training(save_every=1000, evaluate_every=1000), accelerator, resume=True).resumed_at_steps == (7,)


def test_a_full_disk_keeps_the_last_good_checkpoint(
    training: Make, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(training("whole"), accelerator)
    job = training("run")
    real, count = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left for .*the last one is still there.*--resume") as caught:
        train(job, accelerator)
    assert caught.value.errno == errno.ENOSPC
    assert not list(job.folder.glob(".*"))
    monkeypatch.setattr(os, "fsync", real)
    found = train(training("run"), accelerator, resume=True)
    assert found.resumed_at_steps[0] > 0
    assert comparable(found) == comparable(expected)


def test_a_checkpoint_of_other_settings_is_refused(training: Make, accelerator: Accelerator) -> None:
    train(training(), accelerator)
    other = replace(training(), identity={"made": "otherwise", "more": 1})
    with pytest.raises(OptionError, match='made "so", now "otherwise", more null, now 1'):
        train(other, accelerator, resume=True)


@pytest.mark.parametrize("damage", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint_is_explained(training: Make, accelerator: Accelerator, damage: bytes | None) -> None:
    job = training()
    train(job, accelerator)
    path = job.folder / LAST_NAME
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    with pytest.raises(InputError, match=r"cannot be read .*--force"):
        train(training(), accelerator, resume=True)


def test_a_batch_must_fit(training: Make, accelerator: Accelerator) -> None:
    with pytest.raises(OptionError, match="a batch of 1 to 96 examples"):
        train(training(batch_size=97), accelerator)


def test_the_listener_hears_every_step(training: Make, accelerator: Accelerator) -> None:
    class Listener:
        def __init__(self) -> None:
            self.said: list[str] = []

        def start(self, step: str, total: int | None) -> None:
            self.said.append(f"{step} {total}")

        def advance(self, text: str = "") -> None:
            self.said.append(text)

        def finish(self) -> None:
            self.said.append("finished")

    listener = Listener()
    train(training(), accelerator, progress=listener)
    assert listener.said[0] == "training 20"
    assert listener.said[-1] == "finished"
    assert len(listener.said) == 22
    assert all("loss" in text and "accuracy" in text and "tokens/s" in text for text in listener.said[1:-1])


def test_bf16_trains(training: Make) -> None:
    found = train(training(steps=60), accelerator_for("bf16", "cpu"))
    assert found.test_accuracy > 0.65


def test_tensorboard_gets_the_same_figures(training: Make, accelerator: Accelerator) -> None:
    pytest.importorskip("tensorboard")
    job = training()
    train(job, accelerator, tensorboard=True)
    files: list[Path] = list((job.folder / "tensorboard").iterdir())
    assert files
    assert b"valid/score" in files[0].read_bytes()
