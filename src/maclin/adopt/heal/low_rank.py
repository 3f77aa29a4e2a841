"""Low-rank adapters on the linear layers of the healed blocks, through peft."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from maclin.core.errors import InputError, OptionError

from .blocks import Model
from .state import is_mechanism

_ADAPTER = "maclin"


def check_peft() -> None:
    """Raises OptionError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise OptionError("train='low_rank' needs peft: pip install peft, or pass train='all' or train='features'")


def add_adapters(model: Model, rank: int) -> None:
    """Adapters of this rank beside every linear layer of the blocks; they begin as nothing.

    Raises:
        InputError: the blocks hold no linear layer that peft knows.
    """
    peft: Any = importlib.import_module("peft")

    wanted = [name for name, module in linear_layers(model)]
    if not wanted:
        raise InputError(
            f"the blocks of this {type(model.root).__name__} hold no nn.Linear to put low-rank adapters beside; "
            "pass train='all' or train='features'"
        )
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=wanted, lora_dropout=0.0, bias="none")
    peft.inject_adapter_in_model(config, model.root, adapter_name=_ADAPTER)


def linear_layers(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers in the blocks from the first converted layer on, mechanisms left out."""
    for block, module in model.stack.items():
        for name, part in module.named_modules(prefix=block):
            if type(part) is nn.Linear and not is_mechanism(name):
                yield name, part


def adapted(root: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Parent, name and layer of everything that carries an adapter."""
    kind: Any = importlib.import_module("peft.tuners.lora").LoraLayer

    return [
        (parent, name, child)
        for parent in root.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]


@contextmanager
def switched_off(root: nn.Module) -> Iterator[None]:
    """Context without the adapters."""
    layers = [layer for _, _, layer in adapted(root)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def remove_adapters(root: nn.Module, merge: bool) -> None:
    """Take the adapters out, into the weights or without a trace.

    Args:
        root: the model.
        merge: add them to the weights first.
    """
    for parent, name, layer in adapted(root):
        if merge:
            layer.merge()
        setattr(parent, name, layer.base_layer)
    root.__dict__.pop("peft_config", None)


def adapter_parameters(root: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Names and parameters of the adapters."""
    return [(name, p) for name, p in root.named_parameters() if ".lora_" in name]
