from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maclin.core import slots as slots_module
from maclin.core.errors import CapabilityError
from maclin.core.mechanisms.revisited_linformer import RevisitedLinformer, slot_attention


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1).double(), v.repeat_interleave(groups, 1).double()
    logits = q.double() @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    return logits.softmax(-1) @ v


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def rel(out: Tensor, wanted: Tensor) -> float:
    return ((out.double() - wanted.double()).norm() / wanted.double().norm()).item()


def repeated_keys(batch: int, heads: int, length: int, width: int, different: int) -> Tensor:
    """Each head has its own ``different`` keys; how often each occurs is far from even."""
    generator = torch.Generator().manual_seed(3)
    rare = torch.rand(batch, heads, length, generator=generator) ** 4
    which = (rare * different).long()
    which[..., :different] = torch.arange(different)
    keys = draw(batch, heads, different, width, seed=4, scale=2.0)
    return keys.gather(2, which[..., None].expand(-1, -1, -1, width))


@pytest.mark.parametrize("different", [1, 2, 7, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_at_most_head_dim_different_keys_are_softmax_attention(
    different: int, dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v = draw(2, 4, 33, 16, scale=2.0), repeated_keys(2, 2, 300, 16, different), draw(2, 2, 300, 5, seed=1)
    out = RevisitedLinformer(16, 4, 2)(q.to(dtype), k.to(dtype), v.to(dtype))
    assert rel(out, softmax_attention(q, k, v)) < tolerance


@pytest.mark.parametrize("keys", [torch.eye(8), torch.cat([torch.eye(4, 8), -torch.eye(4, 8)])])
def test_keys_of_equal_length_stay_apart(keys: Tensor) -> None:
    k = keys.double().repeat(40, 1)[None, None] * 3
    q, v = draw(1, 1, 20, 8), draw(1, 1, 320, 3, seed=1)
    assert rel(RevisitedLinformer(8, 1)(q, k, v), softmax_attention(q, k, v)) < 1e-12


@pytest.mark.parametrize("keys", [1, 2, 15, 16])
def test_fewer_keys_than_slots_are_softmax_attention(keys: int) -> None:
    q, k, v = draw(2, 3, 9, 16, scale=3.0), draw(2, 3, keys, 16, seed=1, scale=3.0), draw(2, 3, keys, 16, seed=2)
    assert rel(RevisitedLinformer(16, 3)(q, k, v), softmax_attention(q, k, v)) < 1e-12


def test_error_grows_with_the_square_of_the_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(8, (1, 2, 1500, 1), generator=generator).expand(-1, -1, -1, 16)
    centres, noise = draw(1, 2, 8, 16, seed=4, scale=2.0).gather(2, which), draw(1, 2, 1500, 16, seed=7)
    q, first_order = draw(1, 2, 50, 16), draw(1, 2, 16, 16, seed=1)
    errors = []
    for spread in (0.02, 0.04, 0.08):
        k = centres + spread * noise
        v = centres + k @ first_order
        errors.append(rel(RevisitedLinformer(16, 2)(q, k, v), softmax_attention(q, k, v)))
    slopes = [math.log2(b / a) for a, b in pairwise(errors)]
    assert errors[-1] < 1e-3
    assert slopes == pytest.approx([2.0, 2.0], abs=0.1)


def test_order_of_the_keys_changes_nothing() -> None:
    q, k, v = (draw(2, 2, 400, 16, seed=s) for s in range(3))
    mech, order = RevisitedLinformer(16, 2), torch.randperm(400, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mech(q, k[:, :, order], v[:, :, order]), mech(q, k, v), rtol=0, atol=1e-12)


def test_order_of_coarsely_rounded_keys_changes_nothing() -> None:
    q, k, v = (draw(1, 2, 400, 16, seed=s).bfloat16() for s in range(3))
    mech, order = RevisitedLinformer(16, 2), torch.randperm(400, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        mech(q.float(), k[:, :, order].float(), v[:, :, order].float()), mech(q.float(), k.float(), v.float())
    )


@pytest.mark.parametrize("kept", [3, 16, 40, 150, 299])
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_masked_keys_are_as_good_as_absent(kept: int, side: str) -> None:
    q, k, v = draw(1, 2, 30, 16), draw(1, 2, 300, 16, seed=1, scale=2.0), draw(1, 2, 300, 8, seed=2)
    positions = {
        "left": torch.arange(300 - kept, 300),
        "right": torch.arange(kept),
        "scattered": torch.randperm(300, generator=torch.Generator().manual_seed(5))[:kept].sort().values,
    }[side]
    mask = torch.zeros(1, 300, dtype=torch.bool)
    mask[:, positions] = True
    mech = RevisitedLinformer(16, 2)
    cropped = mech(q, k[:, :, positions], v[:, :, positions])
    k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    torch.testing.assert_close(mech(q, k, v, key_mask=mask), cropped, rtol=0, atol=1e-12)


def test_batch_mates_change_nothing() -> None:
    q, k, v = (draw(3, 2, 200, 16, seed=s) for s in range(3))
    mask = torch.arange(200) < torch.tensor([[200], [50], [0]])
    mech = RevisitedLinformer(16, 2)
    out = mech(q, k, v, key_mask=mask)
    for i in range(3):
        alone = mech(q[i : i + 1], k[i : i + 1], v[i : i + 1], key_mask=mask[i : i + 1])
        torch.testing.assert_close(out[i : i + 1], alone, rtol=0, atol=1e-12)
    assert (out[2] == 0).all()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (draw(1, 2, 500, 16, seed=s) for s in range(3))
    mech = RevisitedLinformer(16, 2)
    whole = mech(q, k, v)
    monkeypatch.setattr(slots_module, "_MOST_BYTES", 1)
    torch.testing.assert_close(mech(q, k, v), whole, rtol=0, atol=1e-12)


def test_the_traversal_is_the_same_on_every_device() -> None:
    points = draw(3, 40, 5)
    distance = torch.cdist(points, points).square()
    first = torch.arange(3) * 40
    start = torch.tensor([4, 0, 39]) + first
    picks = slots_module._traverse(distance.flatten(0, 1), start, first, 12)
    fast = slots_module._traverse_numpy(distance.flatten(0, 1).numpy(), start.numpy(), first.numpy(), 12)
    assert torch.equal(picks, torch.from_numpy(fast))
    for row in range(3):  # each pick is the farthest from all before it
        own = (picks[row] - first[row]).tolist()
        for i in range(1, 12):
            reach = distance[row][:, own[:i]].amin(-1)
            assert reach[own[i]] == reach.max()


def test_every_run_is_the_same() -> None:
    q, k, v = (draw(1, 2, 700, 16, seed=s, dtype=torch.float32) for s in range(3))
    mech = RevisitedLinformer(16, 2)
    assert torch.equal(mech(q, k, v), mech(q, k, v))


def test_equals_the_formula() -> None:
    q, k, v = draw(1, 1, 12, 8, scale=2.0), draw(1, 1, 90, 8, seed=1), draw(1, 1, 90, 3, seed=2)
    centre = slots_module.mean_key(k, None)
    ids = slots_module.slot_shares((k - centre)[0], slots_module.slot_centres(k, None, centre), None)[0].argmax(-1)
    scale, pooled, total, parts = 8**-0.5, torch.zeros(8, 3, dtype=torch.float64), 0.0, []
    for c in ids.unique().tolist():
        keys, values = k[0, 0, ids == c], v[0, 0, ids == c]
        mean, value = keys.mean(0), values.mean(0)
        pooled += (keys - mean).T @ (values - value)
        total += (keys - mean).square().sum().item()
        parts.append((len(keys), mean, value, (keys - mean).square().sum(-1).mean()))
    out = []
    for row in q[0, 0]:
        logits, reads = [], []
        for n, mean, value, spread in parts:
            log_n = torch.tensor(float(n), dtype=torch.float64).log()
            z2 = scale**2 * row.square().sum() * spread / 8
            r = (1 + z2 / log_n).sqrt() if n > 1 else torch.ones((), dtype=torch.float64)
            logits.append(scale * row @ mean + r * log_n)
            reads.append(value + scale * spread / r * (row @ pooled) / total)
        out.append(torch.stack(logits).softmax(0) @ torch.stack(reads))
    torch.testing.assert_close(RevisitedLinformer(8, 1)(q, k, v)[0, 0], torch.stack(out), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_gradient_agrees_with_finite_differences(which: str, masked: bool) -> None:
    inputs = {"q": draw(2, 4, 11, 8, scale=2.0), "k": draw(2, 2, 60, 8, seed=1), "v": draw(2, 2, 60, 3, seed=2)}
    mask = torch.arange(60) < torch.tensor([[60], [23]]) if masked else None
    weight, step = draw(2, 4, 11, 3, seed=9), 1e-6
    mech = RevisitedLinformer(8, 4, 2)

    def loss(x: Tensor) -> Tensor:
        return (mech(*(inputs | {which: x}).values(), key_mask=mask) * weight).sum()

    leaf = inputs[which].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    for seed in range(4):
        along = draw(*leaf.shape, seed=20 + seed)
        wanted = (loss(inputs[which] + step * along) - loss(inputs[which] - step * along)) / (2 * step)
        torch.testing.assert_close((gradient * along).sum(), wanted, rtol=1e-6, atol=1e-7)


def test_gradient_of_fewer_keys_than_slots_is_that_of_softmax() -> None:
    inputs = [draw(1, 2, 7, 16, seed=s, dtype=torch.float32).requires_grad_() for s in range(3)]
    weight = draw(1, 2, 7, 16, seed=9)
    ours = torch.autograd.grad((RevisitedLinformer(16, 2)(*inputs) * weight).sum(), inputs)
    exact = torch.autograd.grad((softmax_attention(*inputs) * weight).sum(), inputs)
    for a, b in zip(ours, exact, strict=True):
        assert rel(a, b) < 1e-4


def test_gradient_with_a_sample_that_attends_to_nothing_is_finite() -> None:
    inputs = [draw(2, 2, 20, 8, seed=s, dtype=torch.float32).requires_grad_() for s in range(3)]
    mask = torch.tensor([[True] * 20, [False] * 20])
    for gradient in torch.autograd.grad(RevisitedLinformer(8, 2)(*inputs, key_mask=mask).sum(), inputs):
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (draw(1, 2, 300, 16, seed=s).to(dtype) for s in range(3))
    mech = RevisitedLinformer(16, 2)
    out, wide = mech(q, k, v), mech(q.float(), k.float(), v.float())
    assert out.dtype == dtype
    torch.testing.assert_close(out, wide.to(dtype))
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(mech(q.float(), k.float(), v.float()), out)


def test_causal_is_refused() -> None:
    x = draw(1, 2, 10, 8)
    with pytest.raises(CapabilityError, match="is_causal"):
        RevisitedLinformer(8, 2)(x, x, x, is_causal=True)


def test_no_keys_gives_zero() -> None:
    q, k = draw(1, 2, 5, 8), draw(1, 2, 0, 8)
    assert (slot_attention(q, k, k, None, 1.0) == 0).all()


class Largest(TorchDispatchMode):
    """Watches the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and not x._is_view():
                self.numbers = max(self.numbers, x.numel())
        return result


def test_nothing_larger_than_the_output_or_one_block_is_made() -> None:
    block = slots_module._MOST_BYTES // 4
    for length in (4096, 16384):
        q, k = (draw(1, 4, length, 32, seed=s, dtype=torch.float32) for s in range(2))
        v = draw(1, 4, length, 8, seed=2, dtype=torch.float32)
        with Largest() as largest, torch.no_grad():
            RevisitedLinformer(32, 4)(q, k, v)
        # out is N x Dv, a quarter of N x M here
        assert largest.numbers <= max(v.numel(), block)


def test_the_gradient_keeps_no_block() -> None:
    kept = []
    q, k, v = (draw(1, 4, 8192, 32, seed=s, dtype=torch.float32).requires_grad_() for s in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.untyped_storage()) or x, lambda x: x):
        RevisitedLinformer(32, 4)(q, k, v)
    own = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    extra = {s.data_ptr(): s.nbytes() for s in kept if s.data_ptr() not in own}
    assert sum(extra.values()) < q.numel() * 4
