"""ppSBN's halves apart are what they say; errors agree with oracles."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from maclin.core.errors import MaclinError, OptionError
from maclin.core.mechanisms import Mechanism
from maclin.core.norms import PostScale
from maclin.core.reference import softmax_attention
from maclin.study.data import Problem, aligned, real
from maclin.study.ppsbn.errors import errors, relative_error
from maclin.study.ppsbn.variants import VARIANTS, build, fitted_post, variant


def tensors(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 2, 10, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


def made(name: str) -> Mechanism:
    torch.manual_seed(3)
    return build(name, "published", 4, 2, 16).eval()


def by_hand(q: Tensor, k: Tensor, pre: str | bool) -> tuple[Tensor, Tensor]:
    """ppSBN's first half from its definition; running statistics are 0 and 1 before training."""
    if not pre:
        return q, k
    if pre == "token":
        q, k = ((x - x.mean(-1, keepdim=True)) / x.var(-1, keepdim=True, unbiased=False).sqrt() for x in (q, k))
    return q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("chosen", VARIANTS, ids=lambda v: v.name)
def test_a_variant_is_the_plain_mechanism_between_the_halves_it_has(chosen: Any) -> None:
    q, k, v = tensors()
    mech = made(chosen.name)
    assert (getattr(mech, "post", None) is not None) is chosen.post
    post = PostScale(2).double()
    with torch.no_grad():
        post.gamma.copy_(torch.tensor([0.5, 2.0]))
        post.beta.copy_(torch.tensor([1.5, 0.75]))
        if chosen.post:
            mech.load_state_dict(post.state_dict(prefix="post."), strict=False)
        wanted = made("neither")(*by_hand(q, k, chosen.pre), v)
        assert isinstance(wanted, Tensor)
        wanted = post(wanted) if chosen.post else wanted
        got = mech(q, k, v)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(OptionError, match="'ppSBN, token'"):
        variant("ppsbn")


def test_the_second_half_is_fitted_head_by_head() -> None:
    out = tensors()[0]
    post = PostScale(2).double().requires_grad_(False)
    post.gamma.copy_(torch.tensor([0.7, -3.0]))
    post.beta.copy_(torch.tensor([1.3, 0.5]))
    found = fitted_post(out, post(out))
    torch.testing.assert_close(found.state_dict(), post.state_dict())


def halves() -> tuple[Problem, Problem]:
    return tuple(aligned(64, radius=9.0, head_dim=8, num_heads=2, draw=draw) for draw in (0, 1))  # pyright: ignore


def test_errors_are_those_of_the_oracle() -> None:
    judged, calibration = halves()
    q, k, v = (x.double() for x in (judged.q, judged.k, judged.v))
    found = errors("token", False, "taylor", 9, judged, calibration, range(1))
    a, b = by_hand(q, k, "token")
    t = a @ b.mT / math.sqrt(8)
    exact = torch.softmax(q @ k.mT / math.sqrt(8), -1) @ v
    kernel = torch.softmax(t, -1) @ v
    out = (1 + t) @ v / (1 + t).sum(-1, keepdim=True)  # degrees 0 and 1 of exp
    uniform = v.mean(2, keepdim=True).expand_as(out)
    for name, (got, wanted) in {
        "estimator_error": (out, kernel),
        "total_error": (out, exact),
        "normalisation_error": (kernel, exact),
        "uniform_error": (uniform, exact),
        "uniform_to_kernel_error": (uniform, kernel),
    }.items():
        assert found[name] == pytest.approx(relative_error(got, wanted), rel=1e-4), name
    assert found["temperature"] == 1
    assert found["negative_share"] == 0


def test_without_the_first_half_nothing_is_lost_by_normalising_and_denominators_turn_negative() -> None:
    judged, calibration = halves()
    found = errors(False, False, "taylor", 9, judged, calibration, range(1))
    t = judged.q.double() @ judged.k.double().mT / math.sqrt(8)
    share = ((1 + t).sum(-1) < 0).double().mean().item()
    assert found["normalisation_error"] == 0
    assert found["total_error"] == found["estimator_error"]
    assert 0 < share == pytest.approx(found["negative_share"])


def test_a_fitted_temperature_brings_normalised_logits_near_the_raw_ones() -> None:
    judged, calibration = halves()
    fixed, fitted = (errors("token", fits, "taylor", 9, judged, calibration, range(1)) for fits in (False, True))
    assert fitted["temperature"] == pytest.approx(9 * math.sqrt(8), rel=0.2)  # all raw vectors have the same length
    assert fitted["normalisation_error"] < 0.5 * fixed["normalisation_error"]


def test_batch_statistics_are_those_of_the_calibration_data() -> None:
    judged, calibration = halves()
    found = errors("batch", False, "taylor", 9, judged, calibration, range(1))
    q, k, v = (x.double() for x in (judged.q, judged.k, judged.v))
    of_q, of_k = ((x.double().mean((0, 2)), x.double().std((0, 2))) for x in (calibration.q, calibration.k))
    a, b = by_hand(*(((x - m[:, None]) / s[:, None]) for x, (m, s) in ((q, of_q), (k, of_k))), pre="batch")
    wanted = relative_error(softmax_attention(a, b, v), softmax_attention(q, k, v))
    assert found["normalisation_error"] == pytest.approx(wanted, rel=1e-3)


def test_figures_that_are_not_finite_are_none() -> None:
    assert relative_error(torch.full((2,), torch.nan), torch.ones(2)) == math.inf
    judged, calibration = halves()
    broken = dataclasses.replace(judged, v=judged.v * torch.inf)
    assert errors(False, False, "taylor", 9, broken, calibration, range(1))["total_error"] is None


@pytest.mark.slow
def test_on_real_attention_ppsbn_is_averaging_and_the_raw_published_estimator_is_worse() -> None:
    try:
        problems = real([5], num_documents=4, length=128)
    except MaclinError as error:
        pytest.skip(str(error))
    judged, calibration = problems.held_out[0], problems.calibration[0]
    raw, token = (errors(pre, False, "published", 128, judged, calibration, range(2)) for pre in (False, "token"))
    assert raw["total_error"] > 3 * raw["uniform_error"]
    assert raw["negative_share"] > 0.1
    assert token["uniform_to_kernel_error"] < 0.1
    assert token["total_error"] == pytest.approx(token["uniform_error"], rel=0.1)
