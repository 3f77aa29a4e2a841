"""Whole runs: every mechanism from every seed, into a directory that can be gone on with, and tables of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maclin.arena import ArenaJob, load_results, run, runs
from maclin.arena.task import Field, Task
from maclin.core.errors import CapabilityError, InputError, OptionError
from maclin.nn import MacformerClassifier
from maclin.records import ArenaRun, ArenaTaskResult

TINY = {"width": 8, "num_layers": 1, "num_heads": 2, "feedforward": 8}
SHORT = {"steps": 4, "batch_size": 8, "lr": 0.01}


@pytest.fixture
def job(tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ArenaJob]:
    monkeypatch.setattr(runs.tasks, "task", lambda name, **options: task, raising=False)

    def make(**changes: Any) -> ArenaJob:
        given = {"mechanisms": "elu", "num_seeds": 2, "costs": False, "train": SHORT, "model": TINY, "device": "cpu"}
        return ArenaJob("counting", **{"out": tmp_path / "out", **given, **changes})

    return make


def by_cell(found: ArenaTaskResult) -> dict[tuple[str, int], ArenaRun]:
    return {(row.label, row.seed): row for row in found.runs}


def without_times(row: ArenaRun) -> ArenaRun:
    looks = tuple(replace(look, seconds=0.0) for look in row.looks)
    return replace(row, seconds=None, tokens_per_second=None, looks=looks, environment=None, resumed_at_steps=())


def test_every_mechanism_is_run_from_every_seed_beside_the_baselines(job: Callable[..., ArenaJob]) -> None:
    found = run(job())
    labels = ["softmax", "mean", "window", "elu"]
    assert [(row.label, row.seed) for row in found.runs] == [(label, seed) for label in labels for seed in (0, 1)]
    for row in found.runs:
        assert row.reason is None
        assert row.score == row.scores["accuracy"]
        assert [look.step for look in row.looks] == [1, 2, 3, 4]
        assert row.environment is not None
        folder = job().folder / row.label / f"seed-{row.seed}"
        assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "model", "result.json"]
    assert found.task.notes == ("a note",)
    assert (found.task.num_train, found.task.num_valid, found.task.num_test) == (96, 32, 32)
    losses = {(row.label, row.seed): row.scores["loss"] or 0 for row in found.runs}
    for seed in (0, 1):  # the window is wider than these sequences
        assert losses.pop(("window", seed)) == pytest.approx(losses["softmax", seed], abs=1e-5)
    assert len(set(losses.values())) == 6


def test_the_model_that_is_saved_is_the_one_that_was_judged(job: Callable[..., ArenaJob], task: Task) -> None:
    found = run(job(baselines=False, num_seeds=1))
    model = MacformerClassifier.from_pretrained(job().folder / "elu" / "seed-0" / "model")
    splits = task.load("quick")
    right = 0
    for i in range(32):
        example = splits.test[i]
        x = torch.tensor(example["x"])[None]
        right += int(model(x).logits.argmax()) == example["y"]
    assert found.runs[0].score == pytest.approx(right / 32)


def test_all_mechanisms_start_from_the_same_weights_and_see_the_same_examples(job: Callable[..., ArenaJob]) -> None:
    run(job(num_seeds=1, mechanisms="elu,favor", train={**SHORT, "steps": 1, "lr": 1e-12}))
    folders = [job().folder / name / "seed-0" / "model" for name in ("softmax", "elu", "favor")]
    models = [MacformerClassifier.from_pretrained(folder) for folder in folders]
    for name, value in models[0].named_parameters():
        for other in models[1:]:
            torch.testing.assert_close(other.get_parameter(name), value, atol=1e-9, rtol=0)


def test_what_a_mechanism_cannot_do_is_a_row_with_the_reason(
    job: Callable[..., ArenaJob], task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(task), "kind", "language")
    monkeypatch.setattr(type(task), "causal", True)
    monkeypatch.setattr(type(task), "num_classes", 5)
    found = by_cell(run(job(mechanisms="linformer,elu", baselines=False, num_seeds=1)))
    assert found["linformer", 0].score is None
    assert "no causal form" in (found["linformer", 0].reason or "")
    assert found["elu", 0].score == found["elu", 0].scores["perplexity"]
    assert (found["elu", 0].score or 0) > 1


def test_an_interrupted_run_goes_on(job: Callable[..., ArenaJob], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_cell(run(job(baselines=False, out=job().out / "whole")))
    real, calls = runs.train, 0

    def once(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(runs, "train", once)
    with pytest.raises(KeyboardInterrupt):
        run(job(baselines=False))
    with pytest.raises(FileExistsError, match=r"1 of these 2 runs, elu among them; pass --resume .*--force"):
        run(job(baselines=False))
    found = by_cell(run(job(baselines=False, resume=True)))
    assert calls == 3  # what was finished was not run again
    assert {cell: without_times(row) for cell, row in found.items()} == {
        cell: without_times(row) for cell, row in expected.items()
    }


def test_more_mechanisms_join_those_that_are_there(job: Callable[..., ArenaJob]) -> None:
    run(job(baselines=False, num_seeds=1))
    found = run(job(baselines=False, num_seeds=1, mechanisms="efficient"))
    assert [row.label for row in found.runs] == ["elu", "efficient"]


def test_other_settings_do_not_mix(job: Callable[..., ArenaJob]) -> None:
    run(job(baselines=False, num_seeds=1))
    other = {"baselines": False, "num_seeds": 1, "train": {**SHORT, "lr": 0.02}}
    with pytest.raises(OptionError, match=r'"lr": 0.01.*now .*"lr": 0.02.*--force'):
        run(job(**other, mechanisms="efficient"))
    found = run(job(**other, force=True))
    assert [row.label for row in found.runs] == ["elu"]
    assert found.settings["train"]["lr"] == 0.02


def test_force_runs_the_same_again(job: Callable[..., ArenaJob]) -> None:
    first = run(job(baselines=False))
    second = run(job(baselines=False, force=True))
    assert [without_times(row) for row in first.runs] == [without_times(row) for row in second.runs]


def test_a_loss_that_is_never_finite_is_a_row_with_the_cause(job: Callable[..., ArenaJob]) -> None:
    found = run(
        job(baselines=False, num_seeds=1, train={**SHORT, "lr": 1e30, "steps": 40, "max_skipped": 2, "clip": None})
    )
    assert found.runs[0].score is None
    assert "not finite" in (found.runs[0].reason or "")


def test_costs_are_measured_side_by_side(job: Callable[..., ArenaJob], monkeypatch: pytest.MonkeyPatch) -> None:
    real = runs.measured_costs
    monkeypatch.setattr(runs, "measured_costs", lambda *a, **o: real(*a, **o, seconds_per_model=0.01))
    found = run(job(costs=True, num_seeds=1))
    assert [cost.label for cost in found.costs] == ["softmax", "softmax (unfused)", "mean", "window", "elu"]
    for cost in found.costs:
        assert cost.length == 9
        assert cost.reason is None
        assert (cost.latency_ms or 0) > 0
        assert (cost.peak_bytes or 0) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mechanisms": "nonsense"}, "unknown mechanism 'nonsense'"),
        ({"mechanisms": "macformer:no=1"}, "no option 'no'"),
        ({"mechanisms": "macformer:num_features=2"}, "num_features"),
        ({"mechanisms": ""}, "wanted mechanisms"),
        ({"num_seeds": 0}, "at least one seed"),
        ({"resume": True, "force": True}, "pass one of them"),
        ({"train": {"stepps": 3}}, "no setting 'stepps'; known are steps"),
        ({"train": {"schedule": "none"}}, "a schedule among linear"),
        ({"train": {"precision": "fp8"}}, "a precision among fp32"),
        ({"train": {"batch_size": 6, "accumulation": 4}}, "accumulation divides"),
        ({"model": {"width": 7, "num_heads": 2}}, "a width that num_heads divides"),
        ({"preset": "huge"}, "a preset of counting among quick"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_wrong_calls_say_what_to_pass_before_anything_is_written(
    job: Callable[..., ArenaJob], changes: dict[str, Any], message: str
) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(OptionError, match=message):
        run(job(**changes))
    assert not job().out.exists()


def test_kernels_are_runs_of_their_own(job: Callable[..., ArenaJob]) -> None:
    specs = job(mechanisms="macformer,elu,taylor:kernel=log", kernels=("exp", "inv"), baselines=False).specs
    texts = ["macformer:kernel=exp", "macformer:kernel=inv", "elu", "taylor:kernel=log"]
    assert [spec.text for spec in specs] == texts
    assert specs[1].options == {"kernel": "inv"}


def test_results_are_read_back(job: Callable[..., ArenaJob]) -> None:
    made = run(job(num_seeds=1))
    found = load_results(job().out)
    assert found.tasks == (made,)
    assert load_results(job().folder).tasks == (made,)
    result = job().folder / "elu" / "seed-0" / "result.json"
    result.write_text(result.read_text()[:-20])
    with pytest.raises(InputError, match=r"result\.json"):
        load_results(job().out)


def test_warnings_say_what_not_to_compare(job: Callable[..., ArenaJob]) -> None:
    run(job(num_seeds=1))
    run(job(num_seeds=2, baselines=False, resume=True))
    path = job().folder / "elu" / "seed-0" / "result.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "environment": {**row["environment"], "processor": "another"}}))
    warnings = load_results(job().out).warnings
    assert "not every seed was run for mean, softmax, window" in warnings[0]
    assert "2 machines" in warnings[1]


def test_nothing_to_show_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        load_results(tmp_path)


def test_values_have_a_front_end_of_their_own(
    job: Callable[..., ArenaJob], task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(task), "field", Field("values", channels=1))
    real = type(task)._load

    def load(self: Task, *args: Any) -> Any:
        splits = real(self, *args)
        parts: list[Any] = [splits.train, splits.valid, splits.test]
        for split in parts:
            split._x = [x[:, None].astype("float32") for x in split._x]
        return splits

    monkeypatch.setattr(type(task), "_load", load)
    found = run(job(baselines=False, num_seeds=1))
    assert found.runs[0].score is not None
    assert not isinstance(found.runs[0].reason, CapabilityError)
