"""Rows of benchmarks/adopt.py: kept, read again, and judged, on rows that are made up."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maclin.bench import Target
from maclin.core.errors import InputError, OptionError
from maclin.progress import Silent

adopt: Any = importlib.import_module("adopt")
job_module: Any = importlib.import_module("models.job")


class Counted:
    """A row that counts how often it is measured."""

    def __init__(self, met: bool | None = True) -> None:
        self.met, self.times = met, 0

    def __call__(self, job: Any) -> Any:
        self.times += 1
        return job_module.Outcome([Target("a row", "1", f"{self.times}", self.met)], {"times": self.times})


def job(work: Path, fresh: bool = False, scale: float = 1.0) -> Any:
    return job_module.Job(work, scale, quick=False, fresh=fresh, progress=Silent())


def test_a_row_is_measured_once_for_the_same_minutes(tmp_path: Path) -> None:
    row = Counted()
    first = job(tmp_path).row("some", row)
    assert job(tmp_path).row("some", row) == first
    assert row.times == 1
    assert job(tmp_path, scale=0.5).row("some", row)["figures"] == {"times": 2}
    assert job(tmp_path, fresh=True).row("some", row)["targets"][0]["measured"] == "3"
    assert job(tmp_path).row("some", row)["figures"] == {"times": 3}


def test_a_row_that_fails_is_not_kept(tmp_path: Path) -> None:
    def failing(job: Any) -> Any:
        raise InputError("no such package")

    with pytest.raises(InputError):
        job(tmp_path).row("some", failing)
    assert job(tmp_path).row("some", Counted())["figures"] == {"times": 1}


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: dict[str, Any], *more: str
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(adopt, "ROWS", rows)
    threads = torch.get_num_threads()
    out = tmp_path / "results"
    status = adopt.main(["--work", str(tmp_path / "work"), "--out", str(out), "--threads", str(threads), *more])
    (path,) = out.iterdir()
    assert path.name.startswith("adopt_")
    return status, json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("met", "status"), [(True, 0), (None, 0), (False, 1)])
def test_the_status_says_whether_a_target_was_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, met: bool | None, status: int
) -> None:
    found, written = run(tmp_path, monkeypatch, {"one": Counted(), "two": Counted(met)})
    assert found == status
    assert [row["row"] for row in written["rows"]] == ["one", "two"]


def test_rows_can_be_chosen_and_a_missing_package_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(job: Any) -> Any:
        raise InputError("could not be fetched")

    one = Counted()
    status, written = run(tmp_path, monkeypatch, {"one": one, "two": without}, "two")
    assert (status, one.times) == (0, 0)
    assert written["rows"][0]["targets"][0]["how"] == "could not be fetched"
    assert "not measured" in capsys.readouterr().out


def test_a_row_that_is_refused_is_missed_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(job: Any) -> Any:
        raise OptionError("another checkpoint")

    status, written = run(tmp_path, monkeypatch, {"one": refused, "two": Counted()})
    assert status == 1
    assert [row["targets"][0]["met"] for row in written["rows"]] == [False, True]


def test_digests_tell_weights_and_batches_apart() -> None:
    model = nn.Linear(3, 2)
    before = job_module.weights_digest(model)
    assert job_module.weights_digest(model) == before
    with torch.no_grad():
        model.bias[0] += 1e-3
    assert job_module.weights_digest(model) != before
    x = torch.arange(4)
    assert job_module.digest([{"a": x}]) != job_module.digest([{"b": x}])
    assert job_module.digest([{"a": x}, {"a": x}]) != job_module.digest([{"a": x}])
