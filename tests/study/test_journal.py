"""What was measured is written at once, and measured once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from maclin.records import Config
from maclin.study import Journal


@pytest.fixture
def measure() -> Callable[[float], Callable[[], Config]]:
    calls: list[float] = []

    def make(value: float) -> Callable[[], Config]:
        def once() -> Config:
            assert value not in calls, "measured twice"
            calls.append(value)
            return {"error": value}

        return once

    return make


def fail() -> Config:
    raise AssertionError("was measured again")


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_key_is_measured_once(measure, tmp_path: Path, on_disk: bool) -> None:
    journal = Journal(tmp_path / "j.jsonl" if on_disk else None)
    key = {"features": 32, "seed": 0}
    first = journal.measured(key, measure(0.1))
    assert first == {"features": 32, "seed": 0, "error": 0.1}
    assert journal.measured({"seed": 0, "features": 32}, fail) == first  # the order of a key does not matter
    assert journal.measured({"features": 32, "seed": 1}, measure(0.2))["error"] == 0.2
    assert journal.num_resumed == 0
    assert (tmp_path / "j.jsonl").exists() == on_disk


def test_a_later_journal_knows_what_the_first_one_measured(measure, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first = Journal(path).measured({"seed": 0}, measure(1 / 3))
    later = Journal(path)
    assert later.num_resumed == 1
    assert later.measured({"seed": 0}, fail) == first
    assert later.measured({"seed": 1}, measure(0.5))["error"] == 0.5
    assert Journal(path).num_resumed == 2


def test_a_line_is_there_before_the_next_measurement(measure, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.measured({"seed": 0}, measure(0.1))

    def interrupted() -> Config:
        assert len(path.read_text().splitlines()) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.measured({"seed": 1}, interrupted)
    assert Journal(path).num_resumed == 1


@pytest.mark.parametrize("rest", ['{"key": {"seed": 1}, "measure', "[1]", "null", "", '{"key": {"seed": 1}}'])
def test_a_line_that_was_cut_short_is_measured_again(measure, tmp_path: Path, rest: str) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path).measured({"seed": 0}, measure(0.1))
    path.write_text(path.read_text() + rest)
    journal = Journal(path)
    assert journal.num_resumed == 1
    journal.measured({"seed": 0}, fail)
    journal.measured({"seed": 1}, measure(0.2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["key"] for line in lines] == [{"seed": 0}, {"seed": 1}]
    assert Journal(path).num_resumed == 2
