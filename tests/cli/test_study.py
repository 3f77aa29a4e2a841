"""The command ``maclin study``."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maclin.records import SCHEMA_VERSION, Environment, Study
from maclin.report import JOURNAL_NAME, STUDY_NAMES, load_study
from maclin.study import Journal, theory
from maclin.study.theory import TheoryStudy

Cli = Callable[..., tuple[int, str, str]]
MACHINE = Environment("2026-01-01", "0", "3.11", "2.13", None, "linux", "a processor", "cpu", 2, "float64")


class StandIn:
    """The study replaced by five cells that take no time; Ctrl-C may come after some of them."""

    def __init__(self) -> None:
        self.name = "theory"
        self.jobs: list[Any] = []
        self.interrupt_after: int | None = None
        self.measured = 0

    def __call__(self, job: Any, journal: Journal, progress: Any = None) -> Study:
        self.jobs.append(job)
        cells = []
        for seed in range(5):
            if seed == self.interrupt_after:
                raise KeyboardInterrupt
            cells.append(journal.measured({"seed": seed}, self.measure))
        if progress is not None:
            progress.start("a step [with brackets]", 2)
            progress.advance("one [bracket]")
            progress.finish()
        return Study(
            SCHEMA_VERSION, self.name, "Is it so?", ("It is.",), {"seeds": 5}, MACHINE, tuple(cells), warnings=("Few.",)
        )

    def measure(self) -> dict:
        self.measured += 1
        return {"error": 1.0 / self.measured}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn()
    monkeypatch.setattr(theory, "run", found)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_without_a_name_the_studies_are_listed(run_cli: Cli) -> None:
    status, out, err = run_cli("study")
    assert (status, err) == (0, "")
    assert all(f"  {name}  " in out for name in ("projection", "approximation", "ppsbn", "theory"))
    assert "study" in run_cli()[1]


def test_a_study_is_written_and_summed_up(
    run_cli: Cli, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run_cli("study", "theory")
    assert status == 0
    assert out.splitlines() == ["Is it so?", "- It is.", "Study: study-theory/study.html"]
    assert "warning: Few." in err
    assert names(tmp_path / "study-theory") == sorted(STUDY_NAMES)  # the journal has gone into study.json
    assert len(load_study(tmp_path / "study-theory" / "study.json").measurements) == 5
    assert stand_in.jobs == [TheoryStudy.standard()]


def test_options_change_the_preset(run_cli: Cli, stand_in: StandIn, tmp_path: Path) -> None:
    options = ["--seeds", "3", "--features", "8, 64", "--kernels", "exp,log", "--radii", "0.5,1", "--cosines", "0.5"]
    options += ["--head-dim", "8", "--max-degree", "2", "--laws", "published", "--sketches", "srht"]
    status, _, err = run_cli("study", "theory", "--quick", "--out", str(tmp_path / "x"), *options)
    assert status == 0, err
    wanted = {"features": (8, 64), "kernels": ("exp", "log"), "radii": (0.5, 1.0), "cosines": (0.5,), "head_dim": 8}
    wanted |= {"max_degree": 2, "laws": ("published",), "sketches": ("srht",), "num_seeds": 3, "num_draws": 256}
    assert stand_in.jobs == [TheoryStudy(**wanted)]


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        (
            "projection",
            "--seeds 4 --lengths 32,64 --proj-lens 4,8 --fitted-lens 8 --trained-lens 4,8 --sharing-len 8 "
            "--projections mean-pool,learned --sharings none --layers 1,2 --steps 7",
            {
                "num_seeds": 4,
                "time_lengths": (32, 64),
                "proj_lens": (4, 8),
                "fitted_lens": (8,),
                "trained_lens": (4, 8),
                "sharing_len": 8,
                "projections": ("mean-pool", "learned"),
                "sharings": ("none",),
                "layers": (1, 2),
                "steps": 7,
            },
        ),
        (
            "approximation",
            "--seeds 4 --lengths 32,64 --features 68,128 --kernels exp --head-dim 32 --estimators published "
            "--data isotropic --scales 0.25",
            {
                "num_seeds": 4,
                "lengths": (32, 64),
                "features": (68, 128),
                "kernels": ("exp",),
                "head_dim": 32,
                "estimators": ("published",),
                "data": ("isotropic",),
                "scales": (0.25,),
            },
        ),
        (
            "ppsbn",
            "--seeds 4 --estimators published --data aligned --radii 1,2 --layers 0,3 --features 40 "
            "--error-features 64 --batch-sizes 4,8 --learning-rates 0.01,0.1 --examples 64",
            {
                "num_seeds": 4,
                "estimators": ("published",),
                "data": ("aligned",),
                "radii": (1.0, 2.0),
                "layers": (0, 3),
                "num_features": 40,
                "error_features": 64,
                "batch_sizes": (4, 8),
                "learning_rates": (0.01, 0.1),
                "num_examples": 64,
            },
        ),
    ],
)
@pytest.mark.parametrize("quick", [True, False])
def test_every_study_has_its_command(
    run_cli: Cli,
    stand_in: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: str,
    wanted: dict,
    quick: bool,
) -> None:
    module = importlib.import_module(f"maclin.study.{name}")
    stand_in.name = name
    settings = getattr(module, f"{name.capitalize()}Study")
    monkeypatch.setattr(module, "run", stand_in)
    monkeypatch.chdir(tmp_path)
    status, _, err = run_cli("study", name, *(["--quick"] if quick else []), *options.split())
    assert status == 0, err
    preset = settings.quick() if quick else settings.standard()
    assert stand_in.jobs == [dataclasses.replace(preset, **wanted)]
    assert names(tmp_path) == [f"study-{name}"]


def test_json_is_json(run_cli: Cli, stand_in: StandIn, tmp_path: Path) -> None:
    status, out, err = run_cli("study", "theory", "--out", str(tmp_path), "--json")
    assert (status, err) == (0, "")
    summary = json.loads(out)
    assert summary["findings"] == ["It is."]
    assert summary["warnings"] == ["Few."]
    assert Path(summary["files"]["json"]).is_file()


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(run_cli: Cli, stand_in: StandIn, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    stand_in.interrupt_after = 3
    status, printed, err = run_cli("study", "theory", "--out", str(out))
    assert (status, printed) == (130, "")
    sentence = [line for line in err.splitlines() if line.startswith("maclin: ")]
    assert len(sentence) == 1
    assert re.search("interrupted; 3 measurements are kept in .*, and the same command goes on", sentence[0])
    assert names(out) == [JOURNAL_NAME]
    stand_in.interrupt_after = None
    status, _, err = run_cli("study", "theory", "--out", str(out))
    assert status == 0
    assert "going on after 3 measurements" in err
    assert stand_in.measured == 5
    assert names(out) == sorted(STUDY_NAMES)
    errors = [row["error"] for row in load_study(out / "study.json").measurements]
    assert errors == [1.0 / n for n in range(1, 6)]


@pytest.mark.parametrize("existing", [True, False])
def test_ctrl_c_before_the_first_measurement_leaves_nothing(
    run_cli: Cli, stand_in: StandIn, tmp_path: Path, existing: bool
) -> None:
    out = tmp_path / "new" / "out"
    if existing:
        out.mkdir(parents=True)
    stand_in.interrupt_after = 0
    status, _, err = run_cli("study", "theory", "--out", str(out))
    assert status == 130
    assert "interrupted; nothing was written" in err
    assert names(out if existing else tmp_path) == []


def test_measurements_with_other_settings_are_not_mixed(run_cli: Cli, stand_in: StandIn, tmp_path: Path) -> None:
    arguments = ("study", "theory", "--out", str(tmp_path))
    stand_in.interrupt_after = 2
    run_cli(*arguments)
    stand_in.interrupt_after = None
    status, _, err = run_cli(*arguments, "--seeds", "5")
    assert status == 2
    assert "num_seeds 12, now 5" in err
    assert "--force" in err
    assert err.count("\n") == 1
    assert names(tmp_path) == [JOURNAL_NAME]
    assert run_cli(*arguments, "--seeds", "5", "--force")[0] == 0
    assert stand_in.measured == 2 + 5  # nothing of the other run was used


def test_measurements_of_another_version_are_not_mixed(run_cli: Cli, stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.interrupt_after = 2
    run_cli("study", "theory", "--out", str(tmp_path))
    journal = tmp_path / JOURNAL_NAME
    journal.write_text(re.sub('"maclin_version": "[^"]*"', '"maclin_version": "0.0.0"', journal.read_text()))
    status, _, err = run_cli("study", "theory", "--out", str(tmp_path))
    assert status == 2
    assert "made by maclin 0.0.0" in err


def test_measurements_that_do_not_say_what_they_are_are_not_used(
    run_cli: Cli, stand_in: StandIn, tmp_path: Path
) -> None:
    Journal(tmp_path / JOURNAL_NAME).measured({"seed": 0}, lambda: {"error": 7.0})
    status, _, err = run_cli("study", "theory", "--out", str(tmp_path))
    assert status == 2
    assert "it does not say with which settings" in err
    assert not stand_in.jobs


def test_a_finished_study_is_kept_unless_forced(run_cli: Cli, stand_in: StandIn, tmp_path: Path) -> None:
    arguments = ("study", "theory", "--out", str(tmp_path))
    run_cli(*arguments)
    status, _, err = run_cli(*arguments)
    assert status == 2
    assert "already holds study.html" in err
    assert len(stand_in.jobs) == 1
    stand_in.interrupt_after = 4
    assert run_cli(*arguments, "--force")[0] == 130
    assert names(tmp_path) == sorted([*STUDY_NAMES, JOURNAL_NAME])  # the earlier one stays until the new one is whole
    stand_in.interrupt_after = None
    status, _, err = run_cli(*arguments, "--force")
    assert status == 0
    assert "going on after 4 measurements" in err
    assert names(tmp_path) == sorted(STUDY_NAMES)
    assert stand_in.measured == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing"),
        (["theory", "--unknown"], "--unknown"),
        (["theory", "--features", "a"], "--features as whole numbers"),
        (["theory", "--radii", "a"], "--radii as numbers"),
        (["theory", "--seeds", "1"], "2 seeds"),
        (["theory", "--kernels", "tanh"], "tanh"),
    ],
)
def test_bad_input_gets_one_sentence(
    run_cli: Cli, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run_cli("study", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("maclin: ")
    assert message in err
    assert err.count("\n") == 1
    assert names(tmp_path) == []


def test_a_failure_keeps_what_was_measured(run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(job: Any, journal: Journal, progress: Any = None) -> Study:
        journal.measured({"seed": 0}, lambda: {"error": 1.0})
        raise MemoryError

    monkeypatch.setattr(theory, "run", failing)
    status, _, err = run_cli("study", "theory", "--out", str(tmp_path))
    assert status == 1
    assert "out of memory" in err
    assert len((tmp_path / JOURNAL_NAME).read_text().splitlines()) == 2


def test_the_real_study_runs_through_the_command(run_cli: Cli, tmp_path: Path) -> None:
    options = ["--seeds", "2", "--head-dim", "4", "--max-degree", "2", "--features", "4,8", "--kernels", "exp"]
    options += ["--radii", "0.5", "--cosines", "0.5"]
    status, out, err = run_cli("study", "theory", "--quick", "--out", str(tmp_path), *options)
    assert status == 0, err
    assert "The closed forms" in out
    assert load_study(tmp_path / "study.json").settings["features"] == [4, 8]
