"""What a guard costs on a model, and how often it is right, beside true errors that are computed in full."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maclin.adopt.guard.examine import Call, examine, true_errors
from maclin.adopt.guard.guard import guard
from maclin.adopt.guard.layers import guardable, root_of, run
from maclin.adopt.guard.options import GuardOptions
from maclin.adopt.hosts.base import Batch
from maclin.core.errors import InputError
from maclin.core.mechanisms import Mechanism, mechanism
from maclin.records import GuardRate, GuardRates

_HUGE = 1e30


def guard_rates(
    model: nn.Module,
    batches: Iterable[Batch],
    tolerances: Sequence[float] = (0.1, 0.2, 0.4, 0.8, 1.6),
    *,
    sample_rows: int = 32,
    confidence: float = 0.99,
    draws: int = 8,
    runs: int = 3,
    seed: int = 0,
) -> GuardRates:
    """Overhead and rates of ``maclin.guard`` on a converted model; its outputs stay what they are.

    The true error of each layer and sequence is computed over all rows from the very q, k and v that the layer gets
    in the converted model. Each decision is drawn several times, with other rows.

    Args:
        model: converted.
        batches: held-out documents; the first one is timed.
        tolerances: to decide by; those for which no layer is above twice or below half of it say nothing.
        sample_rows: of the guard.
        confidence: of the guard.
        draws: decisions per layer, sequence and tolerance.
        runs: timed forward passes, with the guard and without in turn.
        seed: of the rows.

    Raises:
        InputError: no batches, or nothing to guard in the model.
    """
    options = GuardOptions(sample_rows=sample_rows, confidence=confidence, seed=seed)
    root, documents = root_of(model), list(batches)
    if not documents:
        raise InputError("guard_rates: wanted at least one batch, got none; pass held-out documents")
    layers = guardable(root, options.tolerance)
    judge = _Judge(tuple(tolerances), options, draws)
    with torch.no_grad(), _watched(list(layers.values()), judge):
        for batch in documents:
            run(root, batch)
    forward, guarded_s, share = _times(model, root, documents[0], sample_rows, confidence, runs, seed)
    estimates = judge.estimates
    if not estimates:
        raise InputError("guard_rates: no layer was called on more than one token; pass longer documents")
    worst = max((max(e / t, t / e) for e, _, _, t in estimates if min(e, t) > 0), default=1.0)
    return GuardRates(
        rates=tuple(GuardRate(tolerance, *counts) for tolerance, counts in judge.counts.items()),
        confidence=confidence,
        sample_rows=sample_rows,
        num_tokens=judge.longest,
        num_layers=len(layers),
        num_estimates=len(estimates),
        covered_low_share=statistics.fmean(low <= true for _, low, _, true in estimates),
        covered_high_share=statistics.fmean(high >= true for _, _, high, true in estimates),
        worst_ratio=worst,
        forward_ms=forward * 1e3,
        guard_ms=guarded_s * 1e3,
        share=share,
        true_errors=tuple(judge.true),
    )


class _Judge:
    """Decides on each call several times, for each tolerance, and keeps what was right."""

    def __init__(self, tolerances: tuple[float, ...], options: GuardOptions, draws: int) -> None:
        self.options = options
        self.draws = draws
        self.counts = {tolerance: [0, 0, 0, 0] for tolerance in tolerances}
        self.estimates: list[tuple[float, float, float, float]] = []
        self.true: list[float] = []
        self.longest = 0
        self.generator = torch.Generator().manual_seed(options.seed)

    def __call__(self, call: Call) -> None:
        heads, key_heads, width = call.q.shape[1], call.k.shape[1], call.q.shape[3]
        exact = mechanism("softmax", head_dim=width, num_heads=heads, num_kv_heads=key_heads)
        out = exact(call.q, call.k, call.v, key_mask=call.key_mask, is_causal=call.is_causal, scale=call.scale)
        true = true_errors(call, out)
        self.true.extend(true)
        self.longest = max(self.longest, call.q.shape[2])
        for _ in range(self.draws):
            for one, error in zip(self._seen(call, _HUGE), true, strict=True):
                if one.estimate is not None and math.isfinite(error):
                    self.estimates.append((one.estimate.rel_error, one.estimate.low, one.estimate.high, error))
            for tolerance, counts in self.counts.items():
                for one, error in zip(self._seen(call, tolerance), true, strict=True):
                    at = 0 if error > 2 * tolerance else 2 if error < tolerance / 2 else None
                    if at is not None:
                        counts[at] += 1
                        counts[at + 1] += one.reason is not None

    def _seen(self, call: Call, tolerance: float) -> Any:
        return examine(call, tolerance, self.options.sample_rows, self.options.confidence, self.generator)


@contextmanager
def _watched(mechanisms: list[Mechanism], judge: Callable[[Call], None]) -> Iterator[None]:
    """``judge`` is shown every call of the mechanisms that could be checked."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any], out: Any) -> None:
        q, k, v = args
        if q.shape[2] > 1 and options.get("state") is None:
            made = out[0] if isinstance(out, tuple) else out
            judge(Call(q, k, v, made, options.get("key_mask"), bool(options.get("is_causal")), options.get("scale")))

    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in mechanisms]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _times(
    model: nn.Module, root: nn.Module, batch: Batch, sample_rows: int, confidence: float, runs: int, seed: int
) -> tuple[float, float, float]:
    """Median seconds of a forward without the guard, of the guard in one with it, and its share of the rest of that."""
    alone: list[float] = []
    inside: list[float] = []
    shares: list[float] = []
    with torch.no_grad():
        run(root, batch)
        for _ in range(runs):
            began = time.perf_counter()
            run(root, batch)
            alone.append(time.perf_counter() - began)
            with guard(
                model, tolerance=_HUGE, sample_rows=sample_rows, confidence=confidence, max_share=None, seed=seed
            ) as watching:
                run(root, batch)
            record = watching.record()
            inside.append(record.guard_s)
            shares.append(record.share or 0.0)
    return statistics.median(alone), statistics.median(inside), statistics.median(shares)
