"""Losses, drift, blocks and budgets, each against an independent computation."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from maclin.adopt.heal import drift, unknown_id_of
from maclin.adopt.heal.blocks import block_of, converted_layers
from maclin.adopt.heal.divergence import largest, top_divergence
from maclin.adopt.heal.losses import Comparison, chosen_readout, hidden_error
from maclin.adopt.heal.settings import Budget, learning_rate
from maclin.adopt.heal.transfer import exact_output, squares
from maclin.adopt.hosts.base import AttentionCall
from maclin.core.mechanisms import mechanism
from maclin.core.reference import softmax_attention


def test_divergence_of_all_classes_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = (3 * torch.randn(7, 11) for _ in range(2))
    index = theirs.topk(11, -1).indices
    found = top_divergence(ours, theirs.log_softmax(-1).gather(-1, index), index)
    wanted = nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(found, wanted)


def test_divergence_of_few_classes_is_that_of_the_merged_ones() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.randn(5, 9) for _ in range(2))
    index = theirs.topk(3, -1).indices
    found = top_divergence(ours, theirs.log_softmax(-1).gather(-1, index), index)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    total = 0.0
    for row in range(5):
        kept = index[row].tolist()
        a = [float(p[row, i]) for i in kept] + [sum(float(p[row, i]) for i in range(9) if i not in kept)]
        b = [float(q[row, i]) for i in kept] + [sum(float(q[row, i]) for i in range(9) if i not in kept)]
        total += sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)) / 5
    assert float(found) == pytest.approx(total, rel=1e-4)
    same = top_divergence(theirs, theirs.log_softmax(-1).gather(-1, index), index)
    assert float(same) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("classes", "kept", "size"), [(11, 11, 3.0), (9, 3, 3.0), (40, 5, 60.0), (5000, 7, 3.0)])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_derivatives_of_the_divergence(classes: int, kept: int, size: float, weight: float) -> None:
    """Against autograd in float64 of the definition; some probabilities are too small for float32, some blocks cut."""
    torch.manual_seed(0)
    rows = 300
    ours, theirs = (size * torch.randn(rows, classes, dtype=torch.float64) for _ in range(2))
    index, top = largest(theirs.float(), kept)
    torch.testing.assert_close(top.double(), theirs.log_softmax(-1).gather(-1, index), atol=1e-5, rtol=1e-5)
    assert torch.equal(index, theirs.float().topk(kept, -1).indices)
    ours.requires_grad_()
    our_log, top64 = ours.log_softmax(-1).gather(-1, index), top.double()
    wanted = (top64.exp() * (top64 - our_log)).sum(-1)
    if kept < classes:
        rest, our_rest = ((1.0 - x.exp().sum(-1)).clamp_min(1e-6) for x in (top64, our_log))
        wanted = wanted + rest * (rest.log() - our_rest.log())
    (of_wanted,) = torch.autograd.grad(weight * wanted.mean(), ours)
    single = ours.detach().float().requires_grad_()
    found = top_divergence(single, top, index)
    (of_found,) = torch.autograd.grad(weight * found, single)
    torch.testing.assert_close(found.double(), wanted.mean(), rtol=1e-4, atol=1e-6)
    assert float((of_found - of_wanted).norm()) < 1e-3 * float(of_wanted.norm())
    half = single.detach().bfloat16().requires_grad_()
    assert torch.autograd.grad(top_divergence(half, top, index), half)[0].dtype == torch.bfloat16


def test_hidden_errors_leave_padding_out() -> None:
    torch.manual_seed(0)
    theirs, ours = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    a, b = ours[mask], theirs[mask]
    wanted = (a - b).square().sum() / (b - b.mean(0)).square().sum()
    torch.testing.assert_close(hidden_error(ours, theirs, mask), wanted)
    ours[~mask] = 1e6
    torch.testing.assert_close(hidden_error(ours, theirs, mask), wanted)


def test_what_is_compared_follows_from_the_output() -> None:
    hidden, text = torch.zeros(2, 4, 3), {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    assert chosen_readout(SimpleNamespace(logits=torch.zeros(2, 4, 9)), text) == "logits"
    assert chosen_readout(SimpleNamespace(last_hidden_state=hidden), text) == "embedding"
    assert (
        chosen_readout(SimpleNamespace(last_hidden_state=hidden), {"pixel_values": torch.zeros(2, 3, 8, 8)}) == "tokens"
    )
    assert chosen_readout(hidden, torch.zeros(2, 4, 3)) == "tokens"
    assert chosen_readout((torch.zeros(2, 5),), torch.zeros(2, 4)) == "none"
    assert Comparison("logits", 4).measure == "KL divergence"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_exact_output_is_the_oracle_s(is_causal: bool, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 4, dtype=torch.float64) for heads in (4, 2, 2))
    mask = None
    if masked:
        mask = torch.ones(2, 7, dtype=torch.bool)
        mask[0, 5:] = False
    call = AttentionCall("x", q, k, v, mask, is_causal, None)
    wanted = softmax_attention(q, k, v, key_mask=mask, is_causal=is_causal)
    torch.testing.assert_close(exact_output(call), wanted)
    off, size = squares(mechanism("softmax", head_dim=4, num_heads=4, num_kv_heads=2), call)
    assert float(off.max()) < 1e-10
    rows = torch.ones(2, 7, dtype=torch.bool) if mask is None else mask
    expected = (wanted * rows[:, None, :, None]).square().sum((0, 2, 3))
    torch.testing.assert_close(size.double(), expected, rtol=1e-5, atol=1e-6)


def ids(*rows: list[int]) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.tensor(rows), "attention_mask": torch.ones(len(rows), len(rows[0]), dtype=torch.long)}]


def test_drift_of_like_and_unlike_text() -> None:
    torch.manual_seed(0)
    draw = torch.distributions.Categorical(torch.arange(1.0, 30.0).flip(0))
    english, more = (ids(*[[100, *(int(x) for x in draw.sample((60,))), 101] for _ in range(20)]) for _ in range(2))
    other = ids(*[[100, *(40 + int(x) for x in draw.sample((60,))), 101] for _ in range(20)])
    alike, unlike = drift(english, more), drift(english, other)
    assert alike is not None
    assert unlike is not None
    assert alike.warnings == ()
    assert alike.distance is not None
    assert alike.distance < 0.1
    assert unlike.unseen_share == 1.0
    assert unlike.distance == pytest.approx(1.0)
    assert "100% of the held-out tokens" in unlike.warnings[0]


def test_drift_by_its_formula_and_unknown_ids() -> None:
    found = drift(ids([9, 1, 1, 2, 8], [9, 3, 3, 2, 8]), ids([9, 1, 2, 4, 8]), unknown_id=3)
    assert found is not None
    p, q = {1: 2 / 4, 3: 2 / 4}, {1: 1 / 2, 4: 1 / 2}  # what stands in every sequence is left out
    both = {*p, *q}
    middle = {i: (p.get(i, 0) + q.get(i, 0)) / 2 for i in both}
    distance = sum(x[i] * math.log2(x[i] / middle[i]) / 2 for x in (p, q) for i in x)
    assert found.distance == pytest.approx(distance)
    assert found.unseen_share == pytest.approx(0.5)
    assert found.unknown_share == pytest.approx(0.5)
    assert any("unknown to the tokenizer" in warning for warning in found.warnings)
    assert drift([torch.zeros(2, 3)], [torch.zeros(2, 3)]) is None


def test_the_unknown_id_is_found_by_asking() -> None:
    def words(texts: list[str]) -> list[Any]:
        return ids(*[[101, *(7 if c == "\ua015" else ord(c) for c in text), 102] for text in texts])

    def spelled(texts: list[str]) -> list[Any]:
        return ids(*[[101, *text.encode(), 102] for text in texts])

    assert unknown_id_of(words) == 7
    assert unknown_id_of(spelled) is None


def test_blocks_are_the_innermost_elements_of_lists(patients: Any) -> None:
    for name, block in (("bert", "encoder.layer.1"), ("llama", "layers.1"), ("gpt2", "h.1")):
        root = patients.model(name, "elu")
        assert block_of(root, converted_layers(root)[1].name) == block


def test_budgets() -> None:
    both = Budget(2.0, 100)
    assert both.done(50, 60.0, 60.0) == 0.5
    assert both.done(0, 90.0, 60.0) == 0.5
    assert both.done(0, 130.0, 60.0) == 1.0
    assert Budget(None, 0).done(0, 0.0, 0.0) == 1.0
    assert Budget(1.0, None).transfer_over(15.0, 0.25)
    assert not Budget(None, 5).transfer_over(1e9, 0.25)
    rates = [learning_rate(i / 100, 0.1) for i in range(100)]
    assert max(rates) == pytest.approx(1.0, abs=1e-2)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 1e-2
    assert all(a >= b for a, b in pairwise(rates[10:]))
