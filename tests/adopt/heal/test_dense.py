"""Hybrids with all of their weights in memory give what hybrids give, gradients included."""

import pytest
import torch

from maclin.adopt.heal.dense import dense_hybrids
from maclin.core.compose.hybrid import Hybrid
from maclin.core.mechanisms import mechanism


def hybrid(linear: str, balance: str) -> Hybrid:
    generator = torch.Generator().manual_seed(1)
    made = mechanism(
        "hybrid", head_dim=8, num_heads=4, num_kv_heads=2, window=3, linear=linear, balance=balance, generator=generator
    )
    assert isinstance(made, Hybrid)
    made = made.double()
    if made.log_balance is not None:
        torch.nn.init.normal_(made.log_balance, generator=generator)
    return made


@pytest.mark.parametrize("linear", ["hedgehog", "favor"])
@pytest.mark.parametrize("balance", ["fixed", "learned"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("limit", [64, 4])
def test_the_same_numbers(linear: str, balance: str, is_causal: bool, limit: int) -> None:
    made = hybrid(linear, balance)
    torch.manual_seed(0)
    q = (2 * torch.randn(3, 4, 17, 8, dtype=torch.float64)).requires_grad_()
    k, v = (torch.randn(3, 2, 20, width, dtype=torch.float64).requires_grad_() for width in (8, 5))
    mask = torch.rand(3, 20) > 0.3
    mask[1] = False  # a sequence that may attend to nothing
    inputs = [q, k, v, *made.parameters()]
    gradients = []
    outs = []
    for dense in (False, True):
        if dense:
            with dense_hybrids(made, limit):
                out = made(q, k, v, key_mask=mask, is_causal=is_causal)
        else:
            out = made(q, k, v, key_mask=mask, is_causal=is_causal)
        assert isinstance(out, torch.Tensor)
        outs.append(out)
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    torch.testing.assert_close(outs[1], outs[0], atol=1e-12, rtol=1e-9)
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-8)
    assert not {"_bidirectional", "_causal"} & set(vars(made))


def test_others_are_left_alone() -> None:
    made = mechanism("hybrid", head_dim=8, num_heads=2, window=3, linear="taylor")
    with dense_hybrids(made):
        assert "_bidirectional" not in vars(made)
