"""What a layer means to the model's output, against converting it by hand."""

import copy
import math
from typing import Any

import pytest
import torch

import maclin
from maclin.adopt import audit, convert_, restore_
from maclin.adopt.hosts import host
from maclin.adopt.measuring.sensitivity import TOKENS, first_documents, output_changes
from maclin.core.errors import CapabilityError


def changed(tiny: Any, model: Any, batch: dict[str, torch.Tensor], layer: str) -> float:
    """Squared relative change of the hidden states of real tokens where one layer averages."""
    before = tiny.hidden(model, batch)
    other = copy.deepcopy(model)
    convert_(other, {layer: "mean"})
    return float((tiny.hidden(other, batch) - before).square().sum() / before.square().sum())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_it_is_the_change_of_the_output_by_averaging(tiny: Any, name: str) -> None:
    model, batch = tiny.make(name), tiny.batch((11, 5, 8))
    found = audit(model, [batch], mechanisms=["mean", "elu"])
    for row in found.layers:
        wanted = changed(tiny, model, batch, row.layer) / (row.uniform_rel_error or 0.0) ** 2
        assert row.sensitivity == pytest.approx(wanted, rel=1e-3)
    without = audit(model, [batch], mechanisms=["mean"], sensitivities=False)
    assert all(row.sensitivity is None for row in without.layers)
    assert len(without.warnings) == len(found.warnings)


def test_padding_on_the_left_is_left_out(tiny: Any) -> None:
    model = tiny.make("bert")
    right, left = tiny.batch((9,), "right"), tiny.batch((9,), "right")
    left = {key: torch.nn.functional.pad(x, (4, 0)) for key, x in left.items()}
    right_kept: list[Any] = []
    left_kept: list[Any] = []
    assert list(first_documents([right], right_kept)) == [right]
    list(first_documents([left], left_kept))
    assert all(torch.equal(right_kept[0][key], left_kept[0][key]) for key in right)
    layers = [layer for layer in host(model).layers() if layer.refused is None]
    assert output_changes(model, left_kept, layers) == output_changes(model, right_kept, layers)


def test_few_documents_are_looked_at() -> None:
    batches = [{"input_ids": torch.ones(4, 300, dtype=torch.long)} for _ in range(9)]
    kept: list[Any] = []
    assert len(list(first_documents(iter(batches), kept))) == 9
    assert len(kept) == math.ceil(TOKENS / 300)
    assert kept[0]["input_ids"].shape == (1, 300)
    kept.clear()
    list(first_documents([torch.zeros(9, 3, 4, 4)], kept))  # images
    assert [x.shape for x in kept] == [(1, 3, 4, 4)] * 4


def test_shares_of_heads_make_the_error_of_the_layer(tiny: Any) -> None:
    for row in audit(tiny.make("llama"), [tiny.batch()], mechanisms=["elu"]).layers:
        assert sum(row.energy_by_head) == pytest.approx(1.0)
        (error,) = row.errors
        pairs = zip(row.energy_by_head, error.rel_error_by_head, strict=True)
        assert error.rel_error == pytest.approx(math.sqrt(sum(share * e**2 for share, e in pairs)))
        assert (row.is_causal, row.calls, row.value_dim) == (True, 1, 8)


def test_a_converted_model_stays_converted(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    before = audit(model, [batch], mechanisms=["elu"])
    original = tiny.hidden(model, batch)
    convert_(model, {host(model).layers()[0].name: ("window", {"window": 2})})
    converted = tiny.hidden(model, batch)
    model.train()
    after = audit(model, [batch], mechanisms=["elu"])
    assert [row.sensitivity for row in after.layers] == [row.sensitivity for row in before.layers]
    assert model.training
    assert torch.equal(tiny.hidden(model.eval(), batch), converted)
    restore_(model)
    assert torch.equal(tiny.hidden(model, batch), original)


def test_an_output_that_cannot_be_compared_is_told(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    layers = host(model).layers()
    plain = type(model).forward

    def words(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain(self, *args, **kwargs)
        return {"text": "words", "ids": torch.ones(3, dtype=torch.long)}

    monkeypatch.setattr(type(model), "forward", words)
    with pytest.raises(CapabilityError, match="returns no tensor of numbers"):
        output_changes(model, [batch], layers)
    assert not host(model).converted
    found = audit(model, [batch], mechanisms=["elu"])
    assert found.layers[0].sensitivity is None
    assert "a plan weighs all alike: BertModel returns no tensor" in found.warnings[-1]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_each_mechanism_is_tried_in_each_layer_alone(tiny: Any, name: str) -> None:
    model, batch = tiny.make(name), tiny.batch((11, 5, 8))
    weighed: list[str] = []
    found = audit(
        model, [batch], mechanisms=["elu", "linformer", "mean"], sensitivities="each", weighing=weighed.append
    )
    assert weighed == [row.layer for _ in range(3) for row in found.layers]
    for row in found.layers:
        for error in row.errors:
            if error.rel_error is None:  # linformer has no causal form
                assert error.output_change is None
                continue
            before = tiny.hidden(model, batch)
            other = copy.deepcopy(model)
            convert_(other, {row.layer: (error.mechanism, error.config)})
            wanted = float((tiny.hidden(other, batch) - before).square().sum() / before.square().sum())
            assert error.output_change == pytest.approx(wanted, rel=1e-3)
    least = maclin.plan(found, min_layers=1, costs="operations")
    best = min(e.output_change for row in found.layers for e in row.errors if e.output_change and e.mechanism != "mean")
    assert least.rel_error == pytest.approx(math.sqrt(best))


def test_logits_are_compared_as_probabilities(tiny: Any) -> None:
    from transformers import LlamaForCausalLM

    batch = tiny.batch((11,))
    decoder = tiny.make("llama")
    model = LlamaForCausalLM(decoder.config).eval()
    model.model = decoder
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    found = audit(model, [batch], mechanisms=["elu"], sensitivities="each")
    exact = model(**batch)["logits"].detach().log_softmax(-1)
    for row in found.layers:
        other = copy.deepcopy(model)
        convert_(other, {row.layer: "elu"})
        changed_to = other(**batch)["logits"].detach().log_softmax(-1)
        (error,) = row.errors
        hellinger = (1 - (exact / 2 + changed_to / 2).exp().sum(-1)).mean()
        assert error.output_change == pytest.approx(2 * float(hellinger), rel=1e-3)
        divergence = float((exact.exp() * (exact - changed_to)).sum(-1).mean())
        assert 0.3 < (error.output_change or 0.0) / divergence < 0.7
