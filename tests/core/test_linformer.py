"""Linformer: lengths, sharing, sizes, defaults; its formulas are held by test_oracles."""

import pytest
import torch
from torch import nn

import maclin
from maclin.core.errors import CapabilityError, InputError, OptionError
from maclin.core.mechanisms.linformer import Linformer


def build(seed: int = 0, **options) -> Linformer:
    return Linformer(8, 4, 2, generator=torch.Generator().manual_seed(seed), **options)


def test_more_keys_than_it_was_built_for_are_refused(qkv):
    mech = build(seq_len=20, proj_len=5).double()
    assert mech(*qkv(30, 20)).shape == (2, 4, 30, 5)  # queries may be as many as they like
    for s in (21, 500):
        with pytest.raises(InputError, match=rf"linformer: {s} keys, but it was built for seq_len=20.*build it longer"):
            mech(*qkv(3, s))
    pooled = build(seq_len=20, proj_len=5, projection="mean-pool").double()
    with pytest.raises(InputError, match="built for seq_len=20"):
        pooled(*qkv(3, 21))


def test_a_shorter_input_uses_the_first_columns(qkv):
    q, k, v = qkv(6, 12)
    long, short = build(seq_len=20, proj_len=5).double(), build(seq_len=12, proj_len=5).double()
    with torch.no_grad():
        for name in ("E", "F"):
            short.get_parameter(name).copy_(long.get_parameter(name)[..., :12])
    torch.testing.assert_close(long(q, k, v), short(q, k, v), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("sharing", "numbers"),
    [("none", 2 * 2 * 5 * 20), ("headwise", 2 * 5 * 20), ("key-value", 5 * 20), ("layerwise", 5 * 20)],
)
def test_parameters_of_each_sharing(sharing, numbers):
    mech = build(seq_len=20, proj_len=5, sharing=sharing)
    assert sum(p.numel() for p in mech.parameters()) == numbers
    assert set(mech.state_dict()) == ({"E", "F"} if sharing in ("none", "headwise") else {"E"})


@pytest.mark.parametrize("projection", ["mean-pool", "max-pool", "conv"])
def test_pooling_has_no_parameters_and_no_limit(qkv, projection):
    mech = build(projection=projection).double()
    assert not list(mech.parameters())
    assert mech.proj_len == 128
    assert mech(*qkv(3, 700)).shape == (2, 4, 3, 5)


def test_layers_share_one_parameter():
    first = build(0, seq_len=20, proj_len=5, sharing="layerwise")
    second = build(1, seq_len=20, proj_len=5, sharing="layerwise", shared=first.E)
    assert first.E is second.E
    layers = nn.ModuleList([first, second])
    assert sum(p.numel() for p in layers.parameters()) == 5 * 20
    q, k, v = (torch.randn(1, h, 7, 8) for h in (4, 2, 2))
    second(q, k, v).sum().backward()
    grad = first.get_parameter("E").grad
    assert grad is not None
    assert float(grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs seq_len, the longest input; pass it, or projection='mean-pool'"),
        ({"seq_len": 20, "proj_len": 21}, r"proj_len is 21; wanted from 1 to seq_len \(20\)"),
        ({"seq_len": 20, "proj_len": 0}, "proj_len is 0; wanted from 1"),
        ({"seq_len": 0}, "proj_len is 1; wanted from 1 to seq_len"),
        ({"projection": "mean-pool", "proj_len": 0}, "proj_len is 0; wanted from 1"),
        ({"seq_len": 20, "sharing": "all"}, "sharing is 'all'; known are 'none', 'headwise', 'key-value', 'layerwise'"),
        ({"projection": "pool"}, "projection is 'pool'; known are 'learned', 'mean-pool', 'max-pool', 'conv'"),
        ({"seq_len": 20, "shared": nn.Parameter(torch.ones(1, 5, 20))}, "shared is for sharing='layerwise'"),
        (
            {"seq_len": 20, "proj_len": 5, "sharing": "layerwise", "shared": nn.Parameter(torch.ones(5, 20))},
            r"shared has shape \(5, 20\); wanted \(1, 5, 20\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(OptionError, match=f"linformer: .*{message}"):
        Linformer(8, 4, 2, **options)


@pytest.mark.parametrize(("seq_len", "proj_len"), [(1, 1), (3, 1), (64, 16), (512, 128), (4096, 128)])
def test_the_default_projection_is_a_quarter_and_at_most_128(seq_len, proj_len):
    assert build(seq_len=seq_len).proj_len == proj_len
    assert build(seq_len=seq_len, projection="conv").proj_len == proj_len


@pytest.mark.parametrize("projection", ["learned", "mean-pool"])
def test_causal_is_refused(qkv, projection):
    mech = build(seq_len=20, projection=projection).double()
    with pytest.raises(CapabilityError, match=r"linformer cannot honour is_causal=True.*macformer, elu"):
        mech(*qkv(5, 5), is_causal=True)


def test_the_start_has_variance_one_over_k():
    e = build(3, seq_len=2000, proj_len=50, sharing="key-value").get_parameter("E")
    assert float(e.detach().var()) == pytest.approx(1 / 50, rel=0.02)  # 100,000 normal numbers: s.e. 0.45 %


def test_equal_seeds_draw_equal_projections():
    one, two, three = (build(seed, seq_len=20).state_dict() for seed in (1, 1, 2))
    assert torch.equal(one["E"], two["E"])
    assert not torch.equal(one["E"], three["E"])
    assert not torch.equal(one["E"], one["F"])


@pytest.mark.parametrize("projection", ["mean-pool", "max-pool", "conv"])
def test_as_many_segments_as_keys_is_softmax_attention(qkv, projection):
    q, k, v = qkv(9, 12)
    softmax = maclin.mechanism("softmax", head_dim=8, num_heads=4, num_kv_heads=2)
    for proj_len in (12, 30):  # one key a segment, and empty segments between
        mech = build(projection=projection, proj_len=proj_len).double()
        torch.testing.assert_close(mech(q, k, v), softmax(q, k, v), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("projection", ["mean-pool", "max-pool", "conv"])
def test_padding_anywhere_is_cropping(qkv, projection):
    q, k, v = qkv(9, 30)
    mech = build(projection=projection, proj_len=4).double()
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[:, 2:25:2] = True
    torch.testing.assert_close(mech(q, k, v, key_mask=mask), mech(q, k[:, :, 2:25:2], v[:, :, 2:25:2]))


def test_the_convolution_is_exact_for_ranks_beyond_float32():
    """17 million keys and 100 segments: products of rank and segment no longer fit the digits of float32."""
    n = (1 << 24) + 3
    k, v = torch.zeros(1, 1, n, 1), torch.zeros(1, 1, n, 1)
    first = -(-99 * n // 100)  # the first rank of the last segment
    v[0, 0, first] = 1.0
    width = -(-n // 100)
    mech = Linformer(1, 1, projection="conv", proj_len=100)
    with torch.no_grad():
        out = mech(torch.zeros(1, 1, 1, 1), k, v)
    ranks = (torch.arange(n - first, dtype=torch.float64) + 0.5) / width
    hann = torch.sin(torch.pi * ranks).square().clamp_min(1e-3)
    assert float(out) == pytest.approx(float(hann[0] / hann.sum()) / 100, rel=1e-3)
