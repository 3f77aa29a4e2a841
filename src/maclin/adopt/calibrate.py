"""Mechanisms that learn from data, taught by real q, k and v: a bounded number of them from each layer of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from maclin.adopt.capture import token_mask, watch
from maclin.adopt.hosts.base import AttentionCall, AttentionLayer, Batch
from maclin.core import mechanisms as registry
from maclin.core.mechanisms.base import calibrate
from maclin.records import Config

SEQUENCES, LENGTH = 24, 2048
"""Sequences of each layer that are kept to calibrate on, spread evenly over the documents, and tokens of each."""

HELD_BYTES = 1 << 32
"""Of q, k and v that are held at once, at the most: layers that would need more take another run of the model."""


def for_learning(document: int) -> bool:
    """Whether a document, by its running number, is one to calibrate on: every third. The others are measured on."""
    return document % 3 == 2


def learned(mechanism: registry.Mechanism, call: AttentionCall) -> registry.Mechanism:
    """``maclin.calibrate`` on a captured call, in float32 or better, on the CPU.

    Args:
        mechanism: on the CPU; stays as it is.
        call: what to learn from.

    Raises:
        InputError: too few tokens; the message says how many are needed.
    """
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    with torch.no_grad():
        return calibrate(mechanism, q, k, v, call.key_mask, is_causal=call.is_causal, scale=call.scale)


def short_config(mechanism: registry.Mechanism) -> Config:
    """The options of a mechanism that are not its defaults, with which it is built alike; a window always."""
    window = {key: mechanism.config[key] for key in ("window",) if key in mechanism.config}  # what a reader asks first
    return window | registry.row(mechanism.name).differing(mechanism.config)


def needs_data(config: Config) -> bool:
    """Whether a configuration is one that calibration made: counts or centres that mean nothing without bases."""
    if bool(config.get("centred")) or config.get("counts") is not None:
        return True
    values = [item for value in config.values() for item in (value if isinstance(value, list) else [value])]
    return any(needs_data(value) for value in values if isinstance(value, dict))  # of mechanisms made of others


def sampled(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Iterable[AttentionLayer],
    takes: Callable[[int], bool] = lambda document: True,
) -> Iterator[tuple[AttentionLayer, AttentionCall]]:
    """q, k and v of each layer, sequences on end of each other padded on the right, for ``learned``.

    At most ``SEQUENCES`` sequences of ``LENGTH`` tokens of a layer, and of a shared module those of all its calls.

    Args:
        model: the model; its attention is exact meanwhile.
        batches: gone through once, or once per group of layers where one run would hold more than ``HELD_BYTES``.
        layers: of this model.
        takes: which documents, by their running number; layers that meet none are left out.

    Raises:
        InputError: no batches, or NaN or infinity in q, k or v.
    """
    for group in _groups(layers):
        samples = {layer.name: _Sample(takes) for layer in group}
        watch_documents(model, batches, group, lambda call, numbers, of=samples: of[call.layer].add(call, numbers))
        for layer in group:
            sample = samples.pop(layer.name)
            if sample.parts:
                yield layer, sample.whole()


def watch_documents(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Iterable[AttentionLayer],
    callback: Callable[[AttentionCall, range], None],
    go_on: Callable[[int], bool] = lambda done: True,
) -> None:
    """``capture.watch``, with the running numbers of the documents that a call holds."""
    first = size = 0

    def numbered(call: AttentionCall) -> None:
        nonlocal size
        size = call.q.shape[0]
        callback(call, range(first, first + size))

    def advance(done: int) -> bool:
        nonlocal first
        first += size
        return go_on(done)

    watch(model, batches, layers, numbered, advance)


def only(call: AttentionCall, rows: Sequence[int]) -> AttentionCall:
    """These sequences of a call."""
    if len(rows) == call.q.shape[0]:
        return call
    q, k, v = (x[list(rows)] for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, key_mask=None if call.key_mask is None else call.key_mask[list(rows)])


def _groups(layers: Iterable[AttentionLayer]) -> Iterator[list[AttentionLayer]]:
    group: list[AttentionLayer] = []
    held = 0
    for layer in layers:
        numbers = (layer.num_heads + layer.num_kv_heads) * layer.head_dim + layer.num_kv_heads * layer.value_dim
        parameter = next(layer.module.parameters(), None)
        size = SEQUENCES * LENGTH * numbers * (4 if parameter is None else parameter.element_size())
        if group and held + size > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(layer)
        held += size
    if group:
        yield group


class _Sample:
    """Sequences of one layer without their padding; at the limit every other one goes, and from then on comes."""

    def __init__(self, takes: Callable[[int], bool]) -> None:
        self.takes = takes
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.call: AttentionCall | None = None
        self.seen = 0
        self.stride = 1

    def add(self, call: AttentionCall, numbers: range) -> None:
        self.call = call
        real = token_mask(call)
        for row, document in enumerate(numbers):
            if not self.takes(document) or not bool(real[row].any()):
                continue
            if self.seen % self.stride == 0:
                kept = real[row].nonzero()[:LENGTH, 0]
                q, k, v = (x[row][:, kept].cpu() for x in (call.q, call.k, call.v))
                self.parts.append((q, k, v))
            self.seen += 1
            if len(self.parts) > SEQUENCES:
                self.parts, self.stride = self.parts[::2], 2 * self.stride

    def whole(self) -> AttentionCall:
        assert self.call is not None
        longest = max(k.shape[1] for _, k, _ in self.parts)
        mask = torch.stack([torch.arange(longest) < k.shape[1] for _, k, _ in self.parts])
        q, k, v = (
            torch.stack([nn.functional.pad(part[i], (0, 0, 0, longest - part[i].shape[1])) for part in self.parts])
            for i in range(3)
        )
        return replace(self.call, q=q, k=k, v=v, key_mask=mask)
