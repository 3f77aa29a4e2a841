"""Converted models under what people do with models: checkpointing, accelerate, torch.compile, pipelines."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from maclin.adopt import convert_, restore_
from maclin.adopt.hosts import host
from maclin.core.errors import CapabilityError, MaclinError
from maclin.core.mechanisms import Mechanism

pytest.importorskip("transformers")


@torch.no_grad()
def output(case: Any, model: Any = None) -> torch.Tensor:
    own, batch, of = case
    return of((own if model is None else model)(**batch))


def checkpointing(model: Any) -> None:
    """Turned on, by the name that this version of transformers has for it."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(model, next(name for name in names if hasattr(model, name)))()


def gradients(case: Any) -> dict[str, torch.Tensor]:
    model, batch, of = case
    model.zero_grad()
    of(model(**batch)).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mechanism", ["macformer", "hedgehog", "hybrid"])
@pytest.mark.parametrize("name", ["llama", "vit", "whisper"])
def test_gradients_through_checkpointing_are_the_same(hosts: Any, name: str, mechanism: str) -> None:
    case = hosts.case(name)
    model = case[0].train()
    crossed = {layer.name for layer in host(model).layers() if layer.is_cross}
    convert_(model, mechanism, filter_fn=lambda module, layer: layer not in crossed)
    wanted = gradients(case)
    checkpointing(model)
    ran = [0]
    for module in model.modules():
        if isinstance(module, Mechanism):
            module.register_forward_pre_hook(lambda m, args: ran.__setitem__(0, ran[0] + 1))
    found = gradients(case)
    assert ran[0] == 2 * (4 if name == "whisper" else 2)  # once more in the backward pass
    assert set(found) == set(wanted)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient)


def test_running_statistics_are_refused_where_the_forward_is_run_again(hosts: Any) -> None:
    case = hosts.case("vit")
    before = output(case)
    checkpointing(case[0])
    with pytest.raises(CapabilityError, match=r"gradient checkpointing.*ppsbn='token'"):
        convert_(case[0], "macformer", ppsbn="batch")
    assert torch.equal(output(case), before)
    convert_(case[0], "macformer", ppsbn="token")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert", "llama", "encoder"])
def test_accelerate_prepares_places_and_offloads_a_converted_model(hosts: Any, name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    without = {"attention_probs_dropout_prob": 0.0} if name == "bert" else {}
    case = hosts.case(name, **without)
    model = case[0]
    before = output(case)
    convert_(model, "favor")
    converted = output(case)
    device = torch.device("cpu")
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=device)
    torch.testing.assert_close(output(case, offloaded), converted)
    with pytest.raises(CapabilityError, match="meta device"):
        convert_(offloaded, "elu")
    placed = accelerate.dispatch_model(copy.deepcopy(model), device_map={"": device}, force_hooks=True)
    restore_(placed)
    torch.testing.assert_close(output(case, placed), before, atol=1e-5, rtol=1e-5)
    convert_(placed, "favor")
    torch.testing.assert_close(output(case, placed), converted)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-3))
    accelerator.backward(case[2](prepared.train()(**case[1])).square().mean())
    optimizer.step()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_compiled_model_is_the_same(hosts: Any, name: str) -> None:
    case = hosts.case(name)
    convert_(case[0], "elu")
    compiled = torch.compile(case[0], backend="aot_eager")
    torch.testing.assert_close(output(case, compiled), output(case), atol=1e-5, rtol=1e-5)


def test_t5_is_refused_with_the_reason(hosts: Any) -> None:
    import transformers

    sizes: Any = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    model = transformers.T5Model(transformers.T5Config(**sizes)).eval()
    with pytest.raises(CapabilityError, match="position bias") as refused:
        convert_(model, "softmax")
    for name in ("encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention"):
        assert name in str(refused.value)
    assert "filter_fn" not in str(refused.value)  # nothing would be left


def test_a_model_of_texts_and_images_is_found_on_its_own_batches(hosts: Any) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 50, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    model: Any = transformers.CLIPModel(config).eval()
    batch = {"input_ids": torch.tensor([[3, 4, 5, 2]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    with pytest.raises(CapabilityError, match="no example can be made up"):
        convert_(model, "elu")
    convert_(model, "elu", batches=iter([batch]))
    assert {layer.name.split(".")[0]: layer.is_causal for layer in host(model).layers(batch)} == {
        "text_model": True,
        "vision_model": False,
    }
    assert sum(isinstance(module, Mechanism) for module in model.modules()) == 2


def test_whisper_converts_by_part(hosts: Any) -> None:
    case = hosts.case("whisper")
    before = output(case)
    convert_(case[0], "favor", filter_fn=lambda module, name: name.startswith("encoder."))
    assert [n for n, m in case[0].named_modules() if isinstance(m, Mechanism)] == [
        f"encoder.layers.{i}.self_attn.maclin_mechanism" for i in range(2)
    ]
    assert not torch.allclose(output(case), before)
    restore_(case[0])
    assert torch.equal(output(case), before)


def test_the_filter_is_given_module_and_name(hosts: Any) -> None:
    model, _, _ = hosts.case("bert")
    seen: list[tuple[Any, str]] = []
    convert_(model, "mean", filter_fn=lambda module, name: not seen.append((module, name)))
    assert seen == [(model.get_submodule(name), name) for name in (f"encoder.layer.{i}.attention.self" for i in (0, 1))]


def test_a_recording_that_is_padded_gives_the_same_frames_alone(hosts: Any) -> None:
    model, batch, _ = hosts.case("wav2vec2")
    convert_(model, "elu")
    with torch.no_grad():
        both = model(**batch).last_hidden_state[1]
        alone = model(input_values=batch["input_values"][1:, :120]).last_hidden_state[0]
    torch.testing.assert_close(both[: len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_a_sentence_transformer_converts_from_outside(hosts: Any, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertTokenizer

    case = hosts.case("bert")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    case[0].save_pretrained(tmp_path / "model")
    modules = [Transformer(str(tmp_path / "model")), Pooling(32)]
    pipeline = sentence_transformers.SentenceTransformer(modules=modules, device="cpu")
    texts = ["a b c d e f", "a", "h g"]
    before = pipeline.encode(texts, convert_to_tensor=True)
    assert [layer.name for layer in host(pipeline).layers()] == [f"encoder.layer.{i}.attention.self" for i in (0, 1)]
    convert_(pipeline, "softmax")
    torch.testing.assert_close(pipeline.encode(texts, convert_to_tensor=True), before, atol=1e-5, rtol=1e-5)
    convert_(pipeline, "elu")
    assert not torch.allclose(pipeline.encode(texts, convert_to_tensor=True), before)
    restore_(pipeline)
    assert torch.equal(pipeline.encode(texts, convert_to_tensor=True), before)
    with pytest.raises(MaclinError, match="not"):
        restore_(pipeline)
