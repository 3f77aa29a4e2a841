"""``maclin diagnose`` on a tiny model."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

Cli = Callable[..., tuple[int, str, str]]


def test_it_prints_a_table_per_layer_and_writes_json(given: tuple[Path, Path], run_cli: Cli, tmp_path: Path) -> None:
    model, data = map(str, given)
    options = ["--option", "ppsbn=false", "--option", "num_features=20", "--out", str(tmp_path / "new" / "d.json")]
    status, out, err = run_cli("diagnose", model, "--data", data, *options)
    assert (status, err) == (0, "")
    written = json.loads((tmp_path / "new" / "d.json").read_text())
    assert list(written) == [f"encoder.layer.{i}.attention.self" for i in range(2)]
    assert all(name in out for name in written)
    assert all(len(found["heads"]) == 4 and found["config"]["ppsbn"] is False for found in written.values())
    assert all(found["num_sequences"] == 4 and found["num_features"] <= 20 for found in written.values())
    status, out, _ = run_cli("diagnose", model, "--data", data, "--layer", "1", "--mechanism", "elu", "--json")
    assert status == 0
    assert list(json.loads(out)) == ["encoder.layer.1.attention.self"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--option", "ppsbn"], 2, "KEY=VALUE"),
        (["--option", "window=3"], 2, "no option 'window'"),
        (["--mechanism", "lineer"], 2, "known are"),
        (["--layer", "9"], 1, "0 to 1"),
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
    got, _, err = run_cli("diagnose", str(given[0]), "--data", str(given[1]), *arguments)
    assert (got, message in err, err.count("\n")) == (status, True, 1), err
    assert (tmp_path / "there.json").read_text() == "mine"
