"""Models on disk: model.safetensors with config.json beside it, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import InputError
from ..files import written_whole

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write_checkpoint(directory: str | Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Path:
    """Write tensors and description; whatever fails, the disk being full too, an earlier checkpoint survives.

    Both files are written beside their targets, flushed to the disk, then renamed. The weights carry the
    description as well, so that they never stand beside that of another model unnoticed.

    Args:
        directory: made if it is not there.
        tensors: by name.
        description: JSON values.

    Returns:
        The directory.

    Raises:
        InputError: the path is a file.
        OSError: the disk is full, or another failure of it.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"wanted a directory to save the model in, and {directory} is a file; choose another")
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=2)
    # tensors that share memory, as tied weights do, are saved apart; loading ties them again
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }

    with written_whole(directory / WEIGHTS, directory / CONFIG) as (weights, config):
        try:
            save_file(plain, weights, metadata={"format": "pt", "maclin": text})
        except SafetensorError as error:
            raise OSError(f"cannot write {directory / WEIGHTS}: {error}") from error
        config.write_text(text + "\n", encoding="utf-8")
    return directory


def read_description(directory: str | Path) -> dict[str, Any]:
    """What ``write_checkpoint`` was given as description.

    Raises:
        InputError: no such checkpoint, one that cannot be read, or files that do not belong together.
    """
    directory = Path(directory)
    path = directory / WEIGHTS
    if not path.is_file():
        raise InputError(f"wanted a directory that save_pretrained wrote, and {directory} holds no {WEIGHTS}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("maclin")
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {path}, which is damaged or no safetensors file: {error}") from error
    if text is None:
        raise InputError(f"{path} was not written by maclin's save_pretrained: it does not say of which model it is")
    description = json.loads(text)
    beside = directory / CONFIG
    if beside.is_file():
        try:
            also = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"{beside} is no JSON: {error}; remove it to load the weights as they were saved"
            ) from error
        different = differences(description, also)
        if different:
            raise InputError(
                f"{beside} is not of the model that {WEIGHTS} holds; they differ in {'; '.join(different)}. Remove "
                f"{CONFIG} to load the weights as they were saved"
            )
    return description


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU."""
    with safe_open(Path(directory) / WEIGHTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)


def differences(saved: Any, other: Any, name: str = "") -> list[str]:
    """Where two descriptions differ: at most three sentences, "name is x here and y there"."""
    if isinstance(saved, dict) and isinstance(other, dict):
        found: list[str] = []
        for key in {**saved, **other}:
            found += differences(saved.get(key), other.get(key), f"{name}.{key}" if name else str(key))
        return found[:3]
    return [] if saved == other else [f"{name}: {saved!r} saved, {other!r} given"]
