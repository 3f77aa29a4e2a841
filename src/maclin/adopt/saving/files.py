"""Writing a saved model so that a kill, a full disk or Ctrl-C leaves the earlier one, or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from maclin.adopt.saving.manifest import MANIFEST, Manifest
from maclin.core.errors import InputError
from maclin.files import written_whole
from maclin.records import to_json

_TOKENIZER = (
    "tokenizer",
    "vocab",
    "spiece",
    "sentencepiece",
    "merges",
    "special_tokens_map",
    "added_tokens",
    "chat_template",
    "preprocessor_config",
    "processor_config",
    "normalizer",
)
"""How the names of a tokenizer's files begin."""


def write(directory: Path, manifest: Manifest, tensors: Mapping[str, Tensor], files: Mapping[str, Path]) -> None:
    """Write weights, tokenizer files and manifest, in this order.

    The weights have a name of their own, after their content, so the moment in which the manifest takes the place of
    the earlier one is the moment in which the model does. What the earlier one alone used is removed after that.

    Args:
        directory: made if it is not there.
        manifest: yet without the weights' name and checksum.
        tensors: contiguous, on the CPU.
        files: from names in the directory to where their contents are now.

    Raises:
        OSError: the disk is full, or another failure of it.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    earlier = _listed(directory)
    beside = directory / f".weights.{secrets.token_hex(4)}.new"
    weights = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        beside.touch()
        mode = beside.stat().st_mode  # as files are made here; safetensors makes its own for the owner alone
        try:
            save_file(dict(tensors), beside, metadata=manifest.metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.chmod(mode)
        manifest = manifest.sealed(beside)
        fresh = directory / manifest.weights
        weights = None if fresh.exists() else fresh
        os.replace(beside, fresh)
        targets = [directory / name for name in files]
        for target in targets:
            made += [folder for folder in target.parents if not folder.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(*targets, directory / MANIFEST) as news:
            for new, source in zip(news, files.values(), strict=False):
                shutil.copyfile(source, new)
            news[-1].write_text(to_json(manifest) + "\n", encoding="utf-8")
    except BaseException:
        for path in (beside, weights):
            if path is not None:
                path.unlink(missing_ok=True)
        for folder in sorted(set(made), key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):  # not there, or not empty
                folder.rmdir()
        raise
    for name in earlier - {manifest.weights, *files}:
        (directory / name).unlink(missing_ok=True)


def tokenizer_files(tokenizer: Any, folder: Path) -> dict[str, Path]:
    """The files of a tokenizer, by their names in the directory to be.

    Args:
        tokenizer: with ``save_pretrained``, or a directory that holds its files; None has none.
        folder: empty, to write to.

    Raises:
        InputError: it is neither, or the directory holds no tokenizer.
    """
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, str | os.PathLike):
        source = Path(tokenizer)
        found = {path.name: path for path in _files(source) if path.parent == source}
        found = {name: path for name, path in found.items() if name.startswith(_TOKENIZER)}
        if not found:
            raise InputError(f"wanted a directory with the files of a tokenizer (tokenizer.json ...), got {source}")
        return found
    if not callable(getattr(tokenizer, "save_pretrained", None)):
        raise InputError(f"wanted a tokenizer with save_pretrained, or its directory, got {type(tokenizer).__name__}")
    tokenizer.save_pretrained(str(folder))
    return {str(path.relative_to(folder)): path for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _listed(directory: Path) -> set[str]:
    """Files that the manifest in a directory names, whatever else it says."""
    try:
        data = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        names = [data["weights"], *data["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    inside = directory.resolve()
    return {name for name in names if isinstance(name, str) and name and inside in (directory / name).resolve().parents}
