"""Converted models on disk: weights as safetensors, and a manifest that says which mechanism each layer has.

Nothing is pickled. A save is whole or leaves what was there before; a load that finds anything edited, exchanged or
damaged says so and changes nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from maclin._version import __version__
from maclin.adopt.hosts import host
from maclin.adopt.hosts.base import MECHANISM, Host
from maclin.adopt.saving.files import tokenizer_files, write
from maclin.adopt.saving.manifest import SCHEMA, Manifest, differences, read_manifest
from maclin.adopt.saving.tensors import (
    apart,
    below,
    check_same,
    device_of,
    fill,
    left_out,
    mechanisms_of,
    set_buffers,
    stored,
    tie,
    weights_of,
)
from maclin.core.errors import CapabilityError, InputError, MaclinError
from maclin.core.mechanisms import Mechanism
from maclin.files import NO_SPACE

_BUFFER = "buffer:"  # before the names of stored buffers that the state_dict leaves out
_TRANSFORMERS = "transformers"


def save_converted(model: nn.Module, directory: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Write a converted model: its weights as safetensors, and ``maclin.json`` with the mechanism of each layer.

    An earlier model in the directory is replaced once the new one is wholly on the disk; on a full disk, Ctrl-C or any
    error it stays, and nothing half-written is left.

    Args:
        model: what ``maclin.convert_`` was given.
        directory: made if it is not there.
        tokenizer: to save beside it: an object with ``save_pretrained``, or a directory to copy its files from.

    Returns:
        The directory.

    Raises:
        InputError: the model is not converted, or holds what cannot be written: weights on the meta device, quantised
            ones, a mechanism that is not in the registry. Or the path is a file.
        MaclinError: the files cannot be written; the message says why.

    Example:
        >>> maclin.save_converted(model, "converted", tokenizer)
        >>> model = maclin.load_converted("converted")
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"wanted a directory to save the model in, and {directory} is a file; choose another")
    adapter = host(model)
    if not adapter.converted:
        raise InputError(
            f"wanted a model that maclin.convert_ converted, got a {type(model).__name__} that is not; convert it, or "
            "save it as its own library does"
        )
    weights, aliases = weights_of(model)
    buffers = left_out(model)
    manifest = Manifest(
        schema=SCHEMA,
        maclin_version=__version__,
        torch_version=str(torch.__version__),
        transformers_version=_transformers_version(adapter),
        host=adapter.name,
        architecture=_architecture(model),
        root=_root_name(model, adapter),
        description=_description(model, adapter),
        layers=tuple(stored(name, mechanism) for name, mechanism in mechanisms_of(adapter.root).items()),
        aliases=aliases,
        buffers=tuple(sorted(buffers)),
        files=(),
    )
    tensors = apart({**weights, **{_BUFFER + name: x for name, x in buffers.items()}})
    with tempfile.TemporaryDirectory() as folder:
        files = tokenizer_files(tokenizer, Path(folder))
        try:
            write(directory, replace(manifest, files=tuple(files)), tensors, files)
        except OSError as error:
            size = sum(x.nbytes for x in tensors.values()) / 1e6
            full = error.errno in NO_SPACE or "No space left" in str(error)
            raise MaclinError(
                f"cannot save the model in {directory}: {error.strerror or error}; what was there before is unchanged. "
                + (f"It takes {size:.0f} MB: make room, or choose" if full else "Choose")
                + " another place"
            ) from error
    return directory


def load_converted(
    directory: str | os.PathLike[str], model: nn.Module | None = None, device: str | torch.device | None = None
) -> nn.Module:
    """Read a model that ``maclin.save_converted`` wrote: converted, in eval mode, with the same outputs to the bit.

    Nothing is unpickled or downloaded, and no code from the directory is run.

    Args:
        directory: where it was saved.
        model: takes weights and mechanisms, in place: for models that transformers does not rebuild from a
            configuration (``torch.nn``, sentence-transformers, timm, modules of your own). It must be of the same
            architecture and dtypes, and not converted; its own weights are overwritten.
        device: where to put a rebuilt model (default: the CPU); a given one stays where it is.

    Returns:
        The model.

    Raises:
        InputError: the directory holds no such model, or one that was edited, exchanged, damaged or written by a later
            maclin; or ``model`` is another one, or missing where it is needed. A given model is then as it was.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    built = {row.layer: row.build() for row in manifest.layers}
    with safe_open(directory / manifest.weights, framework="pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    tensors.update({alias: tensors[name] for alias, name in manifest.aliases.items()})
    for name, mechanism in built.items():
        path = ".".join(part for part in (manifest.root, name, MECHANISM) if part)
        fill(name, mechanism, below(tensors, f"{path}."))
    weights = {k: x for k, x in tensors.items() if MECHANISM not in k.split(".") and not k.startswith(_BUFFER)}
    buffers = below(tensors, _BUFFER)
    if model is None:
        return _into_rebuilt(manifest, built, weights, buffers, device)
    if device is not None:
        raise InputError("device is for a model that is rebuilt; a given one stays where it is: leave device out")
    _check_given(model, manifest)
    check_same(model, weights, buffers, with_dtypes=True)
    _install(model, manifest, built)  # refuses, if it does, before any weight is overwritten
    model.load_state_dict(weights, strict=False)
    set_buffers(model, buffers)
    return model.eval()


def _into_rebuilt(
    manifest: Manifest,
    built: Mapping[str, Mechanism],
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    device: str | torch.device | None,
) -> nn.Module:
    if manifest.description is None:
        raise InputError(
            f"a {manifest.architecture} ({manifest.host}) cannot be rebuilt from a configuration: pass model=, the "
            "model as it was made before the conversion; its weights do not matter"
        )
    from maclin.adopt.hosts.rebuild import rebuild

    model = rebuild(manifest.description)
    check_same(model, weights, buffers, with_dtypes=False)
    model.load_state_dict(weights, strict=True, assign=True)
    tie(model, manifest.aliases)
    set_buffers(model, buffers)
    empty = [name for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_meta]
    if empty:
        raise InputError(f"{empty[0]!r} of this {manifest.architecture} was not saved; pass model=")
    if device is not None:
        model.to(device)
    _install(model, manifest, built)
    return model.eval()


def _install(model: nn.Module, manifest: Manifest, built: Mapping[str, Mechanism]) -> None:
    adapter = host(model)
    modules = dict(adapter.root.named_modules())
    for row in manifest.layers:
        built[row.layer].to(device_of(modules[row.layer])).eval()
    adapter.install({modules[name]: mechanism for name, mechanism in built.items()})


def _check_given(model: nn.Module, manifest: Manifest) -> None:
    """Refuse a model that is not the one that was saved, as far as its tensors do not show it anyway."""
    adapter = host(model)
    if adapter.converted:
        raise InputError("wanted a model that is not converted, got one that is; call maclin.restore_(model) first")
    whose = f"wanted the model that was saved, a {manifest.architecture} ({manifest.host})"
    if (_architecture(model), adapter.name) != (manifest.architecture, manifest.host):
        raise InputError(f"{whose}, got a {_architecture(model)} ({adapter.name})")
    if _root_name(model, adapter) != manifest.root:
        raise InputError(f"{whose}, got one whose part {_root_name(model, adapter)!r} is what maclin converts")
    if manifest.description is not None:
        from maclin.adopt.hosts.rebuild import differing_configuration

        different = differences(*differing_configuration(model, manifest.description))
        if different:
            raise InputError(f"{whose}, got one with another configuration: {'; '.join(different)}")
    modules = dict(adapter.root.named_modules())
    for row in manifest.layers:
        if row.layer not in modules:
            raise InputError(f"{whose}, got one without the layer {row.layer!r}")
        heads = getattr(modules[row.layer], "num_heads", row.num_heads)
        if heads != row.num_heads:
            raise InputError(f"{whose}, whose layer {row.layer!r} has {row.num_heads} heads, got one with {heads}")
    try:
        found = {layer.name: layer for layer in adapter.layers()}
    except CapabilityError:  # no inputs can be made up for it; then names, shapes and dtypes have to do
        return
    for row in manifest.layers:
        layer = found.get(row.layer)
        ours = (row.num_heads, row.num_kv_heads, row.head_dim)
        theirs = ours if layer is None else (layer.num_heads, layer.num_kv_heads, layer.head_dim)
        if theirs != ours:
            raise InputError(
                f"{whose}, whose layer {row.layer!r} has (heads, key heads, numbers per head) {ours}, got one "
                f"with {theirs}"
            )


def _description(model: nn.Module, adapter: Host) -> dict[str, Any] | None:
    if adapter.name != _TRANSFORMERS or adapter.root is not model:
        return None
    from maclin.adopt.hosts.rebuild import describe

    return describe(model)


def _transformers_version(adapter: Host) -> str | None:
    if adapter.name != _TRANSFORMERS:
        return None
    from maclin.adopt.hosts.rebuild import version

    return version()


def _architecture(model: nn.Module) -> str:
    """The model's class, as it is called before a conversion."""
    return next(cls.__name__ for cls in type(model).__mro__ if not cls.__module__.startswith("maclin.adopt."))


def _root_name(model: nn.Module, adapter: Host) -> str:
    return next(name for name, module in model.named_modules() if module is adapter.root)
