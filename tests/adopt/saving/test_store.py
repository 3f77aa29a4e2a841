"""Converted models on disk: the same outputs to the bit, and nothing half-written or believed unseen."""

import errno
import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers")

from transformers import AutoTokenizer, BertTokenizer

from maclin.adopt import convert_, load_converted, restore_, save_converted
from maclin.adopt.hosts.cache import StateLayer
from maclin.core import mechanisms
from maclin.core.errors import InputError, MaclinError
from maclin.core.mechanisms.elu import Elu

MODELS = ["bert", "roberta", "distilbert", "albert", "vit", "gpt2", "llama", "bart"]
MANIFEST = "maclin.json"


def batch_for(tiny: Any, name: str) -> dict[str, torch.Tensor]:
    return tiny.images() if name == "vit" else tiny.batch((9, 9) if name == "bart" else (11, 5, 8))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_in(folder: Path) -> Path:
    (found,) = folder.glob("weights-*.safetensors")
    return found


class Plain(nn.Module):
    """A module of somebody's own, with torch's attention inside and a tied weight."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, width)
        layer = nn.TransformerEncoderLayer(width, heads, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, 30, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(5), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(ids)))


class Around(nn.Module):
    """A module of somebody's own with a transformers model inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: torch.Tensor) -> Any:
        return self.inner(**batch)


@pytest.mark.parametrize("name", MODELS)
def test_loaded_is_bit_equal(tiny: Any, tmp_path: Path, name: str) -> None:
    model, batch = tiny.make(name), batch_for(tiny, name)
    original = tiny.hidden(model, batch)
    convert_(model, "favor", generator=torch.Generator().manual_seed(7))
    wanted = tiny.hidden(model, batch)
    save_converted(model, tmp_path / "deep" / "saved")
    state = torch.get_rng_state()
    loaded = load_converted(tmp_path / "deep" / "saved")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tiny.hidden(loaded, batch), wanted)
    assert type(loaded) is type(model)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert not loaded.training
    restore_(loaded)
    assert torch.equal(tiny.hidden(loaded, batch), original)
    assert loaded.config._attn_implementation == "sdpa"  # pyright: ignore


@pytest.mark.parametrize("mechanism", [row for row in mechanisms.names() if mechanisms.row(row).causal])
def test_every_mechanism_comes_back(tiny: Any, tmp_path: Path, mechanism: str) -> None:
    model, batch = tiny.make("llama"), tiny.batch()
    convert_(model, {"layers.1.self_attn": mechanism}, generator=torch.Generator().manual_seed(3))
    save_converted(model, tmp_path)
    loaded = load_converted(tmp_path)
    assert torch.equal(tiny.hidden(loaded, batch), tiny.hidden(model, batch))
    past = loaded(**batch, use_cache=True).past_key_values
    assert isinstance(past.layers[1], StateLayer) == (mechanism != "softmax")


def test_what_was_learned_from_data_comes_back(tiny: Any, tmp_path: Path) -> None:
    model, batch = tiny.make("bert"), tiny.batch((30, 30, 30, 20))
    convert_(
        model, "macformer", ppsbn=False, num_features=16, batches=[tiny.batch((40, 40, 38), seed=s) for s in (1, 2)]
    )
    trained = next(m for m in model.modules() if isinstance(m, mechanisms.Mechanism))
    save_converted(model, tmp_path)
    loaded = load_converted(tmp_path)
    assert torch.equal(tiny.hidden(loaded, batch), tiny.hidden(model, batch))
    row = json.loads((tmp_path / MANIFEST).read_text())["layers"][0]
    assert row["layer"] == "encoder.layer.0.attention.self"
    assert row["config"] == json.loads(json.dumps(trained.config))
    assert row["shapes"] == {key: list(x.shape) for key, x in trained.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_come_back(tiny: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    model, batch = tiny.make("llama").to(dtype), tiny.batch()
    convert_(model, "macformer")
    save_converted(model, tmp_path)
    loaded = load_converted(tmp_path)
    assert {key: x.dtype for key, x in loaded.state_dict().items()} == {
        key: x.dtype for key, x in model.state_dict().items()
    }
    assert torch.equal(tiny.hidden(loaded, batch), tiny.hidden(model, batch))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, tie_word_embeddings=True)).eval()
    convert_(model, "elu")
    model.generation_config.top_k = 7
    save_converted(model, tmp_path)
    assert "lm_head.weight" not in load_file(weights_in(tmp_path))
    assert weights_in(tmp_path).stat().st_mode == (tmp_path / MANIFEST).stat().st_mode
    loaded: Any = load_converted(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.top_k == 7
    ids = torch.randint(0, 50, (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_model_is_given_where_none_can_be_rebuilt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Plain().eval(), torch.randint(0, 30, (2, 12))
    batch = {"ids": ids}
    convert_(model, "favor", batch=batch)
    model.get_buffer("steps").add_(3)
    with torch.no_grad():
        wanted = model(ids)
    save_converted(model, tmp_path)
    with pytest.raises(InputError, match=r"a Plain \(torch.nn\) cannot be rebuilt.*pass model="):
        load_converted(tmp_path)
    torch.manual_seed(1)
    other = Plain()
    loaded = load_converted(tmp_path, other)
    assert loaded is other
    with torch.no_grad():
        assert torch.equal(other(ids), wanted)
    assert other.head.weight is other.embed.weight
    assert other.get_buffer("steps").tolist() == [3, 4, 5, 6, 7]
    restore_(model)
    restore_(other)
    with torch.no_grad():
        assert torch.equal(other(ids), model(ids))


def test_a_model_around_a_model(tiny: Any, tmp_path: Path) -> None:
    model, batch = Around(tiny.make("bert")), tiny.batch()
    convert_(model, "window", window=3)
    save_converted(model, tmp_path)
    fresh = Around(tiny.make("bert"))
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    load_converted(tmp_path, fresh)
    assert torch.equal(tiny.hidden(fresh, batch), tiny.hidden(model, batch))
    with pytest.raises(InputError, match=r"a Around \(transformers\), got a BertModel"):
        load_converted(tmp_path, tiny.make("bert"))


def test_nothing_is_unpickled(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make("llama")
    convert_(model, "macformer")
    save_converted(model, tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    load_converted(tmp_path)


def test_a_tokenizer_comes_along(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "there"]))
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    model = tiny.make("bert")
    convert_(model, "elu")
    save_converted(model, tmp_path / "one", tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "one", local_files_only=True)
    assert again("hello there").input_ids == tokenizer("hello there").input_ids
    save_converted(model, tmp_path / "two", tmp_path / "one")
    names = {name for name in files(tmp_path / "one") if name.startswith("tokenizer")}
    assert names
    assert names <= set(files(tmp_path / "two"))
    load_converted(tmp_path / "two")
    save_converted(model, tmp_path / "two")  # without it: nothing of the earlier model stays
    assert set(files(tmp_path / "two")) == {MANIFEST, weights_in(tmp_path / "two").name}
    with pytest.raises(InputError, match="save_pretrained"):
        save_converted(model, tmp_path / "two", 3)
    with pytest.raises(InputError, match="files of a tokenizer"):
        save_converted(model, tmp_path / "two", tmp_path / "three")


def test_saving_again_replaces_the_earlier_model(tiny: Any, tmp_path: Path) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    convert_(model, "elu")
    save_converted(model, tmp_path)
    first = files(tmp_path)
    save_converted(model, tmp_path)
    assert files(tmp_path) == first
    convert_(model, "favor")
    save_converted(model, tmp_path)
    assert len(files(tmp_path)) == 2
    assert torch.equal(tiny.hidden(load_converted(tmp_path), batch), tiny.hidden(model, batch))


def test_a_full_disk_leaves_the_earlier_model(tiny: Any, tmp_path: Path) -> None:
    model, larger, batch = tiny.make("bert"), tiny.make("bert", num_hidden_layers=6), tiny.batch()
    for one in (model, larger):
        convert_(one, "elu")
    save_converted(model, tmp_path / "there")
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the system refuses to write more to a file
    try:
        for folder in ("there", "new/one"):
            with pytest.raises(MaclinError, match=r"cannot save the model in .*what was there before is unchanged"):
                save_converted(larger, tmp_path / folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert torch.equal(tiny.hidden(load_converted(tmp_path / "there"), batch), tiny.hidden(model, batch))


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_whatever_interrupts_it_leaves_the_earlier_model(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, step: str, call: int, earlier: bool
) -> None:
    model = tiny.make("bert")
    folder = tmp_path / "there"
    if earlier:
        convert_(model, "elu")
        save_converted(model, folder)
    before = files(tmp_path)
    convert_(model, "favor")
    real, calls = getattr(os, step), []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise kind(errno.ENOSPC, "No space left on device")
        real(*args)

    monkeypatch.setattr(os, step, interrupted)
    with pytest.raises((KeyboardInterrupt, MaclinError), match=r"No space left"):
        save_converted(model, folder)
    monkeypatch.undo()
    assert len(calls) >= call
    assert files(tmp_path) == before
    assert folder.exists() == earlier


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "option": (lambda m: m["layers"][0]["config"].update(window=9), r"layers\.0\.config\.window: 3 saved, 9 found"),
    "mechanism": (lambda m: m["layers"][1].update(mechanism="elu"), r"layers\.1\.mechanism: 'window' saved, 'elu'"),
    "layer": (lambda m: m["layers"].pop(), "edited.*layers"),
    "model": (lambda m: m["description"]["config"].update(hidden_act="relu"), "hidden_act: 'gelu' saved, 'relu' found"),
    "class": (lambda m: m["description"].update({"module": "os", "class": "system"}), r"description\.\w+: "),
    "nothing": (lambda m: m["description"].clear(), "edited.*description"),
    "type": (lambda m: m.update(layers=3), r"Manifest\.layers: wanted a list"),
    "field": (lambda m: m.pop("aliases"), "field 'aliases' is missing"),
    "checksum": (lambda m: m.update(sha256="0" * 64), "SHA-256 differ"),
    "elsewhere": (lambda m: m.update(weights="../../" + m["weights"], sha256="0"), "SHA-256 differ"),
    "later": (lambda m: m.update(schema="2.3", maclin_version="9.9"), r"schema 2\.3, written by maclin 9\.9.*Upgrade"),
    "other": (lambda m: m.update(schema="x"), r"wanted a manifest of schema 1\.0 .*got 'x'"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_refused(tiny: Any, tmp_path: Path, edit: str) -> None:
    model = tiny.make("bert")
    convert_(model, "window", window=3)
    save_converted(model, tmp_path)
    change, message = EDITS[edit]
    edited(tmp_path, change)
    with pytest.raises(InputError, match=message):
        load_converted(tmp_path)


def test_damaged_or_foreign_files_are_refused(tiny: Any, tmp_path: Path) -> None:
    model = tiny.make("bert")
    convert_(model, "window", window=3)
    save_converted(model, tmp_path / "one")
    good, manifest = weights_in(tmp_path / "one"), tmp_path / "one" / MANIFEST
    content, text = good.read_bytes(), manifest.read_text()
    convert_(model, "window", window=4)
    save_converted(model, tmp_path / "two")

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_converted(tmp_path / "one")

    flipped = bytearray(content)
    flipped[-5] ^= 1
    good.write_bytes(flipped)
    refused("is not the file that was saved.*SHA-256")
    good.write_bytes(content[:-100])
    refused("damaged, incomplete or no safetensors file")
    good.write_bytes(weights_in(tmp_path / "two").read_bytes())
    refused(r"belongs to other weights.*window: 4 saved, 3 found")
    save_file({"a": torch.zeros(2)}, good)
    refused("was not written by maclin.save_converted")
    good.unlink()
    refused("without its weights")
    manifest.write_text(text[:-50])
    refused("cannot read .* as JSON")
    manifest.unlink()
    refused(r"holds no maclin\.json")


def test_another_model_is_refused_and_left_as_it_was(tiny: Any, tmp_path: Path) -> None:
    model = Around(tiny.make("llama"))
    convert_(model, "favor")
    save_converted(model, tmp_path)
    converted = Around(tiny.make("llama"))
    convert_(converted, "elu")
    for other, message in (
        (Around(tiny.make("llama", intermediate_size=64)), "has shape .*saved is"),
        (Around(tiny.make("llama", num_hidden_layers=3)), r"it also has 'inner\.layers\.2"),
        (Around(tiny.make("llama", num_hidden_layers=1)), r"got one without the layer 'layers\.1\.self_attn'"),
        (Around(tiny.make("llama", num_attention_heads=8, num_key_value_heads=4)), "heads, key heads.*got one with"),
        (Around(tiny.make("llama").double()), r"is torch\.float64, saved is torch\.float32: call model\.to"),
        (converted, "got one that is; call maclin.restore_"),
        (nn.Linear(2, 2), "got a Linear"),
    ):
        before = {key: x.clone() for key, x in other.state_dict().items()}
        with pytest.raises(InputError, match=message):
            load_converted(tmp_path, other)
        assert list(other.state_dict()) == list(before)
        assert all(torch.equal(x, before[key]) for key, x in other.state_dict().items())
        if other is not converted and isinstance(other, Around):
            convert_(other, "elu")  # as if nothing had been


def test_a_model_with_another_configuration_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = tiny.make("bert")
    convert_(model, "elu")
    save_converted(model, tmp_path)
    with pytest.raises(InputError, match="another configuration: hidden_act: 'gelu' saved, 'relu' found"):
        load_converted(tmp_path, tiny.make("bert", hidden_act="relu"))
    with pytest.raises(InputError, match="a given one stays where it is"):
        load_converted(tmp_path, tiny.make("bert"), device="cpu")
    load_converted(tmp_path, tiny.make("bert", use_cache=False))


def test_what_cannot_be_written_is_refused(tiny: Any, tmp_path: Path) -> None:
    def refused(model: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            save_converted(model, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    refused(tiny.make("bert"), "got a BertModel that is not")

    def converted() -> Any:
        model = tiny.make("bert")
        convert_(model, "elu")
        return model

    model = converted()
    model.pooler.dense.weight = nn.Parameter(torch.empty(32, 32, device="meta"))
    refused(model, r"'pooler\.dense\.weight' is on the meta device")
    model = converted()

    class Packed(nn.Parameter):
        pass

    model.pooler.dense.weight = Packed(torch.zeros(32, 32))
    refused(model, "is a Packed, no plain tensor, as in quantised layers")

    class Own(Elu):
        pass

    model = tiny.make("bert")
    convert_(model, {"encoder.layer.0.attention.self": Own(8, 4)})
    refused(model, "holds a Own, which is not in maclin's registry")
    (tmp_path / "file").write_text("here")
    with pytest.raises(InputError, match="is a file; choose another"):
        save_converted(converted(), tmp_path / "file")
