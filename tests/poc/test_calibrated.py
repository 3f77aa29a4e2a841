"""A frontier of calibrated mechanisms: taught on the calibration documents only."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from maclin.adopt import Loaded, audit, calibrated_layers, load
from maclin.core import mechanisms
from maclin.poc import ProofOfConcept, run
from maclin.report import render_html, render_markdown

RAW = ("macformer", {"ppsbn": False, "num_features": 20})


def test_only_calibration_documents_teach(model_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("maclin.poc.run")
    taught_on: list[int] = []

    def only_raw(*arguments: Any, **options: Any) -> Any:
        return audit(*arguments, mechanisms=[RAW], **options)

    def watched(model: Any, choices: Any, batches: Any) -> Any:
        taught_on.extend(int(batch["attention_mask"].sum()) for batch in batches)
        ready = calibrated_layers(model, choices, batches)
        assert all(isinstance(m, mechanisms.Mechanism) and m.config["centred"] for m in ready.values())
        return ready

    monkeypatch.setattr(module, "audit", only_raw)
    monkeypatch.setattr(module, "calibrated_layers", watched)
    job = ProofOfConcept(model=model_dir, data=[data_dir], lengths=(16,), tolerance=0.9, seconds_per_point=0.01)
    report = run(job)
    assert sum(taught_on) == report.data.num_calibration_tokens
    assert report.frontier[2].mechanisms == ("macformer", "macformer")
    assert all(config["counts"][:2] == [1, 8] for config in report.frontier[2].configs)
    shown = "+".join(map(str, report.frontier[2].configs[-1]["counts"]))
    for text in (render_html(report), render_markdown(report)):
        assert f"counts={shown}" in text
        assert "calibrated on 3 other documents" in text


def test_the_model_stays_as_it_was(model_dir: Path) -> None:
    loaded: Loaded = load(model_dir)
    texts = ["a b c d e f g h " * 3] * 3
    before = loaded.encode(texts)
    layer = "encoder.layer.0.attention.self"
    ready = calibrated_layers(loaded.model, {layer: RAW}, loaded.tokenize(texts))
    assert isinstance(ready[layer], mechanisms.Mechanism)
    assert torch.equal(loaded.encode(texts), before)
