"""Mechanisms that learn from data do so from the first batch, before the first step, and again when resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maclin.arena import ArenaJob, run, runs
from maclin.arena.task import Task
from maclin.core.errors import InputError
from maclin.nn import MacformerClassifier
from maclin.records import ArenaRun

SHORT = {"steps": 6, "batch_size": 16, "lr": 0.01, "save_every": 2, "evaluate_every": 3}


@pytest.fixture
def job(tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ArenaJob]:
    monkeypatch.setattr(runs.tasks, "task", lambda name, **options: task, raising=False)

    def make(**changes: Any) -> ArenaJob:
        given = {
            "mechanisms": "macformer",
            "baselines": False,
            "num_seeds": 1,
            "costs": False,
            "train": SHORT,
            "model": {"width": 16, "num_layers": 1, "num_heads": 2, "feedforward": 16},
            "device": "cpu",
        }
        return ArenaJob("counting", **{"out": tmp_path / "out", **given, **changes})

    return make


def model_of(job: ArenaJob) -> MacformerClassifier:
    return MacformerClassifier.from_pretrained(job.folder / "macformer" / "seed-0" / "model")


def test_features_come_from_the_first_batch(job: Callable[..., ArenaJob]) -> None:
    plain = job(out=job().out / "plain", train={**SHORT, "calibrate": False})
    assert [row.reason for row in (*run(plain).runs, *run(job()).runs)] == [None, None]
    built, calibrated = (next(model_of(which).attentions())[1].mechanism for which in (plain, job()))
    assert built.config["counts"] is None
    assert calibrated.config["counts"] is not None
    assert calibrated.config["centred"]


def test_a_killed_training_that_was_calibrated_ends_the_same(
    job: Callable[..., ArenaJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = job(out=job().out / "whole"), job(out=job().out / "cut")
    score = run(whole).runs[0].scores
    original = runs.train

    def stopped(*arguments: Any, **options: Any) -> Any:
        arguments[0].splits.train[0]  # as after a few steps, the process is gone
        calls = iter(range(4))
        objective = arguments[0].objective

        def dying(model: Any, batch: Any) -> Any:
            if next(calls, None) is None:
                raise SystemExit(9)
            return original_call(model, batch)

        original_call = objective.call
        object.__setattr__(objective, "call", dying)
        return original(*arguments, **options)

    monkeypatch.setattr(runs, "train", stopped)
    with pytest.raises(SystemExit):
        run(cut)
    monkeypatch.setattr(runs, "train", original)
    again: ArenaRun = run(job(out=cut.out, resume=True)).runs[0]
    assert again.resumed_at_steps
    assert again.scores == score
    for name, value in model_of(whole).state_dict().items():
        torch.testing.assert_close(model_of(cut).state_dict()[name], value, rtol=0, atol=0)


def test_a_batch_that_is_too_small_is_a_reason(job: Callable[..., ArenaJob], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise InputError("wanted more tokens")

    monkeypatch.setattr(runs, "calibrated_", refused)
    (row,) = run(job()).runs
    assert row.score is None
    assert row.reason == "wanted more tokens. Pass --no-calibrate to train it as it is built"
