from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maclin.bench import sweep, sweep_attention
from maclin.bench.sweep import predicted
from maclin.core.errors import CapabilityError
from maclin.records import Timing


class Work:
    """A subject whose cost is made up: seconds and bytes by length, on a clock of its own."""

    def __init__(self, seconds: Callable[[int], float], size: Callable[[int], float] = lambda n: n) -> None:
        self.seconds, self.size = seconds, size
        self.lengths: list[int] = []

    def __call__(self, length: int) -> Tensor:
        self.lengths.append(length)
        Work.now += self.seconds(length)
        return torch.empty(int(self.size(length)), dtype=torch.uint8)

    now = 0.0


def run(subjects: dict[str, Callable[..., object]], lengths: list[int], **options: object) -> dict[str, list[Timing]]:
    rows = sweep(
        subjects,
        lengths,
        lambda length: [length],
        scope="model",
        clock=lambda: Work.now,
        **options,  # pyright: ignore[reportArgumentType]
    )
    return {name: [row for row in rows if row.subject == name] for name in subjects}


def test_figures_of_what_fits() -> None:
    rows = run({"a": Work(lambda n: n / 1000), "b": Work(lambda n: n / 500, lambda n: 2 * n)}, [200, 100])
    assert [(row.length, row.latency_ms, row.peak_bytes) for row in rows["a"]] == [
        (100, pytest.approx(100.0), 100),
        (200, pytest.approx(200.0), 200),
    ]
    assert [(row.length, row.latency_ms, row.peak_bytes) for row in rows["b"]] == [
        (100, pytest.approx(200.0), 200),
        (200, pytest.approx(400.0), 400),
    ]
    assert all(row.scope == "model" and row.reason is None and row.num_runs >= 3 for row in rows["a"] + rows["b"])


def test_what_is_slow_is_timed_once() -> None:
    slow = Work(lambda n: 3.0 * n)
    (row,) = run({"slow": slow, "fast": Work(lambda n: 0.1)}, [1])["slow"]
    assert (row.latency_ms, row.latency_ms_low, row.latency_ms_high, row.num_runs) == (3000.0, 3000.0, 3000.0, 1)
    assert slow.lengths == [1, 1]  # for the memory, and for the time


def test_a_slow_start_alone_does_not_make_it_slow() -> None:
    durations = iter([9.0, *[0.25] * 50])
    (row,) = run({"a": Work(lambda n: next(durations))}, [1])["a"]
    assert row.latency_ms == 250.0
    assert row.num_runs == 8  # of two seconds


def test_what_would_take_too_long_is_not_started() -> None:
    quadratic, flat = Work(lambda n: (n / 100) ** 2), Work(lambda n: 1.0)
    rows = run({"quadratic": quadratic, "flat": flat}, [100, 200, 400, 800], max_seconds_per_run=5.0)
    assert [row.latency_ms for row in rows["quadratic"]] == [1000.0, 4000.0, None, None]
    assert rows["quadratic"][2].reason == "predicted 16 s for a run at 400 tokens exceeds the limit of 5 s"
    assert rows["quadratic"][2].num_runs == 0
    assert max(quadratic.lengths) == 200
    assert [row.latency_ms for row in rows["flat"]] == [1000.0] * 4


def test_one_length_says_little_so_the_caller_may_say_how_time_grows() -> None:
    known, unknown = Work(lambda n: n / 100), Work(lambda n: n / 100)
    rows = run({"known": known, "unknown": unknown}, [100, 2000], max_seconds_per_run=25.0, linear=["known"])
    assert [row.latency_ms for row in rows["known"]] == [1000.0, 20_000.0]
    assert rows["unknown"][1].reason == "predicted 400 s for a run at 2000 tokens exceeds the limit of 25 s"


def test_what_would_not_fit_is_not_started() -> None:
    quadratic = Work(lambda n: 0.1, lambda n: n**2)
    rows = run(
        {"quadratic": quadratic, "linear": Work(lambda n: 0.1)},
        [2**10, 2**11, 2**12, 2**13],
        input_bytes=lambda n: 100 * n,
        memory_limit_bytes=2**24 + 2**20,
    )
    assert [row.peak_bytes for row in rows["quadratic"]] == [2**20, 2**22, 2**24, None]
    assert rows["quadratic"][3].reason == (
        "would need about 0.0633 GiB at 8192 tokens, more than the 0.0166 GiB allowed"
    )
    assert max(quadratic.lengths) == 2**12
    assert all(row.reason is None for row in rows["linear"])


def test_inputs_that_do_not_fit_are_not_made() -> None:
    made: list[int] = []
    (row,) = sweep(
        {"a": lambda n: None},
        [5],
        lambda n: made.append(n) or [n],
        scope="model",
        input_bytes=lambda n: 2**40,
    )
    assert row.latency_ms is None
    assert row.reason is not None
    assert row.reason.startswith("inputs and output alone are 1.02e+03 GiB at 5 tokens; allowed are ")
    assert not made


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA"), "ran out of memory at 7 tokens"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
            "ran out of memory at 7 tokens",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "ran out of memory at 7 tokens"),
        (CapabilityError("linformer takes 4 tokens at most, got 7; pass max_length=7"), None),
    ],
)
def test_what_fails_says_why(error: Exception, reason: str | None) -> None:
    def fails(_: int) -> None:
        raise error

    rows = run({"fails": fails, "works": Work(lambda n: 0.1)}, [7])
    assert rows["fails"] == [Timing("fails", "model", 7, None, reason=reason or str(error))]
    assert rows["works"][0].latency_ms == pytest.approx(100.0)


def test_failing_later_says_why_too() -> None:
    calls: list[int] = []

    def fails(length: int) -> None:
        calls.append(length)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA")

    assert run({"fails": fails}, [7])["fails"][0].reason == "ran out of memory at 7 tokens"


def test_inputs_that_run_out_of_memory() -> None:
    def make_inputs(length: int) -> list[int]:
        raise torch.OutOfMemoryError("CUDA")

    rows = sweep({"a": print, "b": print}, [7], make_inputs, scope="model")
    assert [row.reason for row in rows] == ["ran out of memory at 7 tokens"] * 2


def test_other_errors_go_on() -> None:
    def fails(_: int) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run({"fails": fails}, [7])


def test_no_speed_for_a_wrong_result() -> None:
    wrong, right = Work(lambda n: 0.1), Work(lambda n: 0.1)
    rows = run(
        {"wrong": wrong, "right": right},
        [1, 2],
        check=lambda subject: "off by 0.5 from the reference" if subject is wrong else None,
    )
    assert [row.reason for row in rows["wrong"]] == ["off by 0.5 from the reference"] * 2
    assert [row.latency_ms for row in rows["wrong"]] == [None, None]
    assert not wrong.lengths
    assert all(row.reason is None for row in rows["right"])


def test_progress_speaks_of_everything() -> None:
    said: list[str] = []
    run({"a": Work(lambda n: 0.1), "b": print}, [3], check=lambda s: "no" if s is print else None, progress=said.append)
    assert said[0] == "a at 3: first run"
    assert said[1].startswith("at 3: a: 100.000 ms")
    assert said[2] == "b at 3: no"


@pytest.mark.parametrize("lengths", [[], [0, 4]])
def test_nothing_to_measure(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="wanted subjects and lengths of at least 1"):
        run({"a": print}, lengths)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 0.0),
        ({100: 3.0}, 12.0),
        ({50: 1.5, 100: 3.0}, 6.0),
        ({50: 1.0, 100: 4.0}, 16.0),
        ({50: 1.0, 100: 16.0}, 64.0),  # no steeper than quadratic
        ({50: 5.0, 100: 3.0}, 6.0),  # no flatter than linear
        ({50: 0.0, 100: 3.0}, 12.0),
    ],
)
def test_predictions(values: dict[int, float], expected: float) -> None:
    assert predicted(values, 200) == pytest.approx(expected)


def test_attention_is_measured_beside_fused_softmax() -> None:
    shapes: set[tuple[int, ...]] = set()

    def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.update({tuple(q.shape), tuple(k.shape), tuple(v.shape)})
        assert q.dtype is torch.float64
        assert not torch.equal(q, k)
        return q

    rows = sweep_attention(
        {"linear": linear}, [8, 16], num_heads=2, head_dim=4, batch=3, dtype=torch.float64, seconds_per_point=0.01
    )
    assert shapes == {(3, 2, 8, 4), (3, 2, 16, 4)}
    assert [(row.subject, row.scope, row.length) for row in rows] == [
        ("softmax", "attention", 8),
        ("linear", "attention", 8),
        ("softmax", "attention", 16),
        ("linear", "attention", 16),
    ]
    for row in (row for row in rows if row.subject == "softmax"):
        n = row.length
        least = 3 * 2 * n * 4 * 8 + 3 * 2 * n * 8  # out, and the log-sum-exp of each row; the kernel has scratch, too
        assert row.peak_bytes is not None
        assert least <= row.peak_bytes < least + 3 * 2 * n * n * 8
    assert all(row.peak_bytes == 0 for row in rows if row.subject == "linear")


def test_what_comes_before_a_run_counts_neither_as_time_nor_as_memory() -> None:
    state: list[Tensor] = []
    seen: list[int] = []

    def switch(size: int) -> None:
        state[:] = [torch.empty(size)]
        Work.now += 9.0

    def embed(length: int) -> None:
        seen.append(len(state[0]))
        Work.now += 0.5

    rows = run(
        {"original": embed, "converted": embed},
        [1],
        before={"original": lambda: switch(10), "converted": lambda: switch(20)},
    )
    assert [(row[0].latency_ms, row[0].peak_bytes) for row in rows.values()] == [(500.0, 0)] * 2
    assert seen[:6] == [10, 20, 10, 20, 20, 10]


def test_grouped_heads() -> None:
    shapes: set[tuple[int, ...]] = set()

    def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.update({tuple(q.shape), tuple(k.shape), tuple(v.shape)})
        return q

    rows = sweep_attention({"linear": linear}, [64], num_heads=4, num_kv_heads=2, head_dim=8, seconds_per_point=0.01)
    assert shapes == {(1, 4, 64, 8), (1, 2, 64, 8)}
    # no weights of all pairs: out, the log-sum-exp of each row, and the repeated k and v
    least = 4 * (4 * 64 * 8 + 4 * 64 + 2 * 4 * 64 * 8)
    assert rows[0].peak_bytes is not None
    assert least <= rows[0].peak_bytes < least + 4 * 4 * 64 * 64


def test_a_softmax_of_ones_own_is_kept() -> None:
    seen: list[int] = []

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v)

    rows = sweep_attention({"softmax": softmax}, [8], num_heads=1, head_dim=4, seconds_per_point=0.001)
    assert len(rows) == 1
    assert seen
