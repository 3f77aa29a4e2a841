"""Drawn features have the moments that the closed forms say; the study on a small job."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch

from maclin.core.errors import OptionError
from maclin.core.kernels import KERNELS
from maclin.records import Study, StudyTable, from_json, to_json
from maclin.study import Journal
from maclin.study.theory import TheoryStudy, run
from maclin.study.theory import variance as theory
from maclin.study.theory.draws import MAX_DEGREE, kernel_estimates, pair_of, projections, sketch_errors
from maclin.study.theory.findings import found
from maclin.study.theory.rows import Simulated, degree_rows, exceeded_by_chance, kernel_rows, slope
from maclin.study.theory.variance import SKETCHES, Pair

X = torch.tensor([0.7, -0.4, 0.5, 0.2], dtype=torch.float64)
Y = torch.tensor([0.6, 0.3, 0.4, -0.1], dtype=torch.float64)
PAIR = Pair.of(X, Y)
SMALL = TheoryStudy(
    head_dim=4,
    max_degree=2,
    kernels=("exp", "inv"),
    features=(8, 32),
    radii=(0.125, 2.0),
    num_draws=64,
    num_seeds=3,
)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_drawn_directions_have_the_moments_of_their_sketch(sketch: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z = projections(sketch, torch.stack([X, Y]), 4, 40_000, generator)
    estimate = (z[0] * z[1].conj()).mean(-1).real
    variance = theory.sketch_variance(sketch, PAIR, 1, 4, 4)
    assert float(estimate.mean()) == pytest.approx(PAIR.dot, abs=5 * math.sqrt(variance / 40_000) + 1e-12)
    assert float(estimate.var()) == pytest.approx(variance, rel=0.05, abs=1e-12)
    assert z.shape == (2, 40_000, 2 if sketch == "complex" else 4)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_combining_the_draws_of_ranks_is_unbiased(sketch: str) -> None:
    pairs = torch.stack([X, Y])[None]
    generator = torch.Generator().manual_seed(1)
    found = [sketch_errors(sketch, pairs, 3, 2, 40, generator) for _ in range(400)]
    for n in range(3):
        bias = torch.stack([bias[0, n] for bias, _ in found])
        square = torch.stack([square[0, n] for _, square in found])
        assert abs(float(bias.mean())) < 4.5 * float(bias.std()) / 20
        closed = theory.sketch_variance(sketch, PAIR, n + 1, 2, 4)
        assert abs(float(square.mean()) - closed) < 4.5 * float(square.std()) / 20
        assert float(square.std()) / 20 < 0.05 * closed  # tight enough to tell a wrong closed form


@pytest.mark.parametrize("law", theory.LAWS)
def test_one_draw_serves_every_kernel(law: str) -> None:
    names, radius = ("exp", "log"), 0.49
    powers = range(MAX_DEGREE + 1)
    c = torch.tensor([[KERNELS[k].coefficient(n) * radius**n for k in names] for n in powers], dtype=torch.float64)
    pairs = torch.stack([X / X.norm(), Y / Y.norm()])[None]
    found = kernel_estimates(law, c, pairs, 16, 4000, torch.Generator().manual_seed(3))
    assert found.shape == (1, 4000, 2)
    for column, name in enumerate(names):
        pair = Pair.of(*pairs[0]).scaled(radius)
        variance, bias = theory.kernel_moments(law, KERNELS[name], pair, 16)
        errors = found[0, :, column] - theory.kernel_value(KERNELS[name], pair.dot)
        spread = float((errors**2).std()) / math.sqrt(4000)
        assert abs(float(errors.mean()) - bias) < 4 * math.sqrt(variance / 4000)
        assert abs(float((errors**2).mean()) - variance - bias**2) < 4 * spread < 0.4 * variance


@pytest.mark.parametrize(
    ("errors", "freedom", "probability"),
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.571, 5, 0.05), (2.228, 10, 0.05), (2.947, 15, 0.01)],
)
def test_chance_is_that_of_students_table(errors: float, freedom: int, probability: float) -> None:
    assert exceeded_by_chance(errors, freedom) == pytest.approx(probability, rel=1e-3)
    assert exceeded_by_chance(0.0, freedom) == pytest.approx(1.0)


def test_a_wrong_closed_form_does_not_agree() -> None:
    squares = (1.0, 1.1, 0.9, 1.05, 0.95, 1.0)
    right = Simulated((0.1, -0.1, 0.05, -0.05, 0.0, 0.0), squares, 0.0, 1.02)
    assert right.agrees
    assert right.is_unbiased
    assert not dataclasses.replace(right, closed_square=2.0).agrees
    assert not dataclasses.replace(right, closed_bias=1.0).is_unbiased
    assert dataclasses.replace(right, closed_square=math.inf).ratio is None


def test_the_slope_of_an_error_that_falls_with_the_root_is_minus_one_half() -> None:
    rows = [Simulated((0.0,) * 3, (2.0 / m, 3.0 / m, 4.0 / m), 0.0, 3.0 / m) for m in (8, 32, 512)]
    assert slope(rows, (8, 32, 512)) == (pytest.approx(-0.5), pytest.approx(0.0, abs=1e-12))


def test_pairs_have_the_cosine_that_was_asked_for() -> None:
    x, y = pair_of(-0.3, 7, torch.Generator().manual_seed(0))
    assert float(x @ x) == pytest.approx(1.0)
    assert float(y @ y) == pytest.approx(1.0)
    assert float(x @ y) == pytest.approx(-0.3)


@pytest.fixture(scope="module")
def study() -> Study:
    return run(SMALL)


def column(table: StudyTable, name: str) -> list:
    return [row[table.columns.index(name)] for row in table.rows]


def test_the_study_is_a_record_that_is_read_back(study: Study) -> None:
    assert from_json(Study, to_json(study)) == study
    assert study.settings["features"] == [8, 32]
    assert 2 <= len(study.findings) <= 5
    # 4 sketches x 4 numbers of features, 2 laws x 2 numbers of features, 3 seeds each
    assert len(study.measurements) == 3 * (16 + 4)


def test_baselines_stand_in_every_table_and_chart(study: Study) -> None:
    for table in study.tables:
        assert any("baseline" in name for name in table.columns), table.title
    for chart in study.charts:
        assert any(line.is_baseline for line in chart.lines), chart.title
    kernels = study.tables[1]
    for value, radius, cosine, kernel in zip(
        column(kernels, "baseline: uniform, f(0)"),
        column(kernels, "radius"),
        column(kernels, "cosine"),
        column(kernels, "kernel"),
        strict=True,
    ):
        t = float(radius) * float(cosine)
        f = math.exp(t) if kernel == "exp" else 1 / (1 - t)
        assert value == pytest.approx((f - 1) / f)


def test_what_cannot_exist_is_none(study: Study) -> None:
    degrees, kernels, bounds = study.tables
    exact = [row for row in degrees.rows if row[0] == "srht" and row[2] == 1]
    assert exact
    assert all(row[3] == 0.0 and row[4] is None and row[5] is None for row in exact)
    infinite = [row for row in kernels.rows if row[:3] == ("inv", "kar_karnick", "2")]
    assert infinite
    assert all(row[4] is None and row[5] is not None for row in infinite)
    assert not [row for row in kernels.rows if row[0] == "inv" and float(str(row[2])) * float(str(row[3])) >= 1]
    assert all(row[-2] is not None for row in bounds.rows if row[:3] == ("exp", "published", "0.125"))


def test_simulation_and_closed_form_agree_on_a_small_job(study: Study) -> None:
    assert study.findings[0].startswith("The closed forms predict the error")
    moments = {0.9: Pair(0.9, 1.0, 0.3, 2.0), 0.2: Pair(0.2, 1.0, 0.2, 2.0)}  # not those of the pairs drawn
    degrees = degree_rows(study.measurements, moments, SMALL.head_dim)
    wrong = [dataclasses.replace(row, closed_square=3 * row.closed_square) for row in degrees]
    kernels = kernel_rows(study.measurements, moments, SMALL.num_draws)
    assert found(SMALL, moments, wrong, kernels).findings[0].startswith("The closed forms do not predict the error")


def test_a_resumed_study_gives_the_same_figures(study: Study, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting:
        left = 25

        def start(self, step: str, total: int | None) -> None: ...

        def finish(self) -> None: ...

        def advance(self, text: str = "") -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    path = tmp_path / "measurements.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, Journal(path), Interrupting())
    assert len(path.read_text().splitlines()) == 25
    journal = Journal(path)
    assert journal.num_resumed == 25
    again = run(SMALL, journal)
    assert again.measurements == study.measurements
    assert again.tables == study.tables
    assert len(path.read_text().splitlines()) == len(study.measurements)


def test_every_seed_has_its_own_draws(study: Study) -> None:
    cells = [json.dumps(cell["errors"]) for cell in study.measurements]
    assert len(set(cells)) == len(cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sketches": ("signs",)}, r"sketches among rademacher.*got signs"),
        ({"kernels": ()}, "kernels among exp.*got none"),
        ({"laws": ("published", "published")}, "each of the laws once"),
        ({"head_dim": 48}, "power of two"),
        ({"head_dim": 3}, "even head_dim"),
        ({"max_degree": 0}, "max_degree of at least 1"),
        ({"features": (32,)}, "two or more features"),
        ({"features": (32, 16)}, "increasing features from 4 on"),
        ({"radii": (0.0,)}, "positive radii"),
        ({"cosines": (1.0,)}, "between -1 and 1"),
        ({"num_seeds": 1}, "2 seeds"),
        ({"kernels": ("inv",), "radii": (8.0,)}, "at which a kernel is defined"),
    ],
)
def test_bad_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("preset", [TheoryStudy.quick, TheoryStudy.standard])
def test_presets_are_valid(preset: Callable[[], TheoryStudy]) -> None:
    assert preset().max_degree == 6
    assert preset().sketches == tuple(SKETCHES)


@pytest.mark.slow
def test_the_quick_study_finds_the_closed_forms_right() -> None:
    study = run(TheoryStudy.quick())
    assert study.findings[0].startswith("The closed forms predict the error")
