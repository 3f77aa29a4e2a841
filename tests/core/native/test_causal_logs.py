"""Causal attention with positive features by the compiled kernels against the plain form in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import maclin
from maclin.core.native import causal_logs, layout

from .conftest import in_torch
from .test_backward import compared, gradients
from .test_causal_backward import random

BACK = ["maclin_causal_logs_queries", "maclin_causal_logs_keys"]


@pytest.fixture
def count(monkeypatch) -> list[str]:
    """Names of the kernels that ran."""
    names: list[str] = []

    def counted(name, arguments):
        names.append(name)
        layout.run(name, arguments)

    monkeypatch.setattr(causal_logs, "run", counted)
    return names


def favor(heads: int = 4, key_heads: int = 2, width: int = 8, features: int = 24) -> maclin.Mechanism:
    generator = torch.Generator().manual_seed(1)
    options = {"head_dim": width, "num_heads": heads, "num_kv_heads": key_heads, "num_features": features}
    return maclin.mechanism("favor", generator=generator, **options).float()


def values(mech: maclin.Mechanism, tensors: list[Tensor], **options) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernels, in torch, and in float64."""
    with torch.no_grad():
        ours = mech(*tensors, is_causal=True, **options)
        with in_torch():
            torchs = mech(*tensors, is_causal=True, **options)
            exact = mech.double()(*(x.double() for x in tensors), is_causal=True, **options)
    mech.float()
    return ours, torchs, exact


@settings(max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 230), st.integers(1, 40), st.integers(1, 60)),
    heads=st.sampled_from([(4, 2), (4, 1), (3, 3)]),
    size=st.sampled_from([0.3, 1.0, 5.0, 20.0]),
    heads_last=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_derivatives_for_any_shape(sizes, heads, size, heads_last, masked, seed):
    batch, n, dv, features = sizes
    mech = favor(*heads, features=features)
    generator = torch.Generator().manual_seed(seed)

    def make(h: int, width: int) -> Tensor:
        if heads_last:
            return torch.randn(batch, n, h, width, generator=generator).transpose(1, 2)
        return torch.randn(batch, h, n, width, generator=generator)

    mask = torch.rand(batch, n, generator=generator) < 0.5 if masked else None
    tensors = [size * make(heads[0], 8), size * make(heads[1], 8), make(heads[1], dv)]
    ours, torchs, exact = values(mech, tensors, key_mask=mask)
    limit = 3 * (torchs - exact).norm() + 1e-5 * exact.norm().clamp_min(1e-2)
    assert (ours - exact).norm() < limit
    for one, other in compared(mech, tensors, make(heads[0], dv), key_mask=mask, is_causal=True):
        assert one < 30 * other + 1e-4


@pytest.mark.parametrize("order", ["rising", "falling", "peak", "random"])
def test_extreme_keys_hide_nobody_before_them(order, count):
    q, k, v = random(4, *((1, 2, 150, 8) for _ in range(3)))
    size = torch.linspace(0.0, 40.0, 150)[:, None]
    if order == "falling":
        size = size.flip(0)
    elif order == "peak":
        size = torch.where(torch.arange(150) == 70, 60.0, 0.1)[:, None]
    elif order == "random":
        size = 40 * torch.rand(150, 1, generator=torch.Generator().manual_seed(0))
    mech = favor(2, 2)
    tensors = [3 * q, k / k.norm(dim=-1, keepdim=True) * size, v]
    ours, torchs, exact = values(mech, tensors)
    assert count == ["maclin_causal_logs"]
    error, of_torch = ((x - exact).norm(dim=-1) for x in (ours, torchs))
    assert float(error.max()) < 4 * float(of_torch.max()) + 1e-5
    (d,) = random(5, (1, 2, 150, 8))
    for one, other in compared(mech, tensors, d, is_causal=True):
        assert one < 10 * other + 1e-4


def test_padding_before_a_far_larger_key_still_sees_the_keys_before_it(count):
    q, k, v, d = random(4, *((1, 2, 150, 8) for _ in range(4)))
    place = torch.arange(150)
    mask = ((place < 90) | (place >= 110))[None]  # over the first tokens of a chunk
    size = torch.where(place < 100, 40.0, 0.1)[:, None]  # exp(Wx - |x|^2 / 2) is far smaller for the long ones
    mech = favor(2, 2)
    tensors = [q, k / k.norm(dim=-1, keepdim=True) * size, v]
    ours, _, exact = values(mech, tensors, key_mask=mask)
    assert count == ["maclin_causal_logs"]
    assert exact[:, :, 90:110].norm(dim=-1).min() > 0.1
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)
    for one, other in compared(mech, tensors, d, key_mask=mask, is_causal=True):
        assert one < 10 * other + 1e-4


@pytest.mark.parametrize("where", ["decoding", "prefill"])
def test_a_state_goes_on_where_it_ended(where, count):
    mech = favor()
    q, k, v, d = random(9, *((2, h, 180, 8) for h in (4, 2, 2, 4)))
    whole = gradients(mech, [q, k, v], d, is_causal=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cut = 179 if where == "decoding" else 77
    first, state = mech(*(x[:, :, :cut] for x in leaves), is_causal=True, return_state=True)
    second, last = mech(*(x[:, :, cut:] for x in leaves), is_causal=True, state=state, return_state=True)
    parts = torch.autograd.grad(torch.cat([first, second], dim=2), leaves, d)
    assert count.count("maclin_causal_logs") == (2 if where == "decoding" else 3)  # one token by torch
    for one, other in zip(parts, whole, strict=False):
        assert other is not None
        assert float((one - other).norm()) <= 2e-5 * float(other.norm())
    with torch.no_grad(), in_torch():
        wanted = mech(q, k, v, is_causal=True, return_state=True)[1]
        after = mech(q[:, :, :3], k[:, :, :3], v[:, :, :3], is_causal=True, state=last)
        as_torch = mech(q[:, :, :3], k[:, :, :3], v[:, :, :3], is_causal=True, state=wanted)
    torch.testing.assert_close(after, as_torch)


def test_masked_keys_count_for_nothing(count):
    mech = favor()
    q, k, v = random(2, *((2, h, 133, 8) for h in (4, 2, 2)))
    mask = torch.ones(2, 133, dtype=torch.bool)
    mask[:, :25], mask[:, 100:] = False, False
    k[:, :, ~mask[0]], v[:, :, ~mask[0]] = torch.nan, torch.inf
    with torch.no_grad():
        out = mech(q, k, v, key_mask=mask, is_causal=True)
    assert out.isfinite().all()
    assert not out[:, :, :25].any()
    dq, dk, dv, *_ = gradients(mech, [q, k, v], torch.ones(2, 4, 133, 8), key_mask=mask, is_causal=True)
    for x in (dq, dk, dv):
        assert x is not None
        assert x.isfinite().all()
    assert count == ["maclin_causal_logs"] * 2 + BACK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_what_its_inputs_and_results_lose(dtype, count):
    mech = favor()
    q, k, v, d = (0.5 * x.to(dtype) for x in random(8, *((2, h, 200, 8) for h in (4, 2, 2, 4))))
    got = gradients(mech, [q, k, v], d, is_causal=True)
    wanted = gradients(mech, [x.float() for x in (q, k, v)], d.float(), is_causal=True)
    assert len(count) == 6
    for one, other in zip(got, wanted, strict=True):
        assert one is not None
        assert other is not None
        assert one.dtype == dtype
        assert float((one.float() - other).norm()) < torch.finfo(dtype).eps * float(other.norm())


def test_compiled_recomputed_and_differentiated_twice():
    mech = favor()
    q, k, v, d = random(1, *((1, h, 100, 8) for h in (4, 2, 2, 4)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mech(q, k, v, is_causal=True)

    def again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(attend, q, k, v, use_reentrant=False)  # pyright: ignore[reportReturnType]

    wanted = gradients(mech, [q, k, v], d, is_causal=True)
    for form in (torch.compile(attend, fullgraph=True, backend="aot_eager"), again):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        found = torch.autograd.grad(form(*leaves), leaves, d)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def second() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        first = torch.autograd.grad(attend(*leaves), leaves, d, create_graph=True)
        return torch.autograd.grad([(x * x).sum() for x in first], leaves)

    ours = second()
    with in_torch():
        torchs = second()
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("threads", [3, 16])
def test_threads_change_nothing(threads):
    mech = favor()
    q, k, v, d = random(5, *((1, h, 700, 8) for h in (4, 2, 2, 4)))
    wanted = gradients(mech, [q, k, v], d, is_causal=True)
    torch.set_num_threads(threads)
    try:
        got = gradients(mech, [q, k, v], d, is_causal=True)
    finally:
        torch.set_num_threads(1)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
