"""Other people's packages for linear attention, measured on the same q, k and v.

Only the attention itself is timed: a module that also projects its input gets identities in place of its projections,
and q, k and v arrive in the layout that it works on, made beforehand. What a package does between them (features,
landmarks, splitting and merging of heads) is its own and counts. The packages are imported where they are asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maclin.core.errors import CapabilityError

from .subjects import Subject


@dataclass(frozen=True)
class PeerSizes:
    """What a peer is built for: heads, their width, the longest sequence, and features (or slots, or landmarks)."""

    num_heads: int
    head_dim: int
    length: int
    num_features: int
    is_causal: bool


@dataclass(frozen=True)
class Peer:
    """A package and what of it is measured.

    Args:
        name: of the distribution, as pip installs it.
        module: to import.
        what: what is measured, in words.
        build: module, sizes -> the attention of q, k, v, and how it wants them.
        causal: whether it has a causal form, a bidirectional form, or both.
        needs_cuda: whether it runs on a GPU only.
    """

    name: str
    module: str
    what: str
    build: Callable[[Any, PeerSizes], tuple[Callable[..., Any], Callable[..., tuple[Tensor, ...]]]]
    causal: tuple[bool, ...] = (False,)
    needs_cuda: bool = False

    @property
    def title(self) -> str:
        """What it is called in results, where a mechanism may have the same name."""
        return f"{self.name} (pip)"

    def missing(self, sizes: PeerSizes, device: torch.device | str) -> str | None:
        """Why it cannot be measured, in one sentence, or None."""
        if self.needs_cuda and torch.device(device).type != "cuda":
            return f"{self.name} runs on a CUDA device only, and this is {device}"
        if sizes.is_causal not in self.causal:
            return f"{self.name} has no {'causal' if sizes.is_causal else 'bidirectional'} form that can be measured"
        try:
            self._module()
        except ImportError as error:
            return f"{self.name} cannot be imported ({error}); install it with: pip install {self.name}"
        return None

    def subject(self, sizes: PeerSizes, device: torch.device | str, dtype: torch.dtype) -> Subject:
        """What is measured, in this dtype on this device; raises CapabilityError with the peer's own words."""
        with _quiet():
            try:
                torch.manual_seed(0)
                core, prepare = self.build(self._module(), sizes)
            except Exception as error:
                raise CapabilityError(f"{self.name} cannot be built: {type(error).__name__}: {error}") from error
        if isinstance(core, nn.Module):
            core = core.eval().to(device=device, dtype=dtype)
        return Subject(self.title, "peer", _guarded(self.name, core), prepare)

    def _module(self) -> Any:
        with _quiet():
            return importlib.import_module(self.module)


class _Given(nn.Module):
    """Stands in for a projection: whatever comes in, what it was told comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.value is None else self.value


class _LinformerCore(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention, self.given = attention, _Given()
        attention.to_q, attention.to_k, attention.to_v = nn.Identity(), nn.Identity(), self.given
        attention.to_out = nn.Identity()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.given.value = v
        return self.attention(q, context=k)


class _TaylorCore(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention
        attention.to_q, attention.to_kv = attention.to_q[-1], attention.to_kv[-1]  # only the splitting of heads is left

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        return self.attention(q, context=kv)


def _performer(module: Any, sizes: PeerSizes) -> Any:
    made = module.FastAttention(sizes.head_dim, nb_features=sizes.num_features, causal=sizes.is_causal)
    return made, _as_it_is


def _linformer(module: Any, sizes: PeerSizes) -> Any:
    width = sizes.num_heads * sizes.head_dim
    made = module.LinformerSelfAttention(width, sizes.length, k=sizes.num_features, heads=sizes.num_heads)
    return _LinformerCore(made), lambda *qkv: tuple(map(_merged, qkv))


def _nystrom(module: Any, sizes: PeerSizes) -> Any:
    made = module.NystromAttention(
        dim=sizes.num_heads * sizes.head_dim,
        dim_head=sizes.head_dim,
        heads=sizes.num_heads,
        num_landmarks=sizes.num_features,
        residual=False,
    )
    made.to_qkv, made.to_out = nn.Identity(), nn.Identity()
    return made, lambda *qkv: (torch.cat([_merged(x) for x in qkv], -1),)


def _linear_transformer(module: Any, sizes: PeerSizes) -> Any:
    return (module.causal_linear_attn if sizes.is_causal else module.linear_attn), _as_it_is


def _taylor(module: Any, sizes: PeerSizes) -> Any:
    width = sizes.num_heads * sizes.head_dim
    made = module.TaylorSeriesLinearAttn(width, dim_head=sizes.head_dim, heads=sizes.num_heads, combine_heads=False)
    return _TaylorCore(made), lambda q, k, v: (_merged(q), torch.cat([_merged(k), _merged(v)], -1))


def _flash_linear(module: Any, sizes: PeerSizes) -> Any:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module.chunk_linear_attn(q, k, v)[0]

    return core, lambda *qkv: tuple(x.transpose(1, 2).contiguous() for x in qkv)


PEERS: tuple[Peer, ...] = (
    Peer(
        "performer-pytorch",
        "performer_pytorch",
        "FastAttention: positive random features of softmax",
        _performer,
        (False, True),
    ),
    Peer("linformer", "linformer", "LinformerSelfAttention without its linear layers", _linformer),
    Peer("nystrom-attention", "nystrom_attention", "NystromAttention without its linear layers", _nystrom),
    Peer(
        "linear-attention-transformer",
        "linear_attention_transformer.linear_attention_transformer",
        "linear_attn: softmax over channels and positions; causal: causal_linear_attn, blind within blocks of 64",
        _linear_transformer,
        (False, True),
    ),
    Peer(
        "taylor-series-linear-attention",
        "taylor_series_linear_attention",
        "TaylorSeriesLinearAttn of degree 2 without its linear layers",
        _taylor,
    ),
    Peer(
        "flash-linear-attention",
        "fla.ops.linear_attn",
        "chunk_linear_attn: causal, features are q and k themselves",
        _flash_linear,
        (True,),
        needs_cuda=True,
    ),
)
"""Every peer that is known, by the order of its row in a result."""


def find_peers(
    sizes: PeerSizes,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    only: Collection[str] = (),
) -> tuple[dict[str, Subject], list[str]]:
    """The peers that can be measured here, and in words why others cannot; ``only`` names some of them."""
    found: dict[str, Subject] = {}
    reasons: list[str] = []
    for peer in (peer for peer in PEERS if not only or peer.name in only):
        reason = peer.missing(sizes, device)
        if reason is None:
            try:
                found[peer.title] = peer.subject(sizes, device, dtype)
            except CapabilityError as error:
                reason = str(error)
        if reason is not None:
            reasons.append(reason)
    return found, reasons


def _guarded(name: str, core: Callable[..., Any]) -> Callable[..., Any]:
    """The peer's attention; what it raises becomes a reason, but memory that does not suffice stays what it is."""

    def call(*args: Tensor) -> Any:
        try:
            return core(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if "memory" in str(error).lower():
                raise
            raise CapabilityError(f"{name} failed: {type(error).__name__}: {error}") from error

    return call


def _as_it_is(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q, k, v


def _merged(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H D)."""
    return x.transpose(1, 2).flatten(2).contiguous()


@contextlib.contextmanager
def _quiet() -> Any:
    """Other packages warn and print as they are imported."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
