"""What a task of the arena is: examples in three splits, how they become a batch, and what a trivial answer scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InputError, OptionError
from ..progress import Progress, Silent

Kind = Literal["classify", "match", "tag", "translate", "language"]
Example = dict[str, np.ndarray | int]

NOT_JUDGED = -100
"""Label of a position that no answer is wanted for; what torch's cross entropy ignores."""

PRESETS = ("quick", "standard", "paper")

_ENOUGH = 20_000  # examples to count labels in
_SEQUENCES: dict[Kind, tuple[str, ...]] = {
    "classify": ("x",),
    "match": ("x1", "x2"),
    "tag": ("x",),
    "translate": ("source", "target"),
    "language": ("x",),
}


@dataclass(frozen=True)
class Field:
    """What one position of a sequence is.

    Args:
        kind: ``tokens`` are ids (n,) of int64, of which 0 is padding and never data; ``values`` are floats
            (n, channels).
        vocab_size: ids, the padding included; None for values.
        channels: of the values; None for tokens.
    """

    kind: Literal["tokens", "values"]
    vocab_size: int | None = None
    channels: int | None = None


class Split(Protocol):
    """Examples by number; the keys of an example belong to the kind of the task.

    classify: x, y. match: x1, x2, y. tag: x, y (n,) with ``NOT_JUDGED``. translate: source, target, which begins and
    ends with a mark. language: x.
    """

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """One example; the arrays may be views that nobody writes to."""
        ...


@dataclass(frozen=True)
class Preset:
    """Sizes of a task.

    Args:
        length: most positions of a sequence.
        train: examples to train on; None is all there are.
        valid: examples held out of the training data, to choose on.
        test: examples to judge on; None is all there are.
    """

    length: int
    train: int | None
    valid: int
    test: int | None

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Examples of training, validation and test, of a task that makes as many as it is asked for."""
        if self.train is None or self.test is None:
            raise OptionError("wanted the numbers of examples to train and to judge on: this task makes its examples")
        return self.train, self.valid, self.test


@dataclass(frozen=True)
class Splits:
    """A task's data.

    Args:
        train: to train on.
        valid: held out of the training data; checkpoints are chosen on it.
        test: judged once.
        length: most positions of a sequence in any of them.
        notes: what was shortened, and which data stands in for the published one; for people.
    """

    train: Split
    valid: Split
    test: Split
    length: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trivial:
    """What an answer scores that never looks at the sequence.

    Args:
        name: of the answer, such as ``majority``.
        value: in the task's metric.
    """

    name: str
    value: float


def check_length(length: int | None) -> int | None:
    """Refuse a length below 1; None is the preset's."""
    if length is not None and length < 1:
        raise OptionError(f"wanted a length of at least 1, got {length}")
    return length


class Task(ABC):
    """A task of the arena. A subclass is its sizes, and a ``load`` that fetches or makes the examples.

    Attributes:
        name: in the registry.
        summary: one line.
        kind: which keys an example has, and which model it needs.
        causal: whether a position may only look back.
        presets: sizes by name; ``quick`` is for two cores and minutes, ``standard`` has the published length,
            ``paper`` the published number of examples too.
        field: of the sequences; of both sides in a translation.
        num_classes: labels; of a tag, and of the next token in a language, the vocabulary.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    kind: ClassVar[Kind]
    causal: ClassVar[bool] = False
    presets: Mapping[str, Preset]
    field: Field
    num_classes: int

    @property
    def metric(self) -> str:
        """``accuracy`` (0 to 1), ``bleu`` (0 to 100), or ``perplexity`` per token."""
        return {"translate": "bleu", "language": "perplexity"}.get(self.kind, "accuracy")

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric != "perplexity"

    def preset(self, name: str) -> Preset:
        """The sizes of that name.

        Raises:
            OptionError: the task has no such preset.
        """
        if name not in self.presets:
            raise OptionError(f"wanted a preset of {self.name} among {', '.join(self.presets)}, got {name!r}")
        return self.presets[name]

    def load(
        self,
        preset: str = "standard",
        seed: int = 0,
        data_dir: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Splits:
        """The examples: fetched or generated the first time, then from the cache.

        Args:
            preset: name of the sizes.
            seed: of what is generated, and of which examples are held out; not the seed of a training.
            data_dir: where the user has the published data, in its official layout; None takes what stands in.
            progress: is told what is fetched or generated.

        Raises:
            OptionError: no such preset, or the task has no data to be read from a directory.
            InputError: the data cannot be had, or is not what was expected; the message says where to put it.
        """
        sizes = self.preset(preset)
        listener = progress if progress is not None else Silent()
        if data_dir is None:
            return self._load(sizes, seed, listener)
        folder = Path(data_dir).expanduser()
        if not folder.is_dir():
            raise InputError(f"wanted --data-dir to be a directory with the data of {self.name}, got {folder}")
        return self._official(folder, sizes, seed, listener)

    @abstractmethod
    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits: ...

    def _official(self, folder: Path, sizes: Preset, seed: int, progress: Progress) -> Splits:
        raise OptionError(f"{self.name} has no official data to be read from {folder}; leave --data-dir out")

    def trivial(self, splits: Splits, split: Split | None = None) -> Trivial:
        """The best answer that ignores the sequence, fitted on the training split, judged on another.

        The commonest label; in a language the frequency of each token, with one added to every count; in a
        translation the source itself.

        Args:
            splits: the task's data.
            split: which to judge on; None is the test split.
        """
        split = splits.test if split is None else split
        if self.kind == "language":
            return Trivial("token frequencies", _frequency_perplexity(splits.train, split, self.num_classes))
        if self.kind == "translate":
            return Trivial("copied source", self._copied(split))
        counts = Counter[int]()
        for labels in _labels(splits.train):
            counts.update(labels.tolist())
        answer = max(sorted(counts), key=counts.__getitem__)
        judged = np.concatenate(list(_labels(split)))
        return Trivial("majority", float((judged == answer).mean()))

    def _copied(self, split: Split) -> float:
        raise NotImplementedError(f"{type(self).__name__} is of kind translate and must score copied sources")


def collate(task: Task, examples: Sequence[Example], length: int | None = None) -> dict[str, Tensor]:
    """Examples as one batch, padded on the right.

    Args:
        task: whose examples they are.
        examples: at least one.
        length: positions to pad to; None is the longest of these examples.

    Returns:
        every sequence under its key, (B, N) int64 or (B, N, channels) float32, with a mask (B, N), True = attend,
        under ``mask``, ``mask1`` and ``mask2``, or ``source_mask`` and ``target_mask``; ``y`` (B,), or (B, N) of a tag.

    Raises:
        InputError: no examples, or one that is longer than ``length``.
    """
    if not examples:
        raise InputError("wanted at least one example for a batch, got none")
    keys = _SEQUENCES[task.kind]
    batch: dict[str, Tensor] = {}
    for key in keys:
        rows = [np.asarray(example[key]) for example in examples]
        dtype = torch.int64 if task.field.kind == "tokens" else torch.float32
        mask_key = f"{key}_mask" if task.kind == "translate" else f"mask{key.removeprefix('x')}"
        batch[key], batch[mask_key] = _padded(rows, dtype, 0, length)
    if task.kind == "tag":
        rows = [np.asarray(example["y"]) for example in examples]
        batch["y"], _ = _padded(rows, torch.int64, NOT_JUDGED, batch["x"].shape[1])
    elif task.kind in ("classify", "match"):
        batch["y"] = torch.tensor([int(example["y"]) for example in examples])
    return batch


def _padded(rows: Sequence[np.ndarray], dtype: torch.dtype, fill: int, length: int | None) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    if length is not None and longest > length:
        raise InputError(f"wanted examples of at most {length} positions, got one of {longest}")
    total = max(longest, 1) if length is None else length
    out = torch.full((len(rows), total, *rows[0].shape[1:]), fill, dtype=dtype)
    mask = torch.zeros(len(rows), total, dtype=torch.bool)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(np.array(row), dtype=dtype)
        mask[i, : len(row)] = True
    return out, mask


def _labels(split: Split) -> Iterator[np.ndarray]:
    """Of every judged position; of a split with very many examples, of some that are evenly spread over it."""
    number = min(len(split), _ENOUGH)
    for i in range(number):
        i = i * len(split) // number
        y = np.atleast_1d(np.asarray(split[i]["y"]))
        yield y[y != NOT_JUDGED]


def _frequency_perplexity(train: Split, split: Split, num_classes: int) -> float:
    def counted(part: Split) -> np.ndarray:
        total = np.zeros(num_classes, np.int64)
        for i in range(len(part)):
            # the first token of a sequence is given, the others are predicted
            total += np.bincount(np.asarray(part[i]["x"])[1:], minlength=num_classes)
        return total

    known, judged = counted(train) + 1, counted(split)
    log = np.log(known / known.sum())
    return float(np.exp(-(judged * log).sum() / judged.sum()))
