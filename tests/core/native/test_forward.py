"""The compiled kernels in float32 against the plain form in float64, and against the blocked torch form in float32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import maclin
from maclin.core.native import calls, layout

from ..fast.conftest import CALIBRATED, CASES, build
from .conftest import in_torch

ALL = [*CASES, *(f"{case}-calibrated" for case in CALIBRATED)]


@pytest.fixture
def count(monkeypatch) -> list[str]:
    """Names of the kernels that ran."""
    names: list[str] = []
    run = layout.run

    def counted(name, arguments):
        names.append(name)
        run(name, arguments)

    monkeypatch.setattr(calls, "run", counted)
    return names


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def compared(mech, q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[float, float]:
    """Relative errors of the kernels and of torch, against the plain form in float64 of the same numbers."""
    with torch.no_grad():
        out = mech(q, k, v, **options)
        with in_torch():
            blocked = mech(q, k, v, **options)
        with maclin.guarded():
            exact = mech.double()(q.double(), k.double(), v.double(), **options)
    mech.float()
    assert out.dtype == v.dtype
    assert out.shape == exact.shape
    return error(out, exact), error(blocked, exact)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "random"])
@pytest.mark.parametrize("case", ALL)
def test_values_are_those_of_the_float64_oracle(qkv, key_mask, count, case, kind, causal):
    mech = build(case).float()
    q, k, v = qkv(250, 250, dtype=torch.float32)
    ours, torchs = compared(mech, q, k, v, key_mask=key_mask(kind, 250), is_causal=causal)
    assert ours < 4 * torchs + 1e-6
    plain = causal and mech.name in ("efficient", "favor")  # their causal form is another
    assert plain or set(count) == ({"maclin_causal"} if causal else {"maclin_accumulate", "maclin_read"})


@settings(max_examples=60)
@given(
    case=st.sampled_from(ALL),
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 230), st.integers(1, 230), st.integers(1, 40)),
    kind=st.sampled_from(["plain", "heads_last", "broadcast", "sliced", "reversed_memory"]),
    masked=st.booleans(),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_stride_and_mask(case, sizes, kind, masked, causal, seed):
    mech = build(case).float()
    batch, n, s, dv = sizes
    if causal:
        s = max(n, s)
    generator = torch.Generator().manual_seed(seed)

    def make(heads: int, tokens: int, width: int) -> Tensor:
        x = torch.randn(batch, heads, tokens, width, generator=generator)
        if kind == "heads_last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if kind == "broadcast":
            return x[:, :1].expand(-1, heads, -1, -1)
        if kind == "sliced":
            return torch.cat([x, x], dim=-1)[..., ::2]
        if kind == "reversed_memory":
            return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        return x

    mask = torch.rand(batch, s, generator=generator) < 0.5 if masked else None
    q, k, v = make(4, n, 8), make(2, s, 8), make(2, s, dv)
    ours, torchs = compared(mech, q, k, v, key_mask=mask, is_causal=causal)
    assert ours < 10 * torchs + 1e-5


@pytest.mark.parametrize("width", [1, 3, 16, 24, 33, 64, 80, 128, 200])
@pytest.mark.parametrize("case", ["stratified", "rfa"])
@pytest.mark.parametrize("causal", [False, True])
def test_any_width_of_head_and_value(case, width, causal):
    generator = torch.Generator().manual_seed(width)
    options = {"num_features": 30} if case == "rfa" else {"num_features": 2 * width + 7, "ppsbn": False}
    name = {"stratified": "macformer"}.get(case, case)
    mech = maclin.mechanism(name, head_dim=width, num_heads=2, generator=generator, **options)
    q, k, v = (0.5 * torch.randn(1, 2, 110, w, generator=generator) for w in (width, width, 2 * width + 1))
    ours, torchs = compared(mech, q, k, v, is_causal=causal)
    assert ours < 4 * torchs + 2e-6


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", ["stratified", "favor", "efficient", "published"])
def test_threads_change_nothing_but_rounding(case, causal, threads):
    """One sample of four heads: the tokens of a head are shared, sums are merged."""
    mech = build(case).float()
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, h, 1700, 8, generator=generator) for h in (4, 2, 2))
    mask = torch.rand(1, 1700, generator=generator) < 0.8
    mask[:, 300:900] = False  # whole blocks, and whole pieces
    with torch.no_grad():
        wanted = mech(q, k, v, key_mask=mask, is_causal=causal)
        torch.set_num_threads(threads)
        try:
            got = mech(q, k, v, key_mask=mask, is_causal=causal)
        finally:
            torch.set_num_threads(1)
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-5)


def test_padding_may_hold_anything(qkv):
    for case in ALL:
        mech, (q, k, v) = build(case).float(), qkv(20, 133, dtype=torch.float32)
        mask = torch.ones(2, 133, dtype=torch.bool)
        mask[:, 25:] = False
        with torch.no_grad():
            wanted = mech(q, k[:, :, :25], v[:, :, :25])
            k[:, :, 25:], v[:, :, 25:] = torch.nan, torch.inf
            torch.testing.assert_close(mech(q, k, v, key_mask=mask), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", ALL)
def test_rows_that_attend_to_nothing_are_zero_and_nan_stays_nan(qkv, case, causal):
    mech, (q, k, v) = build(case).float(), qkv(120, 120, dtype=torch.float32)
    mask = torch.ones(2, 120, dtype=torch.bool)
    mask[0] = False
    mask[1, :7] = False
    with torch.no_grad():
        out = mech(q, k, v, key_mask=mask, is_causal=causal)
        assert not out[0].any()
        assert not causal or not out[1, :, :7].any()
        q[1, 0, 50, 3] = torch.nan
        out = mech(q, k, v, key_mask=mask, is_causal=causal)
        assert out[1, 0, 50].isnan().any()
        assert not out[1, 0, :50].isnan().any()
        assert not out[1, 1:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["stratified", "stratified-raw", "published", "favor", "efficient", "elu", "rfa"])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_is_as_exact_as_its_inputs_and_outputs(qkv, case, causal, dtype):
    mech = build(case).float()
    q, k, v = (x.to(dtype) for x in qkv(130, 130))
    with torch.no_grad():
        out = mech(q, k, v, is_causal=causal)
        with maclin.guarded():
            exact = mech.double()(q.double(), k.double(), v.double(), is_causal=causal)
    assert out.dtype == dtype
    rounding = error(exact.to(dtype), exact)
    assert error(out, exact) < 2 * rounding


def test_a_state_goes_on_from_the_kernels_to_torch(qkv):
    mech = build("stratified").float()
    q, k, v = qkv(130, 130, dtype=torch.float32)
    with torch.no_grad():
        whole = mech(q, k, v, is_causal=True)
        first, state = mech(q[:, :, :77], k[:, :, :77], v[:, :, :77], is_causal=True, return_state=True)
        with in_torch():
            rest = mech(q[:, :, 77:], k[:, :, 77:], v[:, :, 77:], is_causal=True, state=state)
    torch.testing.assert_close(torch.cat([first, rest], dim=2), whole, rtol=1e-4, atol=1e-5)


def test_the_operators_use_the_kernels_too(qkv, count):
    """Where somebody differentiates, or compiles, an operator stands between; its values are the kernels'."""
    mech = build("stratified").float()
    q, k, v = qkv(40, 40, dtype=torch.float32)
    through = mech(q.clone().requires_grad_(), k, v)
    assert set(count) == {"maclin_accumulate", "maclin_read"}
    with torch.no_grad():
        torch.testing.assert_close(through.detach(), mech(q, k, v), rtol=1e-6, atol=1e-6)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_whoever_watches_every_operation_sees_torch(qkv, count):
    mech = build("stratified").float()
    q, k, v = qkv(20, 20, dtype=torch.float32)
    with torch.no_grad():
        wanted = mech(q, k, v)
        count.clear()
        with Watching():
            watched = mech(q, k, v)
    assert not count
    torch.testing.assert_close(watched, wanted, rtol=1e-4, atol=1e-5)


def test_a_change_of_a_buffer_is_seen_by_the_next_call(qkv):
    mech = build("rfa").float()
    q, k, v = qkv(20, 20, dtype=torch.float32)
    with torch.no_grad():
        before = mech(q, k, v)
        for buffer in mech.buffers():
            if buffer.is_floating_point():
                buffer.mul_(0.5)
        after = mech(q, k, v)
        with in_torch():
            wanted = mech(q, k, v)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-5)


def test_an_index_outside_of_the_projections_is_refused():
    from maclin.core.fast.spec import Side, Spec

    side = Side(projection=torch.randn(1, 8, 3), index=torch.tensor([[0, 3, 1]]))
    spec = Spec("product", ranks=(2, 1), constants=1, gathered=True)
    x = torch.randn(1, 1, 10, 8)
    with pytest.raises(IndexError, match="3 projections"):
        calls.accumulate(x, x, None, side, spec)
