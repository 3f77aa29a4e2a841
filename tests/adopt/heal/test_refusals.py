"""What healing refuses, in one sentence each, with the model left as it was."""

import sys
from typing import Any

import pytest
import torch

import maclin
from maclin.adopt import HealRecipe
from maclin.core.errors import InputError, OptionError

EMPTY = {"input_ids": torch.zeros(2, 0, dtype=torch.long)}
PADDING = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, OptionError, "budget_minutes=, steps="),
        ({"steps": -1}, OptionError, "at least 0"),
        ({"budget_minutes": 0.0}, OptionError, "positive"),
        ({"steps": 1, "train": "some"}, OptionError, "'all', 'low_rank', 'features'"),
        ({"steps": 1, "output": "words"}, OptionError, "'embedding'"),
        ({"steps": 1, "teacher": "other"}, OptionError, "'copy'"),
        ({"steps": 1, "layers": ["encoder.layer.7"]}, OptionError, "encoder.layer.0.attention.self"),
        ({"steps": 1, "layers": []}, OptionError, "converted layers"),
        ({"steps": 1, "batches": []}, InputError, "at least 2 batches"),
        ({"steps": 1, "batches": [EMPTY, EMPTY]}, InputError, r"batches\[0\] is empty"),
        ({"steps": 1, "batches": [PADDING, PADDING]}, InputError, "nothing but padding"),
        ({"steps": 1, "batches": {"input_ids": torch.ones(2, 3)}}, InputError, "several batches"),
        ({"steps": 1, "batches": ["words", "words"]}, InputError, "mapping of tensors"),
        ({"steps": 1, "held_out": []}, InputError, "one held out"),
        ({"steps": 1, "batches": [{"strange": torch.ones(2, 3)}] * 2}, InputError, "BertModel"),
    ],
)
def test_bad_calls(patients: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = patients.model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    options = {"batches": patients.batches(2), **options}
    with pytest.raises(error, match=message):
        maclin.heal(model, **options)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "positive finite"),
        ({"transfer_steps": -1}, "at least 0"),
        ({"patience": 0}, "at least 1"),
        ({"warm_up": 1.0}, "share"),
        ({"hidden_weight": -1.0}, "at least 0"),
        ({"transfer_inputs": "both"}, "'student'"),
        ({"features_lr": -1.0}, "features_lr"),
    ],
)
def test_bad_recipes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HealRecipe(**options)


def test_models_that_cannot_be_healed(patients: Any) -> None:
    batches = patients.batches(2)
    plain = patients.tiny.make("bert")
    with pytest.raises(InputError, match="convert_"):
        maclin.heal(plain, batches, steps=1)
    with pytest.raises(InputError, match="got list"):
        maclin.heal([], batches, steps=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="meta device"):
        maclin.heal(patients.model().to("meta"), batches, steps=1)
    checkpointed = patients.model()
    enable = getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)
    enable()
    with pytest.raises(OptionError, match="gradient_checkpointing_disable"):
        maclin.heal(checkpointed, batches, steps=1)
    with pytest.raises(OptionError, match=r"model.float\(\)"):
        maclin.heal(patients.model().bfloat16(), batches, steps=1)


def test_a_teacher_of_another_make(patients: Any) -> None:
    model, batches = patients.model(), patients.batches(2)
    with pytest.raises(InputError, match="got a DistilBertModel"):
        maclin.heal(model, batches, steps=1, teacher=patients.tiny.make("distilbert"))
    with pytest.raises(InputError, match="intermediate"):
        maclin.heal(model, batches, steps=1, teacher=patients.tiny.make("bert", intermediate_size=64))
    with pytest.raises(InputError, match="converted model itself"):
        maclin.heal(model, batches, steps=1, teacher=model)


def test_a_healed_model_is_not_its_own_original(patients: Any) -> None:
    model, batches = patients.model(), patients.batches()
    held = patients.batches(9)[6:]
    first = maclin.heal(model, batches, held, steps=8, recipe=HealRecipe(transfer_steps=0, num_looks=4, lr=1e-4))
    assert first.best_stage == "distillation"
    with pytest.raises(OptionError, match="teacher="):
        maclin.heal(model, batches, held, steps=1)
    recipe = HealRecipe(transfer_steps=0)
    again = maclin.heal(model, batches, held, steps=0, teacher=patients.tiny.make("bert"), recipe=recipe)
    assert again.error_before == pytest.approx(first.error_after, rel=1e-3)


def test_low_rank_without_peft(patients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(OptionError, match="pip install peft"):
        maclin.heal(patients.model(), patients.batches(2), steps=1, train="low_rank")


def test_without_accelerate(patients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(OptionError, match="accelerate"):
        maclin.heal(patients.model(), patients.batches(2), steps=1)


def test_an_error_in_the_metric_leaves_the_best_so_far(patients: Any) -> None:
    model, calls = patients.model(), []
    before = {name: x.clone() for name, x in model.named_parameters()}

    def metric(_: torch.nn.Module) -> float:
        calls.append(1)
        if len(calls) > 2:
            raise ArithmeticError("mine")
        return 0.0

    with pytest.raises(ArithmeticError, match="mine"):
        maclin.heal(model, patients.batches(), steps=4, metric=metric, recipe=HealRecipe(transfer_steps=6))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "maclin" not in name)
    assert all(p.requires_grad for p in model.parameters())
