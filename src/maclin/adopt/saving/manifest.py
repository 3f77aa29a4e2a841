"""What stands beside the weights of a saved model: which mechanism each layer has, and what the weights belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from maclin.core import mechanisms as registry
from maclin.core.errors import InputError, OptionError
from maclin.records import Config, from_json, to_json

SCHEMA = "1.0"
"""Version of the manifest: the first number changes when a reader of the old one would be wrong."""

MANIFEST = "maclin.json"
_KEY = "maclin"  # of the weights' metadata: the manifest they were written with


@dataclass(frozen=True)
class StoredLayer:
    """One converted layer: the mechanism, how to build it, and the shapes of what it holds."""

    layer: str  # qualified module name, relative to the host's root
    mechanism: str
    config: Config
    head_dim: int
    num_heads: int
    num_kv_heads: int
    shapes: dict[str, Any]  # of the mechanism's tensors, by their names within it

    def build(self) -> registry.Mechanism:
        """The mechanism, with whatever it draws still to be replaced.

        Raises:
            InputError: this maclin has no such mechanism, or not with these options.
        """
        sizes = {"head_dim": self.head_dim, "num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}
        try:
            draw: Config = {"generator": torch.Generator()} if registry.row(self.mechanism).takes_generator else {}
            return registry.mechanism(self.mechanism, **sizes, **self.config, **draw)
        except (OptionError, TypeError) as error:
            raise InputError(f"layer {self.layer!r} cannot be built by this maclin: {error}") from error


@dataclass(frozen=True)
class Manifest:
    """What ``maclin.json`` holds.

    Attributes:
        schema: ``SCHEMA`` of the writer.
        host: "transformers", "torch.nn" ...
        architecture: class of the model.
        root: where in the model the host's root is; "" where it is the model.
        description: what the host rebuilds the model from; None where it cannot, and a model must be given.
        layers: the converted ones.
        aliases: tied weights that are stored once, under the other name.
        buffers: names of buffers that the model's state_dict leaves out and that are stored all the same.
        files: of the tokenizer, relative to the directory.
        weights: name of the weights file, which its content is part of: so the manifest alone says which model is
            there, and is exchanged in one step.
        sha256: of the weights file.
        num_bytes: of the weights file.
    """

    schema: str
    maclin_version: str
    torch_version: str
    transformers_version: str | None
    host: str
    architecture: str
    root: str
    description: Config | None
    layers: tuple[StoredLayer, ...]
    aliases: dict[str, Any]
    buffers: tuple[str, ...]
    files: tuple[str, ...]
    weights: str = ""
    sha256: str = ""
    num_bytes: int = 0

    def sealed(self, weights: Path) -> Manifest:
        """With name, size and checksum of a weights file."""
        digest = sha256(weights)
        return replace(
            self, weights=f"weights-{digest[:16]}.safetensors", sha256=digest, num_bytes=weights.stat().st_size
        )

    @property
    def metadata(self) -> dict[str, str]:
        """For the header of the weights file: the manifest, so that neither can be exchanged unnoticed.

        One entry only: with several, safetensors would write them in an order of chance.
        """
        return {_KEY: to_json(replace(self, weights="", sha256="", num_bytes=0), indent=None)}


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory, after a check that it and the weights belong together and are whole.

    Raises:
        InputError: nothing was saved there, or it was written by a later maclin, edited, exchanged or damaged.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise InputError(
            f"wanted a directory that maclin.save_converted wrote, and {directory} holds no {MANIFEST}; for a model "
            "that was not converted, use the loader of its own library"
        )
    data = _json(path)
    _check_schema(path, data)
    try:
        manifest = from_json(Manifest, json.dumps(data))
    except ValueError as error:
        raise InputError(f"{path} is damaged or was edited: {error}; save the model again") from error
    weights = directory / Path(manifest.weights).name
    if not weights.is_file():
        raise InputError(
            f"{directory} holds {MANIFEST} without its weights, {weights.name}; copy the whole directory, or save again"
        )
    try:
        with safe_open(weights, framework="pt") as file:
            written = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"cannot read {weights}, which is damaged, incomplete or no safetensors file ({error}); save the "
            "model again"
        ) from error
    if written is None:
        raise InputError(f"{weights} was not written by maclin.save_converted; put back the file that was")
    ours = json.loads(manifest.metadata[_KEY])
    different = differences(json.loads(written), ours)
    if different:
        raise InputError(
            f"{path} was edited, or belongs to other weights than {weights.name}: {'; '.join(different)}. Put back the "
            "file that was saved with the weights, or convert anew"
        )
    if weights.stat().st_size != manifest.num_bytes or sha256(weights) != manifest.sha256:
        raise InputError(
            f"{weights} is not the file that was saved with {MANIFEST}: size or SHA-256 differ; copy both again from "
            "where they came from"
        )
    return manifest


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(saved: Any, other: Any, name: str = "") -> list[str]:
    """Where two JSON values differ: at most three sentences, "name: x saved, y found"."""
    if isinstance(saved, Mapping) and isinstance(other, Mapping):
        pairs = [(str(key), saved.get(key), other.get(key)) for key in {**saved, **other}]
    elif isinstance(saved, list) and isinstance(other, list) and len(saved) == len(other):
        pairs = [(str(i), one, two) for i, (one, two) in enumerate(zip(saved, other, strict=True))]
    else:
        return [] if saved == other else [f"{name}: {_short(saved)} saved, {_short(other)} found"]
    found: list[str] = []
    for key, one, two in pairs:
        found += differences(one, two, f"{name}.{key}" if name else key)
    return found[:3]


def _check_schema(path: Path, data: Any) -> None:
    schema = data.get("schema") if isinstance(data, dict) else None
    first = str(schema).split(".")[0]
    if first == SCHEMA.split(".")[0]:
        return
    if first.isdigit() and int(first) > int(SCHEMA.split(".")[0]):
        version = data.get("maclin_version")
        raise InputError(
            f"{path} has schema {schema}, written by maclin {version}; this one reads schema {SCHEMA}. Upgrade with "
            "pip install --upgrade maclin, or save the model again with this version"
        )
    raise InputError(f"wanted a manifest of schema {SCHEMA} in {path}, got {schema!r}; save the model again")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} as JSON ({error}); save the model again") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
