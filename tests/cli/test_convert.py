"""``maclin convert`` on tiny models: what it writes is what convert_ makes, and nothing is written by halves."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

from maclin.adopt import convert_, load, load_converted, save_plan
from maclin.records import Plan, PlanRow

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def encoder(given: tuple[Path, Path]) -> Path:
    return given[0]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, save_tiny: Callable[[Path, str], Path]) -> Path:
    return save_tiny(tmp_path_factory.mktemp("decoder"), "LlamaForCausalLM")


@pytest.fixture(scope="module")
def texts(given: tuple[Path, Path]) -> list[str]:
    return [str(path) for path in sorted(given[1].iterdir())]


def listed(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_it_saves_what_convert_makes(encoder: Path, run_cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "new" / "one"
    options = ["--mechanism", "window", "--option", "window=3", "--out", str(out)]
    status, printed, _ = run_cli("convert", str(encoder), *options)
    assert status == 0
    assert "encoder.layer.1.attention.self: window" in printed
    assert f"maclin.load_converted('{out}')" in printed
    model = load(encoder).model
    convert_(model, "window", window=3)
    ids = torch.randint(0, 10, (2, 20))
    with torch.no_grad():
        assert torch.equal(load_converted(out)(ids).last_hidden_state, model(ids).last_hidden_state)
    assert {"tokenizer.json", "tokenizer_config.json", "maclin.json"} <= listed(out)


def test_a_decoder_keeps_its_head_and_generates(decoder: Path, run_cli: Cli, tmp_path: Path) -> None:
    rows = tuple(
        PlanRow(name, mechanism, config, None, "", None, {}, None, num_heads=4, head_dim=8)
        for name, mechanism, config in (("layers.0.self_attn", "softmax", {}), ("layers.1.self_attn", "elu", {}))
    )
    save_plan(Plan(0.1, 64, rows, "LlamaModel"), tmp_path / "plan.json")  # as an audit of the model without head gives
    options = ["--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out"), "--json"]
    status, printed, err = run_cli("convert", str(decoder), *options)
    assert (status, err) == (0, "")
    assert json.loads(printed)["layers"] == {"model.layers.1.self_attn": "elu"}
    model: Any = load_converted(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = torch.randint(2, 10, (2, 9))
    with_state, without = (model.generate(ids, max_new_tokens=5, use_cache=use) for use in (True, False))
    assert torch.equal(with_state, without)


def test_documents_calibrate(encoder: Path, run_cli: Cli, tmp_path: Path, texts: list[str]) -> None:
    options = ["--mechanism", "macformer", "--option", "ppsbn=false", "--option", "num_features=auto", "--layer", "1"]
    options += ["--option", "tolerance=0.5", "--out", str(tmp_path / "one"), "--quiet"]
    assert run_cli("convert", str(encoder), *options, "--documents", *texts) == (0, "", "")
    (row,) = json.loads((tmp_path / "one" / "maclin.json").read_text())["layers"]
    assert row["layer"] == "encoder.layer.1.attention.self"
    assert isinstance(row["config"]["num_features"], int)
    load_converted(tmp_path / "one")
    # a plan holds what calibration chose, and not what it learned
    layers = [f"encoder.layer.{number}.attention.self" for number in range(2)]
    rows = (
        PlanRow(layers[0], "softmax", {}, None, "", None, {}, None),
        PlanRow(layers[1], "macformer", row["config"], None, "", None, {}, None),
    )
    save_plan(Plan(0.1, 64, rows, "BertModel"), tmp_path / "plan.json")
    options = ["--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "two"), "--quiet"]
    status, _, err = run_cli("convert", str(encoder), *options)
    assert status == 2
    assert "name them with --documents FILES" in err
    assert not (tmp_path / "two").exists()
    assert run_cli("convert", str(encoder), *options, "--documents", *texts) == (0, "", "")


def test_it_replaces_an_earlier_model_only_if_told(encoder: Path, run_cli: Cli, tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--quiet"]
    assert run_cli("convert", str(encoder), "--mechanism", "elu", *options)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    status, _, err = run_cli("convert", str(encoder), "--mechanism", "favor", *options)
    assert status == 2
    assert "already holds maclin.json" in err
    assert "--force" in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run_cli("convert", str(encoder), "--mechanism", "favor", *options, "--force")[0] == 0
    assert {row["mechanism"] for row in json.loads((tmp_path / "maclin.json").read_text())["layers"]} == {"favor"}


def test_wrong_calls_say_what_to_do(
    encoder: Path, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--out", str(tmp_path / "out")]
    for arguments, status, message in (
        ([], 2, "wanted either --plan FILE or --mechanism NAME"),
        (["--mechanism", "elu", "--plan", "p.json"], 2, "wanted either --plan"),
        (["--plan", "p.json", "--layer", "0"], 2, "leave out --option and --layer"),
        (["--plan", "p.json"], 1, "cannot read a plan from p.json"),
        (["--mechanism", "nonsense"], 2, "unknown mechanism 'nonsense'"),
        (["--mechanism", "elu", "--layer", "7"], 1, "no attention layer '7'"),
    ):
        found, printed, err = run_cli("convert", str(encoder), *arguments, *out)
        assert (found, printed) == (status, "")
        assert message in err
    assert not (tmp_path / "out").exists()

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("maclin.adopt.saving.files.save_file", interrupt)
    status, _, err = run_cli("convert", str(encoder), "--mechanism", "elu", "--quiet", *out)
    assert status == 130
    assert "interrupted; nothing was written" in err
    assert not (tmp_path / "out").exists()
