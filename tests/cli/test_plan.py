"""``maclin plan`` on a tiny model, and the report of a plan per head."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

from maclin.adopt import load_plan
from maclin.records import Audit, from_json

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACLIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_the_plan_is_written_and_shown(
    given: tuple[Path, Path], run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [("window", {"window": 4}), ("elu", {}), ("efficient", {})]
    monkeypatch.setattr("maclin.poc.planning.plan_candidates", lambda *_: few)
    model, data = map(str, given)
    out, seen = tmp_path / "new" / "plan.json", tmp_path / "audit.json"
    options = ["--min-layers", "1", "--per-head", "--out", str(out), "--audit", str(seen)]
    status, printed, _ = run_cli("plan", model, "--data", data, *options)
    plan = load_plan(out)
    assert status == 0
    assert (len(plan.rows), plan.audited, plan.costs) == (2, "BertModel", "measured")
    assert sum(row.is_linear for row in plan.rows) >= 1
    assert plan.model_ms is not None
    assert plan.predicts_output
    assert all(row.layer in printed for row in plan.rows)
    assert "speed-up" in printed
    assert len(from_json(Audit, seen.read_text()).layers) == 2
    status, printed, _ = run_cli(
        "plan", model, "--data", data, "--length", "100000", "--costs", "operations", "--speedup", "20", "--json",
        "--out", str(out), "--force",
    )  # fmt: skip
    assert status == 0
    assert json.loads(printed)["speedup"] == 20
    assert (load_plan(out).attention_speedup or 0) >= 20


def test_mechanisms_are_tried_in_each_layer(
    given: tuple[Path, Path], run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maclin.poc.planning.plan_candidates", lambda *_: [("window", {"window": 4}), ("elu", {})])
    out, seen = tmp_path / "plan.json", tmp_path / "audit.json"
    options = ["--try-each", "--min-layers", "1", "--costs", "operations", "--out", str(out), "--audit", str(seen)]
    code, _, err = run_cli("plan", str(given[0]), "--data", str(given[1]), *options)
    assert code == 0, err
    changes = [e.output_change for row in from_json(Audit, seen.read_text()).layers for e in row.errors]
    assert len(changes) == 4
    assert all(change is not None and change > 0 for change in changes)
    # one layer has to change: the one that the output notices least
    assert load_plan(out).rel_error == pytest.approx(min(filter(None, changes)) ** 0.5)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--speedup", "0.5"], 2, "above 1"),
        (["--tolerance", "3"], 2, "between 0 and 1"),
        (["--of", "all"], 2, "of attention or of the model"),
        (["--of", "model", "--speedup", "2", "--costs", "operations"], 2, "needs measured costs"),
        (["--of", "model", "--speedup", "2", "--length", "100"], 2, "takes 64"),
        (["--costs", "guessed"], 2, "measured or operations"),
        (["--length", "0"], 2, "at least 1 token"),
        (["--max-documents", "0"], 2, "at least 1 document"),
        (["--device", "toaster"], 2, "got 'toaster'"),
        (["--out", "there.json"], 2, "--force"),
    ],
)
def test_bad_calls_get_one_sentence(
    given: tuple[Path, Path],
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("mine")
    got, _, err = run_cli("plan", str(given[0]), "--data", str(given[1]), "--quiet", *arguments)
    assert (got, message in err, err.count("\n")) == (status, True, 1), err
    assert not (tmp_path / "plan.json").exists()
    assert (tmp_path / "there.json").read_text() == "mine"
