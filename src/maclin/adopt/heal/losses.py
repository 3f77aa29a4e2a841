"""What is compared with the original: hidden states, embeddings, logits; errors and losses of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from maclin.adopt.hosts.base import Batch

from .blocks import Output, Run, first_tensor
from .divergence import largest, top_divergence
from .settings import Readout

MEASURES = {
    "embedding": "1 - cosine",
    "tokens": "1 - cosine per token",
    "logits": "KL divergence",
    "none": "hidden states",
}
"""What ``HealResult.measure`` says, by the readout."""

Read = Callable[[Output, Batch], Tensor]
"""From the model's output to (..., E) vectors that are compared by their angle."""


@dataclass(frozen=True)
class Target:
    """What the original gives on one batch.

    Attributes:
        hidden: (B, N, E) of the compared blocks, in the order of their calls.
        output: vectors (..., E) that are compared by angle, or the largest logits' log-probabilities (T, K); None
            where the output is not compared.
        index: of the largest logits (T, K).
    """

    hidden: tuple[Tensor, ...]
    output: Tensor | None
    index: Tensor | None = None

    def to(self, device: torch.device) -> Target:
        """On a device, in float32."""
        output = None if self.output is None else self.output.to(device, torch.float32)
        index = None if self.index is None else self.index.to(device, torch.int64)
        return Target(tuple(x.to(device, torch.float32) for x in self.hidden), output, index)


@dataclass(frozen=True)
class Errors:
    """Of one batch, each with gradients where they are on.

    Attributes:
        hidden: squared relative error of each compared block.
        output: of the final output; None where it is not compared.
    """

    hidden: tuple[Tensor, ...]
    output: Tensor | None

    def loss(self, hidden_weight: float, output_weight: float) -> Tensor:
        """What distillation minimises: the mean over blocks, and the output."""
        total = hidden_weight * torch.stack(self.hidden).mean()
        return total if self.output is None else total + output_weight * self.output

    def figures(self) -> tuple[float, float]:
        """The error of the final output (of the last block where it is not compared), and that of the hidden states."""
        hidden = float(torch.stack(self.hidden).detach().mean()) ** 0.5
        return (float(self.hidden[-1].detach()) ** 0.5 if self.output is None else float(self.output.detach())), hidden


class Comparison:
    """Makes targets of what the original gives, and errors of what the converted model gives against them.

    Args:
        readout: "embedding" (the mean of the last hidden states over the tokens), "tokens" (each last hidden state),
            "logits", "none", or a function of its own of output and batch that gives vectors (..., E).
        top_k: logits per token that are kept.
    """

    def __init__(self, readout: Readout | Read, top_k: int) -> None:
        self.readout = readout
        self.top_k = top_k

    @property
    def measure(self) -> str:
        """What the error of the output is."""
        return "1 - cosine" if callable(self.readout) else MEASURES[self.readout]

    @torch.no_grad()
    def target(self, run: Run, batch: Batch) -> Target:
        """What to keep of a run of the original."""
        hidden = tuple(x.detach() for _, x in run.hidden)
        if self.readout == "none":
            return Target(hidden, None)
        if self.readout != "logits":
            return Target(hidden, self._vectors(run.output, batch).detach())
        logits = _judged_logits(run.output, batch)
        index, found = largest(logits, min(self.top_k, logits.shape[-1]))
        return Target(hidden, found, index)

    def errors(self, run: Run, target: Target, batch: Batch) -> Errors:
        """Errors of a run of the converted model."""
        pairs = zip(run.hidden, target.hidden, strict=True)
        hidden = tuple(hidden_error(ours, theirs, token_mask(batch, ours)) for (_, ours), theirs in pairs)
        if target.output is None:
            return Errors(hidden, None)
        if target.index is not None:
            return Errors(hidden, top_divergence(_judged_logits(run.output, batch), target.output, target.index))
        ours = self._vectors(run.output, batch).float()
        return Errors(hidden, (1.0 - F.cosine_similarity(ours, target.output, dim=-1, eps=1e-12)).mean())

    def _vectors(self, output: Output, batch: Batch) -> Tensor:
        """(vectors, E)."""
        if callable(self.readout):
            found = self.readout(output, batch)
            return found.flatten(0, -2) if found.dim() > 1 else found[None]
        last = last_hidden(output)
        mask = token_mask(batch, last)
        if self.readout == "embedding":
            weight = last.new_ones(last.shape[:2]) if mask is None else mask.to(last.dtype)
            return (last * weight[..., None]).sum(1) / weight.sum(1).clamp_min(1)[:, None]
        return last.flatten(0, 1) if mask is None else last[mask]


def chosen_readout(output: Output, batch: Batch) -> Readout:
    """What to compare: logits per token where a model gives them, else the embedding of a text, else each token."""
    logits = _logits(output)
    if logits is not None and logits.dim() == 3:
        return "logits"
    try:
        last = last_hidden(output)
    except (TypeError, ValueError):
        return "none"
    if last.dim() != 3:
        return "none"
    return "embedding" if _is_text(batch) else "tokens"


def last_hidden(output: Output) -> Tensor:
    """The last hidden states (B, N, E) in a model's output."""
    named = getattr(output, "last_hidden_state", None)
    return named if isinstance(named, Tensor) else first_tensor(output)


def token_mask(batch: Batch, hidden: Tensor) -> Tensor | None:
    """Which of the tokens of (B, N, E) are real, (B, N) bool; None where all are, or the batch does not say."""
    if isinstance(batch, Tensor) or hidden.dim() != 3:
        return None
    for key in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]:
            return _or_none(mask.to(hidden.device, torch.bool))
    for key in ("src_key_padding_mask", "key_padding_mask"):  # torch's own: True = ignore
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2] and mask.dtype == torch.bool:
            return _or_none(~mask.to(hidden.device))
    return None


def _or_none(mask: Tensor) -> Tensor | None:
    """None where all are real; a GPU, which would have to be waited for, is not asked."""
    return None if mask.device.type == "cpu" and bool(mask.all()) else mask


def hidden_error(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """||x - x'||² / ||x' - mean(x')||² over the real tokens of a batch."""
    difference = ours.float() - theirs
    dims = tuple(range(theirs.dim() - 1))
    if mask is None or theirs.dim() != 3:
        spread = theirs - theirs.mean(dims)
    else:
        weight = mask[..., None].to(theirs.dtype)
        spread = (theirs - (theirs * weight).sum(dims) / weight.sum()) * weight
        difference = difference * weight
    tiny = torch.finfo(torch.float32).tiny
    # by norms, whose derivative is one pass over the tensor
    of_difference, of_spread = (torch.linalg.vector_norm(x).square() for x in (difference, spread))
    return of_difference / of_spread.clamp_min(tiny)


def _logits(output: Output) -> Tensor | None:
    found = getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def _judged_logits(output: Output, batch: Batch) -> Tensor:
    """Logits (T, V) at real tokens."""
    found = _logits(output)
    logits = first_tensor(output) if found is None else found
    if logits.dim() == 2:
        return logits
    mask = token_mask(batch, logits)
    return logits.flatten(0, -2) if mask is None else logits[mask]


def _is_text(batch: Batch) -> bool:
    return not isinstance(batch, Tensor) and isinstance(batch.get("input_ids"), Tensor)
