"""A mechanism with the kernels turned on gives what it gives without them, gradients included."""

import pytest
import torch

import maclin
from maclin.core import triton as kernels
from maclin.core.triton import dispatch

CASES = {
    "favor": ("favor", {"num_features": 16}),
    "efficient": ("efficient", {}),
    "taylor": ("taylor", {}),
    "stratified": ("macformer", {"counts": (1, 16, 6, 4)}),
    "raw": ("macformer", {"counts": (1, 16, 6, 4), "ppsbn": False}),
    "published": ("macformer", {"estimator": "published", "num_features": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_with_kernels_as_without(monkeypatch, case):
    name, options = CASES[case]
    generator = torch.Generator().manual_seed(5)
    if maclin.mechanisms.row(name).takes_generator:
        options = {**options, "generator": generator}
    mech = maclin.mechanism(name, head_dim=16, num_heads=2, num_kv_heads=1, **options)
    q, k, v = (torch.randn(1, h, 33, 16, generator=generator).mul_(0.7).requires_grad_() for h in (2, 1, 1))
    mask = torch.ones(1, 33, dtype=torch.bool)
    mask[:, 28:] = False
    calls: list[bool] = []
    attend = dispatch.attend

    def watched(*args, **kwargs):
        out = attend(*args, **kwargs)
        calls.append(out is not None)
        return out

    found = []
    for on in (False, True):
        monkeypatch.setattr(kernels, "enabled", lambda on=on: on)
        monkeypatch.setattr(dispatch, "enabled", lambda on=on: on)
        monkeypatch.setattr(dispatch, "attend", watched)
        out = mech(q, k, v, key_mask=mask)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))))
    taken = case != "published" or calls == [True]
    assert calls == [taken] or case == "published"  # degrees above what a kernel takes are refused
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-3, atol=2e-4)


def test_what_has_no_kernel_takes_the_torch_path(monkeypatch):
    monkeypatch.setattr(kernels, "enabled", lambda: True)
    monkeypatch.setattr(dispatch, "enabled", lambda: True)
    mech = maclin.mechanism("rfa", head_dim=16, num_heads=2, num_features=16)
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    before = kernels.refusals["features 'fourier'"]
    got = mech(q, k, v)
    assert kernels.refusals["features 'fourier'"] == before + 1
    monkeypatch.undo()
    torch.testing.assert_close(got, mech(q, k, v))
