"""Sizes, refusals and the choice among block sizes."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from maclin.core import triton as kernels
from maclin.core.errors import CapabilityError
from maclin.core.triton import launch
from maclin.core.triton.attention import attend, causal
from maclin.core.triton.launch import Blocks, Shape, candidates, first_that_fits, spans
from maclin.core.triton.positive import positive
from maclin.core.triton.products import products

SHAPE = Shape(1, 2, 2, 100, 24, 8, 8, 3)


def test_the_first_that_fits_is_taken_and_larger_ones_are_not_launched():
    tried = []

    def run(blocks: Blocks) -> str:
        tried.append(blocks)
        if blocks.tokens > 32:
            raise OutOfResources(1 << 20, 1 << 16, "shared memory")
        return "ran"

    assert first_that_fits("read", SHAPE, [Blocks(128, 64), Blocks(32, 32), Blocks(16, 16)], run) == "ran"
    assert tried == [Blocks(128, 64), Blocks(32, 32)]


def test_where_none_fits_the_reason_is_recorded(monkeypatch):
    monkeypatch.setattr(kernels, "refusals", type(kernels.refusals)())

    def run(blocks: Blocks) -> None:
        raise OutOfResources(1 << 20, 1 << 16, "shared memory")

    with pytest.raises(kernels.NoKernelError, match="shared memory"):
        first_that_fits("read", SHAPE, [Blocks(16, 16)], run)
    ((reason, times),) = kernels.refusals.items()
    assert "read: no block size fits" in reason
    assert times == 1


def test_a_choice_that_was_measured_is_kept():
    choices = {("read", *SHAPE[4:]): Blocks(16, 16)}
    tried = first_that_fits("read", SHAPE, [Blocks(128, 64), Blocks(16, 16)], lambda blocks: blocks, choices)
    assert tried == Blocks(16, 16)


@pytest.mark.parametrize("length", [1, 5, 64, 1000, 100_000, 3_000_000_000])
@pytest.mark.parametrize("heads", [1, 64, 5000])
def test_spans_cover_all_tokens_once(length, heads):
    shape = SHAPE._replace(length=length, heads=heads)
    for blocks in candidates(shape, None):
        number, span = spans(shape, blocks)
        assert (number - 1) * span < length <= number * span
        assert span % blocks.tokens == 0


def test_what_no_kernel_takes_is_refused(device):
    f = positive(torch.zeros(1, 8, 4, device=device), 1.0)

    def x(d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(1, 1, 2, d, dtype=dtype, device=device)

    with pytest.raises(kernels.NoKernelError, match="float64"):
        attend(f, f, x(8, torch.float64), x(8, torch.float64), x(8, torch.float64))
    with pytest.raises(kernels.NoKernelError, match="widths 8 and 300"):
        attend(f, f, x(8), x(8), x(300))
    many = positive(torch.zeros(1, 8, 600, device=device), 1.0)
    with pytest.raises(CapabilityError, match="600 features"):
        causal(many, many, x(8), x(8), x(64))
    with pytest.raises(kernels.NoKernelError, match="degree 40"):
        products(torch.zeros(1, 8, 2), torch.zeros(3, 40, dtype=torch.int64), torch.ones(3))


def test_a_cpu_tensor_outside_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    f = positive(torch.zeros(1, 8, 4), 1.0)
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(kernels.NoKernelError, match="run on CUDA"):
        attend(f, f, x, x, x)
