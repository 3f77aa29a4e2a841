"""Padding on either side, batch mates and later tokens change nothing, under any mechanism."""

from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.nn import MacformerClassifier, MacformerConfig, MacformerLM, MacformerSeq2Seq, MacformerTagger

NAMES = maclin.mechanisms.names()
CAUSAL = [name for name in NAMES if maclin.mechanisms.row(name).causal]
BY_POSITION = [n for n in NAMES if any(e.startswith("left_padding") for e in maclin.mechanisms.row(n).exceptions)]
"""Mechanisms that care where keys stand, so that padding on the left is no cropping."""


def config(mechanism: Any = "macformer", **options: Any) -> MacformerConfig:
    return MacformerConfig(
        **{
            "vocab_size": 20,
            "embed_dim": 16,
            "ff_dim": 24,
            "max_length": 24,
            "num_outputs": 3,
            "mechanism": mechanism,
            "dropout": 0.0,
            **options,
        }
    )


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 20, shape)


def padded(x: Tensor, left: bool, width: int = 5) -> tuple[Tensor, Tensor]:
    """x with other tokens on one side, and the mask that tells them apart."""
    other = ids(len(x), width)
    mask = torch.cat(
        [torch.zeros_like(other), torch.ones_like(x)] if left else [torch.ones_like(x), torch.zeros_like(other)], 1
    )
    return torch.cat([other, x] if left else [x, other], 1), mask.bool()


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "none"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_changes_no_class(position: str, pooling: str) -> None:
    model = MacformerClassifier(config("efficient", position=position, pooling=pooling)).eval()
    x = ids(2, 9)
    for left in (True, False):
        torch.testing.assert_close(model(*padded(x, left)).logits, model(x).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_class_under_any_mechanism(name: str) -> None:
    model = MacformerClassifier(config(name)).double().eval()
    x = ids(2, 9)
    for left in (False,) if name in BY_POSITION else (False, True):
        torch.testing.assert_close(model(*padded(x, left)).logits, model(x).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "window", "macformer", "favor"])
def test_rotary_positions_do_not_feel_padding(name: str) -> None:
    encoder, model = (
        MacformerTagger(config(name, position="rotary")).eval(),
        MacformerLM(config(name, position="rotary")).eval(),
    )
    x = ids(2, 9)
    moved, mask = padded(x, left=True)
    for made in (encoder, model):
        torch.testing.assert_close(made(moved, mask).logits[:, 5:], made(x).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model_neither_feels_padding_nor_sees_the_future(name: str) -> None:
    model = MacformerLM(config(name)).eval()
    x = ids(2, 9)
    wanted = model(x).logits
    for left in (True, False):
        moved, mask = padded(x, left)
        got = model(moved, mask).logits
        torch.testing.assert_close(got[:, 5:] if left else got[:, :9], wanted, rtol=0, atol=1e-5)
    later = x.clone()
    later[:, 6:] = ids(2, 3)
    torch.testing.assert_close(model(later).logits[:, :6], wanted[:, :6], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in ("window", "hybrid")])
def test_an_encoder_decoder_neither_feels_padding_nor_sees_the_future(name: str) -> None:
    model = MacformerSeq2Seq(config(name)).eval()
    source, target = ids(2, 9), ids(2, 7)
    wanted = model(source, target).logits
    (more, mask), (longer, target_mask) = padded(source, left=False), padded(target, left=False)
    torch.testing.assert_close(model(more, longer, mask, target_mask).logits[:, :7], wanted, rtol=0, atol=1e-5)
    later = target.clone()
    later[:, 5:] = ids(2, 2)
    torch.testing.assert_close(model(source, later).logits[:, :5], wanted[:, :5], rtol=0, atol=1e-6)
    assert not torch.allclose(model(ids(2, 9), target).logits, wanted, atol=1e-4), "the source is looked at"


@pytest.mark.parametrize("name", NAMES)
def test_batch_mates_change_nothing(name: str) -> None:
    model = MacformerClassifier(config(name, pooling="cls")).double().eval()
    x, mask = padded(ids(3, 9), left=False)
    mask[1, 6:] = False
    together = model(x, mask).logits
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1], mask[i : i + 1]).logits[0], together[i], rtol=0, atol=1e-9)
