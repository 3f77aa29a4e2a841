"""ppSBN taken apart: the variants of Macformer that the study of ppSBN compares, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core.errors import OptionError
from ...core.mechanisms import mechanism
from ...core.mechanisms.base import Mechanism
from ...core.mechanisms.macformer import Macformer
from ...core.norms import PostScale

Pre = Literal["token", "batch", False]
BASELINES = {"softmax": "softmax", "uniform": "mean"}
"""Exact attention and the average of the values, with their names in the registry."""
_BETAS = torch.arange(2, 31, dtype=torch.float64) / 10


@dataclass(frozen=True)
class Variant:
    """One way to take ppSBN apart.

    Args:
        name: what tables call it.
        pre: statistics of the first half, which standardises q and k; False leaves that half out.
        post: whether the second half rescales out.
    """

    name: str
    pre: Pre
    post: bool


VARIANTS = (
    Variant("ppSBN, token", "token", True),
    Variant("ppSBN, batch", "batch", True),
    Variant("pre only, token", "token", False),
    Variant("pre only, batch", "batch", False),
    Variant("post only", False, True),
    Variant("neither", False, False),
)


def variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        OptionError: the name is unknown; the message lists the known ones.
    """
    for known in VARIANTS:
        if known.name == name:
            return known
    raise OptionError(f"unknown variant {name!r}; known are {', '.join(repr(v.name) for v in VARIANTS)}")


def build(name: str, estimator: str, head_dim: int, num_heads: int, num_features: int) -> Mechanism:
    """A variant with that estimator, or a baseline; what is random is drawn from torch's own generator."""
    if name in BASELINES:
        return mechanism(BASELINES[name], head_dim=head_dim, num_heads=num_heads)
    chosen = variant(name)
    made = macformer(chosen.pre, estimator, head_dim, num_heads, num_features)
    made.post = PostScale(num_heads) if chosen.post else None
    return made


def macformer(
    pre: Pre,
    estimator: str,
    head_dim: int,
    num_heads: int,
    num_features: int,
    *,
    learns_temperature: bool = False,
    generator: torch.Generator | None = None,
) -> Macformer:
    """Macformer with kernel exp, for which exact kernel attention is softmax attention of the normalised q and k."""
    return Macformer(
        head_dim,
        num_heads,
        kernel="exp",
        num_features=num_features,
        estimator=estimator,  # pyright: ignore[reportArgumentType] -- the constructor checks it
        ppsbn=pre,
        temperature="learned" if learns_temperature else "fixed",
        generator=generator,
    )


@torch.no_grad()
def fitted_post(out: Tensor, wanted: Tensor) -> PostScale:
    """ppSBN's second half with the gamma and beta of each head that bring out closest to ``wanted``, in float64.

    For each beta of a grid from 0.2 to 3 the best gamma is a least-squares fit; the best pair is kept.

    Shape: out and wanted (B, H, N, Dv).
    """
    heads = out.shape[1]
    post = PostScale(heads).double().requires_grad_(False)
    out, wanted = out.double(), wanted.double()
    least = torch.full((heads,), torch.inf, dtype=torch.float64)
    best = torch.ones(2, heads, dtype=torch.float64)
    for beta in _BETAS:
        post.beta.fill_(beta)
        x = post(out)
        gamma = (x * wanted).sum((0, 2, 3)) / (x * x).sum((0, 2, 3)).clamp_min(torch.finfo(x.dtype).tiny)
        error = (gamma[:, None, None] * x - wanted).square().sum((0, 2, 3))
        best = torch.where(error < least, torch.stack([gamma, beta.expand(heads)]), best)
        least = torch.minimum(error, least)
    post.gamma.copy_(best[0])
    post.beta.copy_(best[1])
    return post
