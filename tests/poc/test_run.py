from pathlib import Path
from typing import Any

import pytest
import torch

from maclin.adopt import Step, load
from maclin.core import mechanisms
from maclin.core.errors import CapabilityError, InputError, OptionError
from maclin.poc import ProofOfConcept, run
from maclin.poc import frontier as frontier_of
from maclin.progress import Silent
from maclin.records import Report, from_json, to_json
from maclin.report import decide, render_html, render_markdown


class Listener:
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.finished = 0

    def start(self, step: str, total: int | None) -> None:
        self.steps.append(step)

    def advance(self, text: str = "") -> None:
        pass

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(scope="module")
def listener() -> Listener:
    return Listener()


@pytest.fixture(scope="module")
def report(model_dir: Path, data_dir: Path, listener: Listener) -> Report:
    job = ProofOfConcept(model=model_dir, data=[data_dir], lengths=(16, 128), tolerance=0.3, seconds_per_point=0.01)
    return run(job, listener)


def test_every_part_of_the_report_is_there(report: Report, listener: Listener) -> None:
    assert report.model.num_layers == len(report.audit.layers) == len(report.plan.rows) == 2
    assert report.data.num_calibration_documents + report.data.num_held_out_documents == 18
    assert len(report.data.document_tokens) == 18
    assert max(report.data.document_tokens) == 64
    assert list(report.seconds) == listener.steps
    assert listener.finished == len(listener.steps)
    assert from_json(Report, to_json(report)) == report
    for row in report.audit.layers:
        assert row.layer in render_html(report)
        assert row.layer in render_markdown(report)


def test_every_configuration_has_its_column(report: Report) -> None:
    text = render_markdown(report)
    assert "macformer (ppsbn=false, num_features=32)" in text
    assert "not audited" not in text
    (error,) = [e for e in report.audit.layers[0].errors if e.asked == {"ppsbn": False, "num_features": 32}]
    row = next(line for line in text.splitlines() if line.startswith(f"| {report.audit.layers[0].layer}"))
    assert f"{error.rel_error:.3f}" in row


def test_the_conversion_is_proved_on_the_model_itself(report: Report) -> None:
    assert report.host_check_max_abs_error is not None
    assert report.host_check_max_abs_error < 1e-5
    assert report.restore_is_bit_equal is True
    assert report.warnings == report.audit.warnings  # none about the conversion


def test_the_frontier_runs_from_the_original_to_all_linear(report: Report) -> None:
    assert [point.num_linear for point in report.frontier] == [0, 1, 2]
    assert report.frontier[0].cosine_mean == pytest.approx(1.0, abs=1e-12)
    assert report.frontier[0].neighbour_agreement == 1.0
    assert set(report.frontier[2].linear_layers) == {row.layer for row in report.audit.layers}
    assert all(point.length == 64 and point.latency_ms and point.peak_bytes for point in report.frontier)
    audited = report.audit.num_documents + report.audit.num_calibration_documents
    assert audited == report.data.num_calibration_documents  # and no document that the frontier is measured on
    assert report.audit.num_calibration_documents == 3
    last = report.frontier[2]
    least = [
        next(
            e.rel_error
            for e in report.audit.layer(layer).errors
            if (e.mechanism, e.config) == (mechanism, config) and e.rel_error is not None
        )
        for layer, mechanism, config in zip(last.linear_layers, last.mechanisms, last.configs, strict=True)
    ]
    assert least == sorted(least)


def test_attention_is_timed_at_every_length_and_the_model_up_to_its_limit(report: Report) -> None:
    attention = {(t.subject, t.length) for t in report.timings if t.scope == "attention"}
    assert {("softmax", 16), ("softmax", 128), ("macformer", 128)} <= attention
    model = [(t.subject, t.length, t.num_linear is None) for t in report.timings if t.scope == "model"]
    assert model == [("original", 16, True), ("converted", 16, False), ("original", 64, True), ("converted", 64, False)]
    assert all(t.latency_ms is not None or t.reason for t in report.timings)


def test_the_verdict_is_the_rule_applied_to_the_numbers(report: Report) -> None:
    again = decide(report.frontier, report.timings, report.break_even, report.plan, report.model)
    assert report.verdict == again


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored_after_the_frontier(model_dir: Path, fails: bool, monkeypatch: Any) -> None:
    loaded = load(model_dir)
    texts = ["a b c d", "b c d e f", "a a a b h"]
    original = loaded.encode(texts)
    steps = [Step("encoder.layer.1.attention.self", "window", {"window": 2}, 0.1)]
    ready = {steps[0].layer: mechanisms.mechanism("window", head_dim=8, num_heads=4, window=2)}
    arguments: dict[str, Any] = {"length": 8, "device": "cpu", "seconds_per_point": 0.01, "progress": Silent()}
    if fails:
        monkeypatch.setattr(frontier_of, "interleaved", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            frontier_of.measure_frontier(loaded, steps, ready, texts, original, **arguments)
    else:
        points = frontier_of.measure_frontier(loaded, steps, ready, texts, original, **arguments)
        assert points[1].cosine_mean < 1.0
        assert [point.configs for point in points] == [(), ({"window": 2},)]
    assert not loaded.converted
    assert torch.equal(loaded.encode(texts), original)


def test_a_document_of_any_length_can_be_made(model_dir: Path) -> None:
    loaded = load(model_dir)
    for length in (2, 30, 64):
        batch = frontier_of.document_of(loaded, ["a b c", "d"], length)
        assert batch["input_ids"].shape == (1, length)
        assert bool(batch["attention_mask"].all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance between 0 and 1"),
        ({"tolerance": 1.5}, "tolerance between 0 and 1"),
        ({"lengths": ()}, "lengths of at least 1"),
        ({"lengths": (0, 8)}, "lengths of at least 1"),
        ({"max_documents": 1}, "at least 2 documents"),
        ({"seconds_per_point": 0.0}, "positive time"),
    ],
)
def test_options_are_refused_before_any_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ProofOfConcept(**options)


@pytest.mark.parametrize("device", ["gpu", "cuda:99" if not torch.cuda.is_available() else "xyz"])
def test_a_device_that_is_not_there_is_refused(model_dir: Path, device: str) -> None:
    with pytest.raises(OptionError, match="cpu"):
        run(ProofOfConcept(model=model_dir, device=device))


def test_one_document_is_not_enough(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("a b c")
    with pytest.raises(InputError, match="at least 2 documents"):
        run(ProofOfConcept(model=model_dir, data=[tmp_path]))


def test_a_model_whose_attention_cannot_be_replaced_is_refused(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import MistralConfig, MistralModel

    config = MistralConfig(
        vocab_size=10,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    MistralModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir / name, tmp_path)
    with pytest.raises(CapabilityError, match="sliding window"):
        run(ProofOfConcept(model=tmp_path, data=[data_dir], lengths=(16,), seconds_per_point=0.01))
