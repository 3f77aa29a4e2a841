"""Where the kernels run, and attention of each family written out in full, as the truth that they are held against.

On a CUDA device where there is one; otherwise in Triton's interpreter, on the CPU.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

if find_spec("triton") is None:
    collect_ignore = [
        "test_compile.py",
        "test_attention.py",
        "test_dispatch.py",
        "test_edges.py",
        "test_launch.py",
        "test_gpu.py",
        "test_specification.py",
    ]
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _with_index(tensor: Any, scope: Any) -> None:
        # loops over range(start, stop): numpy 2.4 no longer takes the interpreter's one-element arrays for integers
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _with_index


@dataclass(frozen=True)
class Problem:
    """A pair of feature maps, for the kernels and as plain formulas."""

    family: str
    f_q: Any
    f_k: Any
    key_heads: int
    width: int
    floor: float
    logs: Callable[[Tensor, bool], Tensor]  # x, whether of keys -> features, or their logarithms where these exist

    def out(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention with every pair of tokens written out, in the dtype of q."""
        n, s = q.shape[2], k.shape[2]
        visible = torch.ones(n, s, dtype=torch.bool, device=q.device)
        visible = visible.tril(s - n) if causal else visible
        visible = visible if mask is None else visible & mask[:, None, None, :]
        visible = visible.expand(q.shape[0], q.shape[1], n, s)
        groups = q.shape[1] // k.shape[1]
        phi_q, phi_k = self.logs(q, False)[:, :, :, None], self.logs(k, True).repeat_interleave(groups, 1)[:, :, None]
        v = v.repeat_interleave(groups, 1)
        if self.family == "softmax":
            over_keys = phi_k.expand(*visible.shape, -1).masked_fill(~visible[..., None], -1e4).softmax(3)
            return ((phi_q.softmax(-1) * over_keys).sum(-1) * visible) @ v
        if self.family == "positive":
            weights = (phi_q + phi_k).logsumexp(-1).masked_fill(~visible, -torch.inf)
            weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0).softmax(-1)
            return (weights * visible) @ v
        pairs = (phi_q * phi_k).sum(-1) * visible
        numerator, denominator = pairs @ v, pairs.sum(-1, keepdim=True)
        if self.floor:
            constant = phi_q[..., -1] * phi_k[..., -1] * visible
            n0, d0 = constant @ v, constant.sum(-1, keepdim=True)
            short = denominator < self.floor * d0
            share = torch.where(short, (1 - self.floor) * d0 / torch.where(short, d0 - denominator, 1.0), 1.0)
            numerator = n0 + share * (numerator - n0)
            denominator = torch.where(short, self.floor * d0, denominator)
        nothing = ~visible.any(-1, keepdim=True)
        return torch.where(nothing, 0.0, numerator / denominator.masked_fill(nothing, 1.0))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def problem(device) -> Callable[..., Problem]:  # pyright: ignore[reportIncompatibleMethodOverride]
    """The maps of a family: "products", "floor" (of centred keys, with weights), "positive" or "softmax"."""
    from maclin.core.triton.positive import positive
    from maclin.core.triton.products import products
    from maclin.core.triton.softmax import softmax

    def make(family: str, *, key_heads: int = 1, d: int = 5, m: int = 19, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).float().to(device)

        def of_heads(x: Tensor, rows: Tensor) -> Tensor:  # (Hk, ...) -> (H, ...) in the dtype of x
            return rows.to(x.dtype).repeat_interleave(x.shape[1] // rows.shape[0], 0)

        if family == "softmax":
            return Problem(family, softmax(d, 0.7), softmax(d), key_heads, d, 0.0, lambda x, key: x if key else 0.7 * x)
        if family == "positive":
            w = normal(key_heads, d, m)
            f = positive(w, 0.4)

            def log_phi(x: Tensor, key: bool) -> Tensor:
                x = x * 0.4**0.5
                return x @ of_heads(x, w) - (x * x).sum(-1, keepdim=True) / 2 - torch.tensor(m).log().to(x) / 2

            return Problem(family, f, f, key_heads, d, 0.0, log_phi)
        floor = 0.7 if family == "floor" else 0.0
        number = 2 * m
        projections = normal(key_heads, d, number) * (0.5 if floor else 0.25)
        index = torch.randint(0, number, (m, 3), generator=generator)
        degrees = torch.randint(1, 4, (m,), generator=generator)
        index[torch.arange(3) >= degrees[:, None]] = number
        index[-1] = number
        coefficients = torch.rand(m, generator=generator).to(device) + 0.5
        coefficients[-1] = 2.0 if floor else 4.0
        centre, weight = (0.3 * normal(key_heads, d), 0.5 * normal(key_heads, d)) if floor else (None, None)
        f_q = products(projections, index, coefficients, centre)
        f_k = products(projections, index, coefficients, centre, weight)

        def phi(x: Tensor, key: bool) -> Tensor:
            x = x if centre is None else x - of_heads(x, centre)[:, None]
            u = torch.nn.functional.pad(x @ of_heads(x, projections), (0, 1), value=1.0)
            features = u[..., index.to(device)].prod(-1) * coefficients.to(x.dtype)
            if not key or weight is None:
                return features
            return features * (x * of_heads(x, weight)[:, None]).sum(-1, keepdim=True).clamp(-60, 60).exp()

        return Problem(family, f_q, f_k, key_heads, d, floor, phi)

    return make


@pytest.fixture(scope="session")
def tensors(device) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """q (batch, heads, n, d), k and v of s tokens, and a gradient of out, in float64."""

    def make(
        problem: Problem, n: int, s: int, *, batch: int = 1, group: int = 2, dv: int = 3, seed: int = 1
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        heads = problem.key_heads * group

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

        return (
            normal(batch, heads, n, problem.width),
            normal(batch, problem.key_heads, s, problem.width),
            normal(batch, problem.key_heads, s, dv),
            normal(batch, heads, n, dv),
        )

    return make


@pytest.fixture
def short_spans(monkeypatch) -> None:
    """Several spans even in tests of two chunks."""
    from maclin.core.triton import causal

    monkeypatch.setattr(causal, "_LEAST_CHUNKS", 1)
