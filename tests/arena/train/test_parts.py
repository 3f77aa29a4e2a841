"""The parts of the trainer: schedules, order of the examples, objectives, settings, costs."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maclin.arena.costs import UNFUSED, random_batch, step_costs
from maclin.arena.models import build_model, objective_of, test_scores, translated
from maclin.arena.objective import Objective, num_judged, num_tokens, targets
from maclin.arena.schedule import Order
from maclin.arena.settings import ModelSettings, TrainSettings, recipe
from maclin.arena.specs import folder_of, specs_of, task_label
from maclin.arena.task import NOT_JUDGED, Example, Field, Kind, Preset, Splits, Task, collate
from maclin.arena.tasks import TASKS
from maclin.bench.specs import parse_spec
from maclin.core.errors import CapabilityError, OptionError
from maclin.nn import MacformerSeq2Seq
from maclin.progress import Progress
from maclin.training.checkpoint import load_checkpoint, save_checkpoint, write_result
from maclin.training.schedule import SCHEDULES, Schedule, mixed_seed, rate

test_scores.__test__ = False  # type: ignore[attr-defined]  # no test, despite its name
SMALL = ModelSettings(num_layers=1, width=8, feedforward=8, num_heads=2, dropout=0.0)


class Any(Task):
    """A task of any kind, whose examples are not needed."""

    name = "any"
    summary = "of any kind"
    kind: Kind = "classify"  # type: ignore[misc]
    field = Field("tokens", vocab_size=7)
    num_classes = 7
    presets: ClassVar = {"quick": Preset(6, 1, 1, 1)}

    def __init__(self, kind: Kind = "classify", causal: bool = False) -> None:
        self.kind, self.causal = kind, causal  # type: ignore[misc]

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        raise NotImplementedError

    def decode(self, ids: np.ndarray) -> str:
        return "".join("_abc<>d"[i] for i in ids.tolist() if i not in (0, 4, 5))


def example(kind: Kind, length: int = 5) -> Example:
    x = np.arange(length) % 3 + 1
    if kind == "match":
        return {"x1": x, "x2": x[:2], "y": 1}
    if kind == "tag":
        return {"x": x, "y": np.where(np.arange(length) % 2 == 0, x, NOT_JUDGED)}
    if kind == "translate":
        return {"source": x, "target": np.array([4, *x, 5])}
    return {"x": x, "y": 2} if kind == "classify" else {"x": x}


KINDS: tuple[tuple[Kind, bool], ...] = (
    ("classify", False), ("match", False), ("tag", False), ("tag", True), ("language", True), ("translate", False)
)  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_rise_to_one_and_fall(schedule: Schedule) -> None:
    rates = [rate(step, 100, schedule, 0.2) for step in range(100)]
    assert max(rates) == pytest.approx(1.0)
    assert all(0 <= value <= 1 for value in rates)
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    last = {"linear": 1 / 80, "cosine": 0.5 * (1 + math.cos(math.pi * 79 / 80)), "one_cycle": 4e-6, "constant": 1.0}
    assert rates[-1] == pytest.approx(last[schedule])
    first = 1 / 25 if schedule == "one_cycle" else 1 / 20
    assert rates[0] == pytest.approx(first)
    assert rate(0, 1, schedule, 0.0) > 0


def test_one_cycle_is_that_of_torch() -> None:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 1.0, total_steps=50, pct_start=0.3, cycle_momentum=False, div_factor=25, final_div_factor=1e4
    )
    for step in range(50):  # torch has its peak one step before pct_start of them
        assert rate(step, 50, "one_cycle", 14 / 50) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        optimiser.step()
        theirs.step()


def test_every_epoch_sees_every_example_once_in_a_new_order() -> None:
    order = Order(21, 5, seed=3)
    epochs = [[i for step in range(4) for i in order.batch(4 * epoch + step)] for epoch in range(3)]
    for seen in epochs:
        assert len(set(seen)) == 20  # the last one does not fill a batch
    assert epochs[0] != epochs[1]
    assert Order(21, 5, 3).batch(9) == order.batch(9)  # wherever one begins
    assert Order(21, 5, 4).batch(9) != order.batch(9)
    counts = Counter(i for epoch in range(200) for step in range(4) for i in order.batch(4 * epoch + step))
    assert len(counts) == 21  # which one is left out changes


def test_mixed_seeds_differ() -> None:
    seeds = {mixed_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(1, 2) != mixed_seed(2, 1)


@pytest.mark.parametrize(("kind", "causal"), KINDS)
def test_the_loss_is_the_cross_entropy_of_what_is_judged(kind: Kind, causal: bool) -> None:
    task = Any(kind, causal)
    examples = [example(kind, 5), example(kind, 3)]
    batch = collate(task, examples)
    model = build_model(task, parse_spec("softmax"), SMALL, 7, 0).eval()
    objective = objective_of(task)
    outcome = objective(model, batch)
    # one by one, position by position, by hand
    total, correct, judged = 0.0, 0, 0
    for single in examples:
        alone = collate(task, [single])
        logits = objective.call(model, alone)[0]
        rows = logits if logits.dim() == 2 else logits[None]
        if kind == "language":
            wanted = list(np.asarray(single["x"])[1:])
        elif kind == "translate":
            wanted = list(np.asarray(single["target"])[1:])
        else:
            wanted = list(np.atleast_1d(single["y"]))
        for row, label in zip(rows, wanted, strict=False):
            if label == NOT_JUDGED:
                continue
            total += -float(torch.log_softmax(row.detach().double(), -1)[int(label)])
            correct += int(row.argmax() == label)
            judged += 1
    assert outcome.loss.item() == pytest.approx(total, rel=1e-4)
    assert int(outcome.num_correct) == correct
    assert num_judged(kind, batch) == judged
    assert num_tokens(batch) == sum(
        len(np.asarray(value)) for single in examples for key, value in single.items() if key not in ("y",)
    )
    outcome.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["macformer", "efficient", "elu", "favor", "rfa", "taylor", "window", "mean"])
@pytest.mark.parametrize(("kind", "causal"), [("tag", True), ("classify", False)])
def test_a_step_of_every_kind_of_mechanism_is_finite_in_bf16(name: str, kind: Kind, causal: bool) -> None:
    task = Any(kind, causal)
    model = build_model(task, parse_spec(name), SMALL, 7, 0)
    batch = collate(task, [example(kind, 5), example(kind, 3)])
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective_of(task)(model, batch).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_mechanism_without_a_causal_form_says_so() -> None:
    with pytest.raises(CapabilityError, match="linformer"):
        build_model(Any("language", True), parse_spec("linformer"), SMALL, 7, 0)


def test_a_translation_is_scored_against_the_references() -> None:
    task = Any("translate")
    model = build_model(task, parse_spec("softmax"), SMALL, 12, 0)
    assert isinstance(model, MacformerSeq2Seq)
    split = [example("translate", n) for n in (3, 4, 5)]
    outputs, references = translated(task, model, split, 2)
    assert references == ["abc", "abca", "abcab"]
    assert len(outputs) == 3
    scores = test_scores(task, model, split, 2.0, 0.5, 2)
    assert scores["perplexity"] == pytest.approx(math.exp(2.0))
    assert 0 <= (scores["bleu"] or 0) <= 100
    assert 0 <= (scores["chrf"] or 0) <= 100


@pytest.mark.parametrize(("kind", "causal"), KINDS)
def test_costs_have_a_row_for_every_mechanism(kind: Kind, causal: bool) -> None:
    task = Any(kind, causal)
    batch = random_batch(task, 6, 2)
    assert all(bool((targets(kind, batch) >= 0).all()) for _ in range(2))

    def build(name: str) -> nn.Module:
        return build_model(task, parse_spec(name), SMALL, 6, 0)

    names = ["softmax", "elu"] + ["linformer"] * causal
    models = {name: (lambda name=name: build(name)) for name in names}
    costs = {cost.label: cost for cost in step_costs(models, objective_of(task), 6, batch_size=2, seconds_per_model=0)}
    assert list(costs) == ["softmax", UNFUSED, *names[1:]]
    for label, cost in costs.items():
        if label == "linformer":
            assert "causal" in (cost.reason or "")
            assert cost.latency_ms is None
        else:
            assert (cost.latency_ms or 0) > 0
            assert cost.num_runs >= 3


def test_memory_of_unfused_softmax_grows_with_the_square_of_the_length() -> None:
    task = Any()

    def peaks(length: int) -> dict[str, int]:
        models = {
            name: (lambda name=name: build_model(task, parse_spec(name), SMALL, length, 0))
            for name in ("softmax", "elu")
        }
        costs = step_costs(models, objective_of(task), length, batch_size=1, seconds_per_model=0)
        return {cost.label: cost.peak_bytes or 0 for cost in costs}

    short, long = peaks(128), peaks(512)
    assert long[UNFUSED] > 10 * short[UNFUSED]
    assert long["elu"] < 5 * short["elu"]
    assert long["softmax"] < long[UNFUSED] / 4


def test_what_does_not_fit_in_memory_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maclin.arena.costs.free_bytes", lambda device: 1000)
    models = {"softmax": lambda: build_model(Any(), parse_spec("softmax"), SMALL, 16, 0)}
    costs = step_costs(models, objective_of(Any()), 16, seconds_per_model=0)
    assert costs[0].latency_ms is not None
    assert costs[1].latency_ms is None
    assert "GiB" in (costs[1].reason or "")


def test_every_task_has_a_recipe() -> None:
    for name in TASKS:
        quick, standard, paper = (recipe(name, preset) for preset in ("quick", "standard", "paper"))
        assert quick.train.steps < standard.train.steps < paper.train.steps
        assert (standard.model.num_layers, standard.model.width, standard.model.feedforward) == (2, 64, 128)
        assert standard.model.head_dim == 32
        # what stands a few tokens away is not found with learned positions within "quick"
        rotary = name in ("recall", "language", "translation", "audio")
        assert quick.model.position == ("rotary" if rotary else "learned")


def test_labels_are_directories() -> None:
    specs = specs_of("macformer:num_features=64:kernel=inv,elu", baselines=False)
    assert [folder_of(spec.text) for spec in specs] == ["macformer-num-features-64-kernel-inv", "elu"]


def test_a_task_is_called_by_what_makes_it_another() -> None:
    assert task_label("text", {}) == "text"
    assert task_label("text", {"data": "brown", "length": 9}) == "text:data=brown:length=9"
    own = {"data": "/some/where/letters.csv", "text_column": "body", "label_column": "kind"}
    assert task_label("csv", own) == "csv:letters"


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("lr", 0.0), ("clip", -1.0), ("warm_up", 1.0), ("weight_decay", -1.0), ("evaluate_every", 0)],
)
def test_wrong_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"wanted .*{field}"):
        TrainSettings(**{field: value})  # type: ignore[arg-type]


def test_a_failing_disk_is_said_with_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").write_bytes(b"")
    with pytest.raises(OSError, match=r"could not be written .*; there is none yet"):
        write_result(tmp_path / "a file" / "below", b"three")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    write_result(tmp_path / "last", b"one")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"no space left .* needs 3 bytes; the last one is still there: free some"
    ) as told:
        write_result(tmp_path / "last", b"two")
    assert told.value.errno == 28
    assert (tmp_path / "last").read_bytes() == b"one"


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    state: dict[str, object] = {"step": 3, "weights": {"a": torch.arange(3.0)}, "looks": [{"loss": None, "step": 1}]}
    save_checkpoint(path, state, {"seed": 0, "sizes": [1, 2]})
    found = load_checkpoint(path, {"sizes": (1, 2), "seed": 0})
    assert torch.equal(found.pop("weights")["a"], torch.arange(3.0))
    assert found == {"step": 3, "looks": [{"loss": None, "step": 1}]}
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt", {})


def test_padding_to_a_length_changes_nothing() -> None:
    task = Any()
    model = build_model(task, parse_spec("elu"), SMALL, 12, 0).eval()
    examples = [example("classify", 5), example("classify", 3)]
    tight, padded = Objective(task, objective_of(task).call), Objective(task, objective_of(task).call, length=12)
    one, two = (objective(model, objective.collate(examples)).loss for objective in (tight, padded))
    assert one.item() == pytest.approx(two.item(), abs=1e-5)


def test_targets_of_padding_are_not_judged() -> None:
    batch = collate(Any("language", True), [example("language", 5), example("language", 2)])
    found: Tensor = targets("language", batch)
    assert found.tolist() == [[2, 3, 1, 2], [2, NOT_JUDGED, NOT_JUDGED, NOT_JUDGED]]
    logits = F.one_hot(found.clamp_min(0), 7).float()
    assert logits.shape == (2, 4, 7)
