"""Whether the text that a model is healed on is like the one it is judged on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from maclin.adopt.hosts.base import Batch
from maclin.records import Drift

_UNKNOWN, _UNSEEN, _DISTANCE, _TOP = 0.02, 0.3, 0.5, 0.15
"""Shares and bits above which a warning is given; documents of one kind stay below, see docs/heal.md."""


def drift(batches: Sequence[Batch], held_out: Sequence[Batch], unknown_id: int | None = None) -> Drift | None:
    """Token ids to heal on against those to be judged on; None where the batches hold no token ids.

    Args:
        batches: to heal on.
        held_out: to be judged on.
        unknown_id: what the tokenizer gives for what it does not know.
    """
    ours, theirs = _ids(batches), _ids(held_out)
    if not ours or not theirs:
        return None
    healed, judged = torch.cat(ours), torch.cat(theirs)
    size = int(max(healed.max(), judged.max())) + 1
    p, q = (torch.bincount(x, minlength=size).double() for x in (healed, judged))
    everywhere = _in_every_sequence(batches, size)
    p, q = p.masked_fill(everywhere, 0.0), q.masked_fill(everywhere, 0.0)
    if not p.sum() or not q.sum():
        return None
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    distance = float((_divergence(p, middle) + _divergence(q, middle)) / 2)
    unseen, top = float(q[p == 0].sum()), float(p.max())
    unknown = None if unknown_id is None or unknown_id >= size else float(p[unknown_id])
    if unknown_id is not None and unknown_id >= size:
        unknown = 0.0
    return Drift(unknown, unseen, distance, top, len(healed), _warnings(unknown, unseen, distance, top))


def unknown_id_of(tokenize: Callable[[list[str]], Sequence[Batch]]) -> int | None:
    """What a tokenizer gives for a character that no text has; None where it spells everything, byte by byte.

    Args:
        tokenize: from texts to batches with ``input_ids``.
    """
    (strange,), (empty,) = (_ids(tokenize([text])) for text in ("\ua015", ""))
    rest = [i for i in strange.tolist() if i not in set(empty.tolist())]
    return rest[0] if len(rest) == 1 else None


def _warnings(unknown: float | None, unseen: float, distance: float, top: float) -> tuple[str, ...]:
    found: list[str] = []
    advice = "the text may be in another language, or of another kind, than what the model is for"
    if unknown is not None and unknown > _UNKNOWN:
        found.append(f"{unknown:.0%} of the tokens to heal on are unknown to the tokenizer: {advice}")
    elif top > _TOP:
        found.append(f"one token is {top:.0%} of those to heal on, as unknown ones would be: {advice}")
    if unseen > _UNSEEN or distance > _DISTANCE:
        found.append(
            f"{unseen:.0%} of the held-out tokens are in no batch to heal on, and the two distributions of tokens are "
            f"{distance:.2f} bits apart (0 alike, 1 nothing in common): heal on text like that to be served, or more "
            "of it"
        )
    return tuple(found)


def _ids(batches: Sequence[Batch]) -> list[Tensor]:
    found: list[Tensor] = []
    for batch in batches:
        ids, mask = _id_tensor(batch), None if isinstance(batch, Tensor) else batch.get("attention_mask")
        if ids is None:
            continue
        flat = ids if not isinstance(mask, Tensor) or mask.shape != ids.shape else ids[mask.bool()]
        found.append(flat.flatten().cpu().long())
    return found


def _id_tensor(batch: Batch) -> Tensor | None:
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() == 2 else None


def _in_every_sequence(batches: Sequence[Batch], size: int) -> Tensor:
    """Ids that stand in every sequence, such as those of its ends."""
    everywhere = torch.ones(size, dtype=torch.bool)
    for batch in batches:
        ids = _id_tensor(batch)
        for row in ids.cpu() if ids is not None else ():
            there = torch.zeros(size, dtype=torch.bool)
            there[row.long()] = True
            everywhere &= there
    return everywhere


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    there = p > 0
    return (p[there] * (p[there] / q[there]).log2()).sum()
