"""Splits that are arrays in memory, and how a validation part is held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..core.errors import InputError
from .task import Example, Split

# Streams of random numbers that start from the same seed must not be the same numbers.
HELD_OUT, GENERATED, SAMPLED = 1, 2, 3


class Ragged:
    """Sequences of any lengths, end to end in one array.

    Args:
        flat: all of them, (total,) or (total, channels).
        ends: where each one ends, (number,).
    """

    def __init__(self, flat: np.ndarray, ends: np.ndarray) -> None:
        self.flat = flat
        self.ends = np.asarray(ends, np.int64)

    @classmethod
    def of(cls, rows: Iterable[np.ndarray | bytes]) -> Ragged:
        """From single sequences; bytes are taken as they are."""
        arrays = [np.frombuffer(row, np.uint8) if isinstance(row, bytes) else row for row in rows]
        ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        return cls(np.concatenate(arrays) if arrays else np.zeros(0, np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.ends[index - 1] if index else 0
        return self.flat[start : self.ends[index]]

    @property
    def lengths(self) -> np.ndarray:
        """Positions of each one."""
        return np.diff(self.ends, prepend=0)


class Labelled:
    """Examples of the kind classify.

    Args:
        rows: sequences of ids or bytes, or of values; a part of them is taken by ``index``.
        labels: of all rows.
        length: positions after which a sequence is cut.
        shift: added to the ids, 1 where 0 is data.
        index: which rows, in which order; None is all.
    """

    def __init__(
        self,
        rows: Ragged | np.ndarray,
        labels: np.ndarray,
        *,
        length: int | None = None,
        shift: int = 0,
        index: np.ndarray | None = None,
    ) -> None:
        self.rows = rows
        self.labels = np.asarray(labels, np.int64)
        self.length = length
        self.shift = shift
        self.index = np.arange(len(self.labels)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Example:
        place = int(self.index[index])
        return {"x": self._x(place), "y": int(self.labels[place])}

    def only(self, index: np.ndarray) -> Labelled:
        """A part of it."""
        return Labelled(
            self.rows, self.labels, length=self.length, shift=self.shift, index=self.index[np.asarray(index, np.int64)]
        )

    def _x(self, place: int) -> np.ndarray:
        row = self.rows[place][: self.length]
        if np.issubdtype(row.dtype, np.floating):
            return row.astype(np.float32, copy=False)
        return row.astype(np.int64) + self.shift


class Listed:
    """Examples as they are.

    Args:
        examples: all of them.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def hold_out(
    number: int, valid: int, seed: int, groups: Sequence[object] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples to train on, and of those held out, by a split seed of their own.

    Args:
        number: examples there are.
        valid: examples to hold out; with groups, whole groups are held out until there are so many.
        seed: of the split.
        groups: of each example; no group is in both parts. None lets each stand for itself.

    Raises:
        InputError: nothing would be left to train on.
    """
    rng = np.random.default_rng([seed, HELD_OUT])
    if groups is None:
        order = rng.permutation(number)
        train, held = np.sort(order[valid:]), np.sort(order[:valid])
    else:
        names = sorted(set(groups), key=repr)
        codes = {name: i for i, name in enumerate(names)}
        code = np.array([codes[group] for group in groups])
        chosen = np.zeros(len(names), bool)
        sizes = np.bincount(code, minlength=len(names))
        for group in rng.permutation(len(names)):
            if sizes[chosen].sum() >= valid:
                break
            chosen[group] = True
        train, held = np.flatnonzero(~chosen[code]), np.flatnonzero(chosen[code])
    if not len(train) or not len(held):
        raise InputError(f"wanted {valid} of {number} examples held out and some left to train on; give more examples")
    return train, held


def sample(number: int, size: int | None, seed: int, stream: int = 0) -> np.ndarray:
    """Which of so many to keep, evenly at random, in their order; all where ``size`` is None or no less."""
    if size is None or size >= number:
        return np.arange(number)
    return np.sort(np.random.default_rng([seed, SAMPLED, stream]).permutation(number)[:size])


def longest(*splits: Split, keys: Sequence[str] = ("x",)) -> int:
    """Positions of the longest sequence in these splits."""
    return max(len(np.asarray(split[i][key])) for split in splits for i in range(len(split)) for key in keys)
