"""What maclin.calibrate returns: a mechanism of its own, in the mode, dtype and place of the one it came from."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.core.mechanisms.macformer import Macformer

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "auto": {"num_features": "auto", "tolerance": 0.05},
    "kernel": {"kernel": "auto", "ppsbn": "token"},
    "batch": {"ppsbn": "batch", "temperature": "learned", "kernel": "log"},
    "unbiased": {"unbiased": True},
    "published": {"estimator": "published", "ppsbn": "batch", "temperature": "learned"},
}


def build(head_dim: int = 8, num_heads: int = 2, num_kv_heads: int = 1, **options: Any) -> Macformer:
    options = {"ppsbn": False} | options
    return Macformer(head_dim, num_heads, num_kv_heads, **options).double()


def calibrate(mech: Macformer, *tensors: Tensor | None, **arguments: Any) -> Macformer:
    made = maclin.calibrate(mech, *tensors, **arguments)  # pyright: ignore[reportArgumentType]
    assert isinstance(made, Macformer)
    return made


@pytest.mark.parametrize("case", OPTIONS)
def test_what_is_calibrated_stays_as_it_was(problem, case):
    q, k, v = problem("aligned", 0.5, heads=2)
    mech = build(**OPTIONS[case])
    before, config = copy.deepcopy(mech.state_dict()), copy.deepcopy(mech.config)
    inputs = [x.clone() for x in (q, k, v)]
    made = calibrate(mech, q, k, v)
    assert mech.config == config
    assert mech.calibration is None
    assert all(torch.equal(x, before[name]) for name, x in mech.state_dict().items())
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), inputs, strict=True))
    with torch.no_grad():
        for x in (*made.parameters(), *made.buffers()):
            x.zero_()
    assert all(torch.equal(x, before[name]) for name, x in mech.state_dict().items())
    again, once = calibrate(mech, q, k, v), made
    assert again.map is not once.map


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mode_and_dtype_are_kept(problem, case, training, dtype):
    q, k, v = (x.to(dtype) for x in problem("aligned", 0.5, heads=2))
    mech = build(**OPTIONS[case]).to(dtype).train(training)
    made = calibrate(mech, q, k, v)
    assert {module.training for module in made.modules()} == {training}
    assert {x.dtype for x in made.state_dict().values()} <= {dtype, torch.int64}
    assert [name for name, x in made.named_parameters()] == [name for name, x in mech.named_parameters()]
    assert all(x.requires_grad for x in made.parameters())
    assert made(q, k, v).dtype == dtype


def test_half_precision_is_calibrated_in_float32(problem):
    q, k, v = problem("aligned", 0.5, heads=2)
    mech = build(ppsbn="token").float().to(torch.bfloat16)
    made = calibrate(mech, *(x.bfloat16() for x in (q, k, v)))
    assert {x.dtype for x in made.map.buffers()} <= {torch.float32, torch.int64}
    assert made.get_parameter("post.gamma").dtype == torch.bfloat16
    wide = calibrate(build(ppsbn="token").float(), *(x.bfloat16().float() for x in (q, k, v)))
    assert all(torch.equal(x, wide.map.get_buffer(name)) for name, x in made.map.named_buffers())


@pytest.mark.parametrize("case", OPTIONS)
def test_the_configuration_and_the_state_build_it_again(problem, case):
    q, k, v = (x.float() for x in problem("aligned", 0.5, heads=2))
    made = calibrate(build(**OPTIONS[case]).float().eval(), q, k, v)
    again = maclin.mechanism("macformer", head_dim=8, num_heads=2, num_kv_heads=1, **made.config).eval()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(q, k, v), made(q, k, v))
    assert again.config == made.config
    twice = calibrate(made, q, k, v)  # its counts are given by now
    assert twice.config == made.config
    if case not in ("unbiased", "published"):
        assert float((twice(q, k, v) - made(q, k, v)).detach().abs().max()) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("case", OPTIONS)
def test_on_a_device(problem, case):
    q, k, v = (x.float() for x in problem("aligned", 0.5, heads=2))
    torch.manual_seed(0)
    mech = build(**OPTIONS[case]).float()
    torch.manual_seed(1)
    here = calibrate(mech, q, k, v)
    torch.manual_seed(1)
    there = calibrate(copy.deepcopy(mech).cuda(), *(x.cuda() for x in (q, k, v)))
    assert {x.device.type for x in there.state_dict().values()} == {"cuda"}
    assert there.config == here.config
    tensors = [x.cuda() for x in (q, k, v)]
    torch.testing.assert_close(there(*tensors).cpu(), here(q, k, v), rtol=1e-3, atol=1e-4)
    assert there.predicted_rel_error(*tensors) == pytest.approx(here.predicted_rel_error(q, k, v), rel=1e-3)
