"""The error of every mechanism on every layer, measured on real q, k and v beside exact and uniform attention.

Nothing is stored: each call of a layer is compared while the model runs, and only sums are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maclin.adopt.capture import token_mask, watch
from maclin.adopt.exact import ExactAttention, actual_scale, exact_attention, uniform_attention
from maclin.adopt.hosts import host
from maclin.adopt.hosts.base import AttentionCall, AttentionLayer, Batch
from maclin.core import mechanisms as registry
from maclin.core.errors import InputError, MaclinError
from maclin.core.statistics import guarded
from maclin.records import Audit, Config, HeadStatistics, LayerAudit, MechanismError

DRAWS = 3
"""Independent draws of a random mechanism: batches take turns with them, and its error is that over all batches."""

FEW_DOCUMENTS, FEW_TOKENS = 16, 4096
"""Below either, the audit carries a warning."""

Candidate = str | tuple[str, Config]
"""A mechanism's name, with its default configuration for the layer's width, or name and configuration."""


def default_config(name: str, head_dim: int) -> Config:
    """The configuration in which the audit tries a mechanism unless it is told another.

    The mechanism's own defaults, but for Linformer: learned projections say nothing before they are trained, so
    it is tried by mean pooling to twice the head's width.

    Args:
        name: one of ``maclin.core.mechanisms.names()``.
        head_dim: width of the layer's heads.
    """
    if name == "linformer":
        return {"projection": "mean-pool", "proj_len": 2 * head_dim}
    registry.row(name)
    return {}


def audit(
    model: nn.Module,
    batches: Iterable[Batch],
    mechanisms: Iterable[Candidate] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """Measure every mechanism on every attention layer of a model.

    The error is ||out - exact|| / ||exact|| over all tokens that are not padding, against exact attention on the
    same q, k and v in float32. A mechanism that cannot be applied is recorded with the reason.

    Args:
        model: any model that ``maclin.convert_`` takes; it is left as it is.
        batches: keyword arguments of the model's forward, one mapping per batch, padded with an attention_mask.
        mechanisms: names, or pairs of name and configuration (default: all that are registered but softmax, each
            in ``default_config``).
        progress: called after each batch with the number of batches done.

    Returns:
        One row per attention module, in the order of the first call; a module that several layers share is one
        row over all its calls.

    Raises:
        OptionError: an unknown mechanism; the message lists the known.
        InputError: no batches, a batch that does not fit the model, NaN or infinity in q, k or v.
        CapabilityError: the model's attention cannot be watched.
        MaclinError: a batch does not fit in memory.
    """
    layers = host(model).layers()
    names = [name for name in registry.names() if name != "softmax"] if mechanisms is None else list(mechanisms)
    totals = {layer.name: _Totals(layer, _candidates(names, layer)) for layer in layers if layer.refused is None}

    def report(done: int) -> bool:
        if progress is not None:
            progress(done)
        return True

    with torch.no_grad():
        watched = [layer for layer in layers if layer.refused is None]
        watch(model, batches, watched, lambda call: totals[call.layer].add(call), report)
    rows = tuple(
        totals[layer.name].row() if layer.refused is None else _refused(layer, layer.refused) for layer in layers
    )
    measured = [totals[row.layer] for row in rows if row.refused is None]
    documents = max((t.documents // t.layer.calls for t in measured), default=0)
    length = max((t.longest for t in measured), default=0)
    tokens = max((row.num_tokens for row in rows), default=0)
    return Audit(rows, length, documents, _warnings(documents, tokens), type(host(model).root).__name__)


def _warnings(documents: int, tokens: int) -> tuple[str, ...]:
    if tokens and (documents < FEW_DOCUMENTS or tokens < FEW_TOKENS):
        return (
            f"small calibration set: {documents} documents, {tokens} tokens; errors near the tolerance may change with "
            f"other documents, and with them the plan; use at least {FEW_DOCUMENTS} documents and {FEW_TOKENS} tokens",
        )
    return ()


def _candidates(names: Iterable[Candidate], layer: AttentionLayer) -> list[_Candidate]:
    pairs = [(n, default_config(n, layer.head_dim)) if isinstance(n, str) else (n[0], dict(n[1])) for n in names]
    return [_candidate(name, config, layer) for name, config in pairs]


def _candidate(name: str, config: Config, layer: AttentionLayer) -> _Candidate:
    row = registry.row(name)
    if layer.is_causal and not row.causal:
        return _Candidate(name, config, reason=f"{name} has no causal form, and this layer is causal")
    sizes = {"head_dim": layer.head_dim, "num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    draws: list[nn.Module] = []
    try:
        for seed in range(DRAWS if row.random else 1):
            extra: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)} if row.random else {}
            draws.append(registry.mechanism(name, **sizes, **config, **extra).eval())
    except MaclinError as error:
        return _Candidate(name, config, reason=str(error))
    return _Candidate(name, config, draws)


@dataclass
class _Candidate:
    """Squared error of one mechanism on one layer so far."""

    name: str
    config: Config
    draws: list[nn.Module] = field(default_factory=list)
    reason: str | None = None
    squared: Tensor | float = 0.0  # (H,)
    calls: int = 0
    rows: int = 0
    guarded: int = 0
    negative: int = 0

    def add(self, call: AttentionCall, exact: Tensor, real: Tensor) -> None:
        if self.reason is not None:
            return
        dtype = torch.promote_types(call.q.dtype, torch.float32)
        q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
        options: dict[str, Any] = {"key_mask": call.key_mask, "is_causal": call.is_causal, "scale": call.scale}
        mechanism = self.draws[self.calls % len(self.draws)].to(device=q.device, dtype=dtype)
        try:
            with guarded() as counts:
                out = mechanism(q, k, v, **options)
        except MaclinError as error:
            self.reason = str(error)
            return
        self.calls += 1
        self.squared += _squares(out - exact, real)
        self.rows += counts.rows
        self.guarded += counts.guarded
        self.negative += counts.negative

    def result(self, exact: Tensor) -> MechanismError:
        squared = torch.as_tensor(self.squared)
        if self.reason is None and not bool(torch.isfinite(squared).all()):
            self.reason = "its output is not finite on these documents"
        if self.reason is not None:
            return MechanismError(self.name, self.config, None, reason=self.reason)
        shares = (self.guarded / self.rows, self.negative / self.rows) if self.rows else (None, None)
        return MechanismError(self.name, self.config, *_relative(squared, exact), *shares)


class _Totals:
    """Everything that is summed over the calls of one layer."""

    def __init__(self, layer: AttentionLayer, candidates: list[_Candidate]) -> None:
        self.layer = layer
        self.candidates = candidates
        self.documents = 0
        self.longest = 0
        self.tokens = 0
        zeros = torch.zeros(layer.num_heads, dtype=torch.float64)
        self.exact, self.uniform = zeros.clone(), zeros.clone()
        self.entropy, self.entropy_rows, self.logit_std = zeros.clone(), 0, zeros.clone()
        self.q_squared, self.k_squared = zeros.clone(), zeros.clone()
        self.q_max, self.k_max = zeros.clone(), zeros.clone()

    def add(self, call: AttentionCall) -> None:
        real = token_mask(call)
        exact = exact_attention(call)
        lengths = real.sum(1)
        self.documents += int((lengths > 0).sum())
        self.longest = max(self.longest, int(lengths.max()))
        self.tokens += int(lengths.sum())
        self.exact += _squares(exact.out, real)
        self.uniform += _squares(uniform_attention(call) - exact.out, real)
        self._describe(call, exact, real)
        for candidate in self.candidates:
            candidate.add(call, exact.out, real)

    def _describe(self, call: AttentionCall, exact: ExactAttention, real: Tensor) -> None:
        several = real & (exact.attended > 1)
        most = exact.attended.clamp_min(2).log()[:, None]
        self.entropy += _sums(exact.entropy / most, several)
        self.entropy_rows += int(several.sum())
        self.logit_std += _sums(exact.logit_std, real)
        groups = self.layer.num_heads // self.layer.num_kv_heads
        for x, squared, most_so_far in (
            (call.q, self.q_squared, self.q_max),
            (call.k.repeat_interleave(groups, dim=1)[:, :, -call.q.shape[2] :], self.k_squared, self.k_max),
        ):
            norms = x.double().norm(dim=-1) * real[:, None]
            squared += norms.square().sum((0, 2)).cpu()
            torch.maximum(most_so_far, norms.amax((0, 2)).cpu(), out=most_so_far)
        self.scale = actual_scale(call)

    def row(self) -> LayerAudit:
        if not self.tokens:
            return _refused(self.layer, "it was not called on any token of these documents")
        uniform, uniform_by_head = _relative(self.uniform, self.exact)
        tokens = self.tokens
        heads = tuple(
            HeadStatistics(
                entropy_ratio=float(self.entropy[h] / max(self.entropy_rows, 1)),
                logit_std=float(self.logit_std[h] / tokens),
                q_norm=math.sqrt(float(self.q_squared[h]) / tokens),
                k_norm=math.sqrt(float(self.k_squared[h]) / tokens),
                radius=float(self.q_max[h] * self.k_max[h]) * self.scale,
            )
            for h in range(self.layer.num_heads)
        )
        return LayerAudit(
            layer=self.layer.name,
            num_heads=self.layer.num_heads,
            num_kv_heads=self.layer.num_kv_heads,
            head_dim=self.layer.head_dim,
            num_tokens=tokens // self.layer.calls,
            heads=heads,
            uniform_rel_error=uniform,
            uniform_rel_error_by_head=uniform_by_head,
            errors=tuple(candidate.result(self.exact) for candidate in self.candidates),
        )


def _refused(layer: AttentionLayer, reason: str) -> LayerAudit:
    sizes = (layer.num_heads, layer.num_kv_heads, layer.head_dim)
    return LayerAudit(layer.name, *sizes, 0, (), None, (), (), refused=reason)


def _squares(x: Tensor, real: Tensor) -> Tensor:
    """Sum of squares per head (H,) of x (B, H, N, Dv) over real tokens, in float64 on the CPU."""
    return _sums(x.double().square().sum(-1), real)


def _sums(x: Tensor, real: Tensor) -> Tensor:
    """Sum per head (H,) of x (B, H, N) over real tokens, in float64 on the CPU."""
    return x.double().masked_fill(~real[:, None], 0.0).sum((0, 2)).cpu()


def _relative(squared: Tensor, exact: Tensor) -> tuple[float, tuple[float, ...]]:
    by_head = tuple(
        math.sqrt(a / b) if b > 0 else math.sqrt(a) for a, b in zip(squared.tolist(), exact.tolist(), strict=True)
    )
    if not float(exact.sum()) > 0:
        raise InputError(
            "the attention output is zero everywhere on these documents; wanted a model with trained weights"
        )
    return math.sqrt(float(squared.sum() / exact.sum())), by_head
