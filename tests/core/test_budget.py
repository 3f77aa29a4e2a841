"""Every sentence about options that do not go together, with what works instead."""

import re
from typing import Any

import pytest
import torch

import maclin
from maclin.core.errors import InputError, OptionError
from maclin.core.mechanisms.macformer import Macformer

NEEDS = "needs estimator='stratified', and estimator is 'published'"
COUNTS = r"wanted \(1, 8, features of degree 2, of degree 3, ...\)"


def build(head_dim: int = 8, **options: Any) -> Macformer:
    return Macformer(head_dim, 2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "published", "num_features": "auto", "tolerance": 0.1}, f"num_features='auto' {NEEDS}"),
        ({"estimator": "published", "unbiased": True}, f"unbiased {NEEDS}"),
        ({"estimator": "published", "counts": (1, 8)}, f"counts {NEEDS}"),
        ({"estimator": "published", "centred": True}, f"centred {NEEDS}"),
        ({"estimator": "taylor", "tolerance": 0.1}, "tolerance=0.1 needs num_features='auto', and it is None"),
        ({"tolerance": 0.1, "num_features": 40}, "tolerance=0.1 needs num_features='auto', and it is 40"),
        ({"centred": True, "kernel": "inv"}, "centred=True with kernel 'inv'; only exp .* pass centred=False"),
        ({"num_features": "auto"}, r"num_features='auto' needs tolerance=.*; 0.1 is 10 %"),
        *(
            (
                {"num_features": "auto", "tolerance": x},
                f"tolerance is {x:g}; wanted a relative error between 0 and 1, 0.1 is 10 %".replace("+", r"\+"),
            )
            for x in (0.0, 1.0, -0.1, 10.0, float("nan"), float("inf"))
        ),
        (
            {"num_features": "auto", "tolerance": 0.1, "unbiased": True},
            "num_features='auto' excludes unbiased and counts, which fix the features",
        ),
        ({"num_features": "auto", "tolerance": 0.1, "counts": (1, 8)}, "num_features='auto' excludes unbiased and"),
        *(
            (
                {"num_features": "auto", "tolerance": 0.1, "confidence": x},
                rf"confidence is {x!r}; wanted a probability from 0.5 to below 1, as 0.95: how sure the tolerance is",
            )
            for x in (0.49, 1.0, 95, float("nan"), True, "high")
        ),
        ({"confidence": 0.9}, "confidence=0.9 needs num_features='auto' with a tolerance, and it is None"),
        ({"confidence": 0.9, "num_features": 64}, "confidence=0.9 needs num_features='auto' .* and it is 64"),
        *(
            (
                {"num_features": x},
                rf"num_features is {x!r}; wanted an integer of at least 10 \(D \+ 2\), 'auto' with a tolerance, or "
                r"None; estimator='taylor' has D \+ 1$",
            )
            for x in (9, 0, -3, 64.0, True, "many")
        ),
        ({"estimator": "taylor", "num_features": 8}, "num_features is 8; wanted an integer of at least 9$"),
        ({"estimator": "kar_karnick", "num_features": 1}, "num_features is 1; wanted an integer of at least 2$"),
        ({"counts": (1, 8, 5), "num_features": 13}, "num_features is 13; wanted an integer of at least 14, 'auto'"),
        (
            {"counts": (1, 8, 5), "num_features": 14, "unbiased": True},
            "num_features is 14; wanted an integer of at least 15, 'auto'",
        ),
        *(
            ({"counts": x}, rf"counts is {re.escape(str(x))}; {COUNTS}: degrees 0 and 1 are exact")
            for x in ((), (1,), (2, 8), (1, 7), (1, 8, -1), (1, 8, 1.5))
        ),
        (
            {"counts": (1, 8, 37)},
            rf"counts asks for 37 features of degree 2, and 8 axes have 36 monomials of it; {COUNTS}",
        ),
        ({"counts": (1, 8, 0, 121)}, "counts asks for 121 features of degree 3, and 8 axes have 120 monomials"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(OptionError, match=f"^macformer: {message}"):
        build(**options)


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({}, 128),
        ({"estimator": "published"}, 128),
        ({"num_features": "auto", "tolerance": 0.1}, 9),
        ({"num_features": "auto", "tolerance": 0.1, "confidence": 0.5}, 9),
        ({"counts": (1, 8, 5)}, 14),
        ({"counts": (1, 8.0, 36, 120)}, 165),
        ({"counts": (1, 8, 5), "num_features": 20}, 20),
        ({"counts": (1, 8, 5), "unbiased": True}, 128),
        ({"num_features": 10}, 10),
    ],
)
def test_the_number_of_features_before_calibration(options, number):
    mech = build(**options)
    assert mech.num_features == number
    assert mech.map.num_features <= number
    assert mech.feature_map(torch.zeros(1, 2, 3, 8)).shape[-1] == mech.map.num_features
    assert build(100).num_features == 200


def data(n: int = 20, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, 2, n, 8, generator=generator) for _ in range(3))


@pytest.mark.parametrize(
    "options", [{}, {"unbiased": True}, {"kernel": "inv"}, {"num_features": "auto", "tolerance": 0.1}]
)
def test_too_few_tokens_to_calibrate_on(options):
    message = (
        "macformer: 31 tokens to calibrate on; wanted at least 32, 4 per axis of a head of width 8: pass more or "
        "longer sequences"
    )
    q, k, v = data()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 11:] = False
    with pytest.raises(InputError, match=message):
        maclin.calibrate(build(**options), q, k, v, mask)
    mask[1, 11] = True
    assert maclin.calibrate(build(**options), q, k, v, mask) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"ppsbn": "batch"}, {"temperature": "learned"}, {"unbiased": True}])
def test_numbers_that_are_not_finite_are_refused(options, which, value):
    tensors = [x.clone() for x in data()]
    tensors[which][1, 0, 3, 2] = value
    with pytest.raises(
        InputError, match="macformer: the calibration data hold NaN or infinity; wanted finite q, k and v"
    ):
        maclin.calibrate(build(**options), *tensors)


@pytest.mark.parametrize("options", [{"ppsbn": "batch"}, {"temperature": "learned"}])
def test_numbers_that_are_not_finite_are_refused_where_only_statistics_are_learned(options):
    q, k, v = data()
    k[0, 1, 2, 3] = torch.nan
    with pytest.raises(InputError, match="hold NaN or infinity"):
        maclin.calibrate(build(estimator="published", **options), q, k, v)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(scale):
    for call in (maclin.calibrate, lambda mech, *x, **y: mech.predicted_rel_error(*x, **y)):
        with pytest.raises(InputError, match=f"macformer: scale is {scale}; wanted a positive finite number, or None"):
            call(build(), *data(), scale=scale)


def test_the_errors_to_expect_need_tensors_that_fit():
    q, k, v = data()
    with pytest.raises(InputError, match=r"q has shape \(2, 2, 20, 7\); wanted \(batch, 2, tokens, 8\)"):
        build().predicted_rel_error(q[..., :7], k, v)
    with pytest.raises(InputError, match="20 tokens to calibrate on"):
        build().predicted_rel_error(q[:1], k[:1], v[:1])
