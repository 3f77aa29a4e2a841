"""What is kept between calls must never outlive what it was made of, nor leak from one mode into another."""

import copy
import pickle
from typing import Any

import pytest
import torch

import maclin
from maclin.core.fast import fill
from maclin.core.fast.kept import Kept

from .conftest import build


@pytest.mark.parametrize("case", ["favor", "rfa", "stratified-raw", "published", "taylor"])
def test_a_gradient_after_a_call_in_inference_mode(qkv, case):
    mech, (q, k, v) = build(case), qkv(20, 20)
    with torch.inference_mode():
        first = mech(q, k, v)
    out = mech(q.requires_grad_(), k.requires_grad_(), v)
    out.sum().backward()
    torch.testing.assert_close(first.clone(), out.detach())
    assert q.grad is not None


@pytest.mark.parametrize("case", ["favor", "rfa", "published"])
def test_another_draw_is_seen_by_the_next_call(qkv, case):
    mech, (q, k, v) = build(case), qkv(20, 20)
    before = mech(q, k, v)
    redraw: Any = mech
    redraw.resample_(torch.Generator().manual_seed(9))
    assert not torch.allclose(before, mech(q, k, v))


def test_copies_and_pickles_start_empty():
    kept = Kept[int]()
    assert kept.get(lambda: 3, (1,)) == 3
    assert kept.get(lambda: 4, (1,)) == 3
    assert kept.get(lambda: 4, (2,)) == 4
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert other.get(lambda: 5, (2,)) == 5


def test_layouts_are_kept_up_to_a_size(monkeypatch):
    monkeypatch.setattr(fill, "_MOST_BYTES", 1 << 16)
    q, k, v = (torch.randn(1, 2, 10, 16, dtype=torch.float64) for _ in range(3))  # never by compiled kernels
    with torch.no_grad():
        for seed in range(12):
            generator = torch.Generator().manual_seed(seed)
            maclin.mechanism("favor", head_dim=16, num_heads=2, num_features=64, generator=generator)(q, k, v)
    held = sum(layout.size for _, layout in fill._LAYOUTS.values())
    assert held <= 1 << 16 or len(fill._LAYOUTS) == 1
