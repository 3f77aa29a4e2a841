from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maclin.records import Report, Timing
from maclin.report import curves, read_lengths, roi, roi_dict, roi_markdown


def with_curves(report: Report, old: dict[int, float], new: dict[int, float], number: int = 6) -> Report:
    rows = [Timing("original", "model", n, ms) for n, ms in old.items()]
    rows += [Timing("converted", "model", n, ms, num_linear=number) for n, ms in new.items()]
    return dataclasses.replace(report, timings=tuple(rows))


@pytest.fixture
def simple(report: Report) -> Report:
    # 10 ms at 100 tokens, 40 ms at 400: linear in the length; converted: 20 ms everywhere
    return with_curves(report, {100: 10.0, 400: 40.0}, {100: 20.0, 400: 20.0})


def test_closed_form(simple: Report) -> None:
    result = roi(
        simple,
        price_per_hour=3.6,
        requests_per_day=1_000_000,
        lengths=[100, 200, 400, 50, 4000],
        effort_hours=10,
        rate_per_hour=50,
        days_per_month=30,
        currency="EUR",
    )
    assert (result.num_shorter, result.num_longer, result.covered_share) == (1, 1, 0.6)
    assert (result.covered_from_length, result.covered_to_length) == (100, 400)
    assert result.mean_latency_before_ms == pytest.approx((10 + 20 + 40) / 3)
    assert result.mean_latency_after_ms == pytest.approx(20)
    # 600,000 covered requests a day x 30 days x ms / 3.6e6 ms an hour x 3.6 = 18 for each ms
    assert result.monthly_cost_before == pytest.approx(18 * 70 / 3)
    assert result.monthly_cost_after == pytest.approx(18 * 20)
    assert result.monthly_saving_after == pytest.approx(60)
    assert result.payback_months_after == pytest.approx(500 / 60)
    assert result.dispatch_from_length == 400
    assert result.mean_latency_dispatch_ms == pytest.approx((10 + 20 + 20) / 3)
    assert result.monthly_saving_dispatch == pytest.approx(18 * 20 / 3)
    assert result.payback_months_dispatch == pytest.approx(500 / 120)
    assert result.num_linear == 6


def test_what_is_shown_holds_the_numbers_and_what_is_missing(simple: Report) -> None:
    result = roi(simple, price_per_hour=3.6, requests_per_day=1e6, lengths=[100, 400, 4000], effort_cost=500)
    text = roi_markdown(result)
    assert "requests/day x covered share x days/month" in text
    assert f"= {result.monthly_cost_after:,.2f} USD" in text
    assert "exact below 400 tokens" in text
    assert "lie outside the measured 100 to 400 tokens" in text
    assert "The verdict of this report is no-go" in text
    assert json.loads(json.dumps(roi_dict(result)))["payback_months_after"] == result.payback_months_after


def test_nothing_saved_is_never_paid_back(report: Report) -> None:
    slower = with_curves(report, {100: 10.0, 400: 40.0}, {100: 20.0, 400: 50.0})
    result = roi(slower, price_per_hour=1, requests_per_day=10, lengths=[100, 400], effort_cost=100)
    assert result.monthly_saving_after < 0
    assert (result.payback_months_after, result.payback_months_dispatch) == (None, None)
    assert result.dispatch_from_length is None
    assert result.monthly_saving_dispatch == 0
    assert "never" in roi_markdown(result)


def test_no_effort_no_payback(simple: Report) -> None:
    result = roi(simple, price_per_hour=1, requests_per_day=10, lengths=[400])
    assert result.payback_months_after is None
    assert "no effort stated" in roi_markdown(result)


def test_half_the_utilisation_is_twice_the_cost(simple: Report) -> None:
    full = roi(simple, price_per_hour=1, requests_per_day=10, lengths=[400])
    half = roi(simple, price_per_hour=1, requests_per_day=10, lengths=[400], utilisation=0.5)
    assert half.monthly_cost_before == pytest.approx(2 * full.monthly_cost_before)


def test_a_timed_model_other_than_the_recommended_one_is_said(simple: Report) -> None:
    verdict = dataclasses.replace(simple.verdict, decision="go", recommended_num_linear=3)
    result = roi(dataclasses.replace(simple, verdict=verdict), price_per_hour=1, requests_per_day=10, lengths=[400])
    assert result.num_linear == 6
    assert any("recommends 3 linear layers" in note for note in result.notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"price_per_hour": 0}, "wanted price_per_hour above 0, got 0"),
        ({"price_per_hour": math.inf}, "price_per_hour"),
        ({"requests_per_day": -1}, "requests_per_day"),
        ({"utilisation": 1.5}, "utilisation of at most 1"),
        ({"utilisation": 0}, "utilisation above 0"),
        ({"days_per_month": 0}, "days_per_month"),
        ({"lengths": []}, "got none"),
        ({"lengths": [0]}, "got 0"),
        ({"lengths": [5, 1000]}, "within the measured 100 to 400 tokens, got 5 to 1000"),
        ({"effort_hours": 3}, "got effort_hours only"),
        ({"rate_per_hour": 3}, "got rate_per_hour only"),
        ({"effort_hours": 3, "rate_per_hour": 3, "effort_cost": 3}, "got both"),
        ({"effort_cost": -3}, "effort of at least 0"),
    ],
)
def test_arguments_out_of_range_are_named(simple: Report, arguments: dict, message: str) -> None:
    passed = {"price_per_hour": 1, "requests_per_day": 10, "lengths": [200], **arguments}
    with pytest.raises(ValueError, match=message):
        roi(simple, **passed)


def test_a_report_without_whole_model_timings_is_refused(report: Report) -> None:
    for old, new, message in (
        ({}, {100: 1.0}, "none of the original one"),
        ({100: 1.0}, {}, "none of the converted one"),
        ({100: 1.0, 200: 2.0}, {400: 1.0}, "measured at common lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            roi(with_curves(report, old, new), price_per_hour=1, requests_per_day=10, lengths=[100])


@given(exponent=st.floats(0.1, 3), factor=st.floats(0.01, 100), length=st.integers(16, 4096))
def test_a_power_law_is_interpolated_exactly(exponent: float, factor: float, length: int) -> None:
    rows = tuple(Timing("original", "model", n, factor * n**exponent) for n in (16, 100, 1000, 4096))
    assert curves.latency_at(rows, length) == pytest.approx(factor * length**exponent, rel=1e-9)
    assert curves.latency_at(rows, 15) is None
    assert curves.latency_at(rows, 4097) is None


@pytest.mark.parametrize(
    ("name", "text", "lengths"),
    [
        ("a.txt", "12\n\n# a comment\n 300 \n5\n", [12, 300, 5]),
        ("a.csv", 'id,length,text\n1,12,"a, b"\n2,7,c\n', [12, 7]),
        ("a.csv", "tokens\n12\n7\n", [12, 7]),
        ("a.csv", "12\n7\n", [12, 7]),
        ("a.txt", "Length\n12\n", [12]),
        ("a.jsonl", '{"length": 12, "id": 1}\n{"length": 7}\n', [12, 7]),
        ("a.jsonl", "12\n7\n", [12, 7]),
        ("bom.txt", "\ufeff12\n", [12]),
        ("a.txt", "12.0\n", [12]),
    ],
)
def test_lengths_are_read(tmp_path: Path, name: str, text: str, lengths: list[int]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_lengths(tmp_path / name) == lengths


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "got a file without any"),
        ("a.txt", "\n# only a comment\n", "got a file without any"),
        ("a.txt", "12\n\nmany\n", "line 3: wanted a whole number of tokens, at least 1, got 'many'"),
        ("a.txt", "12\n-4\n", "line 2: .* got '-4'"),
        ("a.txt", "0\n", "line 1: .* got '0'"),
        ("a.txt", "1.5\n", r"line 1: .* got '1\.5'"),
        ("a.txt", "inf\n", "line 1: .* got 'inf'"),
        ("a.csv", "a,b\n1,2\n", r"wanted a column 'length' .* got the columns \['a', 'b'\]"),
        ("a.csv", "id,length\n", "got a header only"),
        ("a.csv", "id,length\n1,2\n3\n", "line 3: wanted 2 columns or more"),
        ("a.jsonl", '{"length": 1}\n{"size": 2}\n', r"line 2: wanted the key 'length', got only \['size'\]"),
        ("a.jsonl", '{"length": true}\n', "line 1: .* got True"),
        ("a.jsonl", '{"length": 1}\n{oops\n', "line 2: wanted JSON"),
    ],
)
def test_what_is_not_a_length_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_lengths(tmp_path / name)


def test_a_missing_file_a_directory_and_other_bytes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_lengths(tmp_path / "none.txt")
    with pytest.raises(IsADirectoryError, match="got the directory"):
        read_lengths(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe1")
    with pytest.raises(ValueError, match="UTF-8"):
        read_lengths(tmp_path / "a.txt")
