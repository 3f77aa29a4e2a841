"""transformers models from their configuration: what to write down of one, and the model made of it again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from maclin.adopt.hosts.encoders import attempt
from maclin.adopt.hosts.transformers import _RECORD as RECORD
from maclin.core.errors import InputError

_OWN = "transformers.models."
_PASSING = (
    "transformers_version", "_name_or_path", "name_or_path", "architectures", "dtype", "torch_dtype", "use_cache",
    "output_attentions", "output_hidden_states", "return_dict", "problem_type",
)  # fmt: skip
"""What may differ between two configurations of one model."""


def version() -> str:
    """Of the library."""
    return transformers.__version__


def describe(model: nn.Module) -> dict[str, Any] | None:
    """What ``rebuild`` needs, as JSON values; None where the model is not one of transformers' own."""
    if not isinstance(model, PreTrainedModel) or not type(model).__module__.startswith(_OWN):
        return None
    config = model.config
    if not type(config).__module__.startswith(_OWN):
        return None
    generation = getattr(model, "generation_config", None)
    return {
        "module": type(model).__module__,
        "class": type(model).__name__,
        "config_module": type(config).__module__,
        "config_class": type(config).__name__,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "generation": json.loads(generation.to_json_string(use_diff=False)) if generation is not None else None,
        "attention": _own_attention(model),
    }


def rebuild(description: dict[str, Any]) -> nn.Module:
    """The model without its weights: what it holds is on the meta device, or made up where that is not possible.

    Raises:
        InputError: this version of transformers has no such class, or cannot build it.
    """
    cls = _class(description["module"], description["class"], PreTrainedModel)
    config_class = _class(description["config_module"], description["config_class"], PreTrainedConfig)
    try:
        with torch.random.fork_rng(devices=[]):
            model = _built(cls, config_class, description)
            if any(_left_behind(module) for module in model.modules()):
                with torch.device("cpu"):
                    model = _built(cls, config_class, description, "cpu")
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"transformers {version()} cannot build a {description['class']} from the saved configuration "
            f"({type(error).__name__}: {error}); install the version that the manifest names, or pass model="
        ) from error
    if description["generation"] is not None:
        setattr(model, "generation_config", GenerationConfig.from_dict(description["generation"]))  # noqa: B010
    return model.eval()


def with_head(directory: Path) -> nn.Module | None:
    """The model of a directory as its configuration declares it, with its head; None where it has none there.

    Raises:
        InputError: the directory cannot be read.
    """
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

    def opened() -> nn.Module | None:
        config = AutoConfig.from_pretrained(str(directory), **options)
        cls: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
            return None
        loading: Any = cls.from_pretrained
        model, info = loading(str(directory), weights_only=True, dtype="auto", output_loading_info=True, **options)
        headless = model.base_model is model or info["missing_keys"]
        return None if headless else model.eval()

    return attempt(opened, directory)


def differing_configuration(model: nn.Module, description: dict[str, Any]) -> tuple[Any, Any]:
    """The configurations of a saved model and of this one, without what may differ."""
    own = describe(model) or {}
    return _lasting(description["config"]), _lasting(own.get("config", {}))


def _built(cls: Any, config_class: Any, description: dict[str, Any], device: str = "meta") -> Any:
    config = config_class.from_dict(description["config"])
    if description["attention"] is not None:
        config._attn_implementation = description["attention"]
    with torch.device(device):
        return cls(config)


def _own_attention(model: PreTrainedModel) -> str | None:
    """The implementation that was set before the conversion."""
    record = vars(model).get(RECORD)
    before = () if record is None else record.implementations
    return next((name for config, name in before if config is model.config), model.config._attn_implementation)


def _class(module: str, name: str, base: type) -> Any:
    """A class of transformers by name; nothing else is ever imported."""
    found = getattr(transformers, name, None)
    if found is None and module.startswith(_OWN):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
    if not isinstance(found, type) or not issubclass(found, base):
        raise InputError(f"transformers {version()} has no {base.__name__} called {name!r} in {module}; pass model=")
    return found


def _left_behind(module: nn.Module) -> bool:
    """Whether a module holds a tensor on the meta device that is neither parameter nor buffer."""
    return any(isinstance(value, Tensor) and value.is_meta for value in vars(module).values())


def _lasting(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _lasting(value) for key, value in config.items() if key not in _PASSING}
    return config
