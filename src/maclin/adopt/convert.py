"""Carrying a plan out: ``convert_`` swaps attention in place, ``restore_`` gives it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from maclin.adopt.build import LayerChoice, built_for, check_no_statistics
from maclin.adopt.calibrate import learned, needs_data, sampled
from maclin.adopt.hosts import host, layers_of
from maclin.adopt.hosts.base import GUARD, AttentionLayer, Batch
from maclin.adopt.measuring.audit import audit
from maclin.adopt.planning import EXACT
from maclin.adopt.planning import plan as plan_of
from maclin.core import mechanisms as registry
from maclin.core.errors import InputError, MaclinError, OptionError
from maclin.records import Config, Plan

AUTO = "auto"
"""In place of a plan: audit, plan and convert in one."""

_RECOMPUTING = ("gradient_checkpointing", "grad_checkpointing")
"""Flags by which modules of transformers and timm say that training runs their forward twice."""


def convert_(
    model: nn.Module,
    plan: Plan | str | Mapping[str, LayerChoice],
    *,
    batches: Iterable[Batch] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    generator: torch.Generator | None = None,
    batch: Batch | None = None,
    uncalibrated: bool = False,
    **options: Any,
) -> Plan | None:
    """Replace a model's attention in place; weights and the keys of its state_dict stay, new keys are only added.

    Layers that are not converted keep the host's own attention. All or nothing: on an error the model is as it
    was. Converting again replaces the earlier conversion.

    A mechanism that learns from data (macformer) is calibrated on the layer's own q, k and v where ``batches`` are
    given: on at most 16 sequences of 2048 tokens of each layer, spread evenly, with exact attention everywhere.

    Args:
        model: a transformers model, a SentenceTransformer, or a module with one transformers model inside; a model of
            timm, or any with ``torch.nn.MultiheadAttention`` or ``scaled_dot_product_attention`` inside.
        plan: what ``maclin.plan`` decided; or one mechanism's name for all layers; or a mapping from layer name to
            name, (name, configuration) or mechanism, for these layers only; or "auto", which audits the model on
            ``batches`` and plans, with ``mechanisms`` and the options of ``maclin.plan`` as options.
        batches: documents to calibrate on, keyword arguments of the model's forward; not those to judge the result by.
        filter_fn: called with each attention module and its name; layers for which it says False stay exact.
        generator: of the random features; default is a fresh one seeded with 0, so that converting twice gives
            the same model.
        batch: inputs to find the attention layers with, for models whose inputs cannot be made up; default is the
            first of ``batches`` there.
        uncalibrated: take a plan that was made with calibrated mechanisms without data: shapes are right, and
            ``load_state_dict`` is to bring the rest.
        options: of the mechanism, where ``plan`` is a name.

    Returns:
        The plan that was carried out, where one was given or made.

    Raises:
        OptionError: an unknown mechanism or option (the message lists the known), options beside a plan, or a plan
            with calibrated mechanisms without batches.
        InputError: a plan for another model, a mapping with unknown layers, or too few tokens to calibrate on.
        MaclinError: the model is guarded; what its guard watches would be gone, and nobody told.
        CapabilityError: attention that cannot be replaced faithfully, or a mechanism that lacks what the model
            needs; the message names every such layer, the reason, and the filter that leaves them out.

    Example:
        >>> maclin.convert_(model, "window", window=32)
        >>> maclin.convert_(model, "auto", batches=batches, tolerance=0.3)
        >>> maclin.restore_(model)
    """
    if options and not isinstance(plan, str):
        raise OptionError(f"options {sorted(options)} go with a mechanism's name; a plan or mapping holds its own")
    if isinstance(model, nn.Module) and any(GUARD in vars(module) for module in model.modules()):
        raise MaclinError(
            f"wanted a model without a guard, got a {type(model).__name__} that maclin.guard guards, whose guard would "
            "not watch what is converted now; call maclin.unguard first, and guard it anew afterwards"
        )
    documents = None if batches is None else list(batches)
    if isinstance(plan, str) and plan == AUTO:
        plan, options = _decided(model, documents, options), {}
    found, _ = layers_of(model, documents or (), batch)
    layers = [layer for layer in found if filter_fn is None or filter_fn(layer.module, layer.name)]
    choices = _choices(plan, layers, options, filter_fn is not None)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    chosen = [layer for layer in layers if layer.name in choices]
    if not chosen and not isinstance(plan, Plan):
        raise InputError("no layer is left to convert; wanted a filter_fn or mapping that keeps at least one")
    built = built_for(chosen, choices, generator, documents is not None)
    if any(getattr(module, name, False) for module in model.modules() for name in _RECOMPUTING):
        check_no_statistics(built)
    if documents is not None:
        built |= _taught(model, documents, chosen, choices, built)
    elif not uncalibrated:
        _check_no_data_needed(chosen, choices, built, isinstance(plan, Plan))
    host(model).install({layer.module: _placed(built[layer.name], layer) for layer in chosen})
    return plan if isinstance(plan, Plan) else None


def calibrated_layers(
    model: nn.Module,
    choices: Mapping[str, LayerChoice],
    batches: Iterable[Batch],
    generator: torch.Generator | None = None,
) -> dict[str, nn.Module]:
    """The mechanisms of some layers, built and calibrated, for ``convert_`` to take as they are, as often as needed.

    Args:
        model: left as it is.
        choices: from layer name to name, (name, configuration) or mechanism.
        batches: documents to calibrate on.
        generator: of the random features; None is a fresh one seeded with 0.
    """
    documents = list(batches)
    layers = list(layers_of(model, documents)[0])
    known = _choices(choices, layers, {}, False)
    chosen = [layer for layer in layers if layer.name in known]
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    built = built_for(chosen, known, generator, True)
    taught = built | _taught(model, documents, chosen, known, built)
    return {name: taught[name] for name in choices}


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
    plan: Plan | str | Mapping[str, LayerChoice], layers: list[AttentionLayer], options: Config, filtered: bool
) -> dict[str, LayerChoice]:
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


def _decided(model: nn.Module, batches: list[Batch] | None, options: Config) -> Plan:
    """The plan of "auto"."""
    if batches is None:
        raise OptionError("'auto' measures the model on its own data: pass batches=, tokenized documents")
    known = ("mechanisms", "tolerance", "length", "speedup", "min_layers", "max_layers", "per_head", "costs")
    unknown = [option for option in options if option not in known]
    if unknown:
        raise OptionError(f"'auto' has no option {unknown[0]!r}; known are {', '.join(known)}")
    found = audit(model, batches, options.get("mechanisms"))
    return plan_of(found, **{option: value for option, value in options.items() if option != "mechanisms"})


def _taught(
    model: nn.Module,
    batches: list[Batch],
    layers: list[AttentionLayer],
    choices: Mapping[str, LayerChoice],
    built: Mapping[str, registry.Mechanism],
) -> dict[str, nn.Module]:
    """Those of the mechanisms that learn from data, calibrated; what was handed over ready stays as it is."""
    pupils = [
        layer
        for layer in layers
        if built[layer.name].learns_from_data and not isinstance(choices[layer.name], nn.Module)
    ]
    taught: dict[str, nn.Module] = {}
    if pupils:
        for layer, sample in sampled(model, batches, pupils):
            try:
                taught[layer.name] = learned(built[layer.name], sample)
            except InputError as error:
                raise InputError(f"layer {layer.name!r}: {error}") from error
    missing = [layer.name for layer in pupils if layer.name not in taught]
    if missing:
        raise InputError(f"layer {missing[0]!r} was not called on any token of the batches; pass other documents")
    return taught


def _check_no_data_needed(
    layers: list[AttentionLayer],
    choices: Mapping[str, LayerChoice],
    built: Mapping[str, registry.Mechanism],
    planned: bool,
) -> None:
    for layer in layers:
        choice, mechanism = choices[layer.name], built[layer.name]
        if isinstance(choice, nn.Module) or not mechanism.learns_from_data:
            continue
        if planned or (isinstance(choice, tuple) and needs_data(choice[1])):
            raise OptionError(
                f"layer {layer.name!r} is to become a {mechanism.name} that was calibrated on the layer's own q, k and "
                "v, and a configuration holds its shapes only: pass batches= with documents to calibrate it on (or "
                "uncalibrated=True, if load_state_dict brings what it had learned)"
            )


def _placed(mechanism: nn.Module, layer: AttentionLayer) -> nn.Module:
    """On the layer's device, in its dtype and mode."""
    reference = next((p for p in layer.module.parameters() if p.is_floating_point()), None)
    if reference is not None:
        mechanism.to(device=reference.device, dtype=reference.dtype)
    return mechanism.train(layer.module.training)
