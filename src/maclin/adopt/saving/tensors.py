"""The tensors of a converted model: taken out of it, put into one again, and what cannot be written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maclin.adopt.hosts.base import MECHANISM
from maclin.adopt.saving.manifest import StoredLayer
from maclin.core import mechanisms as registry
from maclin.core.errors import InputError


def mechanisms_of(root: nn.Module) -> dict[str, registry.Mechanism]:
    """The mechanisms of a converted model, by the name of their layer."""
    found = {name: module._modules.get(MECHANISM) for name, module in root.named_modules()}
    return {name: mechanism for name, mechanism in found.items() if isinstance(mechanism, registry.Mechanism)}


def stored(name: str, mechanism: registry.Mechanism) -> StoredLayer:
    """The row of a layer, after a check that the mechanism can be built from it again.

    Raises:
        InputError: it cannot.
    """
    if mechanism.name not in registry.names() or registry.row(mechanism.name).cls is not type(mechanism):
        raise InputError(
            f"layer {name!r} holds a {type(mechanism).__name__}, which is not in maclin's registry, so that it cannot "
            "be built from a file; convert this layer to a mechanism of the registry, or save the state_dict yourself"
        )
    state = mechanism.state_dict()
    row = StoredLayer(
        layer=name,
        mechanism=mechanism.name,
        config=json.loads(json.dumps(mechanism.config)),
        head_dim=mechanism.head_dim,
        num_heads=mechanism.num_heads,
        num_kv_heads=mechanism.num_kv_heads,
        shapes={key: list(x.shape) for key, x in state.items()},
    )
    fill(name, row.build(), state)
    return row


def fill(name: str, mechanism: registry.Mechanism, state: Mapping[str, Tensor]) -> None:
    """Give a mechanism that was just built its tensors, dtypes included.

    Raises:
        InputError: they do not fit.
    """
    try:
        mechanism.load_state_dict(dict(state), strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"layer {name!r}: a {mechanism.name} of this maclin, built as configured, does not take the stored "
            f"tensors: {' '.join(str(error).split())}"
        ) from error


def weights_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state_dict, each tensor once; and the other names of tied ones, with the name that each stands for.

    Raises:
        InputError: something in it cannot be written.
    """
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        _check_plain(name, value)
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)], tensors[name] = name, value.detach()
    return tensors, aliases


def left_out(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that the state_dict leaves out: rotary frequencies, position numbers. Mechanisms make theirs again.

    Raises:
        InputError: one of them cannot be written.
    """
    known = set(model.state_dict())
    found = {
        name: buffer.detach()
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name not in known and MECHANISM not in name.split(".")
    }
    for name, buffer in found.items():
        _check_plain(name, buffer)
    return found


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and contiguous, no two in one piece of memory."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        there = tensor.cpu().contiguous()
        place = there.untyped_storage().data_ptr()
        plain[name] = there.clone() if place in seen else there
        seen.add(place)
    return plain


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def check_same(
    model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], with_dtypes: bool
) -> None:
    """Refuse a model whose tensors are not those that were saved; raises InputError."""
    theirs = {**model.state_dict(), **dict(model.named_buffers(remove_duplicate=False))}
    ours = {**weights, **buffers}
    missing = sorted(set(ours) - set(theirs))
    strange = sorted(name for name in model.state_dict() if name not in ours)
    odd: list[str] = []
    if missing or strange:
        odd += [f"it has no {name!r}" for name in missing[:2]] + [f"it also has {name!r}" for name in strange[:2]]
    else:
        for name, x in weights.items():
            if x.shape != theirs[name].shape:
                odd.append(f"{name!r} has shape {tuple(theirs[name].shape)}, saved is {tuple(x.shape)}")
            elif with_dtypes and x.dtype != theirs[name].dtype:
                odd.append(f"{name!r} is {theirs[name].dtype}, saved is {x.dtype}: call model.to({x.dtype}) first")
    if odd:
        raise InputError(
            f"wanted the model that was saved, got a {type(model).__name__} that differs: {'; '.join(odd[:3])}"
        )


def set_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Put stored buffers in the places of the model's own."""
    for name, buffer in buffers.items():
        owner, leaf = _place(model, name)
        own = owner._buffers[leaf]
        owner._buffers[leaf] = buffer if own is None or own.is_meta else buffer.to(own.device)


def tie(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Make tied weights one parameter again."""
    for alias, name in aliases.items():
        (owner, leaf), (first, its_leaf) = _place(model, alias), _place(model, name)
        for kind in ("_parameters", "_buffers"):
            if its_leaf in getattr(first, kind):
                getattr(owner, kind)[leaf] = getattr(first, kind)[its_leaf]


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module's own weights are."""
    return next((p.device for p in module.parameters() if p.is_floating_point()), None)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _check_plain(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.is_meta:
        raise InputError(f"{name!r} is on the meta device, without numbers; load the weights, then save")
    if type(value) not in (Tensor, nn.Parameter) or value.is_quantized or value.layout != torch.strided:
        raise InputError(
            f"{name!r} is a {type(value).__name__}, no plain tensor, as in quantised layers; save the model before it "
            "is quantised, or with its own library"
        )
