"""ppSBN against explicit formulas, its running statistics, and its statistics over several ranks."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch

from maclin.core.norms import (
    BatchStatistics,
    PostScale,
    batch_moments,
    batch_standardise,
    token_standardise,
    unit_norm,
)


def explicit_token(x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    scaled = [(value - mean) / math.sqrt(variance + 1e-6) for value in x]
    length = math.sqrt(sum(value**2 for value in scaled))
    return [value / length for value in scaled]


def test_token_standardise_is_the_explicit_formula(qkv):
    x = qkv(5, 5)[0] * 3 + 2
    wanted = torch.tensor([explicit_token(row) for row in x.reshape(-1, 8).tolist()], dtype=torch.float64)
    torch.testing.assert_close(token_standardise(x), wanted.view_as(x), rtol=1e-12, atol=1e-14)


def test_unit_norm_has_length_one_and_keeps_zero():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-2e5, 0.0]], dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(unit_norm(x), wanted)
    (grad,) = torch.autograd.grad(unit_norm(x).sum(), x)
    assert bool(grad.isfinite().all())


def test_constant_vectors_have_finite_gradients():
    x = torch.full((2, 6), 3.0, dtype=torch.float64, requires_grad=True)
    out = token_standardise(x)
    assert torch.equal(out, torch.zeros_like(out))
    assert bool(torch.autograd.grad(out.sum(), x)[0].isfinite().all())


@pytest.mark.parametrize("kind", ["none", "right", "left", "random", "all"])
def test_batch_moments_are_those_of_the_attended_tokens(qkv, key_mask, kind):
    x, mask = qkv(11, 11, batch=3)[0] * 2 + 1, key_mask(kind, 11, 3)
    mean, variance = batch_moments(x, mask)
    for head in range(4):
        tokens = [x[b, head, i] for b in range(3) for i in range(11) if mask is None or mask[b, i]]
        columns = torch.stack(tokens)
        torch.testing.assert_close(mean[head], columns.mean(0), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(variance[head], columns.var(0, unbiased=False), rtol=1e-12, atol=1e-13)


def test_masked_positions_do_not_enter_the_statistics(qkv, key_mask):
    x, mask = qkv(11, 11)[0], key_mask("random", 11)
    junk = x.masked_fill(~mask[:, None, :, None], 1e3)
    for one, other in zip(batch_moments(x, mask), batch_moments(junk, mask), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_moments_of_nothing_are_finite():
    mean, variance = batch_moments(torch.ones(2, 3, 4, 5), torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(mean, torch.zeros(3, 5))
    assert torch.equal(variance, torch.zeros(3, 5))


def test_batch_standardise_is_the_explicit_formula(qkv):
    x = qkv(7, 7)[0]
    mean, variance = torch.randn(4, 8, dtype=torch.float64), torch.rand(4, 8, dtype=torch.float64) + 0.1
    got = batch_standardise(x, mean, variance)
    for b, h, i in ((0, 0, 0), (1, 3, 6), (0, 2, 4)):
        scaled = [(float(x[b, h, i, d] - mean[h, d])) / math.sqrt(float(variance[h, d]) + 1e-6) for d in range(8)]
        length = math.sqrt(sum(value**2 for value in scaled))
        assert got[b, h, i].tolist() == pytest.approx([value / length for value in scaled], rel=1e-12)


def test_running_statistics_move_only_in_train_mode(qkv):
    statistics = BatchStatistics(4, 8, momentum=0.25)
    x = qkv(9, 9)[0] * 3 + 5
    statistics.eval()
    mean, variance = statistics.of(x, None)
    assert torch.equal(mean, torch.zeros(4, 8))
    assert torch.equal(variance, torch.ones(4, 8))
    statistics.train()
    mean, variance = statistics.of(x, None)
    of_batch = batch_moments(x, None)
    torch.testing.assert_close((mean, variance), of_batch)
    torch.testing.assert_close(statistics.running_mean, (0.25 * of_batch[0]).float())
    torch.testing.assert_close(statistics.running_var, (0.75 + 0.25 * of_batch[1]).float())


def test_running_statistics_converge_to_those_of_the_data(qkv):
    statistics = BatchStatistics(4, 8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        statistics.of(torch.randn(4, 4, 200, 8, generator=generator) * 2 + 3, None)
    # the running mean averages about 19 batches of 800 values: standard errors .016 and .05
    torch.testing.assert_close(statistics.running_mean, torch.full((4, 8), 3.0), rtol=0, atol=0.08)
    torch.testing.assert_close(statistics.running_var, torch.full((4, 8), 4.0), rtol=0, atol=0.25)


def test_running_statistics_carry_no_gradient_but_the_statistics_of_the_batch_do(qkv):
    statistics = BatchStatistics(4, 8).double()
    x = qkv(3, 3)[0].requires_grad_()
    mean, variance = statistics.of(x, None)
    assert not statistics.running_mean.requires_grad
    (grad,) = torch.autograd.grad(mean.sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, torch.full_like(grad, 1 / 6))
    (grad,) = torch.autograd.grad(variance.sum(), x)
    torch.testing.assert_close(grad, (2 / 6 * (x - mean[:, None])).detach())


def test_running_statistics_stay_wide_in_a_half_precision_model():
    statistics = BatchStatistics(2, 4)
    statistics.set_from(torch.randn(2, 2, 50, 4) * 1e3, None)  # a variance that float16 cannot hold
    kept = copy.deepcopy(statistics.state_dict())
    for dtype in (torch.float16, torch.bfloat16):
        for name, buffer in statistics.to(dtype).state_dict().items():
            assert torch.equal(buffer, kept[name])
    assert statistics.double().running_var.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_post_scale_starts_as_the_identity(dtype):
    x = torch.tensor([[[[-2.0, -1e-3, 0.0, 1e-3, 60.0]]]], dtype=dtype)
    out = PostScale(1)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, x, rtol=1e-6 if dtype != torch.float16 else 0, atol=0)


@pytest.mark.parametrize("beta", [0.3, 0.5, 1.7])
def test_post_scale_is_a_signed_power(beta):
    post = PostScale(2).double()
    with torch.no_grad():
        post.beta.copy_(torch.tensor([beta, 1.0]))
        post.gamma.copy_(torch.tensor([-3.0, 0.5]))
    x = torch.tensor([-40.0, -2.0, -0.1, 0.1, 2.0, 40.0], dtype=torch.float64).expand(1, 2, 3, 6)
    out = post(x)
    # the smooth root differs by (1 - beta) eps / (2 x^2) of it
    torch.testing.assert_close(out[:, 0], -3.0 * x[:, 0].sign() * x[:, 0].abs() ** beta, rtol=1e-4, atol=0)
    torch.testing.assert_close(out[:, 1], 0.5 * x[:, 1])
    torch.testing.assert_close(post(-x), -out, rtol=0, atol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_post_scale_has_finite_gradients_at_zero(beta):
    post = PostScale(1)
    with torch.no_grad():
        post.beta.fill_(beta)
    x = torch.zeros(1, 1, 3, 2, requires_grad=True)
    out = post(x)
    assert torch.equal(out, torch.zeros_like(out))
    for grad in torch.autograd.grad(out.sum(), [x, *post.parameters()]):
        assert bool(grad.isfinite().all())


def test_post_scale_gradients_are_those_of_finite_differences(qkv):
    post = PostScale(4).double()
    with torch.no_grad():
        post.beta.copy_(torch.tensor([0.4, 0.8, 1.0, 1.5]))
    x = qkv(3, 3)[0].requires_grad_()

    def scaled(x, gamma, beta):
        return torch.func.functional_call(post, {"gamma": gamma, "beta": beta}, (x,))

    assert torch.autograd.gradcheck(scaled, (x, *post.parameters()))


RANK = """
import sys, torch
import torch.distributed as dist
from maclin.core.norms import batch_moments, batch_standardise

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
x = torch.randn(5, 2, 7, 3, generator=generator, dtype=torch.float64)
mask = torch.rand(5, 7, generator=generator) > 0.3
weight = torch.randn(5, 2, 7, 3, generator=generator, dtype=torch.float64)
shard = slice(0, 2) if rank == 0 else slice(2, 5)  # of different size on each rank
mine = x[shard].clone().requires_grad_()
moments = batch_moments(mine, mask[shard])
(batch_standardise(mine, *moments) * weight[shard]).sum().backward()
dist.destroy_process_group()

whole = x.clone().requires_grad_()
wanted = batch_moments(whole, mask)  # no process group any more: of the concatenated batch
(batch_standardise(whole, *wanted) * weight).sum().backward()
for one, other in zip(moments, wanted):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
torch.testing.assert_close(mine.grad, whole.grad[shard], rtol=1e-10, atol=1e-12)
alone = batch_moments(x[shard], mask[shard])[0]
assert not torch.allclose(alone, wanted[0], atol=1e-3), "one rank alone would have passed"
print("equal")
"""


@pytest.mark.slow
def test_statistics_over_two_ranks_are_those_of_the_whole_batch(tmp_path):
    command = [sys.executable, "-W", "error", "-c", RANK]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for process, (out, err) in zip(ranks, results, strict=True):
        assert process.returncode == 0, err
        assert out.strip() == "equal"
