"""Every map that has a blocked form, built small: two key heads for four query heads, D = 8."""

from collections.abc import Callable

import pytest
import torch

import maclin

CASES: dict[str, tuple[str, dict]] = {
    "elu": ("elu", {}),
    "efficient": ("efficient", {}),
    "efficient-scaling": ("efficient", {"normalisation": "scaling"}),
    "favor": ("favor", {"num_features": 24}),
    "rfa": ("rfa", {"num_features": 24}),
    "taylor": ("taylor", {}),
    "stratified": ("macformer", {"num_features": 40}),
    "stratified-raw": ("macformer", {"ppsbn": False, "counts": (1, 8, 16, 9)}),
    "stratified-one": ("macformer", {"ppsbn": False, "counts": (1, 8)}),
    "unbiased": ("macformer", {"unbiased": True, "num_features": 60}),
    "published": ("macformer", {"estimator": "published", "num_features": 40}),
    "kar_karnick": ("macformer", {"estimator": "kar_karnick", "num_features": 40}),
    "first-order": ("macformer", {"estimator": "taylor"}),
    "learned": ("macformer", {"temperature": "learned", "num_features": 40}),
    "batch-learned": ("macformer", {"ppsbn": "batch", "temperature": "learned", "num_features": 40}),
    "inv-learned": ("macformer", {"kernel": "inv", "temperature": "learned", "num_features": 40}),
}
CALIBRATED = ("stratified", "stratified-raw", "stratified-one", "unbiased", "learned", "batch-learned", "inv-learned")


def build(case: str) -> maclin.Mechanism:
    """A mechanism of the case, in float64, its parameters moved away from where they start."""
    name, options = CASES[case.removesuffix("-calibrated")]
    generator = torch.Generator().manual_seed(1)
    if maclin.mechanisms.row(name).takes_generator:
        options = {**options, "generator": generator}
    mech = maclin.mechanism(name, head_dim=8, num_heads=4, num_kv_heads=2, **options).double().eval()
    for parameter in mech.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if case.endswith("-calibrated"):
        q, k, v = (torch.randn(3, h, 150, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
        aside = torch.linspace(-1, 3, 8, dtype=torch.float64)  # more than ppSBN takes out
        mech = maclin.calibrate(mech, 0.6 * q + 0.4 * aside, 0.6 * k + 0.2 * aside, v)
    return mech


@pytest.fixture(params=[*CASES, *(f"{case}-calibrated" for case in CALIBRATED)])
def mech(request) -> maclin.Mechanism:
    return build(request.param)


@pytest.fixture
def plainly() -> Callable[..., torch.Tensor]:
    """The same call through the plain form, which is what counts what it guards."""

    def call(mech: maclin.Mechanism, *tensors: torch.Tensor, **options: object) -> torch.Tensor:
        with maclin.guarded():
            return mech(*tensors, **options)

    return call
