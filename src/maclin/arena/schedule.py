"""Which examples a step sees: a function of the seed and the step alone."""

from __future__ import annotations

import torch

from ..core.errors import OptionError
from ..training.schedule import mixed_seed


class Order:
    """Which examples each step sees: epoch by epoch without repetition, each epoch in a new order.

    What is left of an epoch and does not fill a batch is left out.

    Args:
        num_examples: of the training split.
        batch_size: examples of a step.
        seed: of the orders.

    Raises:
        OptionError: a batch that is larger than the training split.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= num_examples:
            raise OptionError(
                f"wanted a batch of 1 to {num_examples} examples, all there are to train on, got {batch_size}"
            )
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self._epoch = -1
        self._order: list[int] = []

    def batch(self, step: int) -> list[int]:
        """The examples of a step, counted from 0."""
        per_epoch = self.num_examples // self.batch_size
        epoch, part = divmod(step, per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            self._order = torch.randperm(self.num_examples, generator=generator).tolist()
            self._epoch = epoch
        return self._order[part * self.batch_size : (part + 1) * self.batch_size]
