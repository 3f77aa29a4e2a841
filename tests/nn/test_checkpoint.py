"""Saving and loading: everything comes back, nothing is lost, and what does not fit is said."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import maclin
from maclin.nn import (
    MacformerClassifier,
    MacformerConfig,
    MacformerLM,
    MacformerMatcher,
    MacformerModel,
    MacformerRegressor,
    MacformerSeq2Seq,
    MacformerTagger,
    calibrate_,
    checkpoint,
)

X = torch.randint(1, 20, (8, 24), generator=torch.Generator().manual_seed(0))


def config(mechanism: Any = "macformer", **options: Any) -> MacformerConfig:
    sizes = {"vocab_size": 20, "embed_dim": 16, "ff_dim": 24, "max_length": 24}
    return MacformerConfig(**{**sizes, "mechanism": mechanism, **options})


def logits(model: MacformerModel) -> Tensor:
    with torch.no_grad():
        pairs = isinstance(model, MacformerMatcher | MacformerSeq2Seq)
        return model(*((X, X) if pairs else (X,))).logits


@pytest.mark.parametrize(
    "build",
    [MacformerClassifier, MacformerTagger, MacformerRegressor, MacformerMatcher, MacformerLM, MacformerSeq2Seq],
)
def test_every_model_comes_back(build: type[MacformerModel], tmp_path: Path) -> None:
    model = build(config(tie_embeddings=build is MacformerLM))
    assert model.save_pretrained(tmp_path / "new" / "directory") == tmp_path / "new" / "directory"
    again = build.from_pretrained(tmp_path / "new" / "directory")
    assert type(again) is build
    assert not again.training
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model.eval()))
    assert sorted(p.name for p in (tmp_path / "new" / "directory").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", maclin.mechanisms.names())
def test_every_mechanism_comes_back(name: str, tmp_path: Path) -> None:
    model = MacformerClassifier(config(name)).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(MacformerClassifier.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "published"},
        {"estimator": "kar_karnick", "kernel": "inv"},
        {"unbiased": True},
        {"ppsbn": "batch"},
        {"ppsbn": False, "estimator": "taylor"},
    ],
)
def test_every_estimator_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = MacformerClassifier(config(options=options))
    model(X)  # running statistics move
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(MacformerClassifier.from_pretrained(tmp_path)), logits(model.eval()))


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (MacformerClassifier, {"num_features": "auto", "tolerance": 0.05}),
        (MacformerLM, {"num_features": 14}),
        (MacformerSeq2Seq, {"num_features": 14, "kernel": "inv"}),
    ],
)
def test_calibrated_mechanisms_come_back(build: type[MacformerModel], size: dict[str, Any], tmp_path: Path) -> None:
    model = build(config(options={"temperature": "learned", **size}, num_layers=1)).eval()
    fresh = logits(model)
    batch = {"source": X, "target": X} if build is MacformerSeq2Seq else {"x": X}
    assert calibrate_(model, [batch]) is model
    for name, attention in model.attentions():
        assert getattr(attention.mechanism, "calibration", None) is not None, name
    assert not torch.allclose(logits(model), fresh, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(build.from_pretrained(tmp_path)), logits(model))


def test_replaced_mechanisms_come_back(tmp_path: Path) -> None:
    model = MacformerClassifier(config("softmax")).eval()
    _, attention = list(model.attentions())[1]
    attention.mechanism = maclin.mechanism("favor", head_dim=8, num_heads=2, num_features=16)
    model.save_pretrained(tmp_path)
    again = MacformerClassifier.from_pretrained(tmp_path)
    assert [a.mechanism.name for _, a in again.attentions()] == ["softmax", "favor"]
    assert torch.equal(logits(again), logits(model))


def test_shared_projections_stay_shared(tmp_path: Path) -> None:
    model = MacformerClassifier(config("linformer", options={"sharing": "layerwise", "proj_len": 4})).eval()
    model.save_pretrained(tmp_path)
    again = MacformerClassifier.from_pretrained(tmp_path)
    first, second = (attention.mechanism for _, attention in again.attentions())
    assert first.E is second.E
    assert torch.equal(logits(again), logits(model))


def test_half_precision_comes_back(tmp_path: Path) -> None:
    model = MacformerClassifier(config("elu")).bfloat16().eval()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["head.weight"].dtype == torch.bfloat16
    assert torch.equal(logits(MacformerClassifier.from_pretrained(tmp_path).bfloat16()), logits(model))


def test_another_configuration_is_said(tmp_path: Path) -> None:
    MacformerClassifier(config()).save_pretrained(tmp_path)
    MacformerClassifier.from_pretrained(tmp_path, config=config())
    with pytest.raises(maclin.InputError, match="another configuration: embed_dim: 16 saved, 32 given"):
        MacformerClassifier.from_pretrained(tmp_path, config=config(embed_dim=32))
    with pytest.raises(maclin.InputError, match=r"holds a MacformerClassifier, wanted a MacformerLM; load it with"):
        MacformerLM.from_pretrained(tmp_path)


def test_files_of_two_models_are_told_apart(tmp_path: Path) -> None:
    MacformerClassifier(config()).save_pretrained(tmp_path / "a")
    MacformerClassifier(config(num_layers=3)).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").replace(tmp_path / "a" / "config.json")
    with pytest.raises(maclin.InputError, match=r"config.num_layers: 2 saved, 3 given.*Remove config.json"):
        MacformerClassifier.from_pretrained(tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    assert MacformerClassifier.from_pretrained(tmp_path / "a").config.num_layers == 2


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    MacformerClassifier(config("elu")).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    text = (tmp_path / "config.json").read_text().strip()
    tensors = load_file(path)
    tensors["head.weight"] = tensors["head.weight"][:1]
    del tensors["head.bias"]
    tensors["other"] = torch.zeros(2)
    save_file(tensors, path, metadata={"maclin": text})
    with pytest.raises(maclin.InputError, match=r'(?s)"head.bias".*"other".*head.weight.*\[1, 16\]'):
        MacformerClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"not tensors"), "damaged or no safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), "damaged"),
        (lambda d: save_file({"x": torch.zeros(1)}, d / "model.safetensors"), "not written by maclin"),
        (lambda d: (d / "config.json").write_text("{"), "is no JSON"),
        (lambda d: (d / "config.json").write_text(json.dumps({"model": "x"})), "they differ in model"),
    ],
)
def test_damaged_checkpoints_are_said(spoil: Any, words: str, tmp_path: Path) -> None:
    MacformerClassifier(config("elu")).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(maclin.InputError, match=words):
        MacformerClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("failing", ["weights", "config", "sync", "rename"])
def test_a_failing_disk_keeps_the_last_checkpoint(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = MacformerClassifier(config("elu")).eval()
    good.save_pretrained(tmp_path)

    def full(*args: Any, **options: Any) -> None:
        if failing == "weights":
            Path(args[1]).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        where: tuple[Any, str] = {
            "weights": (checkpoint, "save_file"),
            "config": (Path, "write_text"),
            "sync": (os, "fsync"),
            "rename": (os, "replace"),
        }[failing]
        patch.setattr(where[0], where[1], full)
        with pytest.raises(OSError, match="No space left"):
            MacformerClassifier(config("favor")).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"], "nothing is left behind"
    assert torch.equal(logits(MacformerClassifier.from_pretrained(tmp_path)), logits(good))


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(maclin.InputError, match="is a file; choose another"):
        MacformerClassifier(config("elu")).save_pretrained(tmp_path / "model")


def test_a_kernel_of_ones_own_cannot_be_saved_by_name(tmp_path: Path) -> None:
    model = MacformerClassifier(config("softmax"))
    kernel = maclin.Kernel("mine", lambda n: 1.0 if n < 3 else 0.0)
    for _, attention in model.attentions():
        attention.mechanism = maclin.mechanism("taylor", head_dim=8, num_heads=2, kernel=kernel)
    with pytest.raises(maclin.OptionError, match="kernel 'mine', which only this program knows"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_calibration_needs_batches() -> None:
    model = MacformerClassifier(config())
    with pytest.raises(maclin.InputError, match="was not called on any batch"):
        calibrate_(model, [])
    with pytest.raises(maclin.InputError, match=r"attention 'encoder.stack.layers.0.self_attn': "):
        calibrate_(model, [{"x": X[:, :1]}])


def test_calibration_sees_what_each_attention_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int, bool]] = []

    def spy(mechanism: maclin.Mechanism, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, is_causal: bool) -> Any:
        seen.append((q.shape[2], k.shape[2], int(mask.sum()), is_causal))
        return mechanism

    monkeypatch.setattr("maclin.nn.calibrate.calibrate", spy)
    mask = torch.ones(4, 24, dtype=torch.bool)
    mask[:, 20:] = False
    batches = [
        {"source": X[:4], "target": X[:4, :11], "source_mask": mask},
        {"source": X[:, :19], "target": X[:, :13]},
        {"source": X, "target": X},
    ]
    calibrate_(MacformerSeq2Seq(config(num_layers=1)), batches)
    # 4 sequences of 20 tokens, 8 of 19, and 4 of the 8 of 24, as 16 are enough; queries of another sequence are cut
    assert seen == [
        (24, 24, 4 * 20 + 8 * 19 + 4 * 24, False),
        (24, 24, 4 * 11 + 8 * 13 + 4 * 24, True),
        (11, 24, 4 * 20 + 8 * 19 + 4 * 24, False),
    ]


def test_calibration_takes_batches_of_different_lengths() -> None:
    model = MacformerSeq2Seq(config(num_layers=1))
    mask = torch.ones(4, 24, dtype=torch.bool)
    mask[:, 20:] = False
    calibrate_(
        model, [{"source": X[:4], "target": X[:4, :11], "source_mask": mask}, {"source": X[:, :19], "target": X}]
    )
    assert model.training
    assert all(attention.mechanism.training for _, attention in model.attentions())
