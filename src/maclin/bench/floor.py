"""The least time that a call can take on this machine: bytes over copy bandwidth, operations over matrix rate.

What must be moved: every input once in, every result once out. What must be multiplied: ``Mechanism.cost``, two
operations for each multiply-add. Forward and backward together need three times the operations of the forward pass
(each product has one gradient product for each of its two factors, and nothing is made anew), and beside q, k, v and
out move q, k, v and the gradients of all four once more. Exact attention that is causal needs half of the pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from maclin.core.mechanisms import Mechanism
from maclin.records import Floor, Rates

BACKWARD_FLOPS = 3
"""Operations of forward and backward together, over those of forward."""
_COPIED_BYTES = (2**23, 2**25, 2**27)
_SHAPES = {  # (batch, rows, inner, columns); the last is what a contraction over tokens looks like
    "cpu": ((1, 1024, 1024, 1024), (1, 2048, 2048, 2048), (8, 1024, 64, 128)),
    "cuda": ((1, 4096, 4096, 4096), (1, 8192, 8192, 8192), (64, 4096, 64, 128)),
}


def measure_rates(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    seconds: float = 1.0,
    copied_bytes: Sequence[int] = _COPIED_BYTES,
    shapes: Sequence[tuple[int, int, int, int]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Rates:
    """Copy bandwidth and matrix rate: the best over a few sizes, each the best of its runs.

    The best, not the median: a rate that was reached once can be reached, and only then is it a limit.

    Args:
        dtype: of the tensors.
        device: where they are.
        seconds: wall time, about.
        copied_bytes: of the tensors to copy.
        shapes: of the products, (batch, rows, inner, columns).
        clock: seconds, monotonic.
    """
    kind = torch.device(device).type
    shapes = _SHAPES["cuda" if kind == "cuda" else "cpu"] if shapes is None else shapes
    share = seconds / (len(copied_bytes) + len(shapes))
    copies, products = {}, {}
    for size in copied_bytes:
        source = torch.ones(max(size // dtype.itemsize, 1), dtype=dtype, device=device)
        target = torch.empty_like(source)
        best = _best(lambda a=target, b=source: a.copy_(b), device, share, clock)
        copies[source.nbytes] = 2 * source.nbytes / best
    for batch, rows, inner, columns in shapes:
        left = torch.ones(batch, rows, inner, dtype=dtype, device=device)
        right = torch.ones(batch, inner, columns, dtype=dtype, device=device)
        out = left.new_empty(batch, rows, columns)
        best = _best(lambda a=left, b=right, c=out: torch.bmm(a, b, out=c), device, share, clock)
        products[f"{batch} x ({rows}, {inner}) @ ({inner}, {columns})"] = 2 * batch * rows * inner * columns / best
    copied, shape = max(copies, key=copies.__getitem__), max(products, key=products.__getitem__)
    return Rates(copies[copied], products[shape], copied, shape, str(dtype).removeprefix("torch."))


def best_of(*rates: Rates) -> Rates:
    """The best copy bandwidth and the best matrix rate of several measurements."""
    copy = max(rates, key=lambda rate: rate.copy_bytes_per_s)
    matrix = max(rates, key=lambda rate: rate.matrix_flops_per_s)
    return Rates(copy.copy_bytes_per_s, matrix.matrix_flops_per_s, copy.copied_bytes, matrix.matrix_shape, matrix.dtype)


def floor(needed_bytes: int, flops: int, rates: Rates) -> Floor:
    """The floor of a call that moves so many bytes and does so many operations."""
    return Floor(
        needed_bytes, flops, 1e3 * needed_bytes / rates.copy_bytes_per_s, 1e3 * flops / rates.matrix_flops_per_s
    )


def attention_flops(
    mech: Mechanism, length: int, *, batch: int = 1, is_causal: bool = False, backward: bool = False
) -> int:
    """Operations that one call needs with as many queries as keys, and values as wide as the head.

    Args:
        mech: the mechanism.
        length: N = S.
        batch: B.
        is_causal: half of the pairs for what attends exactly to all keys; as many for the others, whose cost is
            that of the sums, made once.
        backward: forward and backward.
    """
    multiply_adds = mech.cost(length, length, mech.head_dim)
    if is_causal and mech.name == "softmax":
        multiply_adds = multiply_adds * (length + 1) // (2 * length)
    return 2 * batch * mech.num_heads * multiply_adds * (BACKWARD_FLOPS if backward else 1)


def tensor_bytes(
    length: int, *, batch: int, num_heads: int, num_kv_heads: int, head_dim: int, itemsize: int, backward: bool = False
) -> int:
    """Bytes of q, k, v and out, with ``backward`` of their gradients as well."""
    forward = 2 * batch * (num_heads + num_kv_heads) * length * head_dim * itemsize
    return 2 * forward if backward else forward


def moved_bytes(
    length: int, *, batch: int, num_heads: int, num_kv_heads: int, head_dim: int, itemsize: int, backward: bool = False
) -> int:
    """Bytes that one call must move: q, k, v in, out out; backward q, k, v and out's gradient in, theirs out."""
    of_q = batch * num_heads * length * head_dim * itemsize
    of_k = batch * num_kv_heads * length * head_dim * itemsize
    forward = 2 * of_q + 2 * of_k
    return forward + 3 * of_q + 4 * of_k if backward else forward


def _best(call: Callable[[], object], device: torch.device | str, seconds: float, clock: Callable[[], float]) -> float:
    """Seconds of the fastest of at least three runs."""
    is_cuda = torch.device(device).type == "cuda"
    best, start, runs = float("inf"), clock(), 0
    with torch.inference_mode():
        call()
        while runs < 3 or clock() - start < seconds:
            if is_cuda:
                torch.cuda.synchronize(device)
            begin = clock()
            call()
            if is_cuda:
                torch.cuda.synchronize(device)
            best, runs = min(best, clock() - begin), runs + 1
    return best
