"""Decoding: the time of one more token, after more and more of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maclin.core.fused import fused_attention
from maclin.core.mechanisms import Mechanism, row
from maclin.progress import Progress
from maclin.records import BenchRow, Rates, Timing

from .floor import floor
from .job import BenchJob
from .memory import free_bytes, peak_bytes
from .subjects import BASELINE
from .timing import interleaved

_CHUNK = 4096  # tokens that are read into the state at a time
_HEADROOM = 0.8


def decode_rows(job: BenchJob, mechanisms: dict[str, Mechanism], rates: Rates, told: Progress) -> list[BenchRow]:
    """One token with the state of so many before it; exact attention has the past keys and values in a cache.

    The cache is there in full length from the start, so that exact attention only writes its new row. All subjects
    and positions are timed in turns; a call leaves the state as it was.

    Args:
        job: sizes and positions.
        mechanisms: causal ones, by name.
        rates: of the machine.
        told: hears of every position.
    """
    positions = job.points
    width = job.batch * job.num_heads * job.head_dim * job.torch_dtype.itemsize
    options = {"dtype": job.torch_dtype, "device": job.torch_device}
    generator = torch.Generator(job.torch_device).manual_seed(job.seed)
    shape = (job.batch, job.num_heads, 1, job.head_dim)
    token = tuple(torch.randn(shape, generator=generator, **options) for _ in range(3))
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    state_bytes: dict[tuple[str, int], int] = {}
    refused: dict[tuple[str, int], str] = {}
    free = free_bytes(job.torch_device)
    fitting = [p for p in positions if free is None or 2 * width * (p + 1) <= _HEADROOM * free]
    if fitting:
        longest = (job.batch, job.num_heads, fitting[-1] + 1, job.head_dim)
        cache = (
            torch.randn(longest, generator=generator, **options),
            torch.randn(longest, generator=generator, **options),
        )
        for position in fitting:
            calls[BASELINE, position] = _cached(token, cache, position)
            state_bytes[BASELINE, position] = 2 * width * position
    for position in positions:
        if position not in fitting:
            refused[BASELINE, position] = f"the keys and values of {position} tokens do not fit into memory"
    for name, mech in mechanisms.items():
        if name == BASELINE:
            continue
        for position, state in _states(job, mech).items():
            calls[name, position] = _stepping(mech, token, state)
            state_bytes[name, position] = sum(tensor.nbytes for tensor in state)
    stats = interleaved(
        {f"{name}@{position}": call for (name, position), call in calls.items()},
        min_runs=5,
        max_runs=200,
        max_seconds=job.seconds_per_point * len(calls),
        warm_up=3,
        device=job.torch_device,
    )
    rows = []
    names = [BASELINE, *(name for name in mechanisms if name != BASELINE)]
    for position in positions:
        told.advance(f"position {position}")
        for name in names:
            if (name, position) in refused:
                reason = refused[name, position]
                rows.append(BenchRow(Timing(name, "attention", position, None, reason=reason), _kind(name, mechanisms)))
                continue
            found = stats[f"{name}@{position}"]
            peak = peak_bytes(calls[name, position], job.torch_device)
            timing = Timing(
                name, "attention", position, found.median_ms, found.q1_ms, found.q3_ms, found.runs, peak_bytes=peak
            )
            held = state_bytes[name, position]
            if name == BASELINE:
                moved = held + 6 * width  # the past is read; one row of keys and values is written, and read with it
                adds = row(BASELINE).cls(job.head_dim, job.num_heads).cost(1, position + 1, job.head_dim)
            else:
                moved = 2 * held + 4 * width  # the state is read and written
                adds = mechanisms[name].cost(1, 1, job.head_dim)
            limit = floor(moved, 2 * job.batch * job.num_heads * adds, rates)
            rows.append(BenchRow(timing, _kind(name, mechanisms), limit, held))
    return rows


def _kind(name: str, mechanisms: dict[str, Mechanism]) -> str:
    return "baseline" if name == BASELINE or row(mechanisms[name].name).baseline else "mechanism"


def _states(job: BenchJob, mech: Mechanism) -> dict[int, tuple[Tensor, ...]]:
    """The state after each position, read in chunk by chunk."""
    generator = torch.Generator(job.torch_device).manual_seed(job.seed + 1)
    found: dict[int, tuple[Tensor, ...]] = {}
    state: Any = None
    done = 0
    with torch.inference_mode():
        for position in job.points:
            while done < position:
                shape = (job.batch, job.num_heads, min(_CHUNK, position - done), job.head_dim)
                k, v = (
                    torch.randn(shape, generator=generator, dtype=job.torch_dtype, device=job.torch_device)
                    for _ in range(2)
                )
                _, state = mech(k[:, :, -1:], k, v, is_causal=True, state=state, return_state=True)
                done += shape[2]
            found[position] = tuple(tensor.clone() for tensor in state)
    return found


def _stepping(mech: Mechanism, token: tuple[Tensor, ...], state: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: mech(*token, is_causal=True, state=state, return_state=True)


def _cached(token: tuple[Tensor, ...], cache: tuple[Tensor, Tensor], position: int) -> Callable[[], object]:
    q, k, v = token
    keys, values = (tensor[:, :, : position + 1] for tensor in cache)

    def step() -> Tensor:
        keys[:, :, position:] = k
        values[:, :, position:] = v
        return fused_attention(q, keys, values, None, scale=q.shape[-1] ** -0.5)

    return step
