"""Two results: what regressed, what improved, and what is noise."""

from __future__ import annotations

import dataclasses

import pytest

from maclin.bench import compare
from maclin.core.errors import InputError, OptionError
from maclin.records import BenchResult, BenchRow, Rates


def scaled(result: BenchResult, subject: str, factor: float, memory: float = 1.0) -> BenchResult:
    """The same result, but one subject took so many times as long and as much."""

    def of(row: BenchRow) -> BenchRow:
        t = row.timing
        if t.subject != subject or t.latency_ms is None or t.latency_ms_low is None or t.latency_ms_high is None:
            return row
        timing = dataclasses.replace(
            t,
            latency_ms=factor * t.latency_ms,
            latency_ms_low=factor * t.latency_ms_low,
            latency_ms_high=factor * t.latency_ms_high,
            peak_bytes=int(memory * (t.peak_bytes or 0)),
        )
        return dataclasses.replace(row, timing=timing)

    return dataclasses.replace(result, rows=tuple(of(row) for row in result.rows))


def test_a_result_is_like_itself(result: BenchResult) -> None:
    found = compare(result, result)
    assert {change.verdict for change in found.changes} == {"same"}
    assert found.regressed == ()


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.3, "regressed"), (1 / 1.3, "improved"), (1.2, "same"), (0.83, "same"), (1.0, "same")],
)
def test_only_what_is_beyond_the_quartiles_counts(result: BenchResult, factor: float, verdict: str) -> None:
    # the quartiles are 10 % around the median, so bands part from a factor of 1.1 / 0.9 = 1.222 on
    found = compare(result, scaled(result, "efficient", factor))
    times = [change for change in found.changes if change.subject == "efficient" and change.quantity == "time"]
    assert len(times) == 3
    for change in times:
        assert change.verdict == verdict
        assert change.ratio == pytest.approx(factor)
        assert change.ratio_low == pytest.approx(factor * 0.9 / 1.1)
        assert change.ratio_high == pytest.approx(factor * 1.1 / 0.9)
        assert (change.note == "within noise") == (verdict == "same" and factor != 1.0)
    assert {change.verdict for change in found.changes if change not in times} == {"same"}


def test_the_threshold_holds_beyond_the_noise(result: BenchResult) -> None:
    slower = scaled(result, "efficient", 1.3)
    assert len(compare(result, slower, threshold=0.25).regressed) == 3
    assert compare(result, slower, threshold=0.35).regressed == ()
    with pytest.raises(OptionError, match="at least 0"):
        compare(result, slower, threshold=-0.1)


def test_memory_has_no_noise(result: BenchResult) -> None:
    found = compare(result, scaled(result, "efficient", 1.0, memory=1.06))
    assert {(change.subject, change.quantity) for change in found.regressed} == {("efficient", "memory")}


def test_a_figure_that_is_refused_now_has_regressed(result: BenchResult) -> None:
    rows = [
        dataclasses.replace(row, timing=dataclasses.replace(row.timing, latency_ms=None, peak_bytes=None, reason="red"))
        if row.timing.subject == "efficient"
        else row
        for row in result.rows
    ]
    found = compare(result, dataclasses.replace(result, rows=tuple(rows)))
    assert {change.note for change in found.regressed} == {"no figure any more: red"}
    assert len(found.regressed) == 6  # time and memory at three lengths
    assert compare(dataclasses.replace(result, rows=tuple(rows)), result).regressed == ()


def test_what_only_one_has_is_not_comparable(result: BenchResult) -> None:
    fewer = dataclasses.replace(result, rows=tuple(row for row in result.rows if row.timing.length != 4000))
    for found in (compare(result, fewer), compare(fewer, result)):
        assert {change.verdict for change in found.changes if change.length == 4000} == {"not comparable"}
        assert {change.verdict for change in found.changes if change.length != 4000} == {"same"}


def test_results_that_have_nothing_in_common(result: BenchResult) -> None:
    with pytest.raises(InputError, match="one kind, got speed and memory"):
        compare(result, dataclasses.replace(result, what="memory"))
    other = dataclasses.replace(result, rows=result.rows[:1])
    with pytest.raises(InputError, match="the first has softmax at 1000, the second efficient"):
        compare(other, dataclasses.replace(result, rows=result.rows[1:2]))


def test_another_machine_is_said(result: BenchResult) -> None:
    environment = dataclasses.replace(result.environment, processor="another", num_threads=4)
    rates = Rates(2e10, 1e11, 1, "", "float32")
    other = dataclasses.replace(
        result, environment=environment, rates=rates, settings={**result.settings, "batch": 2}, warnings=()
    )
    warnings = compare(result, other).warnings
    assert "processor is A <b>processor</b> in the first and another in the second" in warnings
    assert "num_threads is 2 in the first and 4 in the second" in warnings
    assert "setting batch is None in the first and 2 in the second" in warnings
    assert "the machine of the second copies 2.00 times as fast as that of the first" in warnings
    assert "the first: a <warning>" in warnings
    assert len(warnings) == 5
