"""Multi-query associative recall: a list of keys with their values, then keys again, each asking for its value.

Source: Arora et al. 2023 (Zoology), section 3. The list stands at the beginning; keys are the first half of the
vocabulary, values the second; the place of each question follows a power law with exponent 0.01, so that most come soon
after the list; everything else is drawn from the whole vocabulary. Deviations: none; sizes are options.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ...core.errors import OptionError
from ...progress import Progress
from ..splits import GENERATED
from ..task import NOT_JUDGED, Example, Field, Kind, Preset, Splits, Task

_POWER = 0.01
_IDS, _QUICK_IDS, _PUBLISHED_IDS = 1_024, 128, 8_192


class Recall(Task):
    """The value that stood beside a key, many times in one sequence; small states forget.

    Args:
        length: tokens, 64 to 4,096 in the published test; None is the preset's.
        pairs: keys with a value, and questions; None is a sixteenth of the length.
        vocab_size: ids, padding included, 8,192 in the published test; None is 1,024, of which ``quick`` uses 128.
    """

    name: ClassVar[str] = "recall"
    summary: ClassVar[str] = "values of keys seen earlier: multi-query associative recall, where small states fail"
    kind: ClassVar[Kind] = "tag"
    causal: ClassVar[bool] = True

    def __init__(self, length: int | None = None, pairs: int | None = None, vocab_size: int | None = None) -> None:
        self.length = length
        self.pairs = pairs
        self.vocab_size = vocab_size
        self.num_classes = _IDS if vocab_size is None else vocab_size
        self.field = Field("tokens", vocab_size=self.num_classes)
        self.presets = {
            "quick": Preset(length=64, train=20_000, valid=500, test=1_000),
            "standard": Preset(length=512, train=50_000, valid=1_000, test=2_000),
            "paper": Preset(length=4_096, train=100_000, valid=1_000, test=3_000),
        }

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        length = sizes.length if self.length is None else self.length
        pairs = max(length // 16, 1) if self.pairs is None else self.pairs
        vocab = self.num_classes
        if self.vocab_size is None and sizes is self.presets.get("quick") and pairs < _QUICK_IDS // 2:
            vocab = _QUICK_IDS  # the fewer there are, the sooner a model finds out what to do
        if pairs < 1 or 4 * pairs > length or vocab < 4 or pairs > vocab // 2 - 1:
            raise OptionError(
                f"wanted 1 to length / 4 pairs and more than twice as many ids, got {pairs} pairs, length {length} and "
                f"vocab_size {vocab}"
            )
        notes = [f"{pairs} pairs and as many questions in {length:,} tokens, with {vocab:,} ids"]
        if vocab < _PUBLISHED_IDS:
            notes.append(f"the published number of ids is {_PUBLISHED_IDS:,}")
        train, valid, test = (
            RecallSplit(number or 0, length, pairs, vocab, (seed, part))
            for part, number in enumerate((sizes.train, sizes.valid, sizes.test))
        )
        return Splits(train, valid, test, length, tuple(notes))


class RecallSplit:
    """Examples that are made when they are asked for; the same number is always the same example.

    Args:
        number: of examples.
        length: tokens.
        pairs: in the list.
        vocab: ids, padding included.
        key: what tells the numbers of this split from those of another.
    """

    def __init__(self, number: int, length: int, pairs: int, vocab: int, key: tuple[int, ...]) -> None:
        self.number, self.length, self.pairs, self.vocab, self.key = number, length, pairs, vocab, key
        slots = (length - 2 * pairs) // 2
        self._log_places = (_POWER - 1.0) * np.log(np.arange(1, slots + 1))

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.number:
            raise IndexError(index)
        rng = np.random.default_rng([GENERATED, *self.key, index])
        half = self.vocab // 2
        keys = 1 + rng.permutation(half - 1)[: self.pairs]
        values = half + rng.permutation(self.vocab - half)[: self.pairs]
        x = rng.integers(1, self.vocab, self.length)
        y = np.full(self.length, NOT_JUDGED)
        x[0 : 2 * self.pairs : 2], x[1 : 2 * self.pairs : 2] = keys, values
        # the largest of log p plus Gumbel noise are a draw without replacement
        order = np.argsort(self._log_places + rng.gumbel(size=len(self._log_places)))
        places = 2 * self.pairs + 2 * rng.permutation(order[-self.pairs :])
        x[places], y[places] = keys, values
        return {"x": x, "y": y}
