"""Derivatives of the hybrid by the compiled kernels in float32 against those of the plain form in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import maclin
from maclin.core.compose import hybrid as module
from maclin.core.compose.hybrid import Hybrid
from maclin.core.mechanisms import window as window_module
from maclin.core.native.band import Problem

from .conftest import in_torch

CENTRED: dict[str, Any] = {"ppsbn": False, "centred": True, "counts": [1, 16, 20, 7]}
LINEAR: list[tuple[str, dict[str, Any]]] = [
    ("macformer", {"ppsbn": False, "num_features": 40}),
    ("macformer", CENTRED),
    ("macformer", {**CENTRED, "temperature": "learned"}),
    ("macformer", {"temperature": "learned"}),
    ("macformer", {"estimator": "published", "num_features": 24}),
    ("taylor", {}),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of the kernels was causal."""
    found: list[bool] = []
    original = module.band

    def called(problem: Any) -> Any:
        found.append(problem.causal)
        return original(problem)

    monkeypatch.setattr(module, "band", called)
    return found


def made(linear: str, options: dict[str, Any], window: int, sinks: int = 0) -> Hybrid:
    mech = maclin.mechanism(
        "hybrid",
        head_dim=16,
        num_heads=4,
        num_kv_heads=2,
        window=window,
        sinks=sinks,
        linear=linear,
        linear_options=options,
        balance="learned",
        generator=torch.Generator().manual_seed(0),
    )
    assert isinstance(mech, Hybrid)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, x in [*mech.named_parameters(), *mech.linear.named_buffers()]:
            if x.is_floating_point() and ("_centre" in name or not name.startswith("map")):
                x.add_(0.2 * torch.randn(x.shape, generator=generator))
    return mech.eval()


def inputs(n: int, s: int, seed: int, *, heads_last: bool = True, size: float = 1.0) -> list[Tensor]:
    """q, k, v, and derivatives of out."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, 4, 16), (s, 2, 16), (s, 2, 19), (n, 4, 19))
    found = [size * torch.randn(2, t, h, d, generator=generator).transpose(1, 2) for t, h, d in shapes]
    return found if heads_last else [x.contiguous() for x in found]


def some_masked(s: int) -> Tensor:
    mask = torch.rand(2, s, generator=torch.Generator().manual_seed(s)) > 0.3
    mask[1, :20] = False
    return mask


def derivatives(mech: Hybrid, tensors: list[Tensor], **options: Any) -> list[Tensor | None]:
    *leaves, d = [x.detach().requires_grad_() for x in tensors]
    out = mech(*leaves, **options)
    return list(torch.autograd.grad(out, [*leaves, *mech.parameters()], d.detach().to(out.dtype), allow_unused=True))


def compared(mech: Hybrid, tensors: list[Tensor], **options: Any) -> list[tuple[float, float]]:
    """Relative errors of each derivative, by the kernels and by torch, against float64."""
    ours = derivatives(mech, tensors, **options)
    with in_torch():
        torchs = derivatives(mech, tensors, **options)
    exact = derivatives(mech.double(), [x.double() for x in tensors], **options)
    mech.float()
    found: list[tuple[float, float]] = []
    for one, other, wanted in zip(ours, torchs, exact, strict=True):
        assert (one is None) == (wanted is None)
        if one is not None and other is not None and wanted is not None:
            assert one.shape == wanted.shape
            size = wanted.norm().clamp_min(1e-3)
            found.append((float((one - wanted).norm() / size), float((other - wanted).norm() / size)))
    return found


SIZES = [(150, 150, 9), (40, 170, 70), (170, 40, 5), (1, 30, 4), (400, 400, 96), (60, 60, 80)]


@pytest.mark.parametrize(("linear", "options"), LINEAR)
@pytest.mark.parametrize(("n", "s", "window"), SIZES)
@pytest.mark.parametrize(("masked", "sinks"), [(False, 0), (True, 5), (False, 100)])
def test_derivatives_are_those_of_the_float64_form(
    linear: str, options: dict[str, Any], n: int, s: int, window: int, masked: bool, sinks: int, calls: list[bool]
) -> None:
    mech, tensors = made(linear, options, window, sinks), inputs(n, s, n + s + window)
    for causal in (False, True) if n <= s else (False,):
        for ours, torchs in compared(mech, tensors, key_mask=some_masked(s) if masked else None, is_causal=causal):
            assert ours < 4 * torchs + 1e-5
    assert calls == [False, True] if n <= s else [False]


@settings(max_examples=40)
@given(
    case=st.sampled_from(LINEAR),
    sizes=st.tuples(st.integers(1, 260), st.integers(1, 260), st.integers(1, 130), st.integers(0, 30)),
    heads_last=st.booleans(),
    masked=st.booleans(),
    causal=st.booleans(),
    size=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_derivatives_for_any_shape(
    case: tuple[str, dict[str, Any]],
    sizes: tuple[int, int, int, int],
    heads_last: bool,
    masked: bool,
    causal: bool,
    size: float,
    seed: int,
) -> None:
    n, s, window, sinks = sizes
    n = min(n, s) if causal else n
    mech, tensors = made(*case, window, sinks), inputs(n, s, seed, heads_last=heads_last, size=size)
    for ours, torchs in compared(mech, tensors, key_mask=some_masked(s) if masked else None, is_causal=causal):
        # torch's own error says how much of a derivative cancels; with a few keys nearly all of it can
        assert ours < 30 * torchs + 1e-4


@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_the_floor_has_changed(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many of all rows, instead of the few that it catches."""
    mech = made("macformer", CENTRED, 9, 3)
    monkeypatch.setattr(type(mech.linear.map), "floor", 0.99)  # pyright: ignore[reportArgumentType]
    tensors = inputs(150, 150, 0)
    for ours, torchs in compared(mech, tensors, is_causal=causal):
        assert ours < 4 * torchs + 1e-5


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize(("n", "s", "window"), [(2100, 2100, 30), (1500, 2000, 64), (2000, 1700, 200)])
def test_threads_change_nothing_but_rounding(threads: int, n: int, s: int, window: int) -> None:
    mech, tensors = made("macformer", CENTRED, window, 5), inputs(n, s, 3)
    mask = some_masked(s)
    mask[:, 300:700] = False  # whole blocks
    for causal in (False, True) if n <= s else (False,):
        wanted = derivatives(mech, tensors, key_mask=mask, is_causal=causal)
        torch.set_num_threads(threads)
        try:
            got = derivatives(mech, tensors, key_mask=mask, is_causal=causal)
        finally:
            torch.set_num_threads(1)
        for one, other in zip(got, wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert float((one - other).norm()) <= 1e-5 * float(other.norm())


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_is_as_good_as_its_inputs(causal: bool) -> None:
    mech = made("macformer", {"ppsbn": False, "num_features": 40}, 20, 4)
    tensors = inputs(200, 200, 0)
    exact = derivatives(mech.double(), [x.double() for x in tensors], is_causal=causal)
    naive = derivatives(mech, [x.bfloat16().double() for x in tensors], is_causal=causal)
    got = derivatives(mech.to(torch.bfloat16), [x.bfloat16() for x in tensors], is_causal=causal)
    for one, rounded, wanted in zip(got[:3], naive, exact, strict=False):
        assert one is not None
        assert rounded is not None
        assert wanted is not None
        assert one.dtype == torch.bfloat16
        assert float((one - wanted).norm()) < 2 * float((rounded.bfloat16() - wanted).norm())


@pytest.mark.parametrize("causal", [False, True])
def test_padding_gets_no_derivative_whatever_it_holds(causal: bool) -> None:
    mech, (q, k, v, d) = made("macformer", CENTRED, 30, 4), inputs(133, 133, 0)
    mask = torch.ones(2, 133, dtype=torch.bool)
    mask[:, 25:] = False
    k[:, :, 25:], v[:, :, 25:] = torch.nan, torch.inf
    for x in derivatives(mech, [q, k, v, d], key_mask=mask, is_causal=causal)[:3]:
        assert x is not None
        assert x.isfinite().all()
        assert x.shape[1] == 4 or not x[:, :, 25:].any()


@pytest.mark.parametrize("causal", [False, True])
def test_compiled_and_checkpointed_are_the_same(causal: bool) -> None:
    mech, tensors = made("macformer", CENTRED, 20, 4), inputs(200, 200, 0)
    mask = some_masked(200)
    wanted = derivatives(mech, tensors, key_mask=mask, is_causal=causal)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(mech, fullgraph=True, backend=keep)

    def remade(*args: Tensor, **options: Any) -> Any:
        return checkpoint(lambda *xs: mech(*xs, **options), *args, use_reentrant=False)

    for form in (compiled, remade):
        *leaves, d = [x.detach().requires_grad_() for x in tensors]
        out = form(*leaves, key_mask=mask, is_causal=causal)
        got = torch.autograd.grad(out, [*leaves, *mech.parameters()], d.detach())
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other)
    torch.compiler.reset()
    assert any(node.target is torch.ops.maclin.band for graph in graphs for node in graph.graph.nodes)


def test_operator_conforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake implementation and autograd registration, by torch's own check."""
    mech, (q, k, v, _) = made("macformer", {**CENTRED, "temperature": "learned"}, 20, 4), inputs(100, 100, 0)
    problems: list[Problem] = []
    original = module.band

    def kept(problem: Problem) -> Any:
        problems.append(problem)
        return original(problem)

    monkeypatch.setattr(module, "band", kept)
    for causal in (False, True):
        mech(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), is_causal=causal)
    for p in problems:
        tensors = (*p[:16], *p.query, *p.key)
        leaves = (x if x is None else x.detach().requires_grad_(x.requires_grad) for x in tensors)
        numbers = (p.query_spec.code, p.key_spec.code, p.scale, p.floor, p.window, p.causal)
        torch.library.opcheck(torch.ops.maclin.band.default, (*leaves, *numbers))


WINDOWS = [(150, 150, 9), (40, 170, 70), (170, 40, 5), (1, 30, 4), (300, 300, 96), (60, 60, 80), (5, 300, 7)]


@pytest.mark.parametrize(("n", "s", "window"), WINDOWS)
@pytest.mark.parametrize(("masked", "sinks"), [(False, 0), (True, 5), (False, 100)])
def test_a_window_alone(n: int, s: int, window: int, masked: bool, sinks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without features: all pairs in float64 under the mask of window and sinks, out and derivatives."""
    used: list[int] = []
    original = window_module.band

    def counted(problem: Problem) -> Any:
        used.append(problem.window)
        return original(problem)

    monkeypatch.setattr(window_module, "band", counted)
    mech = maclin.mechanism("window", head_dim=16, num_heads=4, num_kv_heads=2, window=window, sinks=sinks)
    *tensors, d = inputs(n, s, n + s)
    mask = some_masked(s) if masked else torch.ones(2, s, dtype=torch.bool)
    apart = torch.arange(s)[None] - torch.arange(n)[:, None] - (s - n)
    first = mask & (mask.cumsum(-1) <= sinks)
    for causal in (False, True) if n <= s else (False,):
        near = (apart.abs() <= window) | first[:, None, None]
        seen = near & mask[:, None, None] & ((apart <= 0) | (not causal))
        q, k, v = leaves = [x.double().requires_grad_() for x in tensors]
        logits = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~seen, -torch.inf)
        wanted = logits.softmax(-1).nan_to_num() @ v.repeat_interleave(2, 1)
        of_wanted = torch.autograd.grad(wanted, leaves, d.double())
        ours = [x.detach().requires_grad_() for x in tensors]
        out = mech(*ours, key_mask=mask if masked else None, is_causal=causal)
        assert isinstance(out, Tensor)
        found = torch.autograd.grad(out, ours, d)
        for one, other in zip((out, *found), (wanted, *(x.nan_to_num() for x in of_wanted)), strict=True):
            assert float((one - other).detach().norm()) < 1e-5 * float(other.detach().norm())
    assert used


def test_memory_does_not_grow_with_the_window_or_the_features() -> None:
    """Of one step beyond q, k, v, out and their derivatives: less than the pairs of queries and window."""
    import resource

    mech = maclin.mechanism("hybrid", head_dim=16, num_heads=2, window=200)
    q, k, v = (torch.randn(1, 2, 20000, 16, requires_grad=True) for _ in range(3))
    mech(q[:, :, :500], k[:, :, :500], v[:, :, :500]).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mech(q, k, v).sum().backward()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 16 * q.numel() * 4  # a window of every query alone would be 50 times q
