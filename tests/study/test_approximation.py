"""The errors are those of the methods, what cannot be has no figure, and an interrupted study goes on."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from typing import Any

import pytest
import torch

import maclin
from maclin.core.errors import OptionError
from maclin.records import Config, Study, from_json, to_json
from maclin.study import Journal
from maclin.study.approximation import ApproximationStudy, run
from maclin.study.approximation import cells as approximation_cells
from maclin.study.approximation.cells import Errors
from maclin.study.data import RealProblems, aligned
from maclin.study.latencies import EXACT, latencies, latency

JOB = ApproximationStudy(
    lengths=(32, 64),
    features=(4, 64),
    kernels=("exp", "inv"),
    estimators=("published", "taylor"),
    data=("aligned", "isotropic"),
    scales=(0.25, 0.5),
    head_dim=8,
    num_rows=16,
    num_seeds=2,
    seconds_per_point=0.2,
)


@pytest.fixture(scope="module")
def journal() -> Journal:
    return Journal()


@pytest.fixture(scope="module")
def study(journal: Journal) -> Study:
    return run(JOB, journal)


def rows(cells: Any, **wanted: Any) -> list[Config]:
    found = [{**cell, **row} for cell in cells if cell["part"] == "error" for row in cell["errors"]]
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def test_every_cell_is_there_once(study: Study) -> None:
    errors = [cell for cell in study.measurements if cell["part"] == "error"]
    assert len(errors) == 2 * 2 * 2 * 2  # data, scales, seeds, lengths
    methods = {(row["kernel"], row["method"]) for row in rows(study.measurements)}
    both = {"uniform", "taylor", "exact softmax", "macformer published", "macformer taylor"}
    assert methods == {*(("exp", m) for m in both | {"rfa", "favor"}), *(("inv", m) for m in both)}


@pytest.mark.parametrize(("kernel", "slope"), [("exp", 1.0), ("inv", 1.0)])
def test_errors_are_those_of_the_formulas(study: Study, kernel: str, slope: float) -> None:
    problem = aligned(64, head_dim=8, problem=1, draw=1)
    q, k, v = (x[0, 0].double() for x in (problem.q, problem.k, problem.v))
    q, k = ((x - x.mean(-1, keepdim=True)) for x in (q, k))
    t = 0.5 * (q / q.norm(dim=-1, keepdim=True)) @ (k / k.norm(dim=-1, keepdim=True)).T
    t = t[torch.arange(16) * 4]
    weights = {"exp": t.exp(), "inv": 1 / (1 - t)}[kernel]
    exact = weights / weights.sum(-1, keepdim=True) @ v
    linear = (1 + slope * t) / (1 + slope * t).sum(-1, keepdim=True) @ v
    wanted = {"uniform": v.mean(0).expand_as(exact), "taylor": linear, "exact softmax": torch.softmax(t, -1) @ v}
    for method, out in wanted.items():
        row = rows(study.measurements, data="aligned", scale=0.5, seed=1, length=64, kernel=kernel, method=method)[0]
        nmse = ((out - exact).square().sum() / exact.square().sum()).item()
        assert row["nmse"] == pytest.approx(nmse, rel=1e-3, abs=1e-12)


def test_the_taylor_estimator_is_the_taylor_mechanism_and_needs_its_features(study: Study) -> None:
    for cell in (cell for cell in study.measurements if cell["part"] == "error"):
        by = {(r["kernel"], r["method"], r["num_features"]): r for r in cell["errors"]}
        for kernel in JOB.kernels:
            assert by[kernel, "macformer taylor", 64]["nmse"] == pytest.approx(
                by[kernel, "taylor", 0]["nmse"], rel=1e-3
            )
            assert by[kernel, "macformer taylor", 4]["nmse"] is None
            assert "at least 9" in by[kernel, "macformer taylor", 4]["reason"]
    small = dataclasses.replace(JOB, features=(4,), data=("aligned",), lengths=(32,), num_seeds=1)
    found = run(small)
    assert all(row[3] is None for row in found.tables[0].rows if row[1] == "macformer taylor")
    assert "wanted an integer of at least 9" in found.tables[0].note
    assert any("could not be built" in sentence for sentence in found.findings)
    heat = [h for h in found.heat_maps if h.title.startswith("macformer taylor")]
    assert heat
    assert all(row[2:] == (None,) for h in heat for row in h.values)


def test_tables_and_heat_maps_show_what_was_measured(study: Study) -> None:
    assert len(study.heat_maps) == 2 * 2 * 2  # kernels, estimators, scales
    heat = next(h for h in study.heat_maps if h.title == "macformer published, kernel inv, |t| <= 0.5, aligned data")
    assert (heat.x, heat.y) == (("uniform", "taylor", "4", "64"), ("32", "64"))
    wanted: dict[str, Any] = {"data": "aligned", "scale": 0.5, "kernel": "inv", "length": 64}
    for column, (method, m) in enumerate([("uniform", 0), ("taylor", 0), ("macformer published", 4)]):
        values = [r["nmse"] for r in rows(study.measurements, **wanted, method=method, num_features=m)]
        assert len(values) == 2
        assert heat.values[1][column] == pytest.approx(math.log10(statistics.median(values)))
    table = study.tables[0]
    assert table.columns[-1] == "isotropic, |t| <= 0.5"
    row = next(r for r in table.rows if r[:2] == ("inv", "macformer published"))
    values = [
        r["nmse"]
        for r in rows(study.measurements, data="isotropic", scale=0.5, kernel="inv", length=64,
                      method="macformer published", num_features=64)
    ]  # fmt: skip
    assert row[-1] == pytest.approx(math.sqrt(statistics.median(values)))
    for chart in study.charts:
        assert any(line.is_baseline for line in chart.lines)
        for line in chart.lines:
            triples = zip(line.low, line.y, line.high, strict=True)
            assert all(y is None or low <= y <= high for low, y, high in triples)  # type: ignore[operator]


def test_the_first_finding_says_what_the_table_says(study: Study) -> None:
    shown = {str(row[1]): row[3:5] for row in study.tables[0].rows if row[0] == "exp"}  # aligned, both scales
    for method in ("macformer published", "uniform", "taylor"):
        assert all(f"{method} {value:.3g}" in study.findings[0] for value in shown[method])
    assert "64 tokens with 64 features" in study.findings[0]


@pytest.mark.parametrize("data", JOB.data)
def test_the_second_finding_counts_what_is_beaten(study: Study, data: str) -> None:
    def median(scale: float, kernel: str, length: int, method: str, m: int) -> float:
        found = rows(study.measurements, data=data, scale=scale, kernel=kernel, length=length, method=method)
        return statistics.median([row["nmse"] for row in found if row["num_features"] == m])

    settings = list(itertools.product(JOB.scales, JOB.kernels, JOB.lengths, JOB.features))
    beaten = {
        other: sum(
            math.sqrt(median(s, k, n, "macformer published", m) / median(s, k, n, other, 0)) < 0.99
            for s, k, n, m in settings
        )
        for other in ("uniform", "taylor")
    }
    published, taylor = study.findings[1].split("; ")
    over_uniform, over_taylor = published.split(" and than taylor")
    assert f"{beaten['uniform']} of {len(settings)} ({data})" in over_uniform
    assert f"{beaten['taylor']} ({data})" in over_taylor
    # the estimator that is the first-order expansion is not nearer than itself
    assert taylor.endswith("and than taylor in 0 (aligned), 0 (isotropic).")


def test_latencies_stand_beside_softmax(study: Study) -> None:
    cells = [cell for cell in study.measurements if cell["part"] == "time"]
    assert [cell["length"] for cell in cells] == [32, 64]
    for cell in cells:
        shown = {row["subject"]: row["latency_ms"] for row in cell["latencies"]}
        drawn = {f"{method}, {m} features" for method in ("macformer published", "rfa", "favor") for m in (4, 64)}
        assert set(shown) == {EXACT, "uniform", "taylor", "macformer taylor, 64 features", *drawn}
        assert all(value > 0 for value in shown.values())


def test_the_record_survives_json(study: Study) -> None:
    assert from_json(Study, to_json(study)) == study
    assert study.settings["lengths"] == [32, 64]
    assert len(study.findings) == 5


def test_an_interrupted_study_goes_on(study: Study, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> Config:
        raise AssertionError("was measured again")

    monkeypatch.setattr(Errors, "measure", fail)
    monkeypatch.setattr(approximation_cells.Latencies, "measure", fail)
    again = run(JOB, journal)
    assert again.measurements == study.measurements
    assert (again.tables, again.charts, again.heat_maps, again.findings) == (
        study.tables, study.charts, study.heat_maps, study.findings,
    )  # fmt: skip


def test_a_cell_does_not_depend_on_those_before_it(study: Study) -> None:
    errors = Errors(JOB)
    key = errors.cells()[-3]
    assert {**key, **errors.measure(key)} == next(c for c in study.measurements if {**c, **key} == c)


def test_random_features_lose_their_error_as_one_over_their_number() -> None:
    job = dataclasses.replace(
        JOB, lengths=(64,), features=(64, 256, 1024), kernels=("exp",), data=("aligned",), num_seeds=12,
        estimators=("published",), scales=(0.5,), head_dim=16,
    )  # fmt: skip
    errors = Errors(job)
    cells = [{**key, **errors.measure(key)} for key in errors.cells()]
    for method in ("macformer published", "rfa"):
        medians = [
            statistics.median([r["nmse"] for r in rows(
                [{**c, "part": "error"} for c in cells], method=method, num_features=m)])
            for m in job.features
        ]  # fmt: skip
        slope = math.log(medians[-1] / medians[0]) / math.log(job.features[-1] / job.features[0])
        assert slope == pytest.approx(-1.0, abs=0.25)


def test_an_estimator_that_learns_is_given_other_draws_of_the_same_problem() -> None:
    errors = Errors(JOB)
    problems = [errors._problem("aligned", 512, seed) for seed in range(5)]  # as long as what is learned from
    for seed, problem in enumerate(problems):
        other = errors._calibration("aligned", seed)
        assert other.k.shape == (4, 1, 512, 8)
        assert not any(torch.equal(p.k[0], k) for p in problems for k in other.k)
        values = torch.linalg.svdvals(torch.cat([problem.k[0, 0], *other.k[:, 0]]))
        assert (values[4:].square().sum() / values.square().sum()).item() < 0.05  # one plane for all


def test_the_estimator_that_learns_beats_the_linear_term() -> None:
    job = dataclasses.replace(
        JOB, lengths=(64,), features=(8, 64), kernels=("exp",), estimators=("stratified",), data=("aligned",),
        scales=(0.5,), num_seeds=1,
    )  # fmt: skip
    errors = Errors(job)
    by = {(r["method"], r["num_features"]): r["nmse"] for r in errors.measure(errors.cells()[0])["errors"]}
    assert by["macformer stratified", 64] < 0.1 * by["taylor", 0]
    assert by["macformer stratified", 8] is None


def test_real_data_take_a_layer_for_each_seed_at_their_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = tuple(aligned(512, head_dim=8, num_heads=2, problem=i) for i in range(2))
    monkeypatch.setattr(approximation_cells, "real", lambda length: RealProblems(layers, layers, "made"))
    job = dataclasses.replace(JOB, data=("real",), num_seeds=3)
    errors = Errors(job)
    assert {key["length"] for key in errors.cells()} == {512}
    assert [errors._problem("real", 512, seed).q is layers[seed % 2].q for seed in range(3)] == [True] * 3
    found = run(dataclasses.replace(job, num_seeds=2))
    assert found.heat_maps[0].y == ("512",)
    assert "512 tokens" in found.findings[0]


def test_what_does_not_fit_in_memory_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximation_cells, "free_bytes", lambda: 50_000)
    found = run(dataclasses.replace(JOB, data=("aligned",), lengths=(32, 128), scales=(0.25,)))
    assert [cell["errors"] == [] for cell in found.measurements if cell["part"] == "error"] == [False, True] * 2
    assert found.warnings == ("128 tokens left out: the exact rows alone need 98304 bytes",)
    assert all(row[3] is None for row in found.tables[0].rows)
    assert "n/a" in found.findings[0]


def test_what_would_take_too_long_is_not_started() -> None:
    mechs = {"uniform": maclin.mechanism("mean", head_dim=8, num_heads=1)}
    slow = {
        "length": 16,
        "latencies": [{"subject": EXACT, "latency_ms": 600.0}, {"subject": "uniform", "latency_ms": 600.0}],
    }
    limits: dict[str, Any] = {"seconds_per_point": 0.01, "max_seconds_per_run": 2.0}
    # twice the length: 2.4 s if quadratic, 1.2 s if linear
    cell = latencies(mechs, 32, [slow], **limits, say=lambda text: None)
    assert latency(cell, EXACT) is None
    assert "predicted 2.4 s" in cell["latencies"][0]["reason"]
    assert (latency(cell, "uniform") or 0.0) > 0
    none = latencies(mechs, 128, [slow], **limits, say=lambda text: None)
    assert [row["latency_ms"] for row in none["latencies"]] == [None, None]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kernels": ("exp", "cosh")}, "kernels among exp, inv"),
        ({"kernels": ()}, "got none"),
        ({"estimators": ("best",)}, "estimators among"),
        ({"data": ("aligned", "aligned")}, "each of the data once"),
        ({"lengths": (64, 32)}, "increasing lengths"),
        ({"features": (16, 33)}, "even features"),
        ({"scales": (0.0,)}, "positive scales"),
        ({"scales": (0.25, 1.5)}, "cannot take scale 1.5"),
        ({"head_dim": 2}, "head_dim of at least 4"),
        ({"num_rows": 0}, "positive num_rows"),
        ({"seconds_per_point": 0.0}, "positive seconds_per_point"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        dataclasses.replace(JOB, **wrong)


def test_the_presets_cover_what_was_asked() -> None:
    job = ApproximationStudy.standard()
    assert (job.lengths[0], job.lengths[-1], job.features[0], job.features[-1]) == (256, 32768, 16, 1024)
    assert set(job.kernels) == set(maclin.KERNELS)
    assert (job.reference_length, job.reference_features) == (4096, 128)
    assert len(ApproximationStudy.quick().lengths) > 1
