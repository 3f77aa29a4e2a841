"""How far the embeddings of a changed model are from those of the original."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class EmbeddingFidelity:
    """Agreement of two sets of embeddings of the same documents.

    ``cosine_mean`` and ``cosine_p05`` are the mean and the fifth percentile of the cosine between both
    embeddings of a document. ``neighbour_agreement`` is the share of documents whose nearest other document
    is the same in both; None where there are fewer than three, since it could not differ.
    """

    cosine_mean: float
    cosine_p05: float
    neighbour_agreement: float | None


def embedding_fidelity(
    original: Tensor,  # (n, E)
    changed: Tensor,  # (n, E)
) -> EmbeddingFidelity:
    """Compare embeddings document by document, and which documents they bring together.

    Args:
        original: embeddings by the original model, one document a row.
        changed: embeddings of the same documents by the changed model.

    Raises:
        ValueError: the shapes differ, or there is no document.
    """
    if original.ndim != 2 or original.shape != changed.shape or len(original) == 0:
        raise ValueError(
            f"wanted two matrices of one shape (documents, width), got {tuple(original.shape)} and "
            f"{tuple(changed.shape)}"
        )
    a, b = F.normalize(original.double(), dim=-1), F.normalize(changed.double(), dim=-1)
    cosines = (a * b).sum(-1)
    agreement = None
    if len(a) > 2:
        agreement = (_neighbours(a) == _neighbours(b)).double().mean().item()
    return EmbeddingFidelity(cosines.mean().item(), torch.quantile(cosines, 0.05).item(), agreement)


def _neighbours(unit: Tensor) -> Tensor:
    return (unit @ unit.mT).fill_diagonal_(-torch.inf).argmax(-1)
