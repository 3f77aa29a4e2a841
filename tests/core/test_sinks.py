"""The first attended keys, which every query may see: found, kept, and weighed once."""

import pytest
import torch

import maclin
from maclin.core.errors import OptionError
from maclin.core.sinks import sinks_of

SIZES = {"head_dim": 8, "num_heads": 4, "num_kv_heads": 2}


def drawn(n, s, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, h, t, 8, generator=generator, dtype=torch.float64) for h, t in ((4, n), (2, s), (2, s)))
    mask = torch.rand(3, s, generator=generator) > 0.3
    mask[1, : s // 2] = False  # padding on the left
    mask[2, 3:] = False  # fewer than there are to be
    return q, k, v, mask


def test_sinks_are_the_first_attended_keys_whatever_the_pieces():
    _, k, v, mask = drawn(5, 40)
    whole, rest = sinks_of(k, v, mask, 4)
    past, masks = None, []
    for a, b in ((0, 1), (1, 2), (2, 2), (2, 25), (25, 40)):
        sinks, left = sinks_of(k[:, :, a:b], v[:, :, a:b], mask[:, a:b], 4, past)
        past = sinks.state
        masks.append(left)
    assert torch.equal(torch.cat(masks, 1), rest)
    for x, y in zip(past, whole.state, strict=True):
        assert torch.equal(x, y)
    for row in range(3):
        first = mask[row].nonzero()[:4, 0]
        assert torch.equal(whole.position[row][whole.mask[row]], first)
        assert torch.equal(whole.k[row, :, : len(first)], k[row, :, first])
        assert not bool(whole.k[row, :, len(first) :].any())


@pytest.mark.parametrize(("n", "s"), [(150, 150), (30, 170), (170, 40), (1, 60)])
@pytest.mark.parametrize("sinks", [1, 6])
def test_a_window_with_sinks_is_softmax_over_both(n, s, sinks):
    q, k, v, mask = drawn(n, s)
    mech = maclin.mechanism("window", **SIZES, window=5, sinks=sinks).double()
    apart = torch.arange(s)[None] - torch.arange(n)[:, None] - (s - n)
    logits = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    for causal in (False, True) if n <= s else (False,):
        allowed = (apart.abs() <= 5) | (mask & (mask.cumsum(-1) <= sinks))[:, None, None]
        allowed = allowed & mask[:, None, None] & ((apart <= 0) | (not causal))
        weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
        got = mech(q, k, v, key_mask=mask, is_causal=causal)
        torch.testing.assert_close(got, weights @ v.repeat_interleave(2, 1), rtol=1e-9, atol=1e-11)


def test_a_negative_number_is_refused():
    for name in ("window", "hybrid"):
        with pytest.raises(OptionError, match="sinks is -1"):
            maclin.mechanism(name, **SIZES, sinks=-1)
