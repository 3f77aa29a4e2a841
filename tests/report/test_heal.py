"""The page of healing: what it says follows from the record."""

from dataclasses import replace
from pathlib import Path

import pytest

from maclin.records import Environment, HealLayer, HealLook, HealResult
from maclin.report import heal_study, load_heal, render_heal_html, render_heal_markdown, write_heal


@pytest.fixture
def result() -> HealResult:
    looks = (
        HealLook("converted", 0, 0.5, 0.16, 0.4, None, 0.5),
        HealLook("transfer", 40, 10.0, 0.04, 0.2, 0.08, 0.6),
        HealLook("distillation", 5, 15.0, 0.02, 0.15, 0.05, 0.7),
        HealLook("distillation", 10, 20.0, 0.03, 0.16, 0.04, 0.65),
    )
    machine = Environment(
        "2026-01-31T12:00:00", "0", "3.11", "2.13", None, "Linux", "a <processor>", "cpu", 2, "float32"
    )
    return HealResult(
        measure="1 - cosine",
        error_before=0.16,
        error_after=0.02,
        best_stage="distillation",
        best_step=5,
        stopped="budget",
        looks=looks,
        layers=(HealLayer("layer.0", "hybrid", 0.5, 0.2, "trained"), HealLayer("layer.1", "hybrid", 0.1, None)),
        settings={"train": "all", "steps": None},
        num_batches=7,
        num_held_out=1,
        num_trained=12,
        transfer_steps=40,
        distillation_steps=10,
        num_skipped_steps=0,
        resumed_at_seconds=(),
        seconds=20.0,
        metric_before=0.5,
        metric_after=0.7,
        warnings=("one <warning>",),
        environment=machine,
    )


def test_sentences_and_curve_say_what_was_measured(result: HealResult) -> None:
    study = heal_study(result)
    text = " ".join(study.findings)
    for part in ("0.16 to 0.02", "8.0 times less", "40 steps", "to 0.04", "10 steps", "0.5 to 0.7", "step 5", "budget"):
        assert part in text, part
    error, hidden, metric = study.charts[0].lines
    assert error.x == (0.5, 10.0, 15.0, 20.0)
    assert error.y == (0.16, 0.04, 0.02, 0.03)
    assert hidden.y == (0.4, 0.2, 0.15, 0.16)
    assert metric.y == (0.5, 0.6, 0.7, 0.65)
    assert "10 s" in study.charts[0].note
    best = [row for row in study.tables[0].rows if row[1] == "best"]
    assert [row[2] for row in best] == [5]
    assert study.tables[1].rows[1][2] == "stays as it was"


def test_pages_are_written_whole_and_read_back(result: HealResult, tmp_path: Path) -> None:
    paths = write_heal(result, tmp_path / "out")
    assert load_heal(paths["json"]) == result
    html = render_heal_html(result)
    assert "&lt;warning&gt;" in html
    assert "<warning>" not in html
    assert "8.0 times less" in render_heal_markdown(result)
    assert paths["html"].read_text(encoding="utf-8") == html


def test_what_did_not_get_better_is_not_called_so(result: HealResult) -> None:
    same = replace(result, error_after=0.16, best_stage="converted", best_step=0)
    assert "times less" not in heal_study(same).findings[0]
    with pytest.raises(ValueError, match="environment"):
        heal_study(replace(result, environment=None))
