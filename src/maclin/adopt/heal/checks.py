"""What healing refuses before it changes anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from maclin.adopt.hosts.base import Batch
from maclin.core.errors import InputError, OptionError

from .blocks import Model
from .low_rank import adapter_parameters, check_peft
from .settings import Readout, Train, check_one_of
from .state import is_mechanism

_HELD_OUT_EVERY, _MOST_HELD_OUT = 8, 16


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be run or trained as it is.

    Raises:
        InputError: no model, or one on the meta device.
        OptionError: gradient checkpointing is on.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"wanted a model (torch.nn.Module), got {type(model).__name__}; load it first")
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise InputError(f"{meta} is on the meta device, which holds no numbers; load the model's weights first")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise OptionError(
            "gradient checkpointing is on, which runs a block twice and shows healing its hidden states twice; call "
            "model.gradient_checkpointing_disable(), and pass smaller batches if memory is short"
        )


def check_train(model: Model, train: str) -> None:
    """Refuse what cannot be trained.

    Raises:
        OptionError: an unknown choice, peft is missing, or weights that are not in float32.
    """
    check_one_of("train", train, get_args(Train))
    if train == "low_rank":
        check_peft()
    names = {"all": trained_names(model), "low_rank": [], "features": []}[train]
    known = dict(model.root.named_parameters())
    narrow = next((name for name in names if known[name].dtype in (torch.float16, torch.bfloat16)), None)
    if narrow is not None:
        raise OptionError(
            f"train='all' needs weights in float32, and {narrow} is in {known[narrow].dtype}: its steps would be lost "
            "in rounding; call model.float(), or pass train='features' or 'low_rank'"
        )
    odd = next(
        (name for block in model.stack.values() for name, part in block.named_modules() if _is_quantised(part)), None
    )
    if train == "all" and odd is not None:
        raise OptionError(
            f"train='all' needs plain weights, and {odd} is quantised; pass train='features', or train='low_rank' with "
            "a peft that knows this kind"
        )


def trained_names(model: Model) -> list[str]:
    """Weights that "all" trains: those of the blocks from the first converted layer on, the mechanisms' left out."""
    inside = {id(p) for block in model.stack.values() for p in block.parameters()}
    return [
        name
        for name, p in model.root.named_parameters()
        if id(p) in inside and not is_mechanism(name) and p.is_floating_point()
    ]


def check_output(output: object) -> None:
    """Refuse an unknown way to read the model's output; raises OptionError."""
    if not callable(output):
        check_one_of("output", output, get_args(Readout))


def checked_batches(batches: Iterable[Batch], held_out: Iterable[Batch] | None) -> tuple[list[Batch], list[Batch]]:
    """Batches to heal on and those held out; every eighth is, where none were given.

    Raises:
        InputError: none, too few, empty ones, or what is no batch.
    """
    if isinstance(batches, Mapping | Tensor | str):
        raise InputError(f"wanted several batches, got one {type(batches).__name__}; pass a list of them")
    found = list(batches)
    held = None if held_out is None else list(held_out)
    for label, some in (("batches", found), ("held_out", held)):
        for number, batch in enumerate(some or []):
            _check_batch(label, number, batch)
    if held is None:
        chosen = set(range(_HELD_OUT_EVERY - 1, len(found), _HELD_OUT_EVERY)) or {len(found) - 1}
        chosen = set(sorted(chosen)[:_MOST_HELD_OUT])
        if len(found) < 2:
            raise InputError(
                f"wanted at least 2 batches, one of them to hold out, got {len(found)}; pass more documents"
            )
        held = [batch for number, batch in enumerate(found) if number in chosen]
        found = [batch for number, batch in enumerate(found) if number not in chosen]
    if not found or not held:
        raise InputError(f"wanted at least one batch to heal on and one held out, got {len(found)} and {len(held)}")
    return found, held


@contextlib.contextmanager
def as_before(root: nn.Module) -> Iterator[None]:
    """Evaluation mode and no caches of keys inside; modes, requires_grad and gradients as they were at the end."""
    seen: dict[int, Any] = {id(c): c for c in (getattr(m, "config", None) for m in root.modules())}
    configs = [config for config in seen.values() if getattr(config, "use_cache", False)]
    modes = [(module, module.training) for module in root.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in root.parameters()]
    try:
        for config in configs:
            config.use_cache = False
        root.eval()
        for p, _, _ in flags:
            p.requires_grad_(False)
            p.grad = None
        yield
    finally:
        for config in configs:
            config.use_cache = True
        for module, training in modes:
            module.training = training
        for p, wanted, gradient in flags:
            p.requires_grad_(wanted)
            p.grad = gradient


def choose_trained(model: Model, train: str) -> list[tuple[str, nn.Parameter]]:
    """Switch gradients on for what distillation trains; names and parameters.

    Args:
        model: with adapters already, where they are trained.
        train: as ``heal``.
    """
    known = dict(model.root.named_parameters())
    chosen = [(name, p) for name, p in known.items() if is_mechanism(name) and p.is_floating_point()]
    if train == "all":
        chosen += [(name, known[name]) for name in trained_names(model)]
    elif train == "low_rank":
        chosen += list(adapter_parameters(model.root))
    for p in known.values():
        p.requires_grad_(False)
    for _, p in chosen:
        p.requires_grad_(True)
    return chosen


def _check_batch(label: str, number: int, batch: Batch) -> None:
    if not isinstance(batch, Tensor) and not hasattr(batch, "items"):
        raise InputError(f"{label}[{number}]: wanted a mapping of tensors, or one tensor, got {type(batch).__name__}")
    tensors: Sequence[Tensor] = (
        [batch] if isinstance(batch, Tensor) else [x for x in batch.values() if isinstance(x, Tensor)]
    )
    if not tensors or any(x.numel() == 0 for x in tensors):
        raise InputError(f"{label}[{number}] is empty; wanted tensors with at least one token")
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if isinstance(mask, Tensor) and not bool(mask.any()):
        raise InputError(f"{label}[{number}] holds nothing but padding; leave it out")


def _is_quantised(part: nn.Module) -> bool:
    weight = getattr(part, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not weight.is_floating_point()
