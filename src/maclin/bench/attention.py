"""Attention alone: mechanisms over lengths, beside the fused softmax of torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from maclin.core.fused import fused_attention
from maclin.records import Timing

from .oracle import oracle_check
from .sweep import sweep

BASELINE = "softmax"


def sweep_attention(
    mechanisms: Mapping[str, Callable[..., object]],
    lengths: Iterable[int],
    *,
    num_heads: int = 8,
    num_kv_heads: int | None = None,
    head_dim: int = 64,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    linear: Collection[str] = (),
    seconds_per_point: float = 2.0,
    max_seconds_per_run: float | None = None,
    memory_limit_bytes: int | None = None,
    check: Callable[[Callable[..., object]], str | None] | None = None,
    progress: Callable[[str], None] | None = None,
    seed: int = 0,
) -> list[Timing]:
    """Measure mechanisms on q, k and v of standard normal numbers.

    ``torch.nn.functional.scaled_dot_product_attention`` is measured beside them as "softmax", unless
    ``mechanisms`` brings its own. On the CPU it gets repeated key heads where they are grouped, since it is
    fused for as many key heads as query heads only.

    Shape: q (batch, num_heads, length, head_dim), k and v (batch, num_kv_heads, length, head_dim).

    Args:
        mechanisms: by name, what is called with q, k and v; modules are measured in eval mode if they are in it.
        lengths: tokens of q, k and v alike.
        num_heads: H.
        num_kv_heads: Hk (default H).
        head_dim: D, numbers.
        batch: B.
        dtype: of q, k and v.
        device: where to measure; the mechanisms must be there.
        linear: mechanisms whose cost is known to grow with the length, not its square.
        seconds_per_point: wall time for the runs of one mechanism at one length.
        max_seconds_per_run: longest single run that is still started; 10 times ``seconds_per_point`` by default.
        memory_limit_bytes: for q, k, v and the computation; 80 % of what is free by default.
        check: mechanism -> None, or in one sentence what is wrong with its results; ``oracle_check`` by default.
        progress: is told, in words, what is being done.
        seed: of q, k and v.

    Returns:
        Records of scope "attention", for each length and mechanism, ordered by length.
    """
    if check is None:
        check = functools.partial(oracle_check, dtype=dtype, device=device)
    key_heads = num_heads if num_kv_heads is None else num_kv_heads
    if BASELINE not in mechanisms:
        baseline = functools.partial(fused_attention, allowed=None, scale=head_dim**-0.5)
        mechanisms = {BASELINE: baseline, **mechanisms}

    def make_inputs(length: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = ((batch, heads, length, head_dim) for heads in (num_heads, key_heads, key_heads))
        return tuple(torch.randn(shape, generator=generator, dtype=dtype, device=device) for shape in shapes)

    def input_bytes(length: int) -> int:  # q, k, v and out
        return 2 * batch * (num_heads + key_heads) * length * head_dim * dtype.itemsize

    return sweep(
        mechanisms,
        lengths,
        make_inputs,
        scope="attention",
        device=device,
        linear=linear,
        input_bytes=input_bytes,
        seconds_per_point=seconds_per_point,
        max_seconds_per_run=max_seconds_per_run,
        memory_limit_bytes=memory_limit_bytes,
        check=check,
        progress=progress,
    )
