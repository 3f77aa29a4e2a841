"""Dropout with cheaper random numbers drops as much as torch's, independently, and leaves the mean alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maclin.nn import MacformerClassifier, MacformerConfig
from maclin.nn.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_and_scale(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out = Dropout(p)(torch.ones(401, 499, dtype=dtype))
    kept = out != 0
    assert out.dtype == dtype
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / out.numel()) ** 0.5)
    assert out[kept].float().unique().item() == pytest.approx(
        1 / (1 - p), rel=2**-8 if dtype == torch.bfloat16 else 1e-3
    )


def test_neighbours_are_dropped_independently() -> None:
    # four elements share a draw, and neighbours must not share their fate
    torch.manual_seed(0)
    kept = (Dropout(0.3)(torch.ones(400_000)) != 0).double().view(-1, 4)
    assert torch.corrcoef(kept.T).fill_diagonal_(0).abs().max().item() < 0.015
    assert torch.corrcoef(torch.stack([kept[1:, 0], kept[:-1, 3]]))[0, 1].abs().item() < 0.015


def test_gradient_is_that_of_what_was_kept() -> None:
    x = torch.randn(7, 9, requires_grad=True)
    out = Dropout(0.4)(x)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), out.detach())
    assert x.grad.unique().tolist() == pytest.approx([0.0, 1 / 0.6], rel=1e-3)


def test_equal_seeds_drop_the_same_and_nothing_is_dropped_where_nothing_should_be() -> None:
    x, layer = torch.randn(50), Dropout(0.5)
    torch.manual_seed(3)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), first, rtol=0, atol=0)
    assert not torch.equal(first, second)
    for same in (layer.eval(), Dropout(0.0), Dropout(1e-6)):
        torch.testing.assert_close(same(x), x)
    assert Dropout(1.0)(x).abs().max() == 0
    assert Dropout(0.5)(x[:0]).shape == (0,)


def test_models_use_it_everywhere() -> None:
    model = MacformerClassifier(MacformerConfig(frontend="bytes", dropout=0.2))
    dropouts = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    assert len(dropouts) == 1 + 3 * 2
    assert all(type(part) is Dropout and part.p == 0.2 for part in dropouts)
