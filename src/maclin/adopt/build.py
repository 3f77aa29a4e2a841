"""The mechanism of each layer, built for its sizes; and everything that speaks against it, said at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from maclin.adopt.hosts.base import AttentionLayer
from maclin.core import mechanisms as registry
from maclin.core.errors import CapabilityError, InputError, MaclinError
from maclin.records import Config

LayerChoice = str | tuple[str, Config] | nn.Module
"""A mechanism's name, its name and configuration, or a mechanism that is ready, a calibrated one for example."""


def built_for(
    layers: list[AttentionLayer], choices: Mapping[str, LayerChoice], generator: torch.Generator, teaching: bool
) -> dict[str, registry.Mechanism]:
    """The mechanism of each layer.

    Args:
        layers: to be converted.
        choices: what each is to become.
        generator: of the random features.
        teaching: whether what learns from data is calibrated afterwards.

    Raises:
        CapabilityError: naming every layer that cannot have the one chosen for it, and how to leave them out.
        OptionError: an option or a size that a mechanism cannot have; the message names the layer.
        InputError: a ready mechanism of other sizes, or something that is none.
    """
    built: dict[str, registry.Mechanism] = {}
    problems: dict[str, list[str]] = {}
    for layer in layers:
        if layer.refused is not None:
            problems.setdefault(layer.refused, []).append(layer.name)
            continue
        choice = choices[layer.name]
        mechanism = _checked(choice, layer) if isinstance(choice, nn.Module) else _made(choice, layer, generator)
        problem = _problem(mechanism, layer, teaching and not isinstance(choice, nn.Module))
        if problem is not None:
            problems.setdefault(problem, []).append(layer.name)
        built[layer.name] = mechanism
    if problems:
        raise CapabilityError(_refusal(problems, len(layers)))
    return built


def check_no_statistics(built: Mapping[str, registry.Mechanism]) -> None:
    """Refuse running statistics in a model that recomputes its forward, since they would move twice for each batch.

    Raises:
        CapabilityError: naming the first layer.
    """
    for layer, mechanism in built.items():
        if any("running_" in name for name, _ in mechanism.named_buffers()):
            raise CapabilityError(
                f"layer {layer!r}: the model recomputes its forward in training (gradient checkpointing), and the "
                f"running statistics of this {mechanism.name} would move twice for each batch; pass ppsbn='token', "
                "or turn checkpointing off"
            )


def _refusal(problems: Mapping[str, list[str]], asked: int) -> str:
    """Every layer that is refused, by reason, and the filter that leaves them out."""
    refused = [name for names in problems.values() for name in names]
    listed = "; ".join(f"{', '.join(map(repr, names))}: {reason}" for reason, names in problems.items())
    if len(refused) == 1:
        what = f"layer {refused[0]!r} cannot be replaced faithfully: {next(iter(problems))}"
    else:
        what = f"{len(refused)} of {asked} layers cannot be replaced faithfully, {listed}"
    if len(refused) == asked:
        return f"{what}; nothing was converted"
    test, these = (f"name != {refused[0]!r}", "it") if len(refused) == 1 else (f"name not in {refused}", "these")
    return (
        f"{what}; nothing was converted. To convert the others and leave {these} exact, pass "
        f"filter_fn=lambda module, name: {test}, a mapping, or a plan"
    )


def _problem(mechanism: registry.Mechanism, layer: AttentionLayer, teaching: bool) -> str | None:
    """Why a layer cannot have this mechanism; None where it can."""
    name = mechanism.name
    if layer.is_causal and not mechanism.causal:
        able = [known for known in registry.names() if registry.row(known).causal]
        return f"it is causal, and {name} has no causal form; mechanisms that have one are {', '.join(able)}"
    if not layer.is_causal and not mechanism.bidirectional:
        return f"it is not causal, and {name} as configured ({mechanism.extra_repr()}) is for causal attention only"
    if layer.is_cross and mechanism.aligned:
        return f"it is cross-attention, and {name} goes by the positions of queries and keys in one sequence"
    if layer.is_cross and teaching and mechanism.learns_from_data:
        return f"it is cross-attention, and {name} learns from data, for which there is self-attention only"
    return None


def _made(choice: str | tuple[str, Config], layer: AttentionLayer, generator: torch.Generator) -> registry.Mechanism:
    """A mechanism by name, for the layer's sizes."""
    name, config = (choice, {}) if isinstance(choice, str) else choice
    draw = {"generator": generator} if registry.row(name).takes_generator else {}
    sizes = {"head_dim": layer.head_dim, "num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    try:
        return registry.mechanism(name, **sizes, **{**config, **draw})
    except MaclinError as error:
        raise type(error)(f"layer {layer.name!r}: {error}") from error


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
