"""The diagnosis of a mechanism in the layers of a model, on what they see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from maclin.adopt.calibrate import for_learning, learned, sampled
from maclin.adopt.hosts import layers_of
from maclin.adopt.hosts.base import AttentionLayer, Batch
from maclin.adopt.measuring.diagnose import diagnose
from maclin.core import mechanisms as registry
from maclin.core.errors import InputError
from maclin.core.mechanisms import Mechanism
from maclin.records import Config, Diagnosis


def diagnose_layers(
    model: nn.Module,
    batches: Iterable[Batch],
    mechanism: str = "macformer",
    config: Config | None = None,
    layers: Iterable[str] | None = None,
) -> Iterator[tuple[str, Diagnosis]]:
    """``diagnose`` on the layers of a model, one after the other; on at most 16 sequences of 2048 tokens of each.

    A mechanism that learns from data is calibrated on every third document, and diagnosed on the others.

    Args:
        model: any model that ``maclin.convert_`` takes; it is left as it is.
        batches: keyword arguments of the model's forward, one mapping per batch.
        mechanism: its name.
        config: its options.
        layers: their names, or numbers from 0 on (default: all that can be replaced).

    Raises:
        InputError: an unknown layer, no batches, or fewer than three documents to calibrate on and measure.
        CapabilityError: the model cannot be watched, or the mechanism lacks what a layer needs.
    """
    documents = list(batches)
    chosen = _named(layers_of(model, documents)[0], layers)
    built = {layer.name: _built(mechanism, config or {}, layer) for layer in chosen}
    learns = any(made.learns_from_data for made in built.values())
    if learns:
        taught = {
            layer.name: learned(built[layer.name], s) for layer, s in sampled(model, documents, chosen, for_learning)
        }
        if not taught:
            raise InputError(
                f"{mechanism} learns from data: wanted at least 3 documents, every third to calibrate on and the "
                "others to measure on"
            )
        built |= taught
    for layer, sample in sampled(model, documents, chosen, lambda d: not (learns and for_learning(d))):
        options: dict[str, Any] = {"is_causal": sample.is_causal, "scale": sample.scale}
        made = built[layer.name]
        yield layer.name, diagnose(made, sample.q, sample.k, sample.v, sample.key_mask, **options)


def _built(name: str, config: Config, layer: AttentionLayer) -> Mechanism:
    options = dict(config)
    if registry.row(name).takes_generator:
        options["generator"] = torch.Generator().manual_seed(0)
    sizes = {"head_dim": layer.head_dim, "num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    return registry.mechanism(name, **sizes, **options)


def _named(known: Iterable[AttentionLayer], wanted: Iterable[str] | None) -> list[AttentionLayer]:
    """Layers by name or number, in the model's order."""
    layers = [layer for layer in known if layer.unmeasured is None]
    if wanted is None:
        return layers
    names = [layer.name for layer in layers]
    found: set[str] = set()
    for name in wanted:
        if name.isdecimal() and int(name) < len(names):
            name = names[int(name)]
        if name not in names:
            raise InputError(
                f"no attention layer {name!r} that can be replaced; wanted 0 to {len(names) - 1} or one of {names}"
            )
        found.add(name)
    return [layer for layer in layers if layer.name in found]
