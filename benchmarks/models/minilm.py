"""all-MiniLM-L6-v2: 6 layers, 12 heads of 32, 512 tokens; its metric is what becomes of its embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maclin.adopt import Loaded
from maclin.adopt import load as load_directory
from maclin.core.errors import InputError
from maclin.progress import Progress, Silent

from . import texts
from .packages import MINILM, unpacked
from .texts import Text

SHORTEST = 256
"""Tokens of a document at least."""

BUCKETS = ((256, 319), (320, 383), (384, 511), (512, 512))
"""Tokens, both included; what is longer is cut at 512."""

ALIKE = (
    ("A man is playing a guitar on the stage.", "Someone plays guitar in front of an audience."),
    ("The company reported higher profits this year.", "Annual earnings of the firm went up."),
)
"""Pairs of sentences that say the same."""


def load(progress: Progress | None = None) -> Loaded:
    """The packaged model with its tokenizer.

    Raises:
        InputError: the package cannot be had; the message says where to put it.
    """
    return load_directory(unpacked(MINILM, progress or Silent()))


def similarities(model: Loaded) -> tuple[float, float]:
    """The lowest cosine of two sentences that say the same, and the highest of two that do not."""
    flat = [sentence for pair in ALIKE for sentence in pair]
    e = torch.nn.functional.normalize(model.encode(flat), dim=1)
    cosines = e @ e.T
    same = [float(cosines[i, i + 1]) for i in range(0, len(flat), 2)]
    other = [float(cosines[i, j]) for i in range(len(flat)) for j in range(i) if i // 2 != j // 2]
    return min(same), max(other)


@dataclass(frozen=True)
class Judged:
    """Documents to judge by, with their tokens.

    Attributes:
        documents: of at least ``SHORTEST`` tokens.
        tokens: of each, at most 512.
    """

    documents: tuple[Text, ...]
    tokens: tuple[int, ...]


def _long(model: Loaded, pool: Sequence[Text], number: int, longest_share: float = 0.5) -> list[tuple[Text, int]]:
    """So many documents of at least ``SHORTEST`` tokens, at most a share of them cut at 512."""
    found: list[tuple[Text, int]] = []
    cut = 0
    for text in texts.drawn(pool, len(pool), lambda text: len(text.text) > 2 * SHORTEST):
        (count,) = model.token_counts([text.text[:8_000]])
        if count >= SHORTEST and (count < 512 or cut < longest_share * number):
            cut += count == 512
            found.append((text, count))
            if len(found) == number:
                return found
    raise InputError(f"wanted {number} documents of at least {SHORTEST} tokens, found {len(found)}")


def judged(model: Loaded, number: int = 300, progress: Progress | None = None) -> Judged:
    """Documents that nothing was healed on: newsgroups' test part and kernel documentation, half of either.

    Args:
        model: whose tokens are counted.
        number: of documents.
        progress: is told when something is brought.
    """
    pools = (texts.newsgroups("test", progress), texts.kernel("judged", progress))
    rows = [row for pool in pools for row in _long(model, pool, number // len(pools))]
    return Judged(tuple(text for text, _ in rows), tuple(tokens for _, tokens in rows))


def learned(model: Loaded, number: int, progress: Progress | None = None) -> list[Text]:
    """Documents to heal on, of the same kinds: newsgroups' training part, other files of the kernel's."""
    pools = (texts.newsgroups("train", progress), texts.kernel("learned", progress))
    by_kind = [[text for text, _ in _long(model, pool, number // len(pools), 0.7)] for pool in pools]
    return [text for together in zip(*by_kind, strict=True) for text in together]


def cosines(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of each document's embedding with its earlier one: (documents,)."""
    return torch.nn.functional.cosine_similarity(before, after, dim=1)


def same_neighbour(before: Tensor, after: Tensor) -> float:
    """Share of the documents whose nearest other document is the same in both embeddings."""

    def nearest(x: Tensor) -> Tensor:
        e = torch.nn.functional.normalize(x, dim=1)
        return (e @ e.T).fill_diagonal_(-2.0).argmax(1)

    return float((nearest(before) == nearest(after)).double().mean())


def by_length(values: Tensor, tokens: Sequence[int]) -> dict[str, tuple[float, int]]:
    """Mean and number of documents in each bucket of ``BUCKETS`` that has any."""
    counts = torch.tensor(tokens)
    out: dict[str, tuple[float, int]] = {}
    for low, high in BUCKETS:
        inside = (counts >= low) & (counts <= high)
        if bool(inside.any()):
            out[f"{low}-{high}" if low != high else f"{low}"] = (float(values[inside].mean()), int(inside.sum()))
    return out


@dataclass(frozen=True)
class Newsgroups:
    """Documents of at least ``SHORTEST`` tokens with their newsgroup, to learn centroids from and to judge by."""

    train: tuple[Text, ...]
    test: tuple[Text, ...]


def newsgroups(model: Loaded, number: int = 600, progress: Progress | None = None) -> Newsgroups:
    """So many documents of either part."""
    train, test = (
        tuple(text for text, _ in _long(model, texts.newsgroups(part, progress), number, 1.0))
        for part in ("train", "test")
    )
    return Newsgroups(train, test)


def centroid_accuracy(train: Tensor, test: Tensor, data: Newsgroups) -> float:
    """Share of the test documents whose nearest mean of a newsgroup, by cosine, is that of their own.

    Args:
        train: embeddings of ``data.train``.
        test: embeddings of ``data.test``.
        data: the documents.
    """
    names = sorted({text.label for text in data.train})
    e = torch.nn.functional.normalize(train, dim=1)
    labels = torch.tensor([names.index(text.label) for text in data.train])
    centroids = torch.stack([e[labels == i].mean(0) for i in range(len(names))])
    found = (torch.nn.functional.normalize(test, dim=1) @ torch.nn.functional.normalize(centroids, dim=1).T).argmax(1)
    wanted = [text.label for text in data.test]
    return sum(names[i] == label for i, label in zip(found.tolist(), wanted, strict=True)) / len(wanted)
