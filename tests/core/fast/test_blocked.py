"""The blocked operators against the plain form in float64: values, derivatives, shapes, strides, bad input."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import maclin
from maclin.core.fast import causal as fast_causal
from maclin.core.fast import memory, sums
from maclin.core.fast.spec import Spec, spec_of

from .conftest import CASES, build


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_SHARE", 0.0)
    monkeypatch.setattr(memory, "_STEP", 16)
    monkeypatch.setattr(fast_causal, "CHUNK", 8)


def is_causal_only_plain(mech: maclin.Mechanism) -> bool:
    return mech.name in ("efficient", "favor")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "random"])
def test_values_and_derivatives_are_those_of_the_plain_form(qkv, key_mask, small_blocks, plainly, mech, causal, kind):
    q, k, v = (x.requires_grad_() for x in qkv(43, 43))
    mask = key_mask(kind, 43)
    wanted_of = [q, k, v, *mech.parameters()]
    direction = torch.randn(2, 4, 43, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found: list[tuple[Tensor, ...]] = []
    for call in (mech, lambda *a, **o: plainly(mech, *a, **o)):
        out = call(q, k, v, key_mask=mask, is_causal=causal)
        gradients = torch.autograd.grad((out * direction).sum(), wanted_of, allow_unused=True)
        found.append((out.detach(), *gradients))
    for blocked, plain in zip(*found, strict=True):
        assert (blocked is None) == (plain is None)
        if plain is not None:
            torch.testing.assert_close(blocked, plain, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_without_gradients_the_operator_is_not_needed_and_gives_the_same(qkv, case):
    mech, (q, k, v) = build(case), qkv(20, 33)
    with torch.no_grad():
        direct = mech(q, k, v)
    through = mech(q.requires_grad_(), k, v).detach()
    torch.testing.assert_close(direct, through, rtol=1e-13, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(1, 70), st.integers(1, 9)),
    layout=st.sampled_from(["plain", "heads_last", "broadcast", "sliced", "reversed_memory"]),
    causal=st.booleans(),
)
def test_any_shape_and_stride(case, sizes, layout, causal):
    mech = build(case)
    batch, n, s, dv = sizes
    if causal:
        s = max(n, s)
    generator = torch.Generator().manual_seed(3)

    def make(heads: int, tokens: int, width: int) -> Tensor:
        x = torch.randn(batch, heads, tokens, width, generator=generator, dtype=torch.float64)
        if layout == "heads_last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "broadcast":
            return x[:, :1].expand(-1, heads, -1, -1)
        if layout == "sliced":
            return torch.cat([x, x], dim=-1)[..., ::2]
        if layout == "reversed_memory":
            return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        return x

    q, k, v = make(4, n, 8), make(2, s, 8), make(2, s, dv)
    with maclin.guarded():
        wanted = mech(q, k, v, is_causal=causal)
    got = mech(q, k, v, is_causal=causal)
    assert got.shape == (batch, 4, n, dv)
    # a denominator in which much cancels loses digits in either form
    assert torch.allclose(got, wanted, rtol=1e-7, atol=1e-9)


def test_padding_may_hold_anything(qkv, mech):
    q, k, v = qkv(20, 33)
    mask = torch.ones(2, 33, dtype=torch.bool)
    mask[:, 25:] = False
    wanted = mech(q, k[:, :, :25], v[:, :, :25])
    k[:, :, 25:], v[:, :, 25:] = torch.nan, torch.inf
    torch.testing.assert_close(mech(q, k, v, key_mask=mask), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", ["stratified-learned", "published-learned"])
def test_a_sharp_temperature_in_float32_is_no_less_exact_than_the_plain_form(plainly, case, causal):
    """Weights of features then span ten orders of magnitude: no share of them may pass for cancellation."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"counts": (1, 8, 16, 9, 6)}
    if case.startswith("published"):
        options = {"estimator": "published"}
    mech = maclin.mechanism("macformer", head_dim=8, num_heads=2, temperature="learned", generator=generator, **options)
    q, k, v = (torch.randn(2, 2, 200, 8, generator=generator) for _ in range(3))
    mech.get_parameter("log_temperature").data.fill_(4.0)
    with torch.no_grad():
        blocked, plain = mech(q, k, v, is_causal=causal), plainly(mech, q, k, v, is_causal=causal)
        exact = mech.double()(q.double(), k.double(), v.double(), is_causal=causal)
    off = [float((x - exact).norm() / exact.norm()) for x in (blocked, plain)]
    assert off[0] < 2 * off[1] + 1e-5


def test_padding_costs_nothing_where_no_sample_needs_it(qkv, small_blocks, monkeypatch):
    seen: list[int] = []
    block = sums.Keys.block

    def counted(self, tokens):
        seen.append(tokens.start)
        return block(self, tokens)

    monkeypatch.setattr(sums.Keys, "block", counted)
    mech, (q, k, v) = build("stratified"), qkv(20, 64)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[:, 20:30] = True
    with torch.no_grad():
        mech(q, k, v, key_mask=mask)
    assert seen == [16]


def test_state_goes_on_from_one_form_to_the_other(qkv, plainly, mech):
    if not mech.causal:
        return
    q, k, v = qkv(30, 30)
    whole = mech(q, k, v, is_causal=True)
    first, state = mech(q[:, :, :17], k[:, :, :17], v[:, :, :17], is_causal=True, return_state=True)
    rest = plainly(mech, q[:, :, 17:], k[:, :, 17:], v[:, :, 17:], is_causal=True, state=state)
    torch.testing.assert_close(torch.cat([first, rest], dim=2), whole, rtol=1e-9, atol=1e-10)


def heads_last(x: Tensor) -> Tensor:
    """The same, as projections give it: heads next to each other in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by kernels where there are some, and in torch
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", ["stratified", "elu", "favor", "learned-calibrated"])
def test_out_lies_as_the_queries_do(qkv, small_blocks, case, causal, dtype):
    mech, given = build(case).to(dtype), [x.to(dtype) for x in qkv(43, 43)]
    wanted = mech(*given, is_causal=causal)
    last = [heads_last(x) for x in given]
    with torch.no_grad():
        direct = mech(*last, is_causal=causal)
    through = mech(last[0].requires_grad_(), *last[1:], is_causal=causal)
    for out in (direct, through):
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
        if not (causal and is_causal_only_plain(mech) and dtype == torch.float64):
            assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("lie", [torch.Tensor.contiguous, heads_last])
@pytest.mark.parametrize("case", ["stratified-raw", "published", "favor", "efficient", "elu"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_operators_are_well_formed(qkv, case, causal, lie):
    """Schema, fake shapes and strides, autograd registration and tracing, as torch checks them."""
    mech, (q, k, v) = build(case), map(lie, qkv(20, 20))
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "maclin":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        mech(q.requires_grad_(), k, v, is_causal=causal).sum().backward()
    for func, args in calls:
        own = tuple(x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args)
        torch.library.opcheck(func, own, test_utils=("test_schema", "test_faketensor"))
    assert calls or (causal and is_causal_only_plain(mech))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("softmax", {}),
        ("mean", {}),
        ("elu", {}),
        ("efficient", {}),
        ("favor", {}),
        ("rfa", {}),
        ("taylor", {}),
        ("macformer", {}),
        ("macformer", {"estimator": "published", "temperature": "learned"}),
        ("linformer", {"proj_len": 16}),
        ("window", {}),
        ("revisited_linformer", {}),
        ("hedgehog", {}),
        ("hybrid", {"window": 9, "linear_options": {"ppsbn": False, "num_features": 24}}),
        ("hybrid", {"window": 9, "linear": "favor"}),
        ("by_head", {"heads": ["elu", "elu", "softmax", "softmax"]}),
    ],
)
def test_compile_without_a_graph_break_and_export(name, options, causal):
    row = maclin.mechanisms.row(name)
    if causal and not row.causal:
        pytest.skip(f"{name} is not causal")
    if name == "linformer":
        options = {**options, "seq_len": 100}
    mech = maclin.mechanism(name, head_dim=8, num_heads=4, num_kv_heads=2, **options)
    q, k, v = (torch.randn(2, h, 100, 8, requires_grad=True) for h in (4, 2, 2))
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1, 80:] = False

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mech = mech

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return self.mech(q, k, v, key_mask=mask, is_causal=causal)

    torch._dynamo.reset()
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in _both(compiled, model, q, k, v, mask):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        exported = torch.export.export(model, (q.detach(), k.detach(), v.detach(), mask))
        torch.testing.assert_close(exported.module().forward(q, k, v, mask), model(q, k, v, mask), rtol=1e-4, atol=1e-5)


def _both(one, other, *inputs: Tensor):
    outs = [one(*inputs), other(*inputs)]
    grads = [torch.autograd.grad(out.sum(), inputs[:3], allow_unused=True) for out in outs]
    yield outs[0], outs[1]
    for a, b in zip(*grads, strict=True):
        if a is not None and b is not None:
            yield a, b


@pytest.mark.parametrize(
    "spec",
    [
        Spec("elu", scale=0.1),
        Spec("product", "token", 1.0, (9, 4, 1), 2, True, True, True),
        Spec("positive", scale=1 / 3),
    ],
)
def test_a_specification_survives_its_string(spec):
    assert spec_of(spec.code) == spec


def test_huge_lengths_are_cut_into_blocks_of_bounded_size():
    device = torch.device("cpu")
    sizes = [memory.block_tokens(length, 8 * 1000, device) for length in (10, 10_000, 10_000_000)]
    assert sizes[0] == 10
    assert sizes[1] % 64 == sizes[2] % 64 == 0
    assert max(sizes) * 8000 <= memory._SHARE * memory.cache_bytes() * torch.get_num_threads() + 64 * 8000


def test_a_change_of_a_buffer_is_seen_by_the_next_call(qkv):
    mech, (q, k, v) = build("stratified-raw"), qkv(20, 20)
    with torch.no_grad():
        before = mech(q, k, v)
        mech.get_buffer("map.coefficients").mul_(0.5)
        after = mech(q, k, v)
        with maclin.guarded():
            wanted = mech(q, k, v)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, wanted)
