"""Where the original's targets come from, without a second copy of the model in memory unless one is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from maclin.adopt.hosts import host
from maclin.adopt.hosts.base import Batch
from maclin.core.errors import InputError, MaclinError
from maclin.training.checkpoint import load_tensors, save_tensors

from .blocks import Model, Watched, shape_of
from .losses import Comparison, Target
from .state import is_mechanism, put_weights, weights_of

_HALF_LIMIT = 6e4  # the largest number that half precision holds is 65504


class Teacher(Protocol):
    """Gives targets."""

    def target(self, index: int, upcoming: Sequence[int]) -> Target:
        """What the original gives on a batch.

        Args:
            index: of the batch.
            upcoming: indices of the batches that will be asked for next, this one first.
        """
        ...


class LiveTeacher:
    """Runs the original when it is asked: another model, or the same one while its weights are the original's.

    Args:
        model: with exact attention, the original.
        batches: to heal on.
        comparison: makes the targets.
        off: context in which the model's weights are the original's, for adapters that can be switched off.
        autocast: context that it runs in.
    """

    def __init__(
        self,
        model: Watched,
        batches: Sequence[Batch],
        comparison: Comparison,
        off: Callable[[], AbstractContextManager[object]] = nullcontext,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.batches, self.comparison, self.off = model, batches, comparison, off
        self.autocast = autocast

    def target(self, index: int, upcoming: Sequence[int]) -> Target:
        """What the original gives on a batch."""
        with self.off(), self.autocast():
            return self.comparison.target(self.model.run_exact(self.batches[index]), self.batches[index])


class DiskTeacher:
    """Brings the original's weights back for a chunk of batches at a time, and keeps their targets on disk.

    While it does so, the weights that are being trained lie in a file. Targets are kept in half precision, the oldest
    go when there are more bytes of them than are allowed; what went is computed again when it is needed.

    Args:
        model: the converted model.
        batches: to heal on.
        comparison: makes the targets.
        original: file with the original's weights, by the names of those that are trained.
        folder: of the targets.
        chunk: batches at a time.
        cache_bytes: of targets, at the most (but at least one batch's).
        autocast: context that the original runs in.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[Batch],
        comparison: Comparison,
        original: Path,
        folder: Path,
        chunk: int,
        cache_bytes: int,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.batches, self.comparison = model, batches, comparison
        self.original, self.folder = original, folder
        self.chunk, self.cache_bytes, self.autocast = chunk, cache_bytes, autocast
        self.kept: dict[int, int] = {}  # bytes by batch, the oldest first
        folder.mkdir(parents=True, exist_ok=True)

    def target(self, index: int, upcoming: Sequence[int]) -> Target:
        """What the original gives on a batch."""
        if index not in self.kept:
            self._make([i for i in dict.fromkeys((index, *upcoming)) if i not in self.kept][: self.chunk])
        return load_target(self._path(index))

    def _make(self, wanted: list[int]) -> None:
        fresh: set[int] = set()
        with self._original_weights():
            for index in wanted:
                batch = self.batches[index]
                with self.autocast():
                    target = self.comparison.target(self.model.run_exact(batch), batch)
                size = save_target(self._path(index), target)
                fresh.add(index)
                self.kept[index] = size
                while sum(self.kept.values()) > self.cache_bytes and set(self.kept) - fresh:
                    oldest = next(i for i in self.kept if i not in fresh)
                    del self.kept[oldest]
                    self._path(oldest).unlink(missing_ok=True)
                if sum(self.kept.values()) + size > self.cache_bytes:
                    break  # another one like this would not fit beside those that come first

    @contextmanager
    def _original_weights(self) -> Iterator[None]:
        root, away = self.model.root, self.folder / "trained.pt"
        original = load_tensors(self.original)
        save_tensors(away, weights_of(root, original))
        try:
            put_weights(root, original)
            yield
        finally:
            put_weights(root, load_tensors(away))
            away.unlink()

    def _path(self, index: int) -> Path:
        return self.folder / f"target-{index}.pt"


def save_target(path: Path, target: Target) -> int:
    """Write a target in half precision; returns its bytes."""
    found = {f"hidden.{i}": _half(x) for i, x in enumerate(target.hidden)}
    if target.output is not None:
        found["output"] = target.output.cpu()
    if target.index is not None:
        found["index"] = target.index.cpu().to(torch.int32)
    save_tensors(path, found)
    return path.stat().st_size


def load_target(path: Path) -> Target:
    """What ``save_target`` wrote."""
    found = load_tensors(path)
    hidden = tuple(found[f"hidden.{i}"] for i in range(sum(name.startswith("hidden.") for name in found)))
    return Target(hidden, found.get("output"), found.get("index"))


def other_model(teacher: nn.Module, model: Model) -> Watched:
    """A model that was given as the original, after checking that it is one of the same make.

    Raises:
        InputError: another architecture, or other sizes; the message names the first difference.
    """
    adapter = host(teacher)
    theirs = {name: tuple(p.shape) for name, p in adapter.root.named_parameters() if not is_mechanism(name)}
    ours = {name: tuple(p.shape) for name, p in model.root.named_parameters() if not is_mechanism(name)}
    wanted = f"wanted as teacher the original of this {type(model.root).__name__}"
    if type(adapter.root) is not type(model.root):
        raise InputError(f"{wanted}, got a {type(adapter.root).__name__}")
    different = next((name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name)), None)
    if different is not None:
        raise InputError(
            f"{wanted}, got one whose {different} is {theirs.get(different, 'missing')} instead of "
            f"{ours.get(different, 'missing')}"
        )
    if adapter.root is model.root:
        raise InputError(f"{wanted}, got the converted model itself; leave teacher out, or pass teacher='copy'")
    return Watched(adapter, {name: adapter.root.get_submodule(name) for name in model.compared})


def copied(model: Model) -> Watched:
    """A second copy of the model, in memory.

    Raises:
        MaclinError: it cannot be copied.
    """
    try:
        root = copy.deepcopy(model.root)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise MaclinError(f"cannot copy this {type(model.root).__name__} ({error}); leave teacher out") from error
    return Watched(host(root), {name: root.get_submodule(name) for name in model.compared})


def check_alike(target: Target, hidden: Sequence[Tensor], batch: Batch) -> None:
    """Refuse targets that are not of the same form as what the converted model gives; raises InputError."""
    theirs, ours = [tuple(x.shape) for x in target.hidden], [tuple(x.shape) for x in hidden]
    if theirs != ours:
        raise InputError(
            f"wanted a teacher that gives hidden states of the same shapes as the model on a batch of shape "
            f"{shape_of(batch)}, {ours}, got {theirs}"
        )


def _half(x: Tensor) -> Tensor:
    """In half precision where it holds the numbers."""
    return x.cpu().half() if not x.numel() or float(x.abs().max()) < _HALF_LIMIT else x.cpu()
