"""Where healing stands, and what of the model it has changed: what a checkpoint holds."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maclin.adopt.hosts.base import MECHANISM, Batch
from maclin.core import mechanisms as registry

from .blocks import Layer, Model

_HEALED = "_maclin_healed"


@dataclass
class HealState:
    """Counters of healing; numbers, strings, and lists and dicts of them.

    Args:
        stage: "transfer", "distillation" or "done".
        transfer_step: of attention transfer, done.
        transfer_batch: batches that it has used up.
        step: of distillation, done.
        seconds: since the beginning, of all runs together.
        started: seconds at which distillation began.
        best_error: on held-out batches; None before the first look.
        best_stage: where it was seen.
        best_step: likewise.
        stale: looks since then.
        look_seconds: that the last look took.
        looked_at: seconds at the end of it.
        step_seconds: that the last step of distillation took.
        skipped: steps whose loss or gradient was not finite.
        stopped: why it ended.
        looks: at held-out batches.
        layers: rows of ``HealLayer``.
        resumed_at: seconds at which it went on after an interruption.
        loss: sum since the last look.
        losses: number of them.
    """

    stage: str = "transfer"
    transfer_step: int = 0
    transfer_batch: int = 0
    step: int = 0
    seconds: float = 0.0
    started: float = 0.0
    best_error: float | None = None
    best_stage: str = "converted"
    best_step: int = 0
    stale: int = 0
    look_seconds: float = 0.0
    looked_at: float = 0.0
    step_seconds: float = 0.0
    skipped: int = 0
    stopped: str = ""
    looks: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    resumed_at: list[float] = field(default_factory=list)
    loss: float = 0.0
    losses: int = 0

    def __post_init__(self) -> None:
        self._clock = time.perf_counter()

    def tick(self) -> float:
        """Count the wall time since the last tick; returns the seconds since the beginning."""
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        return self.seconds

    @property
    def reserve(self) -> float:
        """Seconds that another step and the look at the end will take."""
        return self.look_seconds + self.step_seconds

    @property
    def train_loss(self) -> float | None:
        """Mean since the last look."""
        return self.loss / self.losses if self.losses else None


def mechanisms_of(model: Model) -> dict[str, Any]:
    """The mechanisms of the converted layers, as what a checkpoint can hold."""
    return {layer.name: packed(layer.mechanism) for layer in model.layers}


def packed(mechanism: registry.Mechanism) -> dict[str, Any]:
    """A mechanism's name, configuration and tensors."""
    state = {name: x.detach().clone() for name, x in mechanism.state_dict().items()}
    return {"name": mechanism.name, "config": dict(mechanism.config), "state": state}


def unpacked(found: Mapping[str, Any], layer: Layer) -> registry.Mechanism:
    """The mechanism that ``packed`` took apart, for the same layer; that of the layer itself where it can hold it."""
    now = layer.mechanism
    if now.name == found["name"] and now.config == found["config"]:
        now.load_state_dict(found["state"])
        return now
    made = registry.mechanism(
        found["name"],
        head_dim=now.head_dim,
        num_heads=now.num_heads,
        num_kv_heads=now.num_kv_heads,
        **found["config"],
    )
    made.load_state_dict(found["state"])
    reference = next((p for p in layer.module.parameters() if p.is_floating_point()), None)
    if reference is not None:
        made.to(device=reference.device, dtype=reference.dtype)
    return made.train(now.training)


def put_mechanisms(model: Model, found: Mapping[str, Any]) -> None:
    """Give the converted layers what ``mechanisms_of`` kept."""
    made = {layer.name: unpacked(found[layer.name], layer) for layer in model.layers}
    changed = {layer.name: made[layer.name] for layer in model.layers if made[layer.name] is not layer.mechanism}
    if changed:
        model.replace(changed)


def mechanism_parameters(layer: Layer) -> list[nn.Parameter]:
    """What of a layer's mechanism can be trained."""
    return [p for p in layer.mechanism.parameters() if p.is_floating_point()]


def is_healed(root: nn.Module) -> bool:
    """Whether healing has trained this model's weights, so that it is not its own original any more."""
    return _HEALED in root.__dict__


def mark_healed(root: nn.Module) -> None:
    """Remember that it has."""
    root.__dict__[_HEALED] = True


def is_mechanism(name: str) -> bool:
    """Whether a parameter's name is one of a mechanism's."""
    return MECHANISM in name.split(".")


def weights_of(root: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Parameters by name, as they are (not copies)."""
    known = dict(root.named_parameters())
    return {name: known[name].detach() for name in names}


@torch.no_grad()
def put_weights(root: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Copy values into parameters, one at a time."""
    known = dict(root.named_parameters())
    for name, value in found.items():
        known[name].copy_(value)


def digest(root: nn.Module) -> str:
    """Of every weight and buffer of a model, by name."""
    found = hashlib.blake2b(digest_size=12)
    for name, x in root.state_dict(keep_vars=True).items():
        if isinstance(x, Tensor):
            found.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
            found.update(_bytes(x))
    return found.hexdigest()


def digest_batches(batches: Iterable[Batch]) -> str:
    """Of the tensors of batches, in their order."""
    found = hashlib.blake2b(digest_size=12)
    for batch in batches:
        for key, x in [("", batch)] if isinstance(batch, Tensor) else sorted(batch.items()):
            if isinstance(x, Tensor):
                found.update(f"{key}{tuple(x.shape)}{x.dtype}".encode())
                found.update(_bytes(x))
    return found.hexdigest()


def _bytes(x: Tensor) -> bytes:
    flat = x.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
