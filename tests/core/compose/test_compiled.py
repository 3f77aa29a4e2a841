"""The compiled kernel of the hybrid against the plain form in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import maclin
from maclin.core.compose import hybrid as module
from maclin.core.compose.hybrid import Hybrid
from maclin.core.native.library import native_status, wait_for_kernels

LINEAR: list[tuple[str, dict[str, Any]]] = [
    ("macformer", {"ppsbn": False, "num_features": 40}),
    ("macformer", {"ppsbn": False, "centred": True, "counts": [1, 16, 20, 7]}),
    ("macformer", {"temperature": "learned"}),
    ("macformer", {"estimator": "published", "num_features": 24}),
    ("taylor", {}),
]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    if not wait_for_kernels():
        pytest.skip(f"no compiled kernels here: {native_status().reason}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernel's calls."""
    found: list[str] = []
    for name in ("band",):
        original = getattr(module, name)

        def called(*args: Any, name: str = name, original: Any = original) -> Any:
            found.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, called)
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


@pytest.mark.parametrize(("linear", "options"), LINEAR)
@pytest.mark.parametrize(("n", "s", "window"), [(150, 150, 9), (40, 170, 70), (170, 40, 5), (1, 30, 4), (400, 400, 96)])
@pytest.mark.parametrize(("masked", "sinks"), [(False, 0), (True, 0), (True, 5), (False, 100)])
@torch.no_grad()
def test_it_agrees_with_double_precision(
    linear: str, options: dict[str, Any], n: int, s: int, window: int, masked: bool, sinks: int, calls: list[str]
) -> None:
    mech = made(linear, options, window, sinks)
    generator = torch.Generator().manual_seed(n + s + window)
    q, k, v = (
        torch.randn(2, t, h, d, generator=generator).transpose(1, 2)  # as projections leave them
        for t, h, d in ((n, 4, 16), (s, 2, 16), (s, 2, 19))
    )
    mask = None
    if masked:
        mask = torch.rand(2, s, generator=generator) > 0.3
        mask[1, :20] = False
    for causal in (False, True) if n <= s else (False,):
        wanted = mech.double()(q.double(), k.double(), v.double(), key_mask=mask, is_causal=causal)
        got = mech.float()(q, k, v, key_mask=mask, is_causal=causal)
        # where a row's denominator nearly cancels, no digit is right in single precision
        off = (got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-3)
        assert float(off.median()) < 2e-6
        assert float(off.quantile(0.99)) < 1e-3
    assert calls == ["band"] * (1 + (n <= s))


@torch.no_grad()
def test_pieces_are_the_whole(calls: list[str]) -> None:
    mech = made("macformer", {"ppsbn": False, "centred": True}, 12, 9)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 230, 16, generator=generator) for h in (4, 2, 2))
    mask = torch.rand(2, 230, generator=generator) > 0.2
    whole = mech(q, k, v, key_mask=mask, is_causal=True)
    state, parts = None, []
    for a, b in ((0, 4), (4, 100), (100, 101), (101, 230)):
        piece = (x[:, :, a:b] for x in (q, k, v))
        out, state = mech(*piece, key_mask=mask[:, a:b], is_causal=True, state=state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-3, atol=1e-4)
    assert len(calls) >= 3


@torch.no_grad()
def test_half_precision_is_as_good_as_its_inputs(calls: list[str]) -> None:
    mech = made("macformer", {"ppsbn": False, "num_features": 40}, 20).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 200, 16, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    for causal in (False, True):
        got = mech(*(x.bfloat16() for x in (q, k, v)), is_causal=causal).double()
        exact = mech.double()(q, k, v, is_causal=causal)
        naive = mech(*(x.bfloat16().double() for x in (q, k, v)), is_causal=causal).bfloat16().double()
        assert float((got - exact).norm()) < 2 * float((naive - exact).norm())
        mech.to(torch.bfloat16)
    assert calls == ["band"] * 2
