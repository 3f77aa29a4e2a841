"""What says where a token stands: rotary, sinusoidal and learned positions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core import mechanisms
from ..core.errors import CapabilityError, InputError, OptionError
from ..core.mechanisms import Mechanism

POSITIONS = ("rotary", "sinusoidal", "learned", "none")
"""The kinds that models know."""


class Rotation(NamedTuple):
    """Cosines and sines of the angles of some tokens, each (B or 1, 1, N, D / 2), float32."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Turn x (B, H, N, D): channels c and c + D / 2 are the two coordinates of a plane."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Rotary(nn.Module):
    """Rotary positions: q and k are turned by position x theta^(-2c/D) in each of D / 2 planes.

    The product of a turned q at i with a turned k at j depends on i - j alone. The planes join channel c with
    c + D / 2, as models of the Llama family do.

    Args:
        head_dim: D, even.
        theta: the slowest plane turns by about 1 / theta per token.

    Raises:
        OptionError: an odd width, or theta that is not above 1.

    Source: Su et al. 2021, arXiv 2104.09864, equation 34; deviation: half-split planes instead of neighbours.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise OptionError(
                f"rotary positions turn pairs of channels, and head_dim is {head_dim}; wanted an even number"
            )
        if not theta > 1:
            raise OptionError(f"theta is {theta}; wanted a number above 1, 10000 for example")
        self.head_dim = head_dim
        self.theta = theta

    def forward(self, positions: Tensor, from_zero: bool = False) -> Rotation:
        """Positions (B or 1, N), integers -> what turns the q and k of these tokens.

        ``from_zero``: they are below N, as ``positions_of`` counts them, and need one table of N rows only.
        """
        angles = _angles(positions, self.head_dim, self.theta, from_zero)
        return Rotation(*(_looked_up(f(angles), positions, from_zero)[:, None] for f in (torch.cos, torch.sin)))

    def extra_repr(self) -> str:
        """Width and base."""
        return f"head_dim={self.head_dim}, theta={self.theta:g}"


def check_rotary(mechanism: Mechanism) -> None:
    """Refuse rotary positions where they mean nothing: the output must depend on q and k by their products alone.

    Then a common shift of all positions is not felt. Softmax and window attention do, and so do taylor and the
    projections of linformer that are linear (though in a segment of keys the fast planes average out); macformer,
    favor and rfa estimate a function of the product, and revisited_linformer softmax attention. mean looks at neither
    and stays the same baseline. macformer's
    ppsbn="token" takes the mean over channels away, which a turn moves, so that a shift is felt a little.

    Raises:
        CapabilityError: with the reason, and the mechanisms that allow it.
    """
    for part in mechanism.modules():
        reason = _against_rotary(part) if isinstance(part, Mechanism) else None
        if reason is not None:
            allowed = [name for name in mechanisms.names() if name not in ("elu", "efficient")]
            raise CapabilityError(
                f"{mechanism.name} does not allow rotary positions: {reason}; pass position='sinusoidal' or 'learned', "
                f"or one of {', '.join(allowed)}"
            )


def _against_rotary(mechanism: Mechanism) -> str | None:
    """Why turned q and k would not do what they are for; None where they do."""
    if mechanism.name == "elu":
        return "its weight of a pair, the sum of (elu(q) + 1)(elu(k) + 1), is no function of the product of q and k"
    if mechanism.name == "efficient" and mechanism.config["normalisation"] == "softmax":
        return "its softmax over the channels of q, which a turn mixes, knows no product of q and k"
    if mechanism.name == "linformer" and mechanism.config["projection"] == "max-pool":
        return "max-pooling picks channels of different keys, which were turned by different angles"
    return None


class SinusoidalPositions(nn.Module):
    """sin(p / base^(2c/E)) in channel 2c and its cosine in channel 2c + 1; any length, nothing to learn.

    Args:
        embed_dim: E.
        base: of the wavelengths, which go from 2 pi to 2 pi base.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5; deviations: none (an odd E lacks the last cosine).
    """

    def __init__(self, embed_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.base = base

    def forward(self, positions: Tensor, from_zero: bool = False) -> Tensor:
        """Positions (B or 1, N), integers -> (B or 1, N, E), float32.

        ``from_zero``: they are below N, as ``positions_of`` counts them, and need one table of N rows only.
        """
        angles = _angles(positions, self.embed_dim, self.base, from_zero)
        both = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        return _looked_up(both[..., : self.embed_dim], positions, from_zero)


def _angles(positions: Tensor, width: int, base: float, from_zero: bool) -> Tensor:
    """p base^(-2c / width) for every c < width / 2, of each position; or of 0 to N - 1 once, to be looked up.

    In float64 where there is one: in float32 the angle of a token far from the start is off by more than the fast
    planes can tell.
    """
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=dtype) / width
    if from_zero:
        positions = torch.arange(positions.shape[-1], device=positions.device)
    return positions[..., None].to(dtype) * base**-exponents


def _looked_up(table: Tensor, positions: Tensor, from_zero: bool) -> Tensor:
    """What ``_angles`` became, by token: (B or 1, N, channels), float32."""
    return nn.functional.embedding(positions, table.float()) if from_zero else table.float()


class LearnedPositions(nn.Module):
    """One learned vector per position, at the start normal with the mean square of sinusoidal ones, 1/2.

    Args:
        max_length: positions there are.
        embed_dim: E.
    """

    def __init__(self, max_length: int, embed_dim: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.weight = nn.Parameter(torch.empty(max_length, embed_dim))
        nn.init.normal_(self.weight, std=math.sqrt(0.5))

    def forward(self, positions: Tensor, from_zero: bool = False) -> Tensor:
        """Positions (B or 1, N), integers -> (B or 1, N, E).

        ``from_zero``: they are below N, as ``positions_of`` counts them; otherwise the last one is read on the host.

        Raises:
            InputError: a position beyond the table.
        """
        if positions.numel() and not (from_zero and positions.shape[-1] <= self.max_length):
            self.check(int(positions.max()) + 1)
        return nn.functional.embedding(positions, self.weight)

    def check(self, length: int) -> None:
        """Refuse sequences that are longer than the table; raises InputError."""
        if length > self.max_length:
            raise InputError(
                f"a sequence has {length} tokens, and the table of learned positions has {self.max_length}; "
                "shorten it to "
                f"{self.max_length}, build the model with max_length={length}, or take position='sinusoidal' or "
                "'rotary', "
                "which have no end"
            )

    def extra_repr(self) -> str:
        """Size of the table."""
        return f"max_length={self.max_length}, embed_dim={self.weight.shape[1]}"


def positions_of(key_mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Where each token stands among the attended ones of its sequence, from 0: (B, N), or (1, N) without a mask.

    Counting attended tokens only, padding on either side changes no position; masked ones have any.
    """
    if key_mask is None:
        return torch.arange(length, device=device)[None]
    return (key_mask.cumsum(-1) - 1).clamp_min(0)
