"""From tensors to launches: what a kernel needs of a feature map, block sizes, precision, and what is refused."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import triton.testing
from torch import Tensor
from triton import knobs
from triton.runtime.errors import OutOfResources

from . import NoKernelError
from .device import BFLOAT16, BFLOAT16_INTERPRETED, CHANNEL, FLOAT32, PRODUCTS, TF32

Result = TypeVar("Result")

_MOST_FEATURES_AND_WIDTH = 256
_PROGRAMS = 512  # programs that keep a large GPU busy: a few for each of its multiprocessors


@dataclass(frozen=True)
class FeatureMap:
    """What the kernels know of a feature map; ``products``, ``positive`` and ``softmax`` make them.

    Args:
        family: PRODUCTS, POSITIVE or CHANNEL of ``device``.
        num_features: M.
        w: (Hk, ranks, D, M) float32 contiguous: the projections of each rank; None for CHANNEL.
        degrees: (M,) int32: how many ranks a feature has.
        coefficients: (Hk, M) float32.
        centre: (Hk, D) float32, subtracted from x first; None for nothing.
        weight: (Hk, D) float32: each token's features times exp(<weight, x>), the exponent at most 60 in size.
        square: coefficient of |x|^2 / 2 in the logarithm of positive features; factor of x for CHANNEL.
        offset: subtracted from the logarithm of positive features.
    """

    family: int
    num_features: int
    w: Tensor | None = None
    degrees: Tensor | None = None
    coefficients: Tensor | None = None
    centre: Tensor | None = None
    weight: Tensor | None = None
    square: float = 1.0
    offset: float = 0.0

    @property
    def logarithms(self) -> bool:
        """Whether sums carry a scale per feature."""
        return self.family != PRODUCTS

    @property
    def last(self) -> Tensor | None:
        """(Hk,) coefficient of the last feature, the constant one where there is a floor."""
        return None if self.coefficients is None else self.coefficients[:, -1].contiguous()

    def arguments(self) -> tuple[Any, ...]:
        """The tuple ``f`` of ``device``."""
        strides = (0, 0) if self.w is None else self.w.stride()[:2]
        tensors = (self.w, self.degrees, self.coefficients, self.centre, self.weight)
        return (*tensors, *strides, float(self.square), float(self.offset))


class Blocks(NamedTuple):
    """Sizes of a launch: tokens and features of a block, warps, and stages of the pipeline."""

    tokens: int
    features: int
    warps: int = 4
    stages: int = 2


class Shape(NamedTuple):
    """Sizes of a call, and how blocks are multiplied."""

    batch: int
    heads: int
    key_heads: int
    length: int
    features: int
    width: int  # D
    value_width: int  # Dv
    mode: int

    def sizes(self) -> tuple[int, ...]:
        """M, D and E, as the kernels call them."""
        return self.features, self.width, self.value_width


Choices = dict[tuple[Any, ...], Blocks]
_choices: Choices = {}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def padded(size: int) -> int:
    """The least power of 2 that holds ``size`` and that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(knobs.runtime.interpret)


def runs_on(x: Tensor) -> bool:
    """Whether a kernel can take x where it lies."""
    return interpreting() or x.is_cuda


def mode_of(dtype: torch.dtype) -> int:
    """How blocks of this dtype are multiplied; sums are float32.

    float16 takes tf32, which has its digits and the range that features need.
    """
    if dtype == torch.bfloat16:
        return BFLOAT16_INTERPRETED if interpreting() else BFLOAT16
    if dtype in (torch.float16, torch.float32):
        return TF32 if dtype == torch.float16 else FLOAT32
    raise NoKernelError(f"dtype {dtype}: kernels take bfloat16, float16 and float32")


def shape_of(f: FeatureMap, x: Tensor, y: Tensor, key_heads: int) -> Shape:
    """Sizes of a launch over x (B, H, N, D) with y (B, H, N, Dv), refused where no kernel takes them."""
    if not runs_on(x):
        raise NoKernelError(f"device {x.device}: kernels run on CUDA")
    batch, heads, length, width = x.shape
    shape = Shape(batch, heads, key_heads, length, f.num_features, width, y.shape[-1], mode_of(y.dtype))
    if max(shape.width, shape.value_width) > _MOST_FEATURES_AND_WIDTH:
        raise NoKernelError(f"head widths {width} and {y.shape[-1]}: kernels take at most {_MOST_FEATURES_AND_WIDTH}")
    if is_channel(f) and padded(width) * padded(shape.value_width) > 1 << 15:
        raise NoKernelError(
            f"softmax features of widths {width} and {y.shape[-1]}: kernels take at most {1 << 15} sums"
        )
    if batch * heads > 65535:
        raise NoKernelError(f"{batch} x {heads} heads: a grid has at most 65535")
    return shape


def start_kernel(kernel: Any, grid: tuple[int, int, int], *arguments: Any, **options: Any) -> None:
    """Launch a kernel over a grid whose last axis is that of batch and heads; the first argument is a ``view``."""
    device = arguments[0][0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options)


def options(f: FeatureMap, shape: Shape, blocks: Blocks) -> dict[str, Any]:
    """Constants of a launch over blocks of tokens and features."""
    return {
        "FAMILY": f.family,
        "MODE": shape.mode,
        "BT": blocks.tokens,
        "BM": padded(shape.features) if is_channel(f) else blocks.features,
        "BD": padded(shape.width),
        "BE": padded(shape.value_width),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def view(x: Tensor) -> tuple[Any, ...]:
    """Pointer and strides of (B, H, N, E)."""
    return (x, *x.stride())


def mask_view(mask: Tensor | None) -> tuple[Any, ...] | None:
    """Pointer and strides of a key mask (B, S), as bytes."""
    return None if mask is None else (mask.view(torch.uint8), *mask.stride())


def candidates(shape: Shape, blocks: Blocks | None) -> Sequence[Blocks]:
    """Block sizes to try, the preferred ones first; each needs less shared memory than the one before."""
    if blocks is not None:
        return [blocks]
    most = min(padded(shape.features), 64)
    widest = max(padded(shape.width), padded(shape.value_width))
    if widest > 128:
        return [Blocks(32, min(most, 32), 8, 1), Blocks(16, 16, 4, 1)]
    return [
        *([Blocks(128, most, 8, 2)] if widest <= 64 else []),
        Blocks(64, most, 4, 2),
        Blocks(64, min(most, 32), 4, 1),
        Blocks(32, 16, 4, 1),
    ]


def first_that_fits(
    name: str, shape: Shape, tried: Sequence[Blocks], run: Callable[[Blocks], Result], choices: Choices | None = None
) -> Result:
    """Run with the first block sizes that the device has shared memory and registers for.

    Triton compares what a compiled kernel needs with what the device has before it launches anything. With
    ``MACLIN_TRITON_TUNE=1`` the sizes that fit are timed once per kernel and widths, and the fastest stays; sums may
    then round differently from one process to the next.

    Raises:
        NoKernelError: none fits.
    """
    choices = _choices if choices is None else choices
    key = (name, *shape[4:])
    if len(tried) > 1 and key not in choices and not interpreting() and os.environ.get("MACLIN_TRITON_TUNE") == "1":
        times = {blocks: _milliseconds(run, blocks) for blocks in tried}
        choices[key] = min(times, key=lambda blocks: times[blocks])
    reason = ""
    for blocks in [choices[key]] if key in choices and len(tried) > 1 else tried:
        try:
            return run(blocks)
        except OutOfResources as error:
            reason = f"{tuple(blocks)}: {error}"
    raise NoKernelError(f"{name}: no block size fits this device; the smallest, {reason}")


def _milliseconds(run: Callable[[Blocks], object], blocks: Blocks) -> float:
    """Median time of a launch; infinite where it does not fit."""
    bench: Any = triton.testing.do_bench
    try:
        return bench(lambda: run(blocks), warmup=5, rep=20, return_mode="median")
    except OutOfResources:
        return float("inf")


def spans(shape: Shape, blocks: Blocks) -> tuple[int, int]:
    """How many spans the tokens are cut into, and their length, a multiple of a block."""
    programs = shape.batch * shape.heads * cdiv(shape.features, blocks.features)
    steps = max(1, cdiv(shape.length, blocks.tokens))
    number = max(1, min(cdiv(_PROGRAMS, max(programs, 1)), steps // 4))
    span = cdiv(steps, number) * blocks.tokens
    return max(1, cdiv(shape.length, span)), span


def is_channel(f: FeatureMap) -> bool:
    """Whether the logarithms of the features are the channels of x themselves."""
    return f.family == CHANNEL
