"""Carrying a plan out: ``convert_`` swaps attention in place, ``restore_`` gives it back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from maclin.adopt.hosts import host
from maclin.adopt.hosts.base import AttentionLayer, Batch
from maclin.adopt.plan import EXACT
from maclin.core import mechanisms as registry
from maclin.core.errors import CapabilityError, InputError, MaclinError, OptionError
from maclin.records import Config, Plan

Choice = str | tuple[str, Config] | nn.Module
"""A mechanism's name, its name and configuration, or a mechanism that is ready, a calibrated one for example."""


def convert_(
    model: nn.Module,
    plan: Plan | str | Mapping[str, Choice],
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    generator: torch.Generator | None = None,
    batch: Batch | None = None,
    **options: Any,
) -> None:
    """Replace a model's attention in place; weights and the keys of its state_dict stay, new keys are only added.

    Layers that are not converted keep the host's own attention. All or nothing: on an error the model is as it
    was. Converting again replaces the earlier conversion.

    Args:
        model: a transformers model, a SentenceTransformer, or a module with one transformers model inside.
        plan: what ``maclin.plan`` decided; or one mechanism's name for all layers; or a mapping from layer name to
            name, (name, configuration) or mechanism, for these layers only.
        filter_fn: called with each attention module and its name; layers for which it says False stay exact.
        generator: of the random features; default is a fresh one seeded with 0, so that converting twice gives
            the same model.
        batch: inputs to find the attention layers with, for models whose inputs cannot be made up.
        options: of the mechanism, where ``plan`` is a name.

    Raises:
        OptionError: an unknown mechanism or option (the message lists the known), or options beside a plan.
        InputError: a plan for another model, or a mapping with unknown layers.
        CapabilityError: attention that cannot be replaced faithfully, or a mechanism that lacks what the model
            needs; the message names the layer and the reason.

    Example:
        >>> maclin.convert_(model, "window", window=32)
        >>> maclin.restore_(model)
    """
    if options and not isinstance(plan, str):
        raise OptionError(f"options {sorted(options)} go with a mechanism's name; a plan or mapping holds its own")
    adapter = host(model)
    layers = [layer for layer in adapter.layers(batch) if filter_fn is None or filter_fn(layer.module, layer.name)]
    choices = _choices(plan, layers, options, filter_fn is not None)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    built = {layer.module: _built(choices[layer.name], layer, generator) for layer in layers if layer.name in choices}
    if not built and not isinstance(plan, Plan):
        raise InputError("no layer is left to convert; wanted a filter_fn or mapping that keeps at least one")
    adapter.install(built)


def restore_(model: nn.Module) -> None:
    """Give a converted model its own attention back: the same outputs, bit for bit, and the same state_dict keys.

    Args:
        model: what ``maclin.convert_`` was given.

    Raises:
        MaclinError: the model is not converted.
    """
    adapter = host(model)
    if not adapter.converted:
        raise MaclinError(f"wanted a model that maclin.convert_ converted, got a {type(model).__name__} that is not")
    adapter.remove()


def _choices(
    plan: Plan | str | Mapping[str, Choice], layers: list[AttentionLayer], options: Config, filtered: bool
) -> dict[str, Choice]:
    """What each layer to convert becomes; layers that stay with the host are left out."""
    known = {layer.name: layer for layer in layers}
    if isinstance(plan, str):
        registry.row(plan)
        return dict.fromkeys(known, (plan, options))
    if isinstance(plan, Plan):
        _check_plan(plan, known, filtered)
        return {
            row.layer: (row.mechanism, row.config) for row in plan.rows if row.mechanism != EXACT and row.layer in known
        }
    if not isinstance(plan, Mapping):
        raise InputError(f"wanted a plan, a mechanism's name or a mapping of layers, got {type(plan).__name__}")
    unknown = [name for name in plan if name not in known]
    if unknown:
        raise InputError(f"the model has no attention layer {unknown[0]!r} to convert; it has {list(known)}")
    return dict(plan)


def _check_plan(plan: Plan, known: Mapping[str, AttentionLayer], filtered: bool) -> None:
    planned = {row.layer: row for row in plan.rows}
    whose = f"a plan for {plan.audited}" if plan.audited else "a plan for another model"
    strange = sorted(set(planned) - set(known)) if not filtered else []
    missing = sorted(set(known) - set(planned))
    if strange or missing:
        what = f"layer {strange[0]!r}, which this model lacks" if strange else f"no row for layer {missing[0]!r}"
        raise InputError(
            f"wanted a plan for this model, got {whose} with {what}; make one with maclin.audit and maclin.plan"
        )
    for name, layer in known.items():
        row = planned[name]
        for label, theirs, ours in (
            ("heads", row.num_heads, layer.num_heads),
            ("numbers per head", row.head_dim, layer.head_dim),
        ):
            if theirs and theirs != ours:
                raise InputError(
                    f"wanted a plan for this model, whose layer {name!r} has {ours} {label}, got {whose} with "
                    f"{theirs}; make one with maclin.audit and maclin.plan"
                )


def _built(choice: Choice, layer: AttentionLayer, generator: torch.Generator) -> nn.Module:
    if layer.refused is not None:
        raise CapabilityError(
            f"layer {layer.name!r} cannot be replaced faithfully: {layer.refused}; leave it out with filter_fn, "
            "a mapping, or a plan that keeps it exact"
        )
    if isinstance(choice, nn.Module):
        mechanism = _checked(choice, layer)
    else:
        name, config = (choice, {}) if isinstance(choice, str) else choice
        row = registry.row(name)
        draw = {"generator": generator} if "generator" in inspect.signature(row.cls).parameters else {}
        mechanism = registry.mechanism(
            name,
            head_dim=layer.head_dim,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            **{**config, **draw},
        )
    if layer.is_causal and not mechanism.causal:
        raise CapabilityError(
            f"layer {layer.name!r} is causal, and {mechanism.name} has no causal form; wanted one of "
            f"{[name for name in registry.names() if registry.row(name).causal]}"
        )
    reference = next((p for p in layer.module.parameters() if p.is_floating_point()), None)
    if reference is not None:
        mechanism.to(device=reference.device, dtype=reference.dtype)
    return mechanism.train(layer.module.training)


def _checked(mechanism: nn.Module, layer: AttentionLayer) -> registry.Mechanism:
    if not isinstance(mechanism, registry.Mechanism):
        raise InputError(f"layer {layer.name!r}: wanted a mechanism, got {type(mechanism).__name__}")
    theirs = (mechanism.head_dim, mechanism.num_heads, mechanism.num_kv_heads)
    ours = (layer.head_dim, layer.num_heads, layer.num_kv_heads)
    if theirs != ours:
        raise InputError(
            f"layer {layer.name!r}: wanted a mechanism with (head_dim, num_heads, num_kv_heads) {ours}, got {theirs}"
        )
    return mechanism
