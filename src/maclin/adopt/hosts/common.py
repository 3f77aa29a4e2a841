"""What the hosts share: running a model to watch it, placing mechanisms, and reasons that lie in the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maclin.adopt.hosts.base import MECHANISM, Batch
from maclin.adopt.memory import explained
from maclin.core.errors import CapabilityError, InputError, MaclinError

FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)
"""What a model raises on inputs that it cannot run on."""


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Evaluation without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in root.modules()]
    try:
        root.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def inputs_for(root: nn.Module, batch: Batch, main: str | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as arguments of the model's forward, on the model's device.

    Args:
        root: the model.
        batch: keyword arguments, or the one main input.
        main: name of the main input; None passes it by position.

    Raises:
        InputError: the batch is neither.
    """
    reference = next((x for x in (*root.parameters(), *root.buffers())), None)
    device = torch.device("cpu") if reference is None else reference.device
    if isinstance(batch, Tensor):
        x = batch.to(device)
        return ((x,), {}) if main is None else ((), {main: x})
    if not hasattr(batch, "items"):
        raise InputError(f"wanted a batch as a mapping of tensors, or one tensor, got {type(batch).__name__}")
    return (), {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}


def failed(root: nn.Module, error: Exception, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MaclinError:
    """The error to raise where a model fails on a batch: that it does not fit, or does not fit in memory."""
    shape = next((tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), ())
    return explained(error, f"a batch of shape {shape}", f"{type(root).__name__}'s inputs")


def placed(root: nn.Module) -> dict[nn.Module, nn.Module | None]:
    """The mechanisms that modules of the model hold now."""
    return {module: module._modules[MECHANISM] for module in root.modules() if MECHANISM in module._modules}


def place(root: nn.Module, mechanisms: Mapping[nn.Module, nn.Module | None]) -> None:
    """Give these modules their mechanisms, and take those of all others."""
    for module in list(root.modules()):
        module._modules.pop(MECHANISM, None)
    for module, mechanism in mechanisms.items():
        module.add_module(MECHANISM, mechanism)


def check_whole(root: nn.Module, converted: bool) -> None:
    """Refuse a model whose weights are not there, and a part of a model that was converted as a whole.

    Raises:
        CapabilityError: saying which.
    """
    away = next((name for name, p in root.named_parameters() if p.is_meta), None)
    if away is not None:
        raise CapabilityError(
            f"wanted a {type(root).__name__} with its weights in memory, got {away!r} on the meta device; load or move "
            "the weights first, convert, and offload afterwards"
        )
    if placed(root) and not converted:
        raise CapabilityError(
            f"this {type(root).__name__} is part of a model that was converted as a whole; "
            "restore or convert the model that maclin.convert_ was given"
        )


def reason_against_weights(module: nn.Module) -> str | None:
    """Why q, k and v of an attention module cannot be trusted as they are: quantised projections."""
    for name, child in module.named_modules():
        if name.split(".")[0] == MECHANISM:
            continue
        for label in ("weight", "in_proj_weight", "qweight"):
            weight = getattr(child, label, None)
            if weight is not None and _is_quantised(weight):
                what = type(child).__name__
                return f"its projections are quantised ({name or what}: {what}); convert first, and quantise afterwards"
    return None


def _is_quantised(weight: object) -> bool:
    """Whether a weight is packed, of few bits, or made by a library that quantises."""
    if not isinstance(weight, Tensor):
        return callable(weight) and not isinstance(
            weight, nn.Module
        )  # torch's quantised layers unpack their weight when it is called for
    library = type(weight).__module__.split(".")[0]
    return library in ("torchao", "bitsandbytes", "optimum") or not weight.is_floating_point() or weight.itemsize < 2
