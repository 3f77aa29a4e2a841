"""Inputs that every test of the core makes alike, and one thread: these tensors are too small for more."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

Tensors = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def qkv() -> Callable[..., Tensors]:
    """Normal q (batch, 4, n, 8), k (batch, 2, s, 8), v (batch, 2, s, 5), in float64 unless told otherwise."""

    def make(
        n: int,
        s: int,
        *,
        batch: int = 2,
        heads: int = 4,
        kv_heads: int = 2,
        d: int = 8,
        dv: int = 5,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> Tensors:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        return normal(batch, heads, n, d), normal(batch, kv_heads, s, d), normal(batch, kv_heads, s, dv)

    return make


@pytest.fixture(scope="session")
def problem() -> Callable[..., Tensors]:
    """q (batch, heads, n, d), k (batch, kv_heads, n, d) and v, float64, with |q| |k| / sqrt(d) = radius for all pairs.

    "isotropic" points anywhere; "aligned" lies near 3 dimensions, the same for every seed, with v partly linear in k;
    ``shift`` then moves all keys and queries, each key head another way.
    """

    def make(
        kind: str,
        radius: float,
        *,
        batch: int = 6,
        heads: int = 1,
        kv_heads: int = 1,
        n: int = 64,
        d: int = 8,
        seed: int = 0,
        shift: float = 0.0,
    ) -> Tensors:
        structure, generator = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
        plane, mixing, centre = (
            torch.randn(kv_heads, rows, d, generator=structure, dtype=torch.float64) for rows in (3, d, 1)
        )

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def points(number: int) -> Tensor:
            x = normal(batch, number, n, d)
            if kind == "aligned":
                on_plane = normal(batch, number, n, 3) @ plane.repeat_interleave(number // kv_heads, 0)
                x = on_plane + 0.1 * on_plane.square().mean().sqrt() * x
            x = radius**0.5 * d**0.25 * x / x.norm(dim=-1, keepdim=True)
            return x + shift * centre.repeat_interleave(number // kv_heads, 0)

        q, k = points(heads), points(kv_heads)
        return q, k, k @ mixing + 0.5 * k.square().sum(-1, keepdim=True).sqrt() * normal(batch, kv_heads, n, d)

    return make


@pytest.fixture(scope="session")
def key_mask() -> Callable[..., Tensor | None]:
    """A key mask (batch, s): "none", "right", "left", "random" or "all" (the last sample attends to nothing)."""

    def make(kind: str, s: int, batch: int = 2) -> Tensor | None:
        if kind == "none":
            return None
        mask = torch.ones(batch, s, dtype=torch.bool)
        for sample in range(batch):
            cut = s * (sample + 1) // (batch + 2)
            if kind == "right":
                mask[sample, s - cut :] = False
            elif kind == "left":
                mask[sample, :cut] = False
        if kind == "random":
            mask = torch.rand(batch, s, generator=torch.Generator().manual_seed(s)) > 0.4
        if kind == "all":
            mask[-1] = False
        return mask

    return make


@pytest.fixture(scope="session")
def rel_error() -> Callable[[Tensor, Tensor], float]:
    """Relative Frobenius distance; infinite where a number is not finite or a shape differs."""

    def measure(got: Tensor, wanted: Tensor) -> float:
        if got.shape != wanted.shape or not bool(got.isfinite().all()):
            return float("inf")
        got, wanted = got.detach().double(), wanted.detach().double()
        return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))

    return measure
