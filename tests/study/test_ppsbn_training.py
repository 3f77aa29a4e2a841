"""The task of the study of ppSBN, and what is measured of a training run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from maclin.core.errors import InputError
from maclin.core.mechanisms import Mechanism, mechanism
from maclin.core.mechanisms.mean import Mean
from maclin.core.norms import BatchStatistics
from maclin.study import source_text
from maclin.study.ppsbn import training as ppsbn_training
from maclin.study.ppsbn.training import SHIFTS, own_accuracies, scaled, shifted_accuracies, training_run
from maclin.study.ppsbn.variants import build
from maclin.study.source_text import PACKAGES, SourceTask, prose, source_task
from maclin.study.tiny import Examples, Task, TinyClassifier, evaluate

SOURCE = '''"""Module words."""
import os  # a remark


class C:
    """Class words."""

    text = "no docstring"

    def f(self):
        """Function words."""
        return "neither"
'''


def test_prose_is_docstrings_and_comments_only() -> None:
    assert sorted(prose(SOURCE).split("\n")) == ["Class words.", "Function words.", "Module words.", "a remark"]


def test_examples_are_balanced_and_held_out_ones_come_from_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def sources(package: str) -> list[str]:
        return [f'"""prose {package} {i}"""\n' + f"[{i}]\n" * 40 for i in range(6)]

    monkeypatch.setattr(source_text, "sources", sources)
    monkeypatch.setattr(source_text, "_ids", lambda text, vocab: torch.tensor([ord(c) for c in text]))
    found = source_task(8, 60, 24)
    assert found.task.train.labels.bincount().tolist() == [10] * len(PACKAGES)
    assert found.task.majority_accuracy == pytest.approx(1 / len(PACKAGES))
    digits = [
        {chr(i) for i in part.ids.flatten().tolist()} & set("012345") for part in (found.task.train, found.longer)
    ]
    assert digits == [set("0134"), set("25")]
    assert found.task.train.ids.shape == (60, 8)
    assert found.longer.ids.shape == (24, 16)
    assert "prose" in "".join(map(chr, found.prose.ids.flatten().tolist()))


def test_the_task_is_the_same_every_time_and_real() -> None:
    first, second = (source_task(8, 12, 12, seed=0) for _ in range(2))
    assert torch.equal(first.task.train.ids, second.task.train.ids)
    assert len(first.task.train.ids.unique()) > 30
    with pytest.raises(InputError, match="shorter"):
        source_task(10**6, 12, 12)


def pattern_task(number: int = 64, length: int = 8) -> SourceTask:
    """Label 1 where id 1 is among the first two: learned at once."""
    generator = torch.Generator().manual_seed(0)

    def examples(width: int) -> Examples:
        ids = torch.randint(2, 10, (number, width), generator=generator)
        labels = torch.arange(number) % 2
        ids[:, :2] = torch.where(labels[:, None] == 1, 1, ids[:, :2])
        return Examples(ids, labels)

    task = Task("pattern", "", ("0", "1"), 10, examples(length), examples(length))
    return SourceTask(task, examples(2 * length), examples(length))


def trained(name: str, **changes: Any) -> dict[str, Any]:
    settings = {
        "width": 8,
        "num_heads": 2,
        "num_layers": 1,
        "num_examples": 256,
        "batch_size": 8,
        "lr": 0.02,
        "seed": 0,
    }
    return training_run(pattern_task(), lambda _: build(name, "published", 4, 2, 16), **{**settings, **changes})


def test_a_run_learns_and_says_how_steadily() -> None:
    found = trained("ppSBN, batch")
    assert found["accuracy"] > 0.9
    assert not found["failed"]
    assert (found["num_steps"], len(found["losses"])) == (32, 20)
    assert found["final_loss"] < 0.3 < found["losses"][0] < found["worst_loss"]
    assert found["gradient_spike"] >= found["gradient_p99"] >= 1
    assert {name for name in SHIFTS if found[name] is None} == set()
    assert found["own_statistics_64"] > 0.9
    assert found == {**trained("ppSBN, batch"), "seconds": found["seconds"]}


def test_a_run_that_learns_nothing_has_failed() -> None:
    assert trained("softmax", lr=1e-9)["failed"]


class _Broken(Mean):
    """Gives NaN."""

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        return super()._bidirectional(q, k, v, key_mask, scale) * torch.nan


def test_a_run_with_a_step_that_is_not_finite_has_failed_and_has_no_accuracies() -> None:
    found = training_run(
        pattern_task(),
        lambda _: _Broken(4, 2),
        width=8,
        num_heads=2,
        num_layers=1,
        num_examples=16,
        batch_size=4,
        lr=1e-3,
        seed=0,
    )
    assert found["failed"]
    assert found["num_nonfinite_steps"] == 1
    assert [found[name] for name in ("accuracy", "final_loss", "worst_loss", *SHIFTS)] == [None] * (3 + len(SHIFTS))
    json.dumps(found, allow_nan=False)


def classifier(name: str) -> TinyClassifier:
    def factory(_: int) -> Mechanism:
        if name == "softmax":
            return mechanism("softmax", head_dim=4, num_heads=2)
        return build(name, "published", 4, 2, 16)

    return TinyClassifier(10, 8, 2, 1, 16, 2, factory, seed=1)


def test_scaled_multiplies_q_and_k_and_nothing_else() -> None:
    model = classifier("softmax")
    torch.nn.init.normal_(model.tokens.weight, generator=torch.Generator().manual_seed(0))
    ids = pattern_task().task.held_out.ids
    attention: Any = model.layers[0].attention  # pyright: ignore[reportAttributeAccessIssue]
    changed = scaled(model, 3.0)(ids)
    inner = attention.mechanism.forward
    attention.mechanism.forward = lambda q, k, v, **rest: inner(q, k, v, scale=9 / math.sqrt(4), **rest)
    torch.testing.assert_close(changed, model(ids))
    attention.mechanism.forward = inner
    assert not torch.allclose(changed, model(ids), atol=1e-4)


def test_token_statistics_do_not_see_longer_q_and_k_and_the_raw_ones_do() -> None:
    ids = pattern_task().task.held_out.ids
    for name, seen in (("pre only, token", False), ("neither", True)):
        model = classifier(name)
        torch.nn.init.normal_(model.tokens.weight, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(model(ids), scaled(model, 3.0)(ids), atol=1e-4) is not seen


def test_shifts_are_taken_on_the_examples_that_they_name() -> None:
    model, data = classifier("softmax"), pattern_task()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = shifted_accuracies(model, data, seed=0)
    held_out = data.task.held_out
    assert found["longer"] == evaluate(model, data.longer)["accuracy"]
    assert found["prose"] == evaluate(model, data.prose)["accuracy"]
    assert found["shorter"] == evaluate(model, Examples(held_out.ids[:, :2], held_out.labels))["accuracy"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_fifth_of_the_words_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Examples] = []

    def record(model: TinyClassifier, examples: Examples) -> dict[str, float]:
        seen.append(examples)
        return {"accuracy": 0.0}

    monkeypatch.setattr(ppsbn_training, "evaluate", record)
    data = pattern_task(512)
    shifted_accuracies(classifier("softmax"), data, seed=0)
    changed = (seen[list(SHIFTS).index("replaced")].ids != data.task.held_out.ids).double().mean().item()
    assert changed == pytest.approx(0.2 * 0.9, abs=0.02)  # a tenth of the random ids is what was there


def test_spikes_are_over_the_median_and_steps_that_are_not_finite_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = [1.0, 8.0, 2.0, 4.0, math.inf]

    def stand_in(model: TinyClassifier, *args: Any, on_step: Any, **rest: Any) -> dict[str, Any]:
        for step, norm in enumerate(norms):
            model.answer.bias.grad = torch.tensor([norm, 0.0])
            on_step(step, 0.1)
        losses = [0.1] * len(norms)
        return {
            "losses": losses,
            "accuracy": 1.0,
            "held_out_loss": 0.1,
            "num_steps": 5,
            "diverged_at_step": None,
            "seconds": 0.0,
        }

    monkeypatch.setattr(ppsbn_training, "train", stand_in)
    found = trained("softmax")
    assert found["gradient_spike"] == pytest.approx(8 / 3)
    assert (found["num_nonfinite_steps"], found["failed"], found["final_loss"]) == (1, True, None)


def test_own_statistics_are_those_of_the_batch_and_leave_the_running_ones() -> None:
    model = classifier("ppSBN, batch")
    torch.nn.init.normal_(model.tokens.weight, generator=torch.Generator().manual_seed(0))
    examples = pattern_task().task.held_out  # 64 of them: one batch
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = own_accuracies(model, examples)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    statistics = [module for module in model.modules() if isinstance(module, BatchStatistics)]
    for module in statistics:
        module.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(examples.ids)
    assert found["own_statistics_64"] == evaluate(model, examples)["accuracy"]
    assert own_accuracies(classifier("neither"), examples) == {"own_statistics_64": None, "own_statistics_2": None}
