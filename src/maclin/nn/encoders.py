"""Encoder models: classification, tagging, regression, matching."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import InputError
from .config import MacformerConfig
from .frontends import front_end
from .model import MacformerModel, ModelOutput
from .stack import Stack

IGNORED = -100
"""Label of what is not judged, as in torch."""


class MacformerEncoder(MacformerModel):
    """Front end and bidirectional stack: inputs -> hidden states, one per token. The other encoders stand on it.

    Args:
        config: of the model.
    """

    def __init__(self, config: MacformerConfig) -> None:
        super().__init__(config)
        self.front_end = front_end(config)
        # a small start, since it stands beside vectors of unit mean square and is the same in every sequence
        self.cls = nn.Parameter(0.02 * torch.randn(config.embed_dim)) if config.pooling == "cls" else None
        self.stack = Stack(config, "encoder")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, N, E) and their mask (B, N), True = attended, or None where all are.

        With ``pooling="cls"`` N counts the token in front.

        Args:
            x: as the front end takes it.
            mask: as the front end takes it, True = attend.
        """
        vectors, mask = self.front_end(x, mask)
        if self.cls is not None:
            vectors = torch.cat([self.cls.to(vectors.dtype).expand(len(vectors), 1, -1), vectors], dim=1)
            mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        hidden, _ = self.stack(vectors, mask)
        return hidden, mask

    def pooled(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """One vector per sequence (B, E), made as the configuration's ``pooling`` says; 0 where nothing is attended."""
        hidden, mask = self(x, mask)
        if self.config.pooling == "cls":
            return hidden[:, 0]
        if mask is None:
            return hidden.mean(1) if self.config.pooling == "mean" else hidden[:, -1]
        if self.config.pooling == "mean":
            weight = mask.to(hidden.dtype)[..., None]
            return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1.0)
        index = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, index, -1).amax(1)
        found = hidden[torch.arange(len(hidden), device=mask.device), last.clamp_min(0)]
        return found * (last >= 0)[:, None].to(hidden.dtype)


class MacformerClassifier(MacformerModel):
    """A class per sequence: encoder, pooling, linear scores.

    Args:
        config: ``num_outputs`` classes.

    Example:
        >>> model = MacformerClassifier(MacformerConfig(frontend="bytes", num_outputs=20))
        >>> model(ids, mask, labels).loss.backward()
    """

    def __init__(self, config: MacformerConfig) -> None:
        super().__init__(config)
        self.encoder = MacformerEncoder(config)
        self.head = nn.Linear(config.embed_dim, config.num_outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> ModelOutput:
        """Scores (B, num_outputs), and cross-entropy with labels (B,), of which -100 is not judged.

        Raises:
            InputError: inputs or labels that do not fit.
        """
        logits = self.head(self.encoder.pooled(x, mask))
        return ModelOutput(logits, None if labels is None else cross_entropy(logits, labels))


class MacformerTagger(MacformerModel):
    """A class per token: encoder, linear scores.

    Args:
        config: ``num_outputs`` classes.
    """

    def __init__(self, config: MacformerConfig) -> None:
        super().__init__(config)
        self.encoder = MacformerEncoder(config)
        self.head = nn.Linear(config.embed_dim, config.num_outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> ModelOutput:
        """Scores (B, N, num_outputs), and cross-entropy with labels (B, N), of which -100 is not judged.

        Raises:
            InputError: inputs or labels that do not fit.
        """
        hidden, _ = self.encoder(x, mask)
        logits = self.head(hidden[:, 1:] if self.config.pooling == "cls" else hidden)
        return ModelOutput(logits, None if labels is None else cross_entropy(logits, labels))


class MacformerRegressor(MacformerModel):
    """Numbers per sequence: encoder, pooling, linear.

    Args:
        config: ``num_outputs`` numbers.
    """

    def __init__(self, config: MacformerConfig) -> None:
        super().__init__(config)
        self.encoder = MacformerEncoder(config)
        self.head = nn.Linear(config.embed_dim, config.num_outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> ModelOutput:
        """Numbers (B, num_outputs), and the mean squared error to labels of that shape, or (B,) with one number.

        Raises:
            InputError: inputs or labels that do not fit.
        """
        made = self.head(self.encoder.pooled(x, mask))
        if labels is None:
            return ModelOutput(made)
        wanted = labels[:, None] if labels.dim() == 1 and made.shape[1] == 1 else labels
        if wanted.shape != made.shape or not wanted.is_floating_point():
            raise InputError(
                f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; wanted {tuple(made.shape)}, floats"
            )
        return ModelOutput(made, F.mse_loss(made.float(), wanted.float()))


class MacformerMatcher(MacformerModel):
    """A class per pair of sequences: one encoder for both, then a small network on what their vectors have in common.

    The network sees u, w, u w and u - w, with one hidden layer of width ``ff_dim``.

    Args:
        config: ``num_outputs`` classes, 2 of "match or not".

    Source: the two-tower model of the Long Range Arena's retrieval task (Tay et al. 2021, arXiv 2011.04006, section
        2.2.3), which encodes each document alone; deviations: pooling as configured.
    """

    def __init__(self, config: MacformerConfig) -> None:
        super().__init__(config)
        self.encoder = MacformerEncoder(config)
        self.hidden = nn.Linear(4 * config.embed_dim, config.ff_dim)
        self.head = nn.Linear(config.ff_dim, config.num_outputs)

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        mask1: Tensor | None = None,
        mask2: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """Scores (B, num_outputs) of pairs, and cross-entropy with labels (B,); lengths may differ.

        Raises:
            InputError: inputs or labels that do not fit.
        """
        if len(x1) != len(x2):
            raise InputError(f"x1 holds {len(x1)} sequences and x2 {len(x2)}; wanted pairs")
        u, w = self.encoder.pooled(x1, mask1), self.encoder.pooled(x2, mask2)
        logits = self.head(F.gelu(self.hidden(torch.cat([u, w, u * w, u - w], dim=-1))))
        return ModelOutput(logits, None if labels is None else cross_entropy(logits, labels))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 of logits (..., C) with labels (...), of which -100 is not judged.

    0 where nothing is judged. Labels are looked at on the CPU only.

    Raises:
        InputError: labels of another shape, or not from 0 to C - 1.
    """
    classes = logits.shape[-1]
    if labels.shape != logits.shape[:-1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; wanted "
            f"{tuple(logits.shape[:-1])}, integers"
        )
    judged = labels != IGNORED
    if labels.device.type == "cpu":
        strange = labels[judged & ((labels < 0) | (labels >= classes))]
        if strange.numel():
            raise InputError(
                f"a label is {int(strange[0])}; wanted 0 to {classes - 1} for {classes} classes, or {IGNORED} "
                "where nothing "
                "is judged"
            )
    total = F.cross_entropy(
        logits.float().flatten(0, -2), labels.long().flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / judged.sum().clamp_min(1)
