"""What the kernels make of a specification is what its plain form makes."""

import pytest
import torch

from maclin.core.fast.spec import Side, Spec, features
from maclin.core.triton import NoKernelError
from maclin.core.triton.contraction import accumulate
from maclin.core.triton.launch import Blocks
from maclin.core.triton.specification import feature_map

D, HEADS = 5, 2


def normal(device: torch.device, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def cases(device: torch.device) -> dict[str, tuple[Spec, Side, torch.Tensor | None]]:
    index = torch.randint(0, 3, (HEADS, 4 + 4 + 2), generator=torch.Generator().manual_seed(1)).to(device)
    shift = 0.3 * normal(device, HEADS, D, seed=2)
    return {
        "by rank": (Spec("product", ranks=(6, 3, 1), constants=2), Side(normal(device, HEADS, D, 12)), None),
        "gathered": (
            Spec("product", ranks=(4, 4, 2), constants=1, gathered=True, linear=True, weighted=True),
            Side(normal(device, HEADS, D, 4), index=index, shift=shift),
            normal(device, HEADS, D + 5, seed=3),
        ),
        "first order": (Spec("product", constants=1, linear=True), Side(), None),
        "positive": (Spec("positive", scale=0.4), Side(normal(device, HEADS, D, 7), shift=shift), None),
        "softmax": (Spec("softmax", scale=0.4), Side(), None),
    }


@pytest.mark.parametrize("name", ["by rank", "gathered", "first order", "positive", "softmax"])
def test_sums_are_those_of_the_plain_form(device, rel_error, name):
    spec, side, weights = cases(device)[name]
    k, v = normal(device, 1, HEADS, 20, D, seed=4), normal(device, 1, HEADS, 20, 3, seed=5)
    f = feature_map(spec, side, D, HEADS, weights)
    if weights is None and f.coefficients is not None:
        f = feature_map(spec, side, D, HEADS, torch.ones(HEADS, f.num_features, device=device))
    phi = features(spec, side.to(torch.float64), k.double())
    phi = phi.exp() if spec.log_domain else phi
    phi = phi if weights is None else phi * weights[:, None].double()
    kv, z, log_scale, _ = accumulate(f, k, v, blocks=Blocks(16, 16))
    scale = log_scale.exp() if spec.log_domain else torch.ones_like(z)
    assert rel_error(z * scale, phi.sum(2)) < 1e-5
    assert rel_error(kv * scale[..., None], phi.mT @ v.double()) < 1e-5


@pytest.mark.parametrize(
    ("spec", "side", "message"),
    [
        (Spec("fourier"), Side(torch.ones(1, D, 4)), "'fourier'"),
        (Spec("positive", norm="unit"), Side(torch.ones(1, D, 4)), "norm 'unit'"),
        (Spec("positive"), Side(torch.ones(1, D, 4), offset=torch.ones(1, 4)), "an offset"),
        (Spec("positive"), Side(torch.ones(1, D, 4, requires_grad=True)), "that learn"),
    ],
)
def test_what_no_kernel_has_is_refused(spec, side, message):
    with pytest.raises(NoKernelError, match=message):
        feature_map(spec, side, D, 1)
