"""``maclin heal`` on a tiny model."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

for library in ("transformers", "accelerate"):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}", allow_module_level=True)

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def given(
    given: tuple[Path, Path], write_documents: Callable[[Path, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """With so many documents that some can be held out."""
    return given[0], write_documents(tmp_path_factory.mktemp("data"), 10)


OPTIONS = [
    "--option",
    "window=2",
    "--option",
    "linear=hedgehog",
    "--option",
    'linear_options={"num_features": 8}',
    "--steps",
    "2",
    "--batch-size",
    "4",
]


def test_it_writes_a_model_and_a_report(given: tuple[Path, Path], run_cli: Cli, tmp_path: Path) -> None:
    import torch

    from maclin.adopt import load_converted
    from maclin.records import HealResult
    from maclin.report import load_heal

    model, data = map(str, given)
    out = tmp_path / "out"
    status, printed, err = run_cli("heal", model, "--data", data, *OPTIONS, "--layer", "1", "--out", str(out))
    assert status == 0, err
    assert "held-out" in printed
    result = load_heal(out / "heal.json")
    assert isinstance(result, HealResult)
    assert [row.layer for row in result.layers] == ["encoder.layer.1.attention.self"]
    assert result.environment is not None
    assert result.drift is not None
    assert result.drift.unknown_share == 0.0
    assert sorted(path.name for path in out.iterdir()) == ["heal.html", "heal.json", "heal.md", "model"]
    healed = load_converted(out / "model")
    ids = torch.tensor([[2, 3, 4, 5, 6]])
    with torch.no_grad():
        assert bool(healed(input_ids=ids).last_hidden_state.isfinite().all())
    status, printed, _ = run_cli("heal", model, "--data", data, *OPTIONS, "--out", str(out), "--force", "--json")
    assert status == 0
    assert len(json.loads(printed)["layers"]) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--option", "window"], 2, "KEY=VALUE"),
        (["--mechanism", "hybird"], 2, "known are"),
        (["--layer", "9"], 1, "encoder.layer.0"),
        (["--train", "most"], 2, "'features'"),
        (["--minutes", "0"], 2, "positive"),
        (["--plan", "none.json"], 1, "none.json"),
        (["--plan", "none.json", "--layer", "1"], 2, "--plan"),
        (["--out", "there"], 2, "--force"),
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
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "heal.json").write_text("mine")
    got, _, err = run_cli("heal", str(given[0]), "--data", str(given[1]), *arguments, "-q")
    assert (got, message in err, err.count("\n")) == (status, True, 1), err
    assert (tmp_path / "there" / "heal.json").read_text() == "mine"
