"""On a real GPU: sizes that fill it, default block sizes, every dtype; the same bits twice."""

# pyright: reportCallIssue=false, reportArgumentType=false
# (it does not know how long an unpacked tuple is)

import pytest
import torch

from maclin.core.triton.attention import attend, attend_backward, causal, causal_backward

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["products", "floor", "positive", "softmax"])
def test_at_most_twice_as_wrong_as_naive_code(problem, tensors, rel_error, device, family, dtype, is_causal):
    maps = problem(family, key_heads=2, d=8 if family == "softmax" else 64, m=130)
    q, k, v, g = (x.to(dtype) for x in tensors(maps, 300, 333, dv=64))
    if family != "softmax":
        q, k = q * 0.3, k * 0.3
    mask = torch.rand(1, 333, device=device) > 0.2
    mask[:, :34] = True
    results = []
    for _ in range(2):
        pair, floor = (maps.f_q, maps.f_k), maps.floor
        if is_causal:
            reading, sums = causal(*pair, q, k, v, mask, floor=floor)
            grads = causal_backward(*pair, q, k, v, reading, g, mask, floor=floor)[:3]
        else:
            reading, sums = attend(*pair, q, k, v, mask, floor)
            grads = attend_backward(*pair, q, k, v, reading, sums, g, mask, floor)
        results.append((reading.out, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def written_out(*inputs):
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        out = maps.out(*leaves, mask, is_causal)
        return out.detach(), *torch.autograd.grad(out, leaves, inputs[3])

    truth, naive = written_out(*(x.double() for x in (q, k, v, g))), written_out(q, k, v, g)
    for name, value, true, plain in zip(("out", "dq", "dk", "dv"), results[0], truth, naive, strict=True):
        assert rel_error(value, true) <= 2 * rel_error(plain, true) + 3e-6, name


def test_millions_of_tokens_keep_their_digits(problem, tensors, rel_error):
    maps = problem("positive", d=64, m=128)
    q, k, v, _ = (x.bfloat16() for x in tensors(maps, 1000, 1 << 21, group=1, dv=64))
    q, k = q * 0.3, k * 0.3
    reading, sums = attend(maps.f_q, maps.f_k, q, k, v)
    kv, z = torch.zeros_like(sums[0]).double(), torch.zeros_like(sums[1]).double()
    for part in zip(k.split(1 << 16, 2), v.split(1 << 16, 2), strict=True):
        phi = maps.logs(part[0].double(), True).exp()
        kv, z = kv + phi.mT @ part[1].double(), z + phi.sum(2)
    phi_q = maps.logs(q.double(), False).exp()
    truth = (phi_q @ kv) / (phi_q @ z[..., None])
    spread = (reading.out.double() - truth).norm() / v.double().std() / truth.numel() ** 0.5
    assert float(spread) < 1e-3
    assert rel_error(sums[1] * sums[2].exp(), z) < 1e-2
