"""The contraction for CUDA, in Triton: features are made in registers and contracted there, never stored.

Three families of features: ``products`` (random Maclaurin features and exact monomials), ``positive`` (exp(Wx -
|x|^2 / 2)) and ``softmax`` (Efficient Attention); each with ``accumulate``, ``read``, ``attend`` and ``causal``, and
their gradients. Tensors in, tensors out: no autograd and no modules here.

**Off by default.** These kernels are tested in Triton's interpreter on the CPU, and compiled for compute capability
9.0; none has run on a GPU yet, and none has been timed. ``MACLIN_TRITON=1`` in the environment, or ``enable()``, turns
them on. Without Triton or CUDA the torch path runs, and so it does for whatever raises ``NoKernelError``.
"""

from __future__ import annotations

import os
from collections import Counter
from importlib.util import find_spec

import torch

from ..errors import CapabilityError

ENABLED = os.environ.get("MACLIN_TRITON", "0") == "1"
"""Whether the kernels may be used where they are available; they have only ever run in the interpreter."""

refusals: Counter[str] = Counter()
"""Why calls that asked for a kernel took the torch path instead, and how often."""


class NoKernelError(CapabilityError):
    """No kernel for these sizes, this dtype or this device; the torch path takes them. Counted in ``refusals``."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"no Triton kernel for {reason}; the torch path takes it")
        refusals[reason] += 1


def available() -> bool:
    """Whether Triton is installed and there is a CUDA device."""
    return find_spec("triton") is not None and torch.cuda.is_available()


def enabled() -> bool:
    """Whether the contraction should try the kernels: they are available and turned on."""
    return ENABLED and available()


def enable(on: bool = True) -> None:
    """Turn the kernels on or off for this process."""
    global ENABLED
    ENABLED = on  # pyright: ignore[reportConstantRedefinition] -- a switch, and the name says what it switches
