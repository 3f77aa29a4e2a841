"""Calibrating the mechanisms of a model on its own q, k and v."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.mechanisms import Mechanism
from ..core.mechanisms.base import calibrate
from .attention import MultiheadAttention
from .generation import evaluating

_MOST_SEQUENCES = 16
_MOST_TOKENS = 2048


class _Watch:
    """Collects what one mechanism is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.is_causal = False
        self.sequences = 0

    def __call__(self, mechanism: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        room = _MOST_SEQUENCES - self.sequences
        if room <= 0:
            return
        q, k, v = (x[:room, :, :_MOST_TOKENS].detach() for x in args)
        mask = options.get("key_mask")
        if mask is None:
            mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        self.calls.append((q, k, v, mask[:room, :_MOST_TOKENS]))
        self.is_causal = bool(options.get("is_causal"))
        self.sequences += len(q)

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and mask of all calls, shorter ones padded and masked behind."""
        keys = max(call[1].shape[2] for call in self.calls)
        queries = max(call[0].shape[2] for call in self.calls)
        if any(call[0].shape[2] != call[1].shape[2] for call in self.calls):
            # of two sequences, the mask says nothing of the queries: none may be made up
            queries = min(call[0].shape[2] for call in self.calls)
        pad = nn.functional.pad
        rows = [
            (
                pad(q, (0, 0, 0, queries - q.shape[2])),
                pad(k, (0, 0, 0, keys - k.shape[2])),
                pad(v, (0, 0, 0, keys - v.shape[2])),
                pad(mask, (0, keys - mask.shape[1])),
            )
            for q, k, v, mask in self.calls
        ]
        q, k, v, mask = (torch.cat(column) for column in zip(*rows, strict=True))
        return q, k, v, mask


def calibrate_(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> nn.Module:
    """Replace the mechanisms that learn from data by ones that ``maclin.calibrate`` made on what the model feeds them.

    At most 16 sequences of 2,048 tokens per attention are used. The model is run as it is, so calibrate after some
    training, not before: what a fresh model's q and k look like says little.

    Args:
        model: any module with ``maclin.nn.MultiheadAttention`` inside.
        batches: keyword arguments of the model's forward.

    Returns:
        The model.

    Raises:
        InputError: nothing to calibrate on, or too few tokens.
    """
    pupils = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MultiheadAttention) and module.mechanism.learns_from_data
    }
    watches = {name: _Watch() for name in pupils}
    hooks = [
        pupils[name].mechanism.register_forward_pre_hook(watch, with_kwargs=True) for name, watch in watches.items()
    ]
    try:
        with evaluating(model):
            for batch in batches:
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    made: dict[str, Mechanism] = {}
    for name, watch in watches.items():
        if not watch.calls:
            raise InputError(
                f"attention {name!r} was not called on any batch; pass at least one batch of the model's input"
            )
        q, k, v, mask = watch.all()
        try:
            made[name] = calibrate(pupils[name].mechanism, q, k, v, mask, is_causal=watch.is_causal)
        except InputError as error:
            raise InputError(f"attention {name!r}: {error}") from error
    for name, mechanism in made.items():
        pupils[name].mechanism = mechanism.train(pupils[name].training)
    return model
