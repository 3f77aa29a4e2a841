"""The kernels against attention written out in float64: values and gradients, at most twice as wrong as naive code."""

# pyright: reportCallIssue=false, reportArgumentType=false
# (it does not know how long an unpacked tuple is)

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from maclin.core.features import RandomMaclaurin, rademacher
from maclin.core.maps import maclaurin_maps
from maclin.core.triton.attention import attend, attend_backward, causal, causal_backward
from maclin.core.triton.launch import Blocks
from maclin.core.triton.products import of_columns

FAMILIES = ["products", "floor", "positive", "softmax"]
SMALL = Blocks(16, 16)

pytestmark = pytest.mark.usefixtures("short_spans")


def by_kernels(problem, q, k, v, g, mask, is_causal) -> tuple[Tensor, ...]:
    """out, dq, dk, dv."""
    maps, floor = (problem.f_q, problem.f_k), problem.floor
    if is_causal:
        reading, _ = causal(*maps, q, k, v, mask, floor=floor, blocks=SMALL)
        grads = causal_backward(*maps, q, k, v, reading, g, mask, floor=floor, blocks=SMALL)[:3]
    else:
        reading, sums = attend(*maps, q, k, v, mask, floor, SMALL)
        grads = attend_backward(*maps, q, k, v, reading, sums, g, mask, floor, SMALL)
    return reading.out, *grads


def written_out(problem, q, k, v, g, mask, is_causal) -> tuple[Tensor, ...]:
    """The same by autograd, in the dtype of q."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = problem.out(*leaves, mask, is_causal)
    return out.detach(), *torch.autograd.grad(out, leaves, g)


def some(mask_shape: tuple[int, int], device: torch.device) -> Tensor:
    return (torch.rand(mask_shape, generator=torch.Generator().manual_seed(3)) > 0.3).to(device)


@pytest.mark.parametrize(
    ("family", "dtype", "is_causal", "chunks"),  # two chunks side by side, or, where that is 8, in one span
    [
        *((family, torch.float32, False, 1) for family in FAMILIES),
        *((family, torch.float32, True, chunks) for family in FAMILIES for chunks in (1, 8)),
        *((family, torch.bfloat16, way, 8) for family in ("products", "positive", "softmax") for way in (False, True)),
        ("positive", torch.float16, True, 8),
    ],
)
def test_at_most_twice_as_wrong_as_naive_code(
    problem, tensors, rel_error, device, monkeypatch, family, dtype, is_causal, chunks
):
    monkeypatch.setattr("maclin.core.triton.causal._LEAST_CHUNKS", chunks)
    maps = problem(family)
    group = 2 if (dtype, chunks) == (torch.float32, 1) else 1  # the interpreter takes its time
    q, k, v, g = (x.to(dtype) for x in tensors(maps, 18, 21, group=group))
    mask = some((1, 21), device)
    mask[:, :5] = torch.tensor([False, False, False, True, False])  # causal, the first query sees one key
    truth = written_out(maps, q.double(), k.double(), v.double(), g.double(), mask, is_causal)
    naive = written_out(maps, q, k, v, g, mask, is_causal)
    got = by_kernels(maps, q, k, v, g, mask, is_causal)
    for name, value, true, plain in zip(("out", "dq", "dk", "dv"), got, truth, naive, strict=True):
        assert value.dtype == dtype
        # sums over features cancel more than sums over pairs do: a few units of float32 beside
        assert rel_error(value, true) <= 2 * rel_error(plain, true) + 3e-6, name


@settings(max_examples=5, phases=[Phase.generate, Phase.reuse])  # to shrink takes the interpreter minutes
@given(data=st.data())
def test_any_shape(problem, tensors, device, data):
    draw = data.draw
    is_causal = draw(st.booleans())
    maps = problem(
        draw(st.sampled_from(FAMILIES)),
        key_heads=draw(st.integers(1, 2)),
        d=draw(st.sampled_from([1, 3, 17])),
        m=draw(st.sampled_from([2, 16, 33])),
        seed=draw(st.integers(0, 99)),
    )
    n = draw(st.integers(1, 18))
    s = n + draw(st.integers(0, 4)) if is_causal else draw(st.integers(1, 18))
    batch = draw(st.integers(1, 2))
    group = draw(st.integers(1, 2))
    inputs = tensors(maps, n, s, batch=batch, group=group, dv=draw(st.sampled_from([1, 4, 18])))
    mask = draw(st.sampled_from([None, some((batch, s), device), torch.zeros(batch, s, dtype=torch.bool).to(device)]))
    truth = written_out(maps, *inputs, mask, is_causal)
    naive = written_out(maps, *(x.float() for x in inputs), mask, is_causal)
    got = by_kernels(maps, *(x.float() for x in inputs), mask, is_causal)
    if mask is not None and not bool(mask.any()):
        assert all(bool((value == 0).all()) for value in got)
    for value, true, plain in zip(got, truth, naive, strict=True):
        # one key alone has no gradient but rounding: errors are measured against no less than what comes in
        bound = 2 * (plain - true).norm() + 1e-5 * max(true.norm(), inputs[3].norm())
        assert value.isfinite().all()
        assert (value - true).norm() <= bound


def test_some_rows_of_the_case_with_a_floor_need_it(problem, tensors, device):
    """Otherwise the cases above would say nothing about it."""
    maps = problem("floor")
    q, k, _, _ = tensors(maps, 18, 21)
    phi_q, phi_k = maps.logs(q, False), maps.logs(k, True)
    share = (phi_q @ phi_k.sum(2, keepdim=True).mT)[..., 0] / (phi_q[..., -1] * phi_k[..., -1].sum(2, keepdim=True))
    assert 0.05 < float((share < maps.floor).float().mean()) < 0.9


def test_the_table_of_random_maclaurin_features(rel_error, device):
    generator = torch.Generator().manual_seed(0)
    plain = RandomMaclaurin((5, 3, 2, 2, 1, 1, 1, 0, 0), (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1))
    directions = rademacher((2, 6, plain.num_directions), generator)
    columns = plain.columns(directions, 0.5)
    f = of_columns(plain.counts_by_rank, plain.weights[plain.counts_by_rank[0] :], columns.to(device))
    x, v = (torch.randn(1, 2, 20, width, generator=generator).to(device) for width in (6, 3))
    _, sums = attend(f, f, x, x, v, blocks=SMALL)
    phi = maclaurin_maps(plain, directions, 0.5).of_queries(x.double().cpu())
    assert rel_error(sums[0].cpu(), phi.mT @ v.double().cpu()) < 1e-5
    assert rel_error(sums[1].cpu(), phi.sum(2)) < 1e-5
