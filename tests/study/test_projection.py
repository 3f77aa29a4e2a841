"""Spectra against a decomposition of another kind, fits that help, runs that share what they should, and the record."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.core.errors import OptionError
from maclin.core.mechanisms.linformer import Linformer
from maclin.core.reference import softmax_attention
from maclin.records import Config, Study, from_json, to_json
from maclin.study import Journal
from maclin.study.data import Problem, RealProblems, aligned, joined
from maclin.study.latencies import EXACT
from maclin.study.projection import ProjectionStudy, run
from maclin.study.projection import cells as projection_cells
from maclin.study.projection.cells import RealAttention, _learned, _spectrum
from maclin.study.projection.trained import Trained, build, byte_task

JOB = ProjectionStudy(
    proj_lens=(4, 8, 32, 64),
    layers=(0, 2),
    num_documents=4,
    length=32,
    spectrum_documents=1,
    fitted_lens=(4, 8),
    fit_steps=3,
    time_lengths=(16, 48),
    num_heads=1,
    head_dim=8,
    seconds_per_point=0.2,
    trained_lens=(2, 4),
    sharing_len=4,
    task_length=8,
    num_train=32,
    num_held_out=48,
    steps=2,
    num_seeds=2,
)


def problems(layer: int) -> tuple[Problem, Problem]:
    """Calibration and held-out documents of one layer, two each; the held-out ones are harder."""

    def part(radius: float, draws: tuple[int, int]) -> Problem:
        return joined([aligned(32, head_dim=8, num_heads=2, radius=radius, problem=layer, draw=d) for d in draws])

    return part(2.0, (0, 1)), part(4.0, (2, 3))


def made(layers: Any, **options: Any) -> RealProblems:
    assert options == {"num_documents": 4, "length": 32}
    parts = [problems(layer) for layer in layers]
    return RealProblems(tuple(c for c, _ in parts), tuple(h for _, h in parts), "made")


@pytest.fixture(scope="module")
def journal() -> Journal:
    return Journal()


@pytest.fixture(scope="module")
def study(journal: Journal) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection_cells, "real", made)
        return run(JOB, journal)


def cells(study: Study, part: str) -> list[Config]:
    return [cell for cell in study.measurements if cell["part"] == part]


def rel(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact.double()).norm() / exact.double().norm()).item()


def test_the_spectrum_is_that_of_a_singular_value_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20, 20, generator=generator, dtype=torch.float64)
    v = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    weights = torch.softmax(logits, -1)
    found, missing = _spectrum(weights, v)
    u, s, vh = torch.linalg.svd(weights)
    energy = s.square().cumsum(0) / s.square().sum()
    assert found["index"] == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert found["energy"] == pytest.approx([energy[i - 1].item() for i in found["index"]])
    assert found["singular_sum"] == pytest.approx([(s[:i].sum() / s.sum()).item() for i in found["index"]])
    for share in (50, 90, 99):
        rank = found[f"rank_{share}"]
        assert energy[rank - 1] >= share / 100
        assert rank == 1 or energy[rank - 2] < share / 100
    shares = s / s.sum()
    assert found["effective_rank"] == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item())
    for k in (0, 1, 5, 19, 20):
        cut = u[:, :k] * s[:k] @ vh[:k]
        assert missing[k].item() == pytest.approx((cut @ v - weights @ v).square().sum().item(), abs=1e-12)


def test_uniform_attention_has_one_singular_value() -> None:
    found, missing = _spectrum(torch.full((6, 6), 1 / 6, dtype=torch.float64), torch.ones(6, 2, dtype=torch.float64))
    assert (found["rank_50"], found["rank_99"]) == (1, 1)
    assert found["effective_rank"] == pytest.approx(1.0, abs=1e-5)
    assert missing[1].item() == pytest.approx(0.0, abs=1e-12)


def test_errors_are_those_of_the_mechanisms(study: Study) -> None:
    held = problems(2)[1]
    exact = softmax_attention(held.q, held.k, held.v, scale=held.scale)
    errors = {(r["method"], r["projection"], r["k"]): r["rel_error"] for r in cells(study, "error")[1]["errors"]}
    assert errors["uniform", None, None] == pytest.approx(
        rel(held.v.mean(2, keepdim=True).expand_as(exact), exact), rel=1e-4
    )
    # four slots of eight keys each
    slots = [x.unflatten(2, (4, 8)).mean(3) for x in (held.k, held.v)]
    pooled = softmax_attention(held.q, *slots, scale=held.scale)
    assert errors["linformer", "mean-pool", 4] == pytest.approx(rel(pooled, exact), rel=1e-4)
    q, k, v = held.q.double(), held.k.double(), held.v.double()
    efficient = torch.softmax(q, -1) @ (torch.softmax(k, 2).mT @ v)
    assert errors["efficient", None, None] == pytest.approx(rel(efficient, exact), rel=1e-4)
    for mode in ("mean-pool", "max-pool", "conv"):
        assert errors["linformer", mode, 32] == pytest.approx(0.0, abs=1e-5)  # as many slots as keys
    assert ("linformer", "mean-pool", 64) not in errors


def test_a_cut_at_rank_k_is_measured_over_the_whole_layer(study: Study) -> None:
    held = problems(0)[1]
    weights = torch.softmax(held.q[0].double() @ held.k[0].double().mT * held.scale, -1)
    v = held.v[0].double()
    u, s, vh = torch.linalg.svd(weights)
    cut = (u[..., :4] * s[..., None, :4]) @ vh[..., :4, :] @ v
    found = {r["k"]: r["rel_error"] for r in cells(study, "spectrum")[0]["svd_rel_error"]}
    assert found[4] == pytest.approx(rel(cut, weights @ v), rel=1e-6)
    assert found[32] == pytest.approx(0.0, abs=1e-6)
    assert list(found) == [4, 8, 32]
    assert len(cells(study, "spectrum")[0]["heads"]) == 2  # one document of two heads


@pytest.mark.parametrize("sharing", ["none", "headwise", "key-value", "layerwise"])
def test_fitted_projections_start_as_mean_pooling_and_share_as_they_say(sharing: str) -> None:
    both = [problems(layer)[0] for layer in (0, 1)]
    mechs = _learned(both, 8, sharing, 32)
    pooled = maclin.mechanism("linformer", head_dim=8, num_heads=2, proj_len=8, projection="mean-pool")
    for mech, problem in zip(mechs, both, strict=True):
        torch.testing.assert_close(mech(problem.q, problem.k, problem.v), pooled(problem.q, problem.k, problem.v))
    assert (mechs[0].E is mechs[1].E) == (sharing == "layerwise")
    assert len(list(mechs[0].parameters())) == (2 if sharing in ("none", "headwise") else 1)


def test_a_fit_learns_which_positions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def positional(seed: int) -> Problem:  # every query wants the first two keys, whatever they hold
        generator = torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(3, 4, 1, 32, 8, generator=generator)
        q[..., 0], k[..., 0] = 4.0, -4.0
        k[:, :, :2, 0] = 4.0
        return Problem("positional", q, k, v, 8**-0.5, "made")

    def one_layer(layers: Any, **options: Any) -> RealProblems:
        return RealProblems((positional(0),), (positional(1),), "made")

    monkeypatch.setattr(projection_cells, "real", one_layer)
    monkeypatch.setattr(projection_cells, "_FIT_RATE", 0.02)
    attention = RealAttention(dataclasses.replace(JOB, layers=(0,)))

    def fit(steps: int, sharing: str) -> Config:
        return attention.fit({"layers": [0], "k": 4, "sharing": sharing, "steps": steps})["fitted"][0]

    for sharing in ("none", "layerwise"):
        before, after = fit(1, sharing), fit(80, sharing)
        for part in ("calibration", "held_out"):
            assert after[f"{part}_rel_error"] < 0.7 * before[f"{part}_rel_error"]


def test_errors_of_a_fit_are_of_the_documents_they_name(study: Study) -> None:
    """Three small steps leave a projection where it began."""
    pooled = maclin.mechanism("linformer", head_dim=8, num_heads=2, proj_len=4, projection="mean-pool")
    for layer in JOB.layers:
        errors = [
            rel(pooled(p.q, p.k, p.v, scale=p.scale), softmax_attention(p.q, p.k, p.v, scale=p.scale))
            for p in problems(layer)
        ]
        assert abs(errors[0] - errors[1]) > 0.02  # so that they can be told apart
        fitted = [c for c in cells(study, "fit") if (c["k"], c["sharing"], c["layers"]) == (4, "headwise", [layer])]
        row = fitted[0]["fitted"][0]
        assert [row["calibration_rel_error"], row["held_out_rel_error"]] == pytest.approx(errors, abs=0.008)


def test_a_fit_is_the_same_again() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection_cells, "real", made)
        key = {"layers": [0, 2], "k": 4, "sharing": "layerwise", "steps": 3}
        first, again = RealAttention(JOB).fit(key), RealAttention(JOB).fit(key)
    assert first == again
    assert [row["layer"] for row in first["fitted"]] == [0, 2]


def test_the_byte_task_holds_out_files() -> None:
    task = byte_task(24, 60, 60)
    assert task.train.ids.shape == (60, 24)
    assert task.train.labels.bincount().tolist() == task.held_out.labels.bincount().tolist() == [10] * 6
    assert task.majority_accuracy == pytest.approx(1 / 6)
    library = Path(statistics.__file__).parent
    for examples in (task.train, task.held_out):
        for ids, label in list(zip(examples.ids, examples.labels, strict=True))[:12]:
            text = bytes(ids.tolist())
            files = [file for file in (library / task.classes[int(label)]).rglob("*.py") if text in file.read_bytes()]
            assert files
    assert torch.equal(byte_task(24, 60, 60).train.ids, task.train.ids)


def test_runs_cover_every_mode_at_one_k() -> None:
    runs = [(r["projection"], r["sharing"], r["k"]) for r in Trained(JOB).cells() if r["seed"] == 0]
    assert runs[:4] == [(None, None, None)] * 4
    assert set(runs[4:]) == {
        ("learned", "headwise", 2),
        *(("learned", sharing, 4) for sharing in ("none", "headwise", "key-value")),
        *(("mean-pool", None, k) for k in (2, 4)),
        ("max-pool", None, 4),
        ("conv", None, 4),
    }
    deeper = Trained(dataclasses.replace(JOB, num_layers=2)).cells()
    assert {r["sharing"] for r in deeper} == {None, "none", "headwise", "key-value", "layerwise"}
    assert len({repr(r) for r in deeper}) == len(deeper)


def test_layers_share_only_what_is_to_be_shared() -> None:
    key = {"method": "linformer", "projection": "learned", "k": 4, "task_length": 8}
    for sharing in ("layerwise", "headwise"):
        first = build({**key, "sharing": sharing}, None)
        second = build({**key, "sharing": sharing}, first)
        assert isinstance(first, Linformer)
        assert isinstance(second, Linformer)
        assert (first.E is second.E) == (sharing == "layerwise")
    assert build({"method": "efficient"}, None).name == "efficient"


def test_tables_show_what_was_measured(study: Study) -> None:
    errors, by_layer, spectrum, latency, accuracy = study.tables
    shown: dict[Any, Any] = {row[0]: row[1:] for row in errors.rows}
    assert errors.columns == ("mode", "without k", "k = 4", "k = 8", "k = 32", "k = 64")
    pooled = [
        next(r["rel_error"] for r in cell["errors"] if (r["projection"], r["k"]) == ("mean-pool", 8))
        for cell in cells(study, "error")
    ]
    assert shown["mean-pool"] == (None, shown["mean-pool"][1], pytest.approx(statistics.median(pooled)),
                                  pytest.approx(0.0, abs=1e-5), None)  # fmt: skip
    assert shown["uniform"][0] > 0
    assert shown["uniform"][1:] == (None,) * 4
    fits = [c for c in cells(study, "fit") if (c["sharing"], c["k"]) == ("none", 4)]
    held = [row["held_out_rel_error"] for cell in fits for row in cell["fitted"]]
    assert len(held) == 2
    assert shown["learned, none"][1] == pytest.approx(statistics.median(held))
    assert {"learned, layerwise", "learned, key-value, on the calibration documents", "max-pool", "conv"} <= set(shown)
    assert [row[0] for row in by_layer.rows] == ["0", "2"]
    assert by_layer.rows[1][by_layer.columns.index("mean-pool")] == pytest.approx(pooled[1])
    assert [row[:2] for row in spectrum.rows[-3:-1]] == [("all layers", "median"), ("all layers", "largest")]
    assert spectrum.rows[-1] == ("uniform attention", None, 1.0, 1.0, 1.0, 1.0)
    times: dict[Any, Any] = {row[0]: row[1:] for row in latency.rows}
    assert times["linformer learned, k = 32"][0] is None  # more slots than tokens
    assert times["linformer learned, k = 32"][1] > 0
    assert {EXACT, "uniform", "efficient", "revisited_linformer", "linformer conv, k = 4"} <= set(times)
    majority = cells(study, "task")[0]["majority_accuracy"]
    assert accuracy.rows[0][:3] == ("majority label", None, majority)
    runs = [r["accuracy"] for r in cells(study, "trained") if (r["sharing"], r["k"]) == ("key-value", 4)]
    row = next(r for r in accuracy.rows if r[0] == "linformer learned key-value")
    assert row[1:5] == (4.0, pytest.approx(statistics.fmean(runs)), min(runs), max(runs))


def test_charts_and_heat_maps_have_their_baselines(study: Study) -> None:
    for chart in study.charts:
        assert any(line.is_baseline for line in chart.lines), chart.title
    error = study.charts[0]
    assert error.lines[0].y[0] == error.lines[0].y[-1]  # no k
    assert {"learned, layerwise", "mean-pool", "matrix cut at rank k"} <= {line.name for line in error.lines}
    energy, _, uniform = study.charts[1].lines
    assert energy.y[-1] == pytest.approx(1.0)
    assert set(uniform.y) == {1.0}
    ranks = study.heat_maps[0]
    assert (ranks.x, ranks.y) == (("0", "1"), ("layer 0", "layer 2"))
    assert study.heat_maps[1].x == ("uniform", "4", "8")


def test_the_record_survives_json(study: Study) -> None:
    assert from_json(Study, to_json(study)) == study
    assert len(study.findings) == 5
    assert "all 32 keys" in study.findings[0]
    assert "seeds of one kind differ" in study.findings[4]


def test_an_interrupted_study_goes_on(study: Study, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> Config:
        raise AssertionError("was measured again")

    monkeypatch.setattr(projection_cells, "real", fail)
    monkeypatch.setattr(projection_cells.ProjectionLatencies, "measure", fail)
    monkeypatch.setattr(Trained, "measure", fail)
    again = run(JOB, journal)
    assert again.measurements == study.measurements
    assert (again.tables, again.charts, again.heat_maps) == (study.tables, study.charts, study.heat_maps)


def test_a_trained_run_is_the_same_again(study: Study) -> None:
    trained = Trained(JOB)
    key = trained.cells()[5]
    found = {**key, **trained.measure(key)}
    wanted = next(cell for cell in cells(study, "trained") if {**cell, **key} == cell)
    assert {**found, "seconds": 0} == {**wanted, "seconds": 0}


def test_fewer_modes_make_a_smaller_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection_cells, "real", made)
    for modes in (("learned",), ("mean-pool", "conv")):
        found = run(dataclasses.replace(JOB, projections=modes, time_lengths=(16,), num_seeds=1))
        assert bool(cells(found, "fit")) == ("learned" in modes)
        assert any("one seed" in sentence for sentence in found.findings)
        assert from_json(Study, to_json(found)) == found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"projections": ("pool",)}, "projections among learned"),
        ({"sharings": ()}, "sharings among none"),
        ({"proj_lens": (8, 4)}, "increasing proj_lens"),
        ({"layers": (-1,)}, "increasing layers from 0"),
        ({"num_documents": 5}, "even number of documents"),
        ({"length": 600}, "512 tokens"),
        ({"fitted_lens": (64,)}, "up to length=32"),
        ({"fitted_lens": (5,)}, "among the proj_lens"),
        ({"proj_lens": (32, 64)}, "some of proj_lens below length=32"),
        ({"trained_lens": (4, 16)}, "at most task_length=8"),
        ({"sharing_len": 3}, "sharing_len=3 among them"),
        ({"num_seeds": 0}, "positive num_seeds"),
        ({"max_seconds_per_run": -1.0}, "positive max_seconds_per_run"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        dataclasses.replace(JOB, **wrong)


def test_the_presets_cover_what_was_asked() -> None:
    job = ProjectionStudy.standard()
    assert (job.proj_lens[0], job.proj_lens[-1]) == (16, 1024)
    assert set(job.projections) == {"learned", "mean-pool", "max-pool", "conv"}
    assert set(job.sharings) == {"none", "headwise", "key-value", "layerwise"}
    assert job.num_seeds >= 3
    assert ProjectionStudy.quick().num_seeds == 1


@pytest.mark.slow
def test_real_attention_is_of_low_rank_in_its_last_layer() -> None:
    job = dataclasses.replace(ProjectionStudy.quick(), layers=(5,))
    attention = RealAttention(job)
    try:
        found = attention.spectrum({"layer": 5, "documents": 1, "proj_lens": [64]})
    except maclin.InputError as error:
        pytest.skip(str(error))
    assert max(head["rank_90"] for head in found["heads"]) < 64
    assert found["svd_rel_error"][0]["rel_error"] < 0.1
