"""Attention alone: mechanisms over lengths, beside the fused softmax of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from maclin.records import Timing

from .sweep import sweep

BASELINE = "softmax"


def sweep_attention(
    mechanisms: Mapping[str, Callable[..., object]],
    lengths: Iterable[int],
    *,
    num_heads: int = 8,
    head_dim: int = 64,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seconds_per_point: float = 2.0,
    max_seconds_per_run: float | None = None,
    memory_limit_bytes: int | None = None,
    check: Callable[[Callable[..., object]], str | None] | None = None,
    progress: Callable[[str], None] | None = None,
    seed: int = 0,
) -> list[Timing]:
    """Measure mechanisms on q, k and v (batch, num_heads, length, head_dim) of standard normal numbers.

    ``torch.nn.functional.scaled_dot_product_attention`` is measured beside them as "softmax", unless
    ``mechanisms`` brings its own.

    Args:
        mechanisms: by name, what is called with q, k and v; modules are measured in eval mode if they are in it.
        lengths: tokens of q, k and v alike.
        num_heads: H.
        head_dim: D, numbers.
        batch: B.
        dtype: of q, k and v.
        device: where to measure; the mechanisms must be there.
        seconds_per_point: wall time for the runs of one mechanism at one length.
        max_seconds_per_run: longest single run that is still started; 10 times ``seconds_per_point`` by default.
        memory_limit_bytes: for q, k, v and the computation; 80 % of what is free by default.
        check: mechanism -> None, or in one sentence what is wrong with its results.
        progress: is told, in words, what is being done.
        seed: of q, k and v.

    Returns:
        Records of scope "attention", for each length and mechanism, ordered by length.
    """
    if BASELINE not in mechanisms:
        mechanisms = {BASELINE: F.scaled_dot_product_attention, **mechanisms}

    def make_inputs(length: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (batch, num_heads, length, head_dim)
        return tuple(torch.randn(shape, generator=generator, dtype=dtype, device=device) for _ in range(3))

    def input_bytes(length: int) -> int:  # q, k, v and out
        return 4 * batch * num_heads * length * head_dim * dtype.itemsize

    return sweep(
        mechanisms,
        lengths,
        make_inputs,
        scope="attention",
        device=device,
        input_bytes=input_bytes,
        seconds_per_point=seconds_per_point,
        max_seconds_per_run=max_seconds_per_run,
        memory_limit_bytes=memory_limit_bytes,
        check=check,
        progress=progress,
    )
