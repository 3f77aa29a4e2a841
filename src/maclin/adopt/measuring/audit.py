"""The error of every mechanism on every layer, measured on real q, k and v beside exact and uniform attention.

Each call of a layer is compared while the model runs, and only sums are kept. Mechanisms that learn from data are
calibrated before, on every third document; then everything is measured on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from maclin.adopt.calibrate import for_learning, only, sampled, watch_documents
from maclin.adopt.capture import token_mask
from maclin.adopt.exact import ExactAttention, actual_scale, exact_attention, uniform_attention
from maclin.adopt.hosts import host, layers_of
from maclin.adopt.hosts.base import AttentionCall, AttentionLayer, Batch
from maclin.adopt.measuring.candidates import Candidate, Trial, default_candidates, relative, squares, sums, trials
from maclin.adopt.measuring.sensitivity import (
    EACH_LONGEST,
    EACH_TOKENS,
    LONGEST,
    TOKENS,
    first_documents,
    output_changes,
)
from maclin.core.errors import MaclinError
from maclin.records import Audit, HeadStatistics, LayerAudit

FEW_DOCUMENTS, FEW_TOKENS = 16, 4096
"""Below either, the audit carries a warning."""

_LEAST_ERROR = 0.01  # of averaging: below, what it does to the output is mostly rounding


def audit(
    model: nn.Module,
    batches: Iterable[Batch],
    mechanisms: Iterable[Candidate] | None = None,
    progress: Callable[[int], None] | None = None,
    calibrating: Callable[[str], None] | None = None,
    *,
    sensitivities: bool | Literal["each"] = True,
    weighing: Callable[[str], None] | None = None,
) -> Audit:
    """Measure every mechanism on every attention layer of a model.

    The error is ||out - exact|| / ||exact|| over all tokens that are not padding, against exact attention on the
    same q, k and v in float32. A mechanism that cannot be applied is recorded with the reason.

    Where a mechanism learns from data, every third document is kept apart to calibrate it on, layer by layer (from
    16 sequences of up to 2048 tokens), and all mechanisms are measured on the other documents. The batches are then
    kept, and gone through twice.

    Args:
        model: any model that ``maclin.convert_`` takes; it is left as it is.
        batches: keyword arguments of the model's forward, one mapping per batch, padded with an attention_mask.
        mechanisms: names, or pairs of name and configuration (default: ``default_candidates``).
        progress: called after each batch that was measured, with the number of them.
        calibrating: called with the name of each layer whose mechanisms have been calibrated.
        sensitivities: also measure what the model's output makes of errors in each layer, from one more run of
            the model for each layer on the first 1024 tokens: the layer is replaced by averaging, and the squared
            relative change of the output is divided by the squared relative error that averaging has there.
            ``maclin.plan`` weighs the layers with it. "each" also tries each mechanism in each layer alone, on the
            first 6144 tokens: of two errors of one size, one can be harmless and the other not. That takes one more
            run for each layer and mechanism, and is worth it where a model is large or looks back far.
        weighing: called with the name of each layer of each document whose sensitivity has been measured.

    Returns:
        One row per attention module, in the order of the first call; a module that several layers share is one
        row over all its calls.

    Raises:
        OptionError: an unknown mechanism; the message lists the known.
        InputError: no batches, a batch that does not fit the model, NaN or infinity in q, k or v.
        CapabilityError: the model's attention cannot be watched.
        MaclinError: a batch does not fit in memory.
    """
    layers, batches = layers_of(model, batches)
    watched = [layer for layer in layers if layer.unmeasured is None]
    given = None if mechanisms is None else list(mechanisms)
    candidates = {
        layer.name: trials(default_candidates(layer.head_dim) if given is None else given, layer) for layer in watched
    }
    learning = 0
    if any(candidate.learns for found in candidates.values() for candidate in found):
        batches = list(batches)
        learning = _teach(model, batches, watched, candidates, calibrating)
    totals = {layer.name: _Totals(layer, candidates[layer.name]) for layer in watched}

    def measure(call: AttentionCall, numbers: range) -> None:
        rows = [row for row, document in enumerate(numbers) if not (learning and for_learning(document))]
        if rows:
            totals[call.layer].add(only(call, rows))

    def report(done: int) -> bool:
        if progress is not None:
            progress(done)
        return True

    few: list[Batch] = []
    with torch.no_grad():
        sizes = (EACH_TOKENS, EACH_LONGEST) if sensitivities == "each" else (TOKENS, LONGEST)
        seen = first_documents(batches, few, *sizes) if sensitivities else batches
        watch_documents(model, seen, watched, measure, report)
    rows = tuple(
        totals[layer.name].row() if layer.unmeasured is None else _refused(layer, layer.unmeasured) for layer in layers
    )
    measured = [totals[row.layer] for row in rows if row.refused is None]
    documents = max((t.documents // t.layer.calls for t in measured), default=0)
    length = max((t.longest for t in measured), default=0)
    tokens = max((row.num_tokens for row in rows), default=0)
    warnings = _warnings(documents, tokens)
    if sensitivities:
        try:
            tried = {t.layer.name: t.tried() for t in measured} if sensitivities == "each" else {}
            changes = output_changes(model, few, [t.layer for t in measured], tried, weighing)
            rows = tuple(
                _weighed(row, changes[row.layer], totals[row.layer]) if row.layer in changes else row for row in rows
            )
        except (MaclinError, RuntimeError, ValueError, TypeError) as error:
            warnings += (
                f"what each layer means to the output could not be measured, a plan weighs all alike: {error}",
            )
    device, dtype = next(((t.device, t.dtype) for t in measured), ("", ""))
    root = type(host(model).root).__name__
    return Audit(rows, length, documents, warnings, root, learning, device, dtype)


def _weighed(row: LayerAudit, changes: Sequence[float | None], totals: _Totals) -> LayerAudit:
    """The row with the change of the output per squared relative error, and with that by each mechanism."""
    averaging, *others = changes
    if averaging is not None and row.uniform_rel_error:
        row = replace(row, sensitivity=averaging / max(row.uniform_rel_error, _LEAST_ERROR) ** 2)
    if not others:
        return row
    found = dict(zip(totals.usable(), others, strict=True))
    errors = (replace(error, output_change=found.get(i)) for i, error in enumerate(row.errors))
    return replace(row, errors=tuple(errors))


def _teach(
    model: nn.Module,
    batches: list[Batch],
    layers: list[AttentionLayer],
    tried: Mapping[str, list[Trial]],
    calibrating: Callable[[str], None] | None,
) -> int:
    """Calibrate what learns from data on every third document; the number of these, 0 where nothing has learned."""
    documents: set[int] = set()

    def takes(document: int) -> bool:
        if for_learning(document):
            documents.add(document)
        return for_learning(document)

    pupils = [layer for layer in layers if any(c.learns for c in tried[layer.name])]
    taught = False
    for layer, sample in sampled(model, batches, pupils, takes):
        for candidate in tried[layer.name]:
            taught = candidate.learn(sample) or taught
        if calibrating is not None:
            calibrating(layer.name)
    for layer in pupils:
        for candidate in tried[layer.name]:
            candidate.leave_untaught()
    return len(documents) if taught else 0


def _warnings(documents: int, tokens: int) -> tuple[str, ...]:
    if tokens and (documents < FEW_DOCUMENTS or tokens < FEW_TOKENS):
        return (
            f"small calibration set: {documents} documents, {tokens} tokens to measure on; errors near the tolerance "
            "may change with other documents, and with them the plan; use at least "
            f"{FEW_DOCUMENTS} documents and {FEW_TOKENS} tokens",
        )
    return ()


class _Totals:
    """Everything that is summed over the calls of one layer."""

    def __init__(self, layer: AttentionLayer, candidates: list[Trial]) -> None:
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
        self.device = self.dtype = ""

    def add(self, call: AttentionCall) -> None:
        real = token_mask(call)
        exact = exact_attention(call)
        lengths = real.sum(1)
        self.documents += int((lengths > 0).sum())
        self.longest = max(self.longest, int(lengths.max()))
        self.tokens += int(lengths.sum())
        self.exact += squares(exact.out, real)
        self.uniform += squares(uniform_attention(call) - exact.out, real)
        self._describe(call, exact, real)
        for candidate in self.candidates:
            candidate.add(call, exact.out, real)

    def _describe(self, call: AttentionCall, exact: ExactAttention, real: Tensor) -> None:
        several = real & (exact.attended > 1)
        most = exact.attended.clamp_min(2).log()[:, None]
        self.entropy += sums(exact.entropy / most, several)
        self.entropy_rows += int(several.sum())
        self.logit_std += sums(exact.logit_std, real)
        groups = self.layer.num_heads // self.layer.num_kv_heads
        for x, squared, most_so_far in (
            (call.q, self.q_squared, self.q_max),
            (call.k.repeat_interleave(groups, dim=1)[:, :, -call.q.shape[2] :], self.k_squared, self.k_max),
        ):
            norms = x.double().norm(dim=-1) * real[:, None]
            squared += norms.square().sum((0, 2)).cpu()
            torch.maximum(most_so_far, norms.amax((0, 2)).cpu(), out=most_so_far)
        self.scale = actual_scale(call)
        self.device, self.dtype = str(call.q.device), str(call.q.dtype).removeprefix("torch.")

    def usable(self) -> list[int]:
        """Which of the candidates could be applied."""
        return [i for i, candidate in enumerate(self.candidates) if candidate.reason is None]

    def tried(self) -> list[nn.Module]:
        """What they made of the layer, as calibrated."""
        return [self.candidates[i].draws[0] for i in self.usable()]

    def row(self) -> LayerAudit:
        if not self.tokens:
            return _refused(self.layer, "it was not called on any token of these documents")
        uniform, uniform_by_head = relative(self.uniform, self.exact)
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
            value_dim=self.layer.value_dim,
            is_causal=self.layer.is_causal,
            calls=self.layer.calls,
            energy_by_head=tuple((self.exact / self.exact.sum()).tolist()),
        )


def _refused(layer: AttentionLayer, reason: str) -> LayerAudit:
    sizes = (layer.num_heads, layer.num_kv_heads, layer.head_dim)
    return LayerAudit(layer.name, *sizes, 0, (), None, (), (), refused=reason)
