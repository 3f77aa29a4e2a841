"""Continued sums, strides, huge offsets, keys that dwarf earlier ones, nothing to attend to."""

# pyright: reportCallIssue=false, reportArgumentType=false
# (it does not know how long an unpacked tuple is)

import pytest
import torch
from torch import Tensor

from maclin.core.triton.attention import attend, attend_backward, causal, causal_backward
from maclin.core.triton.contraction import accumulate, read
from maclin.core.triton.launch import Blocks

FAMILIES = ["products", "positive", "softmax"]
SMALL = Blocks(16, 16)

pytestmark = pytest.mark.usefixtures("short_spans")


@pytest.mark.parametrize("family", [*FAMILIES, "floor"])
def test_continuing_from_sums_is_the_same_as_one_call(problem, tensors, rel_error, family):
    """Values and gradients; the second call has more keys than queries, so part of them is a prefix."""
    maps, cut = problem(family, d=3, m=7), 6
    q, k, v, g = (x.float() for x in tensors(maps, 14, 14, group=1))
    q, g = torch.cat([q[:, :, :cut], q[:, :, 8:]], 2), torch.cat([g[:, :, :cut], g[:, :, 8:]], 2)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    first, second = (
        maps.out(leaves[0][:, :, :cut], leaves[1][:, :, :cut], leaves[2][:, :, :cut], None, True),
        maps.out(leaves[0][:, :, cut:], leaves[1], leaves[2], None, True),
    )
    truth = (first, second, *torch.autograd.grad((first, second), leaves, (g[:, :, :cut].double(), g[:, :, cut:])))
    pair, floor = (maps.f_q, maps.f_k), maps.floor
    early, late = [[x[:, :, part] for x in (q, k, v)] for part in (slice(0, cut), slice(cut, None))]
    one, sums = causal(*pair, *early, floor=floor, blocks=SMALL)
    two, _ = causal(*pair, *late, sums=sums, floor=floor, blocks=SMALL)
    dq2, dk2, dv2, of_sums = causal_backward(*pair, *late, two, g[:, :, cut:], sums=sums, floor=floor, blocks=SMALL)
    dq1, dk1, dv1, nothing = causal_backward(
        *pair, *early, one, g[:, :, :cut], grad_sums=of_sums, log_scale=sums[2], floor=floor, blocks=SMALL
    )
    assert nothing is None
    got = (one.out, two.out, *(torch.cat(x, 2) for x in ((dq1, dq2), (dk1, dk2), (dv1, dv2))))
    for name, value, true in zip(("early", "late", "dq", "dk", "dv"), got, truth, strict=True):
        assert rel_error(value, true) < 2e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_what_they_say_and_continue_where_others_ended(problem, tensors, rel_error, family):
    maps = problem(family, d=3, m=7)
    _, k, v, _ = tensors(maps, 1, 20, group=1)
    phi = maps.logs(k, True) if family == "products" else maps.logs(k, True).exp()
    x = (k.float(), v.float())
    whole = accumulate(maps.f_k, *x, blocks=SMALL)
    known = accumulate(maps.f_k, *(y[:, :, :9] for y in x), blocks=SMALL)
    continued = accumulate(maps.f_k, *(y[:, :, 9:] for y in x), sums=known, blocks=SMALL)
    for kv, z, log_scale, count in (whole, continued):
        scale = log_scale.exp() if family != "products" else torch.ones_like(z)
        assert rel_error(kv * scale[..., None], phi.mT @ v) < 1e-5
        assert rel_error(z * scale, phi.sum(2)) < 1e-5
        assert count.tolist() == [20.0]
        assert family == "products" or bool((z <= 20).all())  # the largest term is 1


def test_unfinished_readings_are_numerators(problem, tensors, rel_error):
    for family in FAMILIES:
        maps = problem(family, d=3, m=7)
        q, k, v, _ = (x.float() for x in tensors(maps, 5, 6, group=1))
        finished, sums = attend(maps.f_q, maps.f_k, q, k, v, blocks=SMALL)
        if family == "softmax":
            continue  # has its own reading, of sums that are divided by z
        rest = read(maps.f_q, q, sums, torch.float32, finish=False, blocks=SMALL)
        assert rel_error(rest.out / rest.denominator[..., None], finished.out) < 1e-6


def strided(x: Tensor, layout: str) -> Tensor:
    """The same numbers lying in memory another way."""
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels apart":
        return x.mT.contiguous().mT
    padded = torch.full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    padded[..., ::2, 1:-2] = x
    return padded[..., ::2, 1:-2]


@pytest.mark.parametrize("layout", ["tokens first", "channels apart", "every second of something wider"])
def test_strides_change_nothing(problem, tensors, layout):
    maps = problem("products", d=3, m=7)
    q, k, v, g = (x.float() for x in tensors(maps, 17, 17, batch=2, group=1))
    results = []
    for x in ((q, k, v, g), tuple(strided(x, layout) for x in (q, k, v, g))):
        reading, sums = attend(maps.f_q, maps.f_k, *x[:3], blocks=SMALL)
        grads = attend_backward(maps.f_q, maps.f_k, *x[:3], reading, sums, x[3], blocks=SMALL)
        results.append((reading.out, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_broadcast_inputs(problem, tensors):
    maps = problem("positive", key_heads=2, d=3, m=7)
    q, k, v, g = (x.float() for x in tensors(maps, 6, 6, group=1))
    wide = [x[:1, :1].expand(2, heads, -1, -1) for x, heads in ((q, 2), (k, 2), (v, 2), (g, 2))]
    assert wide[0].stride()[:2] == (0, 0)
    for mask in (None, torch.tensor([[True, False, True, True, True, False]], device=q.device).expand(2, -1)):
        results = []
        for x in (wide, [x.contiguous() for x in wide]):
            reading, sums = attend(maps.f_q, maps.f_k, *x[:3], mask, blocks=SMALL)
            grads = attend_backward(maps.f_q, maps.f_k, *x[:3], reading, sums, x[3], mask, blocks=SMALL)
            results.append((reading.out, *grads))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_32_bits(problem, tensors, device):
    """Tokens 2^30 numbers apart: the third lies beyond 2^31. Memory that nobody touches costs nothing on a CPU."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 1 << 34:
        pytest.skip("needs 16 GiB of device memory")
    maps = problem("products", d=3, m=4)
    q, k, v, g = (x.to(torch.float16) for x in tensors(maps, 3, 3, group=1))
    far = torch.empty((2 << 30) + 64, dtype=torch.float16, device=device)
    spread = []
    for place, x in enumerate((q, k, v, g)):
        y = far[place * 8 :].as_strided(x.shape, (1, 1, 1 << 30, 1))
        spread.append(y.copy_(x))
    results = []
    for x in ((q, k, v, g), spread):
        reading, sums = attend(maps.f_q, maps.f_k, *x[:3], blocks=SMALL)
        walked, _ = causal(maps.f_q, maps.f_k, *x[:3], blocks=SMALL)
        results.append((reading.out, walked.out, sums[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # of numbers that are then not taken
@pytest.mark.parametrize("family", ["positive", "softmax"])
def test_a_key_that_dwarfs_earlier_ones_in_its_chunk(problem, tensors, rel_error, family):
    """Such chunks are made key by key; a scale shared with that key would leave earlier rows without a digit."""
    maps = problem(family, d=3, m=7)
    q, k, v, g = tensors(maps, 12, 12, group=1)
    if family == "softmax":
        k[:, :, 7] *= 120.0
        q[:, :, 5] *= 40.0
    else:  # the longer a key, the smaller its features
        k[:, :, :5] *= 25.0
        q[:, :, 7] *= 10.0
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = maps.out(*leaves, None, True)
    truth = (out, *torch.autograd.grad(out, leaves, g))
    x = [x.float() for x in (q, k, v)]
    log_k = maps.logs(k, True)
    assert float((log_k.amax(2) - log_k[:, :, 0]).amax()) > 90  # what exp can hold in float32
    reading, _ = causal(maps.f_q, maps.f_k, *x, blocks=SMALL)
    grads = causal_backward(maps.f_q, maps.f_k, *x, reading, g.float(), blocks=SMALL)[:3]
    for name, value, true in zip(("out", "dq", "dk", "dv"), (reading.out, *grads), truth, strict=True):
        assert rel_error(value, true) < 1e-4, name
    assert rel_error(reading.out[:, :, :5], out[:, :, :5]) < 1e-4


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_weights_of_keys_are_cut_at_exp_60(problem, tensors, is_causal):
    """Beyond, neither the weight nor its gradient follows the key; up to there nothing overflows."""
    maps = problem("floor", d=3, m=7)
    q, k, v, g = tensors(maps, 4, 12, group=1)
    k = 75.0 * k
    exponents = ((k - maps.f_k.centre.double()) @ maps.f_k.weight[0].double())[0, 0]
    assert 0 < int((exponents.abs() > 60).sum()) < 12
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = maps.out(*leaves, None, is_causal)
    truth = (out, *torch.autograd.grad(out, leaves, g))
    x, pair = [x.float() for x in (q, k, v)], (maps.f_q, maps.f_k)
    if is_causal:
        reading, _ = causal(*pair, *x, floor=maps.floor, blocks=SMALL)
        grads = causal_backward(*pair, *x, reading, g.float(), floor=maps.floor, blocks=SMALL)[:3]
    else:
        reading, sums = attend(*pair, *x, None, maps.floor, SMALL)
        grads = attend_backward(*pair, *x, reading, sums, g.float(), None, maps.floor, SMALL)
    for name, value, true in zip(("out", "dq", "dk", "dv"), (reading.out, *grads), truth, strict=True):
        # one key has nearly all the weight, so that gradients all but cancel
        assert (value - true).norm() < 1e-4 * max(true.norm(), g.norm()), name


@pytest.mark.parametrize("family", [*FAMILIES, "floor"])
def test_no_row_sees_later_keys(problem, tensors, rel_error, family):
    maps = problem(family, d=3, m=7)
    q, k, v, g = (x.float() for x in tensors(maps, 12, 12, group=1))
    pair, floor = (maps.f_q, maps.f_k), maps.floor
    g[:, :, 5:] = 0.0
    reading, _ = causal(*pair, q, k, v, floor=floor, blocks=SMALL)
    _, dk, dv, _ = causal_backward(*pair, q, k, v, reading, g, floor=floor, blocks=SMALL)
    assert bool((dk[:, :, 5:] == 0).all())
    assert bool((dv[:, :, 5:] == 0).all())
    k[:, :, 5:], v[:, :, 5:] = k[:, :, 5:] + 1.0, 100.0 * v[:, :, 5:]
    other, _ = causal(*pair, q, k, v, floor=floor, blocks=SMALL)
    assert rel_error(other.out[:, :, :5], reading.out[:, :, :5]) < 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, "floor"])
def test_nothing_to_attend_to_is_zero(problem, tensors, device, family):
    maps = problem(family, d=3, m=7)
    q, k, v, g = (x.float() for x in tensors(maps, 3, 4, group=1, batch=2))
    pair, floor = (maps.f_q, maps.f_k), maps.floor
    mask = torch.tensor([[True] * 4, [False] * 4], device=device)
    reading, sums = attend(*pair, q, k, v, mask, floor, SMALL)
    grads = attend_backward(*pair, q, k, v, reading, sums, g, mask, floor, SMALL)
    walked, _ = causal(*pair, q, k, v, mask, floor=floor, blocks=SMALL)
    walked_grads = causal_backward(*pair, q, k, v, walked, g, mask, floor=floor, blocks=SMALL)[:3]
    for x in (reading.out, walked.out, *grads, *walked_grads):
        assert bool((x[1] == 0).all())
        assert bool(x.isfinite().all())
    for n, s in ((0, 4), (3, 0), (0, 0)):
        few = (q[:, :, :n], k[:, :, :s], v[:, :, :s])
        reading, sums = attend(*pair, *few, floor=floor, blocks=SMALL)
        grads = attend_backward(*pair, *few, reading, sums, g[:, :, :n], floor=floor, blocks=SMALL)
        assert reading.out.shape == (2, 1, n, 3)
        assert [x.shape for x in grads] == [x.shape for x in few]
        if s == 0:
            assert bool((reading.out == 0).all())
    reading, sums = causal(*pair, q[:, :, :0], k[:, :, :0], v[:, :, :0], floor=floor, blocks=SMALL)
    assert reading.out.shape == (2, 1, 0, 3)
    assert bool((sums[0] == 0).all())
