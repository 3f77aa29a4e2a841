"""The command ``maclin arena``, on data that is made here."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from maclin.arena import costs_path, keep_costs, runs
from maclin.arena.results import CostsFile, load_task, read_record
from maclin.cli.app import app
from maclin.cli.arena import app as arena
from maclin.records import ArenaCost
from maclin.report.arena import ARENA_NAMES, load_arena, score_table

Cli = Callable[..., tuple[int, str, str]]
SMALL = ("--steps", "4", "--seeds", "1", "--width", "8", "--layers", "1", "--batch-size", "8", "--device", "cpu")


@pytest.fixture(autouse=True)
def registered() -> None:
    if not any(group.name == "arena" or group.typer_instance is arena for group in app.registered_groups):
        app.add_typer(arena)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Texts of a's and b's, with the letter that is more frequent."""
    draw = random.Random(0)
    path = tmp_path / "letters.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["words", "letter"])
        for _ in range(120):
            text = "".join(draw.choice("ab") for _ in range(9))
            writer.writerow([text, max("ab", key=text.count)])
    return path


@pytest.fixture
def run_own(run_cli: Cli, table: Path, tmp_path: Path) -> Cli:
    own = ("csv", "--data", str(table), "--text-column", "words", "--label-column", "letter", *SMALL)

    def call(*more: str) -> tuple[int, str, str]:
        return run_cli("arena", "run", *own, "--out", str(tmp_path / "out"), *more)

    return call


def test_without_a_command_they_are_listed(run_cli: Cli) -> None:
    status, out, err = run_cli("arena")
    assert (status, err) == (0, "")
    assert all(name in out for name in ("run", "table", "list"))


def test_the_tasks_are_listed(run_cli: Cli) -> None:
    status, out, _ = run_cli("arena", "list")
    assert status == 0
    assert "listops" in out
    rows = {row["name"]: row for row in json.loads(run_cli("arena", "list", "--json")[1])}
    assert rows["listops"]["lengths"]["standard"] == 2000
    assert rows["translation"]["metric"] == "bleu"
    assert rows["csv"]["needs"] == ["data"]


def test_own_data_is_run_and_the_tables_are_written(run_own: Cli, tmp_path: Path) -> None:
    status, out, err = run_own("--mechanism", "elu", "--no-costs")
    assert status == 0, err
    assert "csv:letters (quick): accuracy (%) on the test split" in out
    assert all(name in out for name in ("softmax", "mean", "window", "elu", "majority", "arena.html"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*ARENA_NAMES, "csv-letters-quick"}
    found = load_arena(tmp_path / "out" / "arena.json").tasks[0]
    assert [run.label for run in found.runs] == ["softmax", "mean", "window", "elu"]
    assert found.settings["options"]["text_column"] == "words"
    assert found.settings["train"]["steps"] == 4


def test_a_summary_as_json_and_tables_of_what_is_there(run_own: Cli, run_cli: Cli, tmp_path: Path) -> None:
    status, out, _ = run_own("--mechanism", "elu", "--no-costs", "--no-baselines", "--json")
    assert status == 0
    assert json.loads(out)["files"]["json"] == str(tmp_path / "out" / "arena.json")
    status, out, _ = run_cli("arena", "table", str(tmp_path / "out"), "--out", str(tmp_path / "elsewhere"))
    assert status == 0
    assert load_arena(tmp_path / "elsewhere" / "arena.json").tasks[0].runs[0].label == "elu"


def test_ctrl_c_says_how_to_go_on(run_own: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = runs.train, 0

    def second(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(runs, "train", second)
    more = ("--mechanism", "elu", "--no-costs", "--no-baselines", "--seeds", "2")
    status, _, err = run_own(*more)
    assert status == 130
    assert "--resume goes on" in err
    status, _, err = run_own(*more)
    assert status == 2
    assert "pass --resume" in err
    assert run_own(*more, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (("--mechanism", "elm"), 2, "unknown mechanism 'elm'"),
        (("--text-column", "text"), 1, "words"),
        (("--option", "nothing"), 2, "name=value"),
        (("--option", "colour=1"), 2, "colour"),
        (("--precision", "fp8"), 2, "fp32, bf16"),
        (("--resume", "--force"), 2, "one of them"),
        (("--data-dir", "/nowhere"), 1, "/nowhere"),
    ],
)
def test_wrong_calls_are_one_sentence(run_own: Cli, more: tuple[str, ...], status: int, message: str) -> None:
    found, _, err = run_own(*more)
    assert found == status
    assert message in err
    assert len(err.strip().splitlines()) <= 3


def test_costs_are_measured_without_data(run_cli: Cli) -> None:
    size = ("--lengths", "32,64", "--batch-size", "1", "--seconds", "0.01", "--device", "cpu", "--mechanism", "elu")
    status, out, err = run_cli("arena", "cost", "listops", *size)
    assert status == 0, err
    assert "cost of a training step at 64 positions" in out
    rows = json.loads(run_cli("arena", "cost", "listops", *size, "--json")[1])
    assert [(row["label"], row["length"]) for row in rows[::4]] == [("softmax", 32), ("elu", 32), ("window", 64)]
    assert all(row["latency_ms"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert run_cli("arena", "cost", "listops", "--lengths", "many")[0] == 2
    assert run_cli("arena", "cost", "listops", "--lengths", "0")[0] == 2


def test_costs_join_the_tables_of_earlier_runs(run_cli: Cli, run_own: Cli, tmp_path: Path) -> None:
    assert run_own("--mechanism", "elu", "--no-costs")[0] == 0
    runs = tmp_path / "out"
    before = load_task(runs / "csv-letters-quick")
    assert not before.costs
    length, path = before.task.full_length, costs_path(before.task.name, runs)
    row = ArenaCost("elu", length, 2, latency_ms=5.0, peak_bytes=100)
    for costs in (
        (replace(row, length=length + 1),),
        (replace(row, latency_ms=1.0),),
        (ArenaCost("softmax", length, 2, latency_ms=10.0, peak_bytes=300), row),
    ):
        keep_costs(replace(before, costs=costs), path)
    assert [cost.length for cost in load_task(runs / "csv-letters-quick").costs] == [length + 1, length, length]
    assert run_cli("arena", "table", str(runs))[0] == 0
    table = score_table(load_arena(runs / "arena.json").tasks[0])
    cells = dict(zip(table.columns, next(cells for cells in table.rows if cells[0] == "elu"), strict=True))
    assert (cells[f"times faster at {length:,}"], cells["times less memory"]) == ("2.00", "3.00")


def test_costs_are_kept_where_asked(run_cli: Cli, tmp_path: Path) -> None:
    size = ("--lengths", "32", "--batch-size", "1", "--seconds", "0.01", "--device", "cpu", "--mechanism", "elu")
    status, out, err = run_cli("arena", "cost", "listops", *size, "--out", str(tmp_path), "--json")
    assert status == 0, err
    kept = read_record(CostsFile, tmp_path / "listops-quick" / "costs.json").costs
    assert [asdict(cost) for cost in kept] == json.loads(out)
    status, out, _ = run_cli("arena", "cost", "listops", *size, "--out", str(tmp_path), "--preset", "paper")
    assert status == 0
    assert (tmp_path / "listops-paper" / "costs.json").exists()
    assert "costs.json" in out
    status, _, err = run_cli("arena", "cost", "listops", *size, "--out", str(tmp_path), "--preset", "full")
    assert status == 2
    assert "quick, standard, paper" in err


def test_no_results_are_said(run_cli: Cli, tmp_path: Path) -> None:
    status, _, err = run_cli("arena", "table", str(tmp_path))
    assert status == 1
    assert "maclin arena run" in err
