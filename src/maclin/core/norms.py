"""Normalisations of q and k before the features, and of out after the contraction: unit norm and ppSBN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .algebra import wide

EPS = 1e-6


def unit_norm(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; a zero vector stays zero."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPS)


def token_standardise(x: Tensor) -> Tensor:
    """ppSBN's first half with per-token statistics: (x - mean) / sqrt(var + eps) over the channels, then unit norm.

    The division by the standard deviation cancels against the unit norm, so it is left out.
    """
    return unit_norm(x - x.mean(-1, keepdim=True))


class WideBuffers(nn.Module):
    """A module whose own buffers move between devices with it, but never become narrower than float32.

    A draw that is rounded to half precision is another draw, and a biased one; a variance overflows there.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and buffer.is_floating_point() and moved.dtype.itemsize < 4:
                self._buffers[name] = buffer.to(moved.device)
        return self


class BatchStatistics(WideBuffers):
    """Mean and variance of each channel of each head over batch and positions, as in batch normalisation.

    (x - mean) / sqrt(var + eps), then unit norm. In train mode the statistics are those of the batch, masked
    positions left out and summed over all ranks of torch.distributed, and the running statistics move by
    ``momentum``; in eval mode the running statistics are used. They start at mean 0 and variance 1.

    Shape: x (B, H, N, D); buffers running_mean, running_var (H, D).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_heads: int, head_dim: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_heads, head_dim))
        self.register_buffer("running_var", torch.ones(num_heads, head_dim))

    @property
    def running(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance (H, D)."""
        return self.running_mean, self.running_var

    def of(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance (H, D) to use for x; in train mode also moves the running statistics."""
        if not self.training:
            return self.running_mean, self.running_var
        mean, variance = batch_moments(x, mask)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        return mean, variance

    @torch.no_grad()
    def set_from(self, x: Tensor, mask: Tensor | None) -> None:
        """Set the running statistics to those of x."""
        mean, variance = batch_moments(x, mask)
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)


def batch_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of x (B, H, N, D) over batch and attended positions; each (H, D).

    Over several ranks the counts and sums of all of them enter, and gradients flow back to each.
    """
    x = wide(x)
    weight = x.new_ones(x.shape[0], x.shape[2]) if mask is None else mask.to(x.dtype)
    count = weight.sum()
    total = torch.einsum("bhnd,bn->hd", x, weight)
    count, total = _sum_over_ranks(count), _sum_over_ranks(total)
    mean = total / count.clamp_min(1)
    centred = x - mean[:, None]
    square = _sum_over_ranks(torch.einsum("bhnd,bn->hd", centred * centred, weight))
    return mean, square / count.clamp_min(1)


def batch_standardise(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """ppSBN's first half with given statistics (H, D): (x - mean) / sqrt(var + eps), then unit norm."""
    return unit_norm((x - mean[:, None].to(x.dtype)) * torch.rsqrt(variance[:, None].to(x.dtype) + EPS))


class PostScale(nn.Module):
    """ppSBN's second half: out <- gamma x (x^2 + eps)^((beta - 1) / 2), gamma and beta learned per head.

    This is gamma sign(x) |x|^beta with a smooth root: exact at beta = 1 (the start), odd, and with a finite
    gradient at 0 for every beta, where |x|^beta with beta < 1 has none.

    Source: Guo 2024 (arXiv 2408.11656), ppSBN; deviation: the sign and the smooth root, as said.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_heads))
        self.beta = nn.Parameter(torch.ones(num_heads))

    def is_identity(self) -> bool:
        """Whether it is known to change nothing, as before training.

        Asked on the CPU and without gradients only: elsewhere the answer would wait for the device, or hide the
        parameters from autograd.
        """
        if torch.is_grad_enabled() or self.gamma.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return bool((self.gamma == 1).all() & (self.beta == 1).all())

    def forward(self, out: Tensor) -> Tensor:
        """Out (B, H, N, Dv) -> same shape and dtype."""
        x = wide(out)
        gamma, beta = (p.to(x.dtype)[:, None, None] for p in (self.gamma, self.beta))
        # exp(log) instead of pow, whose broadcast form torch does not vectorise: 100 times the time
        root = torch.exp(torch.log(x * x + EPS) * ((beta - 1.0) / 2.0))
        return (gamma * x * root).to(out.dtype)


def _sum_over_ranks(x: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return _AllReduce.apply(x)


class _AllReduce(torch.autograd.Function):
    """Sum over ranks; as every rank's loss depends on the sum, its gradient is summed over ranks as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        total = grad_outputs[0].clone()
        dist.all_reduce(total)
        return total
