"""What all Macformer models share: configuration, output, saving and loading, calibration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .._version import __version__
from ..core import mechanisms
from ..core.errors import InputError, OptionError
from ..core.kernels import KERNELS
from .attention import MultiheadAttention
from .checkpoint import differences, read_description, read_tensors, write_checkpoint
from .config import MacformerConfig
from .stack import StackState


class ModelOutput(NamedTuple):
    """What a model returns."""

    logits: Tensor
    """Scores, one per class or id; of a regression the numbers themselves."""
    loss: Tensor | None = None
    """Mean over what is judged, float32, where labels were given."""
    state: StackState | None = None
    """What the next call continues from, where it was asked for."""


class MacformerModel(nn.Module):
    """Base of the Macformer models.

    Args:
        config: what the model is built from.
    """

    def __init__(self, config: MacformerConfig) -> None:
        super().__init__()
        self.config = config

    def attentions(self) -> Iterator[tuple[str, MultiheadAttention]]:
        """Every attention by its name in the model; its ``mechanism`` may be replaced by another of the same sizes."""
        for name, module in self.named_modules():
            if isinstance(module, MultiheadAttention):
                yield name, module

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``model.safetensors`` (parameters and random features) and ``config.json``, whole or not at all.

        Mechanisms that were calibrated or replaced since the model was built are saved as they are.

        Args:
            directory: made if it is not there; an earlier checkpoint in it is replaced.

        Raises:
            InputError: the path is a file.
            OptionError: a mechanism that cannot be built again from its name and options.
            OSError: the disk is full, or another failure of it; an earlier checkpoint survives.
        """
        return write_checkpoint(directory, self.state_dict(), self.description())

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        config: MacformerConfig | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The model that ``save_pretrained`` wrote, in eval mode.

        Args:
            directory: of the checkpoint.
            config: what it is expected to be built from; None takes what it is.
            device: where to put it.

        Raises:
            InputError: no checkpoint, a damaged one, one of another model, or of another configuration; the message
                names what differs.
        """
        description = read_description(directory)
        if description.get("model") != cls.__name__:
            raise InputError(
                f"{directory} holds a {description.get('model')}, wanted a {cls.__name__}; load it with "
                f"maclin.nn.{description.get('model')}.from_pretrained"
            )
        saved = MacformerConfig.from_dict(description["config"])
        if config is not None and config != saved:
            different = "; ".join(differences(saved.to_dict(), config.to_dict()))
            raise InputError(f"the model in {directory} was built from another configuration: {different}")
        model = cls(saved)
        model.take_mechanisms(description["mechanisms"])
        model.load_tensors(read_tensors(directory), str(directory))
        return model.to(device).eval()

    def description(self) -> dict[str, Any]:
        """What a checkpoint says of the model: its class, configuration, and every mechanism as it is now."""
        return {
            "model": type(self).__name__,
            "maclin": __version__,
            "config": self.config.to_dict(),
            "mechanisms": {name: _described(name, attention) for name, attention in self.attentions()},
        }

    def take_mechanisms(self, saved: dict[str, Any]) -> None:
        """Build anew the mechanisms whose name or options are not those of the configuration; weights come later."""
        for name, attention in self.attentions():
            if name not in saved:
                raise InputError(f"the checkpoint says nothing of attention {name!r}; it knows {', '.join(saved)}")
            mechanism, options = saved[name]
            if _described(name, attention) == [mechanism, options]:
                continue
            attention.mechanism = mechanisms.mechanism(
                mechanism,
                head_dim=attention.head_dim,
                num_heads=attention.num_heads,
                num_kv_heads=attention.num_kv_heads,
                **options,
            )

    def load_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        """Load a state_dict that must have every name and shape.

        Raises:
            InputError: names or shapes that are not this model's.
        """
        try:
            self.load_state_dict(tensors)
        except RuntimeError as error:
            wrong = [line.strip().rstrip(".") for line in str(error).splitlines()[1:]]
            raise InputError(
                f"the weights of {source} are of another configuration: {'; '.join(wrong[:3])}"
                + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            ) from error


def _described(where: str, attention: MultiheadAttention) -> list[Any]:
    """[name, options] of a mechanism, such that it can be built again."""
    mechanism = attention.mechanism
    kernel = mechanism.config.get("kernel", "auto")
    if mechanism.name not in mechanisms.names() or (kernel != "auto" and kernel not in KERNELS):
        what = f"kernel {kernel!r}" if mechanism.name in mechanisms.names() else f"mechanism {mechanism.name!r}"
        raise OptionError(
            f"{where} has {what}, which only this program knows, so that it cannot be saved by name; save the "
            "state_dict"
        )
    return json.loads(json.dumps([mechanism.name, mechanism.config]))
