"""Derivatives of causal attention by the compiled kernels against those of the plain form in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maclin.core.native import causal_derivatives, layout

from ..fast.conftest import CALIBRATED, CASES, build
from .test_backward import compared, gradients

ALL = [
    case
    for case in (*CASES, *(f"{case}-calibrated" for case in CALIBRATED))
    if not case.startswith(("efficient", "favor"))  # their causal form is another
]
BOTH = {"maclin_causal_queries", "maclin_causal_keys"}


@pytest.fixture
def count(monkeypatch) -> list[str]:
    """Names of the kernels that ran."""
    names: list[str] = []

    def counted(name, arguments):
        names.append(name)
        layout.run(name, arguments)

    monkeypatch.setattr(causal_derivatives, "run", counted)
    return names


def random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("kind", ["none", "random"])
@pytest.mark.parametrize("case", ALL)
def test_derivatives_are_those_of_the_float64_oracle(qkv, key_mask, count, case, kind):
    mech = build(case).float()
    q, k, v = qkv(250, 250, dtype=torch.float32)
    (d,) = random(7, (2, 4, 250, 5))
    for ours, torchs in compared(mech, [q, k, v], d, key_mask=key_mask(kind, 250), is_causal=True):
        assert ours < 4 * torchs + 1e-5
    assert set(count) == BOTH


@settings(max_examples=40)
@given(
    case=st.sampled_from(ALL),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 230), st.integers(1, 40)),
    heads_last=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_derivatives_for_any_shape(case, sizes, heads_last, masked, seed):
    mech = build(case).float()
    batch, n, dv = sizes
    generator = torch.Generator().manual_seed(seed)

    def make(h: int, width: int) -> Tensor:
        if heads_last:
            return torch.randn(batch, n, h, width, generator=generator).transpose(1, 2)
        return torch.randn(batch, h, n, width, generator=generator)

    mask = torch.rand(batch, n, generator=generator) < 0.5 if masked else None
    tensors = [make(4, 8), make(2, 8), make(2, dv)]
    for ours, torchs in compared(mech, tensors, make(4, dv), key_mask=mask, is_causal=True):
        assert ours < 30 * torchs + 1e-4


@pytest.mark.parametrize("threads", [3, 16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", ["stratified", "rfa", "stratified-calibrated", "learned-calibrated"])
def test_pieces_of_a_head_change_nothing_but_rounding(case, masked, threads):
    mech = build(case).float()
    q, k, v, d = random(5, *((1, h, 1700, 8) for h in (4, 2, 2, 4)))
    mask = random(6, (1, 1700))[0] > 0 if masked else None
    wanted = gradients(mech, [q, k, v], d, key_mask=mask, is_causal=True)
    torch.set_num_threads(threads)
    try:
        got = gradients(mech, [q, k, v], d, key_mask=mask, is_causal=True)
    finally:
        torch.set_num_threads(1)
    for one, other in zip(got, wanted, strict=True):
        if one is not None and other is not None:
            assert float((one - other).norm()) <= 1e-4 * float(other.norm()) + 1e-7


@pytest.mark.parametrize("case", ["stratified", "elu", "taylor", "unbiased-calibrated"])
def test_a_sequence_in_two_parts_has_the_derivatives_of_the_whole(case, count):
    mech = build(case).float()
    q, k, v, d = random(9, *((2, h, 180, 8) for h in (4, 2, 2, 4)))
    whole = gradients(mech, [q, k, v], d, is_causal=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    first, state = mech(*(x[:, :, :77] for x in leaves), is_causal=True, return_state=True)
    second = mech(*(x[:, :, 77:] for x in leaves), is_causal=True, state=state)
    parts = torch.autograd.grad(torch.cat([first, second], dim=2), leaves, d)
    assert count.count("maclin_causal_keys") == 3
    for one, other in zip(parts, whole, strict=False):
        assert other is not None
        assert float((one - other).norm()) <= 2e-5 * float(other.norm())


def floored(case: str):
    """A calibrated map whose denominators are cut often, and what it is given."""
    mech = build(case).float()
    q, k, v, d = random(3, *((2, h, 140, 8) for h in (4, 2, 2, 4)))
    return mech, [6 * q, 4 * k, v], d


@pytest.mark.parametrize("case", ["stratified-raw-calibrated", "unbiased-calibrated", "stratified-raw"])
def test_derivatives_where_denominators_are_cut(case):
    mech, tensors, d = floored(case)
    mask = random(4, (2, 140))[0] > -0.5
    for ours, torchs in compared(mech, tensors, d, key_mask=mask, is_causal=True):
        assert ours < 10 * torchs + 1e-4


def test_padding_gets_no_derivative_whatever_it_holds():
    for case in ALL:
        mech = build(case).float()
        q, k, v = random(2, *((2, h, 133, 8) for h in (4, 2, 2)))
        mask = torch.ones(2, 133, dtype=torch.bool)
        mask[:, :25], mask[:, 100:] = False, False
        k[:, :, ~mask[0]], v[:, :, ~mask[0]] = torch.nan, torch.inf
        dq, dk, dv, *_ = gradients(mech, [q, k, v], torch.ones(2, 4, 133, 8), key_mask=mask, is_causal=True)
        for x in (dq, dk, dv):
            assert x is not None
            assert x.isfinite().all()
        for x in (dk, dv):
            assert x is not None
            assert not x[:, :, ~mask[0]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["stratified-raw", "elu", "rfa"])
def test_half_precision_loses_what_its_inputs_and_results_lose(case, dtype, count):
    mech = build(case).float()
    q, k, v, d = (0.5 * x.to(dtype) for x in random(8, *((2, h, 200, 8) for h in (4, 2, 2, 4))))
    got = gradients(mech, [q, k, v], d, is_causal=True)
    wanted = gradients(mech, [x.float() for x in (q, k, v)], d.float(), is_causal=True)
    assert len(count) == 4  # two walks, twice
    eps = torch.finfo(dtype).eps
    for one, other in zip(got, wanted, strict=False):
        if one is not None and other is not None:
            assert one.dtype == dtype
            assert float((one.float() - other).norm()) < eps * float(other.norm())


def test_compiled_and_recomputed_give_the_same():
    mech = build("stratified").float()
    q, k, v, d = random(1, *((1, h, 100, 8) for h in (4, 2, 2, 4)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mech(q, k, v, is_causal=True)

    def again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(attend, q, k, v, use_reentrant=False)  # pyright: ignore[reportReturnType]

    wanted = gradients(mech, [q, k, v], d, is_causal=True)
    for form in (torch.compile(attend, fullgraph=True, backend="aot_eager"), again):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        found = torch.autograd.grad(form(*leaves), leaves, d)
        for one, other in zip(found, wanted, strict=False):
            torch.testing.assert_close(one, other)
