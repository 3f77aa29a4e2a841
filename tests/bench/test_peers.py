"""Other packages: stand-ins of the same interface, so that what is handed to them is known."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maclin.bench.peers import PEERS, PeerSizes, find_peers
from maclin.core.errors import CapabilityError

SIZES = PeerSizes(num_heads=2, head_dim=4, length=16, num_features=8, is_causal=False)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 2.0, -1) @ v


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


class LinformerSelfAttention(nn.Module):
    def __init__(self, dim: int, seq_len: int, k: int, heads: int) -> None:
        super().__init__()
        self.sizes = (dim, seq_len, k, heads)
        self.to_q = self.to_k = self.to_v = self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        out = attention(heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context)))
        return self.to_out(out.transpose(1, 2).flatten(2))


class NystromAttention(nn.Module):
    def __init__(self, dim: int, dim_head: int, heads: int, num_landmarks: int, residual: bool) -> None:
        super().__init__()
        assert not residual
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out = attention(*map(heads, self.to_qkv(x).chunk(3, -1)))
        return self.to_out(out.transpose(1, 2).flatten(2))


class Split(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return heads(x) if x.shape[-1] == 8 else tuple(heads(part) for part in x.chunk(2, -1))


class TaylorSeriesLinearAttn(nn.Module):
    def __init__(self, dim: int, dim_head: int, heads: int, combine_heads: bool) -> None:
        super().__init__()
        assert not combine_heads
        self.to_q = nn.Sequential(nn.Linear(dim, dim), Split())
        self.to_kv = nn.Sequential(nn.Linear(dim, 2 * dim), Split())

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return attention(self.to_q(x), *self.to_kv(context)).transpose(1, 2).flatten(2)


class FastAttention(nn.Module):
    def __init__(self, dim_heads: int, nb_features: int, causal: bool) -> None:
        super().__init__()
        self.dim, self.nb_features, self.causal = dim_heads, nb_features, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[-2] == 13:
            raise ValueError("unlucky length")
        return attention(q, k, v)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the peers' names with the classes above."""
    contents: dict[str, dict[str, Any]] = {
        "performer_pytorch": {"FastAttention": FastAttention},
        "linformer": {"LinformerSelfAttention": LinformerSelfAttention},
        "nystrom_attention": {"NystromAttention": NystromAttention},
        "linear_attention_transformer": {},
        "linear_attention_transformer.linear_attention_transformer": {
            "linear_attn": attention,
            "causal_linear_attn": lambda q, k, v: "causal",
        },
        "taylor_series_linear_attention": {"TaylorSeriesLinearAttn": TaylorSeriesLinearAttn},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("packages")
def test_only_the_attention_is_left_and_all_of_it() -> None:
    q, k, v = torch.randn(3, 1, 2, 16, 4, generator=torch.Generator().manual_seed(0))
    found, reasons = find_peers(SIZES)
    assert len(found) == 5
    assert reasons == ["flash-linear-attention runs on a CUDA device only, and this is cpu"]
    wanted = attention(q, k, v)
    for name, subject in found.items():
        subject.give((q, k, v))
        out = subject.forward()
        assert isinstance(out, Tensor)
        assert torch.allclose(out if out.dim() == 4 else heads(out), wanted, atol=1e-6), name
        assert subject.kind == "peer"


@pytest.mark.usefixtures("packages")
def test_gradients_reach_what_was_given() -> None:
    q, k, v = torch.randn(3, 1, 2, 16, 4, generator=torch.Generator().manual_seed(0))
    for subject in find_peers(SIZES)[0].values():
        subject.give((q, k, v), backward=True)
        step = subject.step()
        assert isinstance(step, tuple)
        assert all(gradient is not None and bool((gradient != 0).any()) for gradient in step[1])


@pytest.mark.usefixtures("packages")
def test_causal_peers_are_those_with_a_causal_form() -> None:
    found, reasons = find_peers(PeerSizes(2, 4, 16, 8, is_causal=True))
    assert set(found) == {"performer-pytorch (pip)", "linear-attention-transformer (pip)"}
    subject = found["linear-attention-transformer (pip)"]
    subject.give(tuple(torch.zeros(3, 1, 2, 4, 4)))
    assert subject.forward() == "causal"
    assert "linformer has no causal form that can be measured" in reasons


@pytest.mark.usefixtures("packages")
def test_what_a_peer_raises_is_a_reason() -> None:
    subject = find_peers(SIZES, only=("performer-pytorch",))[0]["performer-pytorch (pip)"]
    subject.give(tuple(torch.zeros(3, 1, 2, 13, 4)))
    with pytest.raises(CapabilityError, match="performer-pytorch failed: ValueError: unlucky length"):
        subject.forward()


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_missing_package_says_how_to_install_it(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, peer.module.split(".")[0], None)
    sizes = PeerSizes(2, 4, 16, 8, is_causal=peer.causal[0])
    reason = peer.missing(sizes, "cuda")
    assert reason is not None
    assert reason.endswith(f"install it with: pip install {peer.name}")
