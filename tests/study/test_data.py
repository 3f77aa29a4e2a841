"""Problems have the radius, the structure and the difficulty that they say."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.core.errors import InputError, MaclinError, OptionError
from maclin.study import data
from maclin.study.data import Problem, aligned, isotropic, joined, real


@pytest.mark.parametrize("make", [isotropic, aligned])
@pytest.mark.parametrize("radius", [0.125, 2.0])
def test_the_radius_bounds_every_logit(make: Callable[..., Problem], radius: float) -> None:
    problem = make(40, radius=radius, head_dim=16, num_heads=2, draw=3)
    assert problem.q.shape == problem.k.shape == problem.v.shape == (1, 2, 40, 16)
    assert (problem.length, problem.head_dim, problem.num_heads, problem.scale) == (40, 16, 2, 0.25)
    assert problem.radius == pytest.approx(radius, rel=1e-5)
    norms = problem.q.norm(dim=-1)  # all the same
    assert norms.max().item() == pytest.approx(norms.min().item(), rel=1e-5)
    logits = problem.q @ problem.k.mT * problem.scale
    assert logits.abs().max().item() <= radius * (1 + 1e-5)


@pytest.mark.parametrize("make", [isotropic, aligned])
def test_a_draw_is_its_seed(make: Callable[..., Problem]) -> None:
    first, again, other = make(20, draw=1), make(20, draw=1), make(20, draw=2)
    for x, y, z in zip(
        (first.q, first.k, first.v), (again.q, again.k, again.v), (other.q, other.k, other.v), strict=True
    ):
        assert torch.equal(x, y)
        assert not torch.equal(x, z)


def test_isotropic_directions_have_no_preference() -> None:
    moments = isotropic(4096, head_dim=8).k[0, 0].T @ isotropic(4096, head_dim=8).k[0, 0]
    values = torch.linalg.eigvalsh(moments)
    assert values[-1] / values[0] < 1.2


def leading_plane(x: Tensor) -> Tensor:
    return torch.linalg.svd(x[0, 0], full_matrices=False).Vh[:4]


def test_draws_of_an_aligned_problem_share_their_plane_and_their_values() -> None:
    first, second, other = aligned(512, draw=0), aligned(512, draw=1), aligned(512, draw=0, problem=1)

    def overlap(x: Tensor, y: Tensor) -> float:
        return torch.linalg.svdvals(leading_plane(x) @ leading_plane(y).T).min().item()

    assert overlap(first.q, first.k) > 0.99
    assert overlap(first.k, second.k) > 0.99
    assert overlap(first.k, other.k) < 0.7
    values = torch.linalg.svdvals(first.k[0, 0])
    # 10 % noise in 60 of 64 directions, over |z|^2, whose inverse has mean 1 / 2 in 4 dimensions instead of 1 / 4
    assert (values[4:].square().sum() / values.square().sum()).item() == pytest.approx(0.01 * 60 / 64 * 2, rel=0.15)

    def regression(problem: Problem) -> Tensor:  # of v on the four coordinates of the first draw's plane
        y = problem.k[0, 0] @ leading_plane(first.k).T
        return torch.linalg.lstsq(torch.cat([y, torch.ones(512, 1)], 1), problem.v[0, 0]).solution

    fits = [regression(problem).flatten() for problem in (first, second, other)]
    similarity = [torch.nn.functional.cosine_similarity(fits[0], fit, 0).item() for fit in fits[1:]]
    assert similarity[0] > 0.7
    assert abs(similarity[1]) < 0.3


@torch.no_grad()
def rel_errors(make: Callable[[int], Problem], number: int) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for seed in range(number):
        problem = make(seed)
        q, k, v = (x[0, 0].double() for x in (problem.q, problem.k, problem.v))
        exact = torch.softmax(q @ k.T * problem.scale, -1) @ v
        options: dict[str, dict[str, Any]] = {"mean": {}, "taylor": {}}
        for m in (128, 512):
            generator = torch.Generator().manual_seed(seed)
            options[f"macformer {m}"] = {"num_features": m, "ppsbn": False, "estimator": "published",
                                         "generator": generator}  # fmt: skip
        for name, kwargs in options.items():
            mech = maclin.mechanism(name.split()[0], head_dim=64, num_heads=1, **kwargs)
            out = mech(problem.q, problem.k, problem.v, scale=problem.scale)[0, 0].double()
            found.setdefault(name, []).append(((out - exact).norm() / exact.norm()).item())
    return {name: statistics.median(values) for name, values in found.items()}


def test_isotropic_data_are_as_hard_as_known() -> None:
    errors = rel_errors(lambda seed: isotropic(512, draw=seed), 5)
    assert errors["mean"] == pytest.approx(0.119, rel=0.1)
    assert errors["taylor"] == pytest.approx(0.010, rel=0.1)
    assert errors["macformer 128"] == pytest.approx(0.149, rel=0.1)
    assert errors["macformer 512"] == pytest.approx(0.074, rel=0.1)


def test_aligned_data_are_as_hard_as_known() -> None:
    errors = rel_errors(lambda seed: aligned(512, problem=seed, draw=seed), 15)
    assert errors["mean"] == pytest.approx(0.746, rel=0.1)
    assert errors["taylor"] == pytest.approx(0.060, rel=0.2)
    assert errors["macformer 128"] == pytest.approx(0.244, rel=0.25)  # its quartiles are this far apart
    assert errors["macformer 512"] == pytest.approx(0.122, rel=0.2)


def test_standardised_is_what_ppsbn_does_first() -> None:
    problem = aligned(30, head_dim=16, radius=3.0)
    done = problem.standardised()
    for raw, x in ((problem.q, done.q), (problem.k, done.k)):
        centred = raw.double() - raw.double().mean(-1, keepdim=True)
        torch.testing.assert_close(x.double(), centred / centred.norm(dim=-1, keepdim=True), atol=1e-5, rtol=0)
    assert done.v is problem.v
    assert done.scale == 0.25
    assert problem.standardised(0.5).radius == pytest.approx(0.5, rel=1e-5)


def test_rows_are_spread_and_joined_problems_stand_side_by_side() -> None:
    problem = isotropic(10, head_dim=4)
    some = problem.rows(5)
    assert torch.equal(some.q, problem.q[:, :, ::2])
    assert torch.equal(some.k, problem.k)
    assert problem.rows(10) is problem
    other = isotropic(10, head_dim=4, draw=1)
    both = joined([problem, other])
    assert torch.equal(both.q[1], other.q[0])
    assert torch.equal(both.v[0], problem.v[0])


@pytest.mark.parametrize("wrong", [{"radius": 0.0}, {"head_dim": 0}, {"num_heads": 0}])
@pytest.mark.parametrize("make", [isotropic, aligned])
def test_sizes_that_cannot_be_are_refused(make: Callable[..., Problem], wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="wanted"):
        make(8, **wrong)
    with pytest.raises(OptionError, match="length 0"):
        make(0)


def test_aligned_needs_room_for_its_plane() -> None:
    with pytest.raises(OptionError, match="head_dim of at least 4"):
        aligned(8, head_dim=3)


def test_without_the_packaged_model_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MaclinError("not installed")

    monkeypatch.setattr(data, "packaged_model", missing)
    with pytest.raises(InputError, match=r"pip install 'maclin\[demo\]'"):
        real()


@pytest.mark.slow
def test_real_problems_are_the_models_own() -> None:
    try:
        found = real((0, 3), num_documents=4)
    except InputError as error:
        pytest.skip(str(error))
    assert [problem.name for problem in found.held_out] == ["layer 0", "layer 3"]
    for part in (found.calibration, found.held_out):
        for problem in part:
            assert problem.q.shape == (2, 12, 512, 32)
            assert problem.scale == pytest.approx(32**-0.5)
            q, k, v = (x.double() for x in (problem.q, problem.k, problem.v))
            exact = torch.softmax(q @ k.mT * problem.scale, -1) @ v
            uniform = ((v.mean(2, keepdim=True) - exact).norm() / exact.norm()).item()
            assert 0.55 < uniform < 0.95  # .68 to .83 over more documents
    documents = torch.cat([found.calibration[0].k, found.held_out[0].k])
    assert len({float(x.sum()) for x in documents}) == 4  # no document twice
    with pytest.raises(InputError, match="no layer 9"):
        real((9,), num_documents=4)
    with pytest.raises(InputError, match="wanted 10000 documents"):
        real(num_documents=10_000)
