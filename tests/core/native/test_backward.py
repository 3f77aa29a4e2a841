"""Derivatives by the compiled kernels in float32 against those of the plain form in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import maclin
from maclin.core.native import derivatives, layout

from ..fast.conftest import CALIBRATED, CASES, build
from .conftest import in_torch

ALL = [*CASES, *(f"{case}-calibrated" for case in CALIBRATED)]


def gradients(mech, tensors: list[Tensor], d: Tensor, **options) -> list[Tensor | None]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = mech(*leaves, **options)
    return list(torch.autograd.grad(out, [*leaves, *mech.parameters()], d.to(out.dtype), allow_unused=True))


def compared(mech, tensors: list[Tensor], d: Tensor, **options) -> list[tuple[float, float]]:
    """Relative errors of each derivative, by the kernels and by torch, against the plain form in float64."""
    ours = gradients(mech, tensors, d, **options)
    with in_torch():
        torchs = gradients(mech, tensors, d, **options)
    with maclin.guarded():
        exact = gradients(mech.double(), [x.double() for x in tensors], d.double(), **options)
    mech.float()
    # Those of q and k are sums of d (v - out): with a single key they are 0, but for the rounding of v and out.
    rounded = 0.1 * float(d.norm() * tensors[2].square().mean().sqrt())
    found: list[tuple[float, float]] = []
    for one, other, wanted in zip(ours, torchs, exact, strict=True):
        assert (one is None) == (wanted is None)
        if one is not None and other is not None and wanted is not None:
            assert one.shape == wanted.shape
            size = wanted.norm().clamp_min(rounded)
            found.append((float((one - wanted).norm() / size), float((other - wanted).norm() / size)))
    return found


@pytest.fixture
def count(monkeypatch) -> list[str]:
    names: list[str] = []

    def counted(name, arguments):
        names.append(name)
        layout.run(name, arguments)

    monkeypatch.setattr(derivatives, "run", counted)
    return names


@pytest.mark.parametrize("kind", ["none", "random"])
@pytest.mark.parametrize("case", ALL)
def test_derivatives_are_those_of_the_float64_oracle(qkv, key_mask, count, case, kind):
    mech = build(case).float()
    q, k, v = qkv(150, 130, dtype=torch.float32)
    d = torch.randn(2, 4, 150, 5, generator=torch.Generator().manual_seed(7))
    for ours, torchs in compared(mech, [q, k, v], d, key_mask=key_mask(kind, 130)):
        assert ours < 4 * torchs + 1e-5
    assert set(count) == {"maclin_read_backward", "maclin_accumulate_backward"}


@settings(max_examples=40)
@given(
    case=st.sampled_from(ALL),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 120), st.integers(8, 120), st.integers(1, 40)),
    heads_last=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_derivatives_for_any_shape(case, sizes, heads_last, masked, seed):
    mech = build(case).float()
    batch, n, s, dv = sizes
    generator = torch.Generator().manual_seed(seed)

    def make(heads: int, tokens: int, width: int) -> Tensor:
        if heads_last:
            return torch.randn(batch, tokens, heads, width, generator=generator).transpose(1, 2)
        return torch.randn(batch, heads, tokens, width, generator=generator)

    mask = torch.rand(batch, s, generator=generator) < 0.5 if masked else None
    tensors = [make(4, n, 8), make(2, s, 8), make(2, s, dv)]
    for ours, torchs in compared(mech, tensors, make(4, n, dv), key_mask=mask):
        # torch's own error says how much of a derivative cancels; with a few keys nearly all of it can
        assert ours < 30 * torchs + 1e-4


@pytest.mark.parametrize("threads", [3, 16])
@pytest.mark.parametrize("case", ["stratified", "favor", "batch-learned", "learned-calibrated"])
def test_threads_change_nothing_but_rounding(case, threads):
    mech = build(case).float()
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(1, h, 1700, 8, generator=generator) for h in (4, 2, 2)]
    d = torch.randn(1, 4, 1700, 8, generator=generator)
    wanted = gradients(mech, tensors, d)
    torch.set_num_threads(threads)
    try:
        got = gradients(mech, tensors, d)
    finally:
        torch.set_num_threads(1)
    for one, other in zip(got, wanted, strict=True):
        if one is not None and other is not None:
            assert float((one - other).norm()) <= 1e-4 * float(other.norm()) + 1e-7


def test_padding_gets_no_derivative_whatever_it_holds(qkv):
    for case in ALL:
        mech, (q, k, v) = build(case).float(), qkv(20, 133, dtype=torch.float32)
        mask = torch.ones(2, 133, dtype=torch.bool)
        mask[:, 25:] = False
        k[:, :, 25:], v[:, :, 25:] = torch.nan, torch.inf
        dq, dk, dv, *_ = gradients(mech, [q, k, v], torch.ones(2, 4, 20, 5), key_mask=mask)
        assert dq is not None
        assert dk is not None
        assert dv is not None
        for x in (dq, dk, dv):
            assert x.isfinite().all()
        assert not dk[:, :, 25:].any()
        assert not dv[:, :, 25:].any()
