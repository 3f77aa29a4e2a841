"""Memory for what is made of a block: taken once, used for every block, and on the CPU kept for the next call.

Memory that is given back to the system has to be fetched, and cleared, again: at short lengths a tenth of a call.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

_MOST_BYTES = 1 << 24  # of one set that is kept; a block is about as large as the caches
_MOST_KEPT = 4  # sets per thread: a causal derivative uses two at a time
_MOST_VIEWS = 256

_Storage = tuple[dict[str, Tensor], dict[tuple[Any, ...], Tensor]]


class _Free(threading.local):
    def __init__(self) -> None:
        self.sets: list[tuple[torch.dtype, _Storage]] = []


_free = _Free()


class Buffers:
    """A set of named tensors of one dtype. One owner at a time; ``close`` hands the memory to the next."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._kept, self._views = self._taken()

    def _taken(self) -> _Storage:
        if self._pooled():
            for i, (dtype, storage) in enumerate(_free.sets):
                if dtype == self._dtype:
                    del _free.sets[i]
                    return storage
        return {}, {}

    def _pooled(self) -> bool:
        # whoever watches every operation, as to count memory, is to see all of it
        return self._device.type == "cpu" and torch._C._len_torch_dispatch_stack() == 0  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape (rows, width, tokens in any order); what it held is lost."""
        key = (name, *shape)
        view = self._views.get(key)
        if view is None:
            numel = shape[0] * shape[1] * shape[2]
            flat = self._kept.get(name)
            with torch.inference_mode(False):  # what is made in inference mode could not be used outside
                if flat is None or flat.numel() < numel:
                    if flat is not None:
                        self._views = {k: v for k, v in self._views.items() if k[0] != name}
                    flat = self._kept[name] = torch.empty(numel, dtype=self._dtype, device=self._device)
                view = self._views[key] = flat[:numel].view(shape)
        return view

    def close(self) -> None:
        """Give the memory back."""
        size = sum(x.numel() * x.element_size() for x in self._kept.values())
        if self._pooled() and size <= _MOST_BYTES and len(_free.sets) < _MOST_KEPT:
            if len(self._views) > _MOST_VIEWS:
                self._views = {}
            _free.sets.insert(0, (self._dtype, (self._kept, self._views)))
        self._kept, self._views = {}, {}
