"""Attention transfer: the parameters of a mechanism, trained against exact attention on given q, k and v."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from .algebra import wide
from .design import split
from .fused import fused_attention

M = TypeVar("M", bound=nn.Module)

_STEPS = 100
_RATE = 0.02
_TOKENS = 512  # of a sequence in a step: more teach little more, and a step costs in proportion
_BATCH = 2
_EVERY = 25  # steps between two looks at what is held back


def transfer(
    mech: M,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    steps: int = _STEPS,
    rate: float = _RATE,
) -> M:
    """A copy of a mechanism whose parameters minimise the relative error of its output, head by head.

    loss = mean over heads of |out - exact|^2 / |exact|^2, exact = softmax(scale q k^T) v; Adam, one cycle. A third of
    the sequences (none of one) is held back, and the copy with the least error on it is returned, be it the first.

    Args:
        mech: under the contract of ``Mechanism``; left as it is.
        q: (B, H, N, D).
        k: (B, Hk, S, D).
        v: (B, Hk, S, Dv).
        key_mask: (B, S) bool, True = attend.
        is_causal: whether it is used so.
        scale: of the logits; None is that of exact attention.
        steps: of at most two sequences, cut to 512 tokens of a random place.
        rate: highest learning rate.
    """
    made = copy.deepcopy(mech)
    if steps < 1 or not any(True for _ in made.parameters()):
        return made
    dtypes = {name: x.dtype for name, x in made.state_dict().items()}
    data = _Data(wide(q.detach()), wide(k.detach()), wide(v.detach()), key_mask, is_causal, scale)
    made = made.to(data.q.dtype)
    learn, held = split(range(len(q)))
    with torch.enable_grad():
        best = _train(made, list(made.parameters()), data, learn, held, steps, rate)
    made.load_state_dict({name: x.to(dtypes[name]) for name, x in best.items()}, assign=True)
    return made.train(mech.training)


@dataclass(frozen=True)
class _Data:
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    is_causal: bool
    scale: float | None

    def taken(self, sequences: list[int], start: int = 0, tokens: int | None = None) -> _Data:
        """Some sequences; of self-attention, some tokens in a row."""
        stop = None if tokens is None or self.q.shape[2] != self.k.shape[2] else start + tokens
        at = slice(start if stop else 0, stop)
        mask = None if self.key_mask is None else self.key_mask[sequences][:, at]
        q, k, v = (x[sequences][:, :, at] for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, key_mask=mask)

    def exact(self) -> Tensor:
        """Softmax attention."""
        scale = 1.0 / math.sqrt(self.q.shape[-1]) if self.scale is None else self.scale
        n, s = self.q.shape[2], self.k.shape[2]
        allowed = torch.ones(n, s, dtype=torch.bool, device=self.q.device)
        allowed = (allowed.tril(s - n) if self.is_causal else allowed)[None, None]
        if self.key_mask is not None:
            allowed = allowed & self.key_mask[:, None, None]
        out = fused_attention(self.q, self.k, self.v, allowed, scale=scale)
        return out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)

    def rel_errors(self, mech: nn.Module) -> Tensor:
        """|out - exact|^2 / |exact|^2 of each head; padded queries do not count."""
        out = mech(self.q, self.k, self.v, key_mask=self.key_mask, is_causal=self.is_causal, scale=self.scale)
        exact = self.exact()
        off = out - exact
        if self.key_mask is not None and self.q.shape[2] == self.k.shape[2]:
            rows = self.key_mask[:, None, :, None]
            off, exact = off * rows, exact * rows
        tiny = torch.finfo(exact.dtype).tiny
        return off.square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3)).clamp_min(tiny)


def _train(
    mech: nn.Module,
    parameters: list[nn.Parameter],
    data: _Data,
    learn: list[int],
    held: list[int],
    steps: int,
    rate: float,
) -> dict[str, Tensor]:
    """The best state on the sequences held back."""
    for parameter in parameters:
        parameter.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    least, best = math.inf, _state(mech)
    room = max(data.q.shape[2] - _TOKENS, 0)
    for step in range(steps + 1):
        if step % _EVERY == 0 or step == steps:
            with torch.no_grad():
                error = sum(float(data.taken([i]).rel_errors(mech).mean()) for i in held) / len(held)
            if error < least:
                least, best = error, _state(mech)
        if step == steps:
            break
        order = torch.randperm(len(learn), generator=generator)[:_BATCH].tolist()
        start = int(torch.randint(room + 1, (1,), generator=generator))
        loss = data.taken([learn[i] for i in order], start, _TOKENS).rel_errors(mech).mean()
        optimiser.zero_grad()
        loss.backward()
        if all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None):
            optimiser.step()
        schedule.step()
    return best


def _state(mech: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in mech.state_dict().items()}
