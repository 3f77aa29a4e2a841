"""Real q, k and v of each attention layer, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from maclin.adopt.hosts import host, layers_of
from maclin.adopt.hosts.base import AttentionCall, AttentionLayer, Batch
from maclin.core.errors import InputError


@dataclass(frozen=True)
class Captured:
    """What ``capture`` kept.

    Attributes:
        layers: every attention layer of the model, also those that were refused or not asked for.
        calls: by layer name, one entry per batch (several where layers share their weights), on the CPU.
    """

    layers: tuple[AttentionLayer, ...]
    calls: Mapping[str, tuple[AttentionCall, ...]]


def capture(
    model: nn.Module, batches: Iterable[Batch], layers: Iterable[str] | None = None, max_tokens: int = 8192
) -> Captured:
    """q, k, v and key mask of a model's attention layers on real inputs.

    Memory: about (H + 2 Hk) x D numbers per token and layer, so name the layers, or lower ``max_tokens``, for a
    large model; ``maclin.audit`` stores nothing.

    Args:
        model: any model that ``maclin.convert_`` takes, converted or not: its attention is exact meanwhile.
        batches: keyword arguments of the model's forward, one mapping per batch.
        layers: names of the layers to keep (default: all that can be replaced).
        max_tokens: stop after the batch that reaches so many tokens, padding included.

    Returns:
        The captured tensors, in the model's dtype, on the CPU.

    Raises:
        InputError: no batches, an unknown layer, a batch that does not fit the model, or NaN or infinity in
            q, k or v; the message names layer and batch.
        CapabilityError: the model's attention cannot be watched, or a layer asked for cannot be replaced.
        MaclinError: a batch does not fit in memory.
    """
    if max_tokens < 1:
        raise InputError(f"wanted max_tokens of at least 1, got {max_tokens}")
    found, batches = layers_of(model, batches)
    wanted = {layer.name for layer in found if layer.refused is None}
    if layers is not None:
        names = list(layers)
        unknown = [name for name in names if name not in wanted]
        if unknown:
            raise InputError(f"no replaceable attention layer {unknown[0]!r}; wanted some of {sorted(wanted)}")
        wanted = set(names)
    calls: dict[str, list[AttentionCall]] = {name: [] for name in sorted(wanted)}
    seen = 0

    def keep(call: AttentionCall) -> None:
        mask = None if call.key_mask is None else call.key_mask.cpu()
        calls[call.layer].append(replace(call, q=call.q.cpu(), k=call.k.cpu(), v=call.v.cpu(), key_mask=mask))

    def count(call: AttentionCall) -> None:
        nonlocal seen
        seen += call.q.shape[0] * call.q.shape[2] if call.layer == first else 0
        keep(call)

    first = next((layer.name for layer in found if layer.name in wanted), "")
    watch(model, batches, [layer for layer in found if layer.name in wanted], count, lambda _: seen < max_tokens)
    return Captured(found, {name: tuple(kept) for name, kept in calls.items()})


def watch(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Iterable[AttentionLayer],
    callback: Callable[[AttentionCall], None],
    go_on: Callable[[int], bool] = lambda done: True,
) -> int:
    """Show ``callback`` every call of ``layers`` on every batch, after checking that its numbers are finite.

    Args:
        model: the model.
        batches: one mapping per batch.
        layers: the layers to watch.
        callback: is given each call; keeps what it wants of it.
        go_on: asked after each batch, with the number of batches done, whether to go on.

    Returns:
        The number of batches done.

    Raises:
        InputError: no batches, or NaN or infinity in q, k or v.
    """
    adapter = host(model)
    names = {layer.module: layer.name for layer in layers}
    done = 0
    for batch in batches:
        index = done

        def checked(call: AttentionCall, index: int = index) -> None:
            check_finite(call, index)
            callback(call)

        adapter.observe(batch, names, checked)
        done += 1
        if not go_on(done):
            break
    if done == 0:
        raise InputError("wanted at least one batch, got none; pass tokenized documents")
    return done


def check_finite(call: AttentionCall, batch: int) -> None:
    """Refuse NaN and infinity at tokens that take part.

    Raises:
        InputError: naming tensor, layer and batch.
    """
    for label, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        bad = ~torch.isfinite(x).all(-1)
        if call.key_mask is not None and call.key_mask.shape[1] == x.shape[2]:
            bad = bad & call.key_mask[:, None, :]
        if bool(bad.any()):
            raise InputError(
                f"{label} of layer {call.layer!r} holds NaN or infinity at {int(bad.sum())} of {bad.numel()} "
                f"positions in batch {batch}; wanted finite numbers: check the weights, or run the model in float32"
            )


def token_mask(call: AttentionCall) -> Tensor:
    """Which queries are real tokens: (B, N) bool; padding of keys is padding of queries in self-attention only."""
    batch, _, length, _ = call.q.shape
    if call.key_mask is None or call.is_cross:
        return torch.ones(batch, length, dtype=torch.bool, device=call.q.device)
    return call.key_mask[:, -length:]
