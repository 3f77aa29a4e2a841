"""What is measured: an attention, the layout that it wants q, k and v in, and its call, forward or with backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maclin.core.fused import fused_attention
from maclin.core.mechanisms import Mechanism, row

BASELINE = "softmax"
"""Name of torch's fused attention in every result."""


@dataclass
class Subject:
    """One thing to measure.

    Args:
        name: in results.
        kind: "mechanism", "baseline" or "peer".
        core: tensors as ``prepare`` made them -> out.
        prepare: q, k, v -> the tensors that ``core`` takes; neither timed nor counted as memory.
        mechanism: what knows the cost and has an oracle, where there is one.
    """

    name: str
    kind: str
    core: Callable[..., Any]
    prepare: Callable[..., tuple[Tensor, ...]] = lambda *qkv: qkv
    mechanism: Mechanism | None = None
    _given: tuple[Tensor, ...] = ()
    _args: tuple[Tensor, ...] = ()
    _gradient: Tensor | None = field(default=None, repr=False)

    def give(self, inputs: tuple[Tensor, ...], backward: bool = False) -> None:
        """Make what the next runs take from q, k, v; done once for the same tensors."""
        if self._given and self._given[0] is inputs[0]:
            return
        self._given, self._args, self._gradient = inputs, (), None
        with torch.inference_mode(False), torch.no_grad():
            self._args = tuple(x.detach().requires_grad_(backward) for x in self.prepare(*inputs))
            if backward:
                q, v = inputs[0], inputs[2]
                shape = (*q.shape[:-1], v.shape[-1])
                if self._args[0].dim() == 3:  # heads merged
                    shape = (q.shape[0], q.shape[2], q.shape[1] * v.shape[-1])
                elif self._args[0].shape != q.shape:  # heads after tokens
                    shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
                generator = torch.Generator(q.device).manual_seed(1)
                self._gradient = torch.randn(shape, generator=generator, dtype=q.dtype, device=q.device)

    def take_back(self) -> None:
        """Let go of the tensors."""
        self._given, self._args, self._gradient = (), (), None

    def forward(self) -> object:
        """out."""
        return self.core(*self._args)

    def step(self) -> object:
        """out and the gradients of q, k and v."""
        with torch.inference_mode(False), torch.enable_grad():
            out = self.core(*self._args)
            return out, torch.autograd.grad(out, self._args, self._gradient, allow_unused=True)


def of_mechanism(name: str, mech: Mechanism, *, is_causal: bool) -> Subject:
    """A mechanism as it is called everywhere."""
    kind = "baseline" if row(mech.name).baseline else "mechanism"
    return Subject(name, kind, lambda q, k, v: mech(q, k, v, is_causal=is_causal), mechanism=mech)


def baseline(head_dim: int, *, is_causal: bool) -> Subject:
    """torch's fused scaled_dot_product_attention, called directly."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused_attention(q, k, v, None, scale=head_dim**-0.5, is_causal=is_causal)

    return Subject(BASELINE, "baseline", core)
