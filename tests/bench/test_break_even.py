import pytest

from maclin.bench import break_even, growth_exponent
from maclin.records import BreakEven, Timing


def row(subject: str, length: int, latency_ms: float | None, spread: float = 0.0, scope: str = "attention") -> Timing:
    if latency_ms is None:
        return Timing(subject, scope, length, None, reason="not run")
    return Timing(subject, scope, length, latency_ms, latency_ms - spread, latency_ms + spread, 9)


def rows(subject: str, latencies: dict[int, float | None]) -> list[Timing]:
    return [row(subject, length, value) for length, value in latencies.items()]


SOFTMAX: dict[int, float | None] = {128: 1.0, 256: 2.0, 512: 4.0, 1024: 8.0}


@pytest.mark.parametrize(
    ("latencies", "length", "note"),
    [
        ({128: 2.0, 256: 2.5, 512: 3.0, 1024: 4.0}, 512, "both measured from 128 to 1024 tokens"),
        (
            {128: 0.5, 256: 0.5, 512: 0.5, 1024: 0.5},
            128,
            "both measured from 128 to 1024 tokens; faster at all of them, so that it may pay at shorter lengths too",
        ),
        (
            {128: 2.0, 256: 3.0, 512: 5.0, 1024: 9.0},
            None,
            "not faster than softmax at 1024 tokens; both measured from 128 to 1024 tokens",
        ),
        # faster in between only: that is no break-even
        (
            {128: 2.0, 256: 1.0, 512: 1.0, 1024: 9.0},
            None,
            "not faster than softmax at 1024 tokens; both measured from 128 to 1024 tokens",
        ),
        # slower once in between: only the lengths after that count
        ({128: 0.5, 256: 3.0, 512: 1.0, 1024: 1.0}, 512, "both measured from 128 to 1024 tokens"),
        ({128: 2.0, 256: 2.5, 512: 4.0, 1024: 4.0}, 1024, "both measured from 128 to 1024 tokens"),  # a tie is no win
        (
            {512: 3.0},
            512,
            "both measured at 512 tokens; faster at all of them, so that it may pay at shorter lengths too",
        ),
        ({128: 2.0, 512: 1.0, 1024: None}, 512, "both measured from 128 to 512 tokens"),
        ({128: None, 2048: 1.0}, None, "no length at which both it and softmax were measured"),
    ],
)
def test_truth_table(latencies: dict[int, float | None], length: int | None, note: str) -> None:
    found = break_even(rows("softmax", SOFTMAX) + rows("efficient", latencies), "attention")
    assert found == [BreakEven("efficient", "attention", length, note)]


def test_overlapping_quartiles_are_said() -> None:
    timings = [row("softmax", 64, 2.0, 0.3), row("softmax", 128, 4.0, 0.3)]
    timings += [row("a", 64, 1.8, 0.3), row("a", 128, 1.0, 0.3)]
    (found,) = break_even(timings, "attention")
    assert found.length == 64
    assert found.note.endswith("within noise at 64 (the quartile bands overlap)")


def test_scopes_and_baselines_are_kept_apart() -> None:
    timings = [
        row("softmax", 64, 1.0),
        row("a", 64, 2.0),
        row("original", 64, 2.0, scope="model"),
        row("converted", 64, 1.0, scope="model"),
        row("b", 64, 0.5),
    ]
    assert [(found.subject, found.length) for found in break_even(timings, "attention")] == [("a", None), ("b", 64)]
    assert [(found.subject, found.length) for found in break_even(timings, "model")] == [("converted", 64)]
    assert [found.length for found in break_even(timings, "attention", baseline="a")] == [64, 64]


def test_rows_without_quartiles() -> None:
    timings = [Timing("softmax", "attention", 64, 2.0), Timing("a", "attention", 64, 1.0)]
    assert break_even(timings, "attention")[0].length == 64


def test_without_a_baseline() -> None:
    with pytest.raises(ValueError, match="wanted timings of the baseline 'softmax' in scope 'attention', got those of"):
        break_even([row("a", 64, 1.0)], "attention")


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0, 2.0])
def test_exponent_of_exact_power_laws(exponent: float) -> None:
    lengths = [100, 300, 1000, 5000]
    assert growth_exponent(lengths, [7.0 * n**exponent for n in lengths]) == pytest.approx(exponent)


@pytest.mark.parametrize(
    ("lengths", "values"), [([1], [1]), ([2, 2], [1, 3]), ([1, 2], [1]), ([1, 2], [0, 1]), ([0, 2], [1, 1]), ([], [])]
)
def test_exponent_of_nothing(lengths: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError, match="wanted at least two different lengths"):
        growth_exponent(lengths, values)
