import gc

import pytest
import torch

from maclin.bench import TimingStats, interleaved


class FakeClock:
    """Seconds that pass only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_median_and_quartiles_in_milliseconds(clock: FakeClock) -> None:
    durations = iter([9.0, 0.001, 0.002, 0.003, 0.004, 0.005])  # the first is the warm-up
    stats = interleaved({"a": lambda: clock.work(next(durations))}, min_runs=5, max_runs=5, clock=clock)
    row = stats["a"]
    assert (row.median_ms, row.q1_ms, row.q3_ms, row.runs) == (
        pytest.approx(3.0),
        pytest.approx(2.0),
        pytest.approx(4.0),
        5,
    )


def test_a_single_run_is_its_own_quartiles(clock: FakeClock) -> None:
    stats = interleaved({"a": lambda: clock.work(2.0)}, min_runs=1, max_runs=1, warm_up=0, clock=clock)
    assert stats["a"] == TimingStats(2000.0, 2000.0, 2000.0, 1)


def test_rounds_are_interleaved_and_rotate() -> None:
    calls: list[str] = []
    subjects = {name: lambda name=name: calls.append(name) for name in "abc"}
    interleaved(subjects, min_runs=3, max_runs=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"


def test_what_comes_before_a_run_is_not_timed(clock: FakeClock) -> None:
    calls: list[str] = []

    def prepare(name: str) -> None:
        calls.append(name)
        clock.work(5.0)

    stats = interleaved(
        {name: lambda: clock.work(0.5) for name in "abc"},
        before={name: lambda name=name: prepare(name) for name in "ab"},
        min_runs=2,
        max_runs=2,
        clock=clock,
    )
    assert {row.median_ms for row in stats.values()} == {500.0}
    assert "".join(calls) == "ab" + "ab" + "ba"


def test_the_time_budget_ends_the_rounds(clock: FakeClock) -> None:
    subjects = {"a": lambda: clock.work(0.5), "b": lambda: clock.work(0.5)}
    assert interleaved(subjects, min_runs=1, max_seconds=4.0, clock=clock)["a"].runs == 4
    assert interleaved(subjects, min_runs=6, max_seconds=4.0, clock=clock)["b"].runs == 6
    assert interleaved(subjects, min_runs=1, max_runs=3, max_seconds=99.0, clock=clock)["b"].runs == 3


def test_runs_have_no_gradients_and_no_garbage_collection() -> None:
    seen: list[bool] = []
    interleaved({"a": lambda: seen.append(torch.is_inference_mode_enabled() and not gc.isenabled())})
    assert seen
    assert all(seen)
    assert gc.isenabled()


def test_the_garbage_collector_comes_back_after_an_error() -> None:
    def fails() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        interleaved({"a": fails})
    assert gc.isenabled()


def test_progress_and_order(clock: FakeClock) -> None:
    said: list[str] = []
    stats = interleaved(
        {"b": lambda: clock.work(1), "a": lambda: clock.work(2)},
        min_runs=1,
        max_runs=1,
        clock=clock,
        progress=said.append,
    )
    assert list(stats) == ["b", "a"]
    assert said == [
        "b: 1000.000 ms (1000.000 to 1000.000) in 1 runs",
        "a: 2000.000 ms (2000.000 to 2000.000) in 1 runs",
    ]


def test_no_subjects() -> None:
    assert interleaved({}) == {}


@pytest.mark.parametrize("wrong", [{"min_runs": 0}, {"min_runs": 5, "max_runs": 4}, {"warm_up": -1}])
def test_wrong_numbers_of_runs(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="wanted 1 <= min_runs <= max_runs"):
        interleaved({"a": lambda: None}, **wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
def test_cuda_is_waited_for() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    stats = interleaved({"one": lambda: x @ x, "many": lambda: [x @ x for _ in range(20)]}, device="cuda")
    assert stats["many"].median_ms > stats["one"].median_ms
