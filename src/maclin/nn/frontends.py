"""Front ends: inputs of different kinds -> vectors (B, N, E), one per token, and their mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import InputError
from .config import MacformerConfig

Embedded = tuple[Tensor, Tensor | None]
"""Vectors (B, N, E), and their mask (B, N), True = attend, or None where all are attended."""


class TokenEmbedding(nn.Module):
    """Ids -> vectors: sqrt(E) times a table whose entries start normal with variance 1 / E.

    So vectors start with unit mean square, and scores against the same table with unit variance.

    Args:
        vocab_size: ids, from 0; 0 is padding, and nothing is learned of it.
        embed_dim: E.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.4; deviations: none.
    """

    def __init__(self, vocab_size: int, embed_dim: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.scale = math.sqrt(embed_dim)
        self.weight = nn.Parameter(torch.empty(vocab_size, embed_dim))
        nn.init.normal_(self.weight, std=1.0 / self.scale)
        with torch.no_grad():
            self.weight[0] = 0.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Embedded:
        """x (B, N), integers; mask (B, N) bool, True = attend, None attends to all, 0 included.

        Raises:
            InputError: another shape or dtype, or (on the CPU) an id beyond the table.
        """
        check_ids(x, self.vocab_size, "token")
        check_mask(mask, x.shape)
        return F.embedding(x, self.weight, padding_idx=0) * self.scale, mask

    def scores(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., E) -> a score per id (..., vocab_size)."""
        return F.linear(hidden, self.weight)

    def extra_repr(self) -> str:
        """Size of the table."""
        return f"vocab_size={self.vocab_size}, embed_dim={self.weight.shape[1]}"


class PatchEmbedding(nn.Module):
    """Images -> one vector per square patch, row by row: a convolution whose stride is its width.

    Args:
        channels: C of an image.
        patch_size: side of a patch.
        embed_dim: E.
    """

    def __init__(self, channels: int, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(channels, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Embedded:
        """x (B, C, height, width), floats; mask (B, N) over patches.

        Raises:
            InputError: another shape, or sides that are not multiples of the patch's.
        """
        channels, size = self.projection.in_channels, self.patch_size
        if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % size or x.shape[3] % size or x.numel() == 0:
            raise InputError(
                f"images have shape {tuple(x.shape)}; wanted (batch, {channels}, height, width) with sides that are "
                f"multiples of patch_size {size}: crop or pad them"
            )
        patches = self.projection(x).flatten(2).transpose(1, 2)
        check_mask(mask, patches.shape[:2])
        return patches, mask


class WaveformEmbedding(nn.Module):
    """Samples -> one vector per ``stride`` of them, each from twice as many: a strided convolution.

    A token is attended if any of its own samples is. Masked samples count as silence, so padding at the end equals
    cropping; padding in front does if it is a multiple of the stride.

    Args:
        channels: of a sample.
        stride: samples per token; 1 is a vector per sample, from that sample alone.
        embed_dim: E.
    """

    def __init__(self, channels: int, stride: int, embed_dim: int) -> None:
        super().__init__()
        self.stride = stride
        self.overlap = stride if stride > 1 else 0
        self.projection = nn.Conv1d(channels, embed_dim, stride + self.overlap, stride=stride)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Embedded:
        """x (B, T) or (B, T, channels), floats; mask (B, T) over samples. N = T / stride, rounded up.

        Raises:
            InputError: another shape.
        """
        x = check_series(x, self.projection.in_channels, mask, "a waveform")
        missing = -x.shape[1] % self.stride
        before = self.overlap // 2
        x = F.pad(x.transpose(1, 2), (before, missing + self.overlap - before))
        tokens = self.projection(x).transpose(1, 2)
        if mask is not None:
            mask = F.pad(mask, (0, missing)).unflatten(1, (-1, self.stride)).any(-1)
        return tokens, mask


class SeriesEmbedding(nn.Module):
    """Multivariate series -> one vector per time step, a linear map of its channels.

    Args:
        channels: of a time step.
        embed_dim: E.
    """

    def __init__(self, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(channels, embed_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Embedded:
        """x (B, N, channels), or (B, N) with one channel, floats; mask (B, N). What masked steps hold is ignored.

        Raises:
            InputError: another shape.
        """
        return self.projection(check_series(x, self.projection.in_features, mask, "a series")), mask


def front_end(config: MacformerConfig) -> nn.Module:
    """The front end that a configuration asks for."""
    if config.frontend in ("tokens", "bytes"):
        return TokenEmbedding(config.input_vocab_size, config.embed_dim)
    if config.frontend == "patches":
        return PatchEmbedding(config.channels, config.patch_size, config.embed_dim)
    if config.frontend == "waveform":
        return WaveformEmbedding(config.channels, config.stride, config.embed_dim)
    return SeriesEmbedding(config.channels, config.embed_dim)


def check_ids(ids: Tensor, vocab_size: int, noun: str) -> None:
    """Refuse what is not (B, N) ids of a vocabulary; the ids themselves are looked at on the CPU only.

    Raises:
        InputError: saying which id, and which were known.
    """
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"{noun} ids have shape {tuple(ids.shape)} and dtype {ids.dtype}; wanted (batch, length), int64 or int32"
        )
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"{noun} ids go from {low} to {high}; wanted 0 to {vocab_size - 1}, as vocab_size is {vocab_size}"
            )


def check_mask(mask: Tensor | None, shape: torch.Size) -> None:
    """Refuse a mask that is not (B, N) bool; raises InputError."""
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise InputError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; wanted {tuple(shape)} bool, True = attend"
        )


def check_series(x: Tensor, channels: int, mask: Tensor | None, noun: str) -> Tensor:
    """Series of floats as (B, T, channels), with zeros where masked; raises InputError for another shape."""
    if x.dim() == 2 and channels == 1:
        x = x[..., None]
    if x.dim() != 3 or x.shape[2] != channels or not x.is_floating_point() or x.shape[1] == 0:
        also = " or (batch, time)" if channels == 1 else ""
        raise InputError(
            f"{noun} has shape {tuple(x.shape)} and dtype {x.dtype}; wanted (batch, time, {channels}){also}, floats"
        )
    check_mask(mask, x.shape[:2])
    # whatever lies in the padding, NaN too, must not reach a sum
    return x if mask is None else x.masked_fill(~mask[..., None], 0.0)
