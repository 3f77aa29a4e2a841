"""What there is to guard in a model, and what is said about it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from maclin.adopt.calibrate import learned, sampled
from maclin.adopt.convert import convert_
from maclin.adopt.guard.watch import Flag
from maclin.adopt.hosts import host
from maclin.adopt.hosts.base import MECHANISM, Batch
from maclin.core.errors import CapabilityError, InputError, MaclinError
from maclin.core.mechanisms import Mechanism


def root_of(model: nn.Module) -> nn.Module:
    """The model that layer names are relative to."""
    try:
        return host(model).root
    except CapabilityError:  # no model of a known host: one built with maclin.nn, or a mechanism alone
        return model


def mechanisms_of(root: nn.Module) -> dict[str, Mechanism]:
    """Mechanisms that are not part of another one, by the name of the attention module that holds them."""
    found: dict[str, Mechanism] = {}
    outer: list[str] = []
    for name, module in root.named_modules():
        if any(name.startswith(f"{other}." if other else "") for other in outer):
            continue
        if isinstance(module, Mechanism):
            outer.append(name)
            found[name.removesuffix(MECHANISM).removesuffix(".")] = module
    return found


def guardable(root: nn.Module, tolerance: float | Mapping[str, float]) -> dict[str, Mechanism]:
    """The mechanisms to guard, by layer: those that are not exact, or that the mapping of tolerances names.

    Raises:
        InputError: there are none, or the mapping names others.
    """
    found = {name: mechanism for name, mechanism in mechanisms_of(root).items() if mechanism.name != "softmax"}
    if not found:
        raise InputError(
            f"wanted a model with layers that are not exact, got a {type(root).__name__} without; "
            "convert it first with maclin.convert_"
        )
    if not isinstance(tolerance, Mapping):
        return found
    unknown = [layer for layer in tolerance if layer not in found]
    if unknown or not tolerance:
        what = f"no converted layer {unknown[0]!r}" if unknown else "no layer in the mapping of tolerances"
        raise InputError(f"guard: {what}; the model has {list(found)}")
    return {layer: found[layer] for layer in found if layer in tolerance}


def run(root: nn.Module, batch: Batch) -> None:
    """One forward pass on a batch, moved to the model's device.

    Raises:
        InputError: the model cannot run on it.
    """
    device = next((parameter.device for parameter in root.parameters()), torch.device("cpu"))
    try:
        if isinstance(batch, Tensor):
            root(batch.to(device))
        elif isinstance(batch, Mapping):
            root(**{key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()})
        else:
            raise InputError(f"wanted a batch as a mapping of tensors, or one tensor, got {type(batch).__name__}")
    except MaclinError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise InputError(
            f"{type(root).__name__} cannot run on a batch of the calibration ({type(error).__name__}: {error})"
        ) from error


def sentence(flag: Flag, tolerance: float) -> str:
    """What a warning says of a flagged sequence."""
    if flag.reason == "nonfinite":
        return f"layer {flag.layer!r}: NaN or infinity in the output"
    if flag.reason == "bound":
        return f"layer {flag.layer!r}: output rows are longer than any average of the values"
    if flag.reason == "denominator" or flag.estimate is None:
        return f"layer {flag.layer!r}: many denominators were too small to divide by"
    one = flag.estimate
    return (
        f"layer {flag.layer!r}: relative error {one.rel_error:.3g} ({one.low:.3g} to {one.high:.3g}) where at most "
        f"{tolerance:g} is wanted"
    )


def learned_anew(root: nn.Module, guarded: Mapping[str, Mechanism], documents: Sequence[Batch]) -> dict[str, Mechanism]:
    """Mechanisms that learn from data, calibrated on other documents and put in place of the old ones; all or nothing.

    Args:
        root: a converted model, unguarded.
        guarded: the mechanisms to look at, by layer; others of the model stay.
        documents: to learn from.

    Returns:
        What then stands where those that learn from data stood.

    Raises:
        InputError: too few tokens, or NaN or infinity in q, k or v.
    """
    pupils = {name: mechanism for name, mechanism in guarded.items() if mechanism.learns_from_data}
    if not pupils:
        return {}
    layers = [layer for layer in host(root).layers(documents[0]) if layer.name in pupils]
    taught: dict[str, nn.Module] = {}
    for layer, sample in sampled(root, documents, layers):
        try:
            taught[layer.name] = learned(copy.deepcopy(pupils[layer.name]).cpu(), sample)
        except InputError as error:
            raise InputError(f"layer {layer.name!r}: {error}") from error
    convert_(root, {**mechanisms_of(root), **taught}, batch=documents[0])
    return {name: mechanism for name, mechanism in mechanisms_of(root).items() if name in taught}
