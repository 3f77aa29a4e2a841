import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import maclin
from maclin import poc
from maclin.records import (
    SCHEMA_VERSION,
    Audit,
    DataInfo,
    Environment,
    FrontierPoint,
    ModelInfo,
    Plan,
    Report,
    Timing,
    Verdict,
)
from maclin.report import NAMES

Cli = Callable[..., tuple[int, str, str]]


def _report() -> Report:
    timings = [
        Timing(subject, "model", length, milliseconds, num_linear=linear)
        for length, milliseconds in ((100, 10.0), (1000, 100.0))
        for subject, milliseconds, linear in (
            ("original", milliseconds, None),
            ("converted", milliseconds / 2, 1),
        )
    ]
    points = [FrontierPoint(n, (), (), 1.0, 1.0, 1.0, 10.0 - n, 100, 1000) for n in (0, 1)]
    return Report(
        SCHEMA_VERSION,
        Environment("2026-01-01", "0", "3.11", "2.13", None, "linux", "a processor", "cpu", 2, "float32"),
        ModelInfo("tiny", "transformers", "BertModel", 1, 4, 4, 8, 32, 1000, 1000),
        DataInfo("documents", 1, 1, 10, 10, (10, 10)),
        Audit((), 10, 1),
        Plan(0.1, 10, ()),
        tuple(points),
        tuple(timings),
        (),
        Verdict("go", "It pays.", "The rule.", 1, 100),
        (),
        0.0,
        True,
    )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The main job replaced by one that returns at once; the list holds the jobs it was given."""
    jobs: list[Any] = []

    def run(job: Any, progress: Any = None) -> Report:
        jobs.append(job)
        if progress is not None:
            progress.start("a step [with brackets]", 2)
            progress.advance("one [bracket]")
            progress.finish()
        return _report()

    monkeypatch.setattr(poc, "run", run)
    return jobs


def test_version(run_cli: Cli) -> None:
    assert run_cli("--version") == (0, f"maclin {maclin.__version__}\n", "")


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "maclin", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"maclin {maclin.__version__}")


def test_without_arguments_the_help_is_shown(run_cli: Cli) -> None:
    status, out, _ = run_cli()
    assert status == 0
    assert all(command in out for command in ("poc", "roi", "mechanisms"))


def test_mechanisms_lists_all_with_what_they_can_do(run_cli: Cli) -> None:
    status, out, _ = run_cli("mechanisms", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0
    assert list(rows) == maclin.mechanisms.names()
    assert not rows["linformer"]["causal"]
    assert rows["macformer"]["options"]["estimator"] == "stratified"
    assert rows["macformer"]["options"]["num_features"] is None
    assert rows["favor"]["options"]["num_features"] == 128
    status, out, _ = run_cli("mechanisms")
    assert all(name in out for name in rows)


def test_the_report_is_written_and_summed_up(run_cli: Cli, stand_in: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "report"
    status, printed, _ = run_cli("poc", "--out", str(out), "--lengths", "128, 1_024", "--tolerance", "0.2")
    assert status == 0
    assert printed.startswith("go\nIt pays.")
    assert sorted(path.name for path in out.iterdir()) == sorted(NAMES)
    assert stand_in[0].lengths == (128, 1024)
    assert stand_in[0].tolerance == 0.2


def test_data_takes_what_a_shell_makes_of_a_pattern(run_cli: Cli, stand_in: list[Any], tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in "abc"]
    run_cli("poc", "some/model", "--data", *files, "--out", str(tmp_path / "report"), "--data", "d", "--quiet")
    assert stand_in[0].model == "some/model"
    assert [str(path) for path in stand_in[0].data] == [*files, "d"]


def test_json_is_json_and_quiet_is_quiet(run_cli: Cli, stand_in: list[Any], tmp_path: Path) -> None:
    status, printed, err = run_cli("poc", "--out", str(tmp_path / "a"), "--json")
    assert (status, err) == (0, "")
    assert json.loads(printed)["decision"] == "go"
    assert Path(json.loads(printed)["files"]["json"]).is_file()
    assert run_cli("poc", "--out", str(tmp_path / "b"), "--quiet") == (0, "", "")


def test_an_earlier_report_is_not_overwritten_and_no_work_is_done(
    run_cli: Cli, stand_in: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "report.md").write_text("mine")
    status, _, err = run_cli("poc", "--out", str(tmp_path))
    assert status == 2
    assert "--force" in err
    assert not stand_in
    assert (tmp_path / "report.md").read_text() == "mine"
    assert run_cli("poc", "--out", str(tmp_path), "--force", "--quiet")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nothing"], 2, "nothing"),
        (["poc", "--lengths", "a"], 2, "whole numbers"),
        (["poc", "--lengths", "-4"], 2, "at least 1 token"),
        (["poc", "--tolerance", "2"], 2, "between 0 and 1"),
        (["poc", "--unknown"], 2, "--unknown"),
        (["poc", "no/such/model"], 1, "no/such/model"),
        (["poc", "--data", "no/such/file.txt"], 1, "no/such/file.txt"),
        (["roi", "no.json", "--price-per-hour", "1", "--requests-per-day", "1", "--lengths-from", "x"], 1, "no.json"),
        (["roi", "no.json"], 2, "--price-per-hour"),
    ],
)
def test_bad_input_gets_one_sentence(
    run_cli: Cli, arguments: list[str], status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    got, out, err = run_cli(*arguments, *(["--quiet"] if arguments[0] == "poc" else []))
    assert got == status
    assert message in err
    assert err.startswith("maclin: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err + out
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(poc, "run", interrupted)
    status, _, err = run_cli("poc", "--out", str(tmp_path / "report"))
    assert status == 130
    assert "nothing was written" in err
    assert not list(tmp_path.iterdir())


def test_a_surprise_is_one_sentence_too_unless_debug_is_asked_for(
    run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poc, "run", lambda *_: 1 / 0)
    arguments = ("poc", "--out", str(tmp_path / "report"), "--quiet")
    status, _, err = run_cli(*arguments)
    assert status == 1
    assert "unexpected ZeroDivisionError" in err
    with pytest.raises(ZeroDivisionError):
        run_cli(*arguments, "--debug")


def test_roi_turns_latencies_into_money(run_cli: Cli, stand_in: list[Any], tmp_path: Path) -> None:
    run_cli("poc", "--out", str(tmp_path), "--quiet")
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("100\n1000\n")
    arguments = [str(tmp_path / "report.json"), "--price-per-hour", "3.6", "--requests-per-day", "1000"]
    status, out, _ = run_cli("roi", *arguments, "--lengths-from", str(lengths), "--json")
    result = json.loads(out)
    # 1000 requests a day, 30.4 days, 55 ms each on average, at 0.001 a second
    assert status == 0
    assert result["monthly_cost_before"] == pytest.approx(1000 * 30.4 * 0.055 * 0.001)
    assert result["monthly_saving_after"] == pytest.approx(result["monthly_cost_before"] / 2)
    status, out, _ = run_cli("roi", *arguments, "--lengths-from", str(lengths), "--effort-cost", "10")
    assert status == 0
    assert "payback" in out.lower()


def test_a_report_of_another_schema_is_refused(run_cli: Cli, tmp_path: Path) -> None:
    data = dataclasses.asdict(_report()) | {"schema_version": "9.0"}
    (tmp_path / "report.json").write_text(json.dumps(data))
    (tmp_path / "lengths.txt").write_text("5")
    arguments = ["--price-per-hour", "1", "--requests-per-day", "1", "--lengths-from", str(tmp_path / "lengths.txt")]
    status, _, err = run_cli("roi", str(tmp_path / "report.json"), *arguments)
    assert status == 1
    assert "9.0" in err
