import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from maclin.adopt import convert_, load, packaged_model, restore_
from maclin.adopt import load as _load
from maclin.core.errors import InputError, MaclinError

TEXTS = ["ab c", "c d e a", "b"]


def directory(tiny: Any, path: Path, name: str = "bert", **options: Any) -> Path:
    """A model directory with a word tokenizer, as save_pretrained writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *"abcde"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny.make(name, **options).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(path)
    return path


def test_a_plain_encoder_is_averaged_over_its_tokens(tiny: Any, tmp_path: Path) -> None:
    loaded = load(directory(tiny, tmp_path / "tiny-bert"))
    batch = loaded.tokenize(TEXTS)[0]
    assert batch["attention_mask"].sum(1).tolist() == [2, 4, 1] == list(loaded.token_counts(TEXTS))
    with torch.no_grad():
        hidden = loaded.model(**batch).last_hidden_state
    wanted = torch.stack([hidden[i, :n].mean(0) for i, n in enumerate([2, 4, 1])])
    for size in (1, 2, 8):
        torch.testing.assert_close(loaded.encode(TEXTS, batch_size=size), wanted, atol=1e-5, rtol=1e-5)
    info = loaded.info()
    assert (info.name, info.host, info.architecture) == ("tiny-bert", "transformers", "BertModel")
    assert (info.num_layers, info.num_heads, info.num_kv_heads, info.head_dim, info.embed_dim) == (2, 4, 4, 8, 32)
    assert (info.max_length, info.num_parameters) == (64, sum(p.numel() for p in loaded.model.parameters()))


def test_texts_are_cut_to_the_length_asked_for(tiny: Any, tmp_path: Path) -> None:
    loaded = load(directory(tiny, tmp_path))
    assert loaded.token_counts(["a " * 100]) == (64,)
    assert loaded.token_counts(["a " * 100], max_length=10) == (10,)
    assert [b["input_ids"].shape[0] for b in loaded.tokenize(TEXTS, batch_size=2)] == [2, 1]
    for length in (1, 65):
        with pytest.raises(InputError, match="from 2 to the model's 64"):
            loaded.encode(TEXTS, max_length=length)
    with pytest.raises(InputError, match="at least one text"):
        loaded.encode([])
    with pytest.raises(InputError, match="batch_size"):
        loaded.tokenize(TEXTS, batch_size=0)


def test_missing_weights_are_not_made_up(tiny: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = directory(tiny, tmp_path)
    weights = load_file(path / "model.safetensors")
    whole = {name: x for name, x in weights.items() if "pooler" not in name}
    save_file(whole, path / "model.safetensors", metadata={"format": "pt"})
    load(path)  # mean pooling does without the pooler
    removed = next(name for name in whole if "layer.1" in name)
    save_file({n: x for n, x in whole.items() if n != removed}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"1 are missing, {removed}"):
        load(path)


def test_roberta_has_fewer_positions_than_it_says(tiny: Any, tmp_path: Path) -> None:
    assert load(directory(tiny, tmp_path, "roberta")).max_length == 62


def test_a_decoder_with_grouped_heads_is_described(tiny: Any, tmp_path: Path) -> None:
    info = load(directory(tiny, tmp_path, "llama")).info()
    assert (info.num_heads, info.num_kv_heads, info.head_dim) == (4, 2, 8)


def test_a_sentence_transformer_keeps_its_own_pipeline(tiny: Any, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    inner = Transformer(str(directory(tiny, tmp_path / "inner")))
    pipeline = sentence_transformers.SentenceTransformer(modules=[inner, Pooling(32, "cls"), Normalize()], device="cpu")
    pipeline.max_seq_length = 3
    pipeline.save(str(tmp_path / "saved"))
    loaded = load(tmp_path / "saved")
    assert (loaded.default_length, loaded.max_length, loaded.info().host) == (3, 64, "sentence-transformers")
    theirs = pipeline.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    torch.testing.assert_close(loaded.encode(TEXTS, max_length=3), theirs, atol=1e-5, rtol=0)
    assert loaded.token_counts(TEXTS) == (2, 4, 1)
    before = loaded.encode(TEXTS)
    convert_(loaded.model, "softmax")
    torch.testing.assert_close(loaded.encode(TEXTS), before, atol=1e-5, rtol=0)
    restore_(loaded.model)
    assert torch.equal(loaded.encode(TEXTS), before)


def test_weights_of_an_older_kind_are_read_without_unpickling(tiny: Any, tmp_path: Path) -> None:
    place = directory(tiny, tmp_path)
    before = load(place).encode(TEXTS)
    model = tiny.make("bert")
    (place / "model.safetensors").unlink()
    torch.save(model.state_dict(), place / "pytorch_model.bin")
    assert torch.equal(load(place).encode(TEXTS), before)


class Intruder:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(INTRUDED[0]),))


INTRUDED: list[str] = [""]


def test_a_pickle_with_code_is_not_run(tiny: Any, tmp_path: Path) -> None:
    place = directory(tiny, tmp_path / "model")
    (place / "model.safetensors").unlink()
    INTRUDED[0] = str(tmp_path / "intruded")
    torch.save({"weight": Intruder()}, place / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load"):
        load(place)
    (place / "pytorch_model.bin").write_bytes(pickle.dumps(Intruder(), protocol=2))
    with pytest.raises(InputError, match="cannot load"):
        load(place)
    assert not (tmp_path / "intruded").exists()


def test_code_that_a_directory_brings_is_not_run(tiny: Any, tmp_path: Path) -> None:
    place = directory(tiny, tmp_path / "model")
    (place / "own.py").write_text(f"open({str(tmp_path / 'intruded')!r}, 'w')\nclass Own: pass\n")
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot load"):
        load(place)
    (place / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "own.Own"}]))
    with pytest.raises(InputError, match=r"own\.Own, which maclin never runs"):
        load(place)
    assert not (tmp_path / "intruded").exists()


def test_bad_directories_are_explained(tiny: Any, tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "No such file")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "Not a directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json")
    place = directory(tiny, tmp_path / "model")
    good = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(good[: len(good) // 2])
    refused(place, "cannot load")
    (place / "model.safetensors").rename(place / "weights.pkl")
    refused(place, "save the model again")
    (place / "model.safetensors").write_bytes(good)
    (place / "config.json").write_text("{")
    refused(place, "as JSON")
    (place / "config.json").write_text("{}")
    refused(place, "cannot load")
    (place / "modules.json").write_text("{}")
    refused(place, "modules.json")


def test_a_directory_without_tokenizer_is_explained(tiny: Any, tmp_path: Path) -> None:
    tiny.make("bert").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="with its tokenizer"):
        load(tmp_path)


def test_what_is_not_installed_is_named(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = directory(tiny, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MaclinError, match=r"maclin\[demo\]"):
        packaged_model()
    with pytest.raises(MaclinError, match=r"maclin\[hf\]"):
        _load(place)
