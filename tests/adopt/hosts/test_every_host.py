"""What holds for every architecture: the same table of models for every test."""

import copy
import pickle
from typing import Any

import pytest
import torch

from maclin.adopt import capture, convert_, restore_
from maclin.adopt.capture import token_mask
from maclin.adopt.exact import exact_attention
from maclin.adopt.hosts import host
from maclin.core.mechanisms import Mechanism

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(nested tensors|enable_nested_tensor)"
)  # torch's encoders, unconverted

TEXT = ["bert", "roberta", "albert", "distilbert", "gpt2", "llama", "qwen2", "qwen3", "mistral"]
EVERY = [*TEXT, "vit", "dinov2", "wav2vec2", "bart", "whisper", "mha", "encoder_layer", "encoder", "decoder",
         "transformer"]  # fmt: skip
LAYERS = {"albert": 1, "bart": 6, "whisper": 6, "mha": 1, "encoder_layer": 1, "decoder": 4, "transformer": 3}


@torch.no_grad()
def output(case: Any, model: Any = None) -> torch.Tensor:
    own, batch, of = case
    return of((own if model is None else model)(**batch))


def called(model: Any) -> list[str]:
    """Names that mechanisms leave here as they are called."""
    seen: list[str] = []
    for module in model.modules():
        if isinstance(module, Mechanism):
            module.register_forward_hook(lambda m, args, out: seen.append(str(m.name)))
    return seen


@pytest.mark.parametrize("name", EVERY)
def test_all_attention_is_found_and_nothing_refused(hosts: Any, name: str) -> None:
    model, batch, _ = hosts.case(name)
    found = host(model).layers()
    assert [layer.refused for layer in found] == [None] * LAYERS.get(name, 2)
    assert [(one.name, one.is_causal, one.is_cross, one.calls) for one in found] == [
        (one.name, one.is_causal, one.is_cross, one.calls) for one in host(model).layers(batch)
    ]
    marks = ("encoder_attn", "multihead_attn")
    assert {one.name for one in found if one.is_cross} == {one.name for one in found if one.name.endswith(marks)}
    decoders = ("gpt2", "llama", "qwen2", "qwen3", "mistral")
    causal = [one for one in found if name in decoders or ("decoder" in one.name and not one.is_cross)]
    if name != "decoder":
        assert [one.name for one in found if one.is_causal] == [one.name for one in causal]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", TEXT)
def test_softmax_equals_the_host_on_padded_texts(hosts: Any, name: str, side: str) -> None:
    case = hosts.case(name, side)
    before = output(case)
    convert_(case[0], "softmax")
    seen = called(case[0])
    torch.testing.assert_close(output(case), before, atol=1e-5, rtol=1e-5)
    assert len(seen) == (3 if name == "albert" else 2)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", EVERY[len(TEXT) :])
def test_softmax_equals_the_host(hosts: Any, name: str, batch_first: bool) -> None:
    case = hosts.case(name, batch_first=batch_first)
    before = output(case)
    convert_(case[0], "softmax")
    seen = called(case[0])
    torch.testing.assert_close(output(case), before, atol=1e-5, rtol=1e-5)
    assert len(seen) == LAYERS.get(name, 2)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_in_train_mode_equal_the_hosts(hosts: Any, name: str) -> None:
    sound = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0,
            "activation_dropout": 0.0, "feat_proj_dropout": 0.0}  # fmt: skip
    bert = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    gpt2 = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    without: dict[str, dict[str, Any]] = {
        "bert": bert, "roberta": bert, "albert": bert, "gpt2": gpt2,
        "distilbert": {"dropout": 0.0, "attention_dropout": 0.0}, "bart": {"dropout": 0.0}, "wav2vec2": sound,
    }  # fmt: skip
    model, batch, of = hosts.case(name, **without.get(name, {}))

    def gradients() -> dict[str, torch.Tensor]:
        model.train().zero_grad()
        of(model(**batch)).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    convert_(model, "softmax")
    found = gradients()
    assert set(found) == set(wanted)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, atol=2e-5, rtol=2e-4)
    convert_(model, "elu")
    assert all(gradient.isfinite().all() for gradient in gradients().values())


@pytest.mark.parametrize("mechanism", ["macformer", "hedgehog", "mean"])
@pytest.mark.parametrize("name", EVERY)
def test_restored_to_the_bit_with_the_same_keys(hosts: Any, name: str, mechanism: str) -> None:
    case = hosts.case(name)
    model = case[0]
    before, keys = output(case), list(model.state_dict())
    weights = {n: p.data_ptr() for n, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    convert_(model, mechanism)
    seen = called(model)
    assert not torch.allclose(output(case), before)
    assert seen
    added = [key for key in model.state_dict() if key not in keys]
    assert [key for key in model.state_dict() if key in keys] == keys
    assert all("maclin_mechanism." in key for key in added)
    assert bool(added) == (mechanism != "mean")
    assert {n: p.data_ptr() for n, p in model.named_parameters() if n in weights} == weights
    restore_(model)
    assert torch.equal(output(case), before)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert not host(model).converted


@pytest.mark.parametrize("name", EVERY)
def test_what_is_captured_gives_the_layers_own_output(hosts: Any, name: str) -> None:
    """Exact attention of q, k and v, and the module's own output projection, against what the module returned."""
    model, batch, _ = hosts.case(name)
    found = host(model).layers()
    seen: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in found}
    for layer in found:
        own = layer.module
        names = ("o_proj", "c_proj", "out_lin", "dense", "out_proj")
        last = next((getattr(own, name) for name in names if hasattr(own, name)), None)
        last = None if isinstance(own, torch.nn.MultiheadAttention) else last

        def enters(module: Any, args: Any, key: str = layer.name) -> None:
            seen[key].append(args[0])

        def leaves(module: Any, args: Any, out: Any, key: str = layer.name) -> None:
            seen[key].append(out[0])

        if last is None:
            own.register_forward_hook(leaves)
        else:
            last.register_forward_pre_hook(enters)
    captured = capture(model, [batch])
    for layer in found:
        calls = captured.calls[layer.name]
        assert len(calls) == layer.calls
        for call, wanted in zip(calls, seen[layer.name][-layer.calls :], strict=True):
            assert (call.is_causal, call.is_cross) == (layer.is_causal, layer.is_cross)
            exact = exact_attention(call).out.transpose(1, 2).flatten(2)
            if isinstance(layer.module, torch.nn.MultiheadAttention):
                exact = layer.module.out_proj(exact)
            torch.testing.assert_close(exact[token_mask(call)], wanted[token_mask(call)], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "mha", "encoder", "decoder"])
def test_copies_and_pickles_are_converted_on_their_own(hosts: Any, name: str) -> None:
    case = hosts.case(name)
    model = case[0]
    before = output(case)
    convert_(model, "favor")
    converted = output(case)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(case, other), converted)
        restore_(other)
        assert torch.equal(output(case, other), before)
        assert torch.equal(output(case), converted)


@pytest.mark.parametrize("name", ["bert", "llama", "whisper", "encoder", "decoder"])
def test_dtype_and_mode_move_with_the_model(hosts: Any, name: str) -> None:
    model, batch, of = hosts.case(name)
    convert_(model, "elu")
    with torch.no_grad():
        single = of(model(**batch))
        model.to(torch.float64)
        double = {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}
        out = of(model(**double))
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, single.double(), atol=1e-4, rtol=1e-4)
    found = [m for m in model.train().modules() if isinstance(m, Mechanism)]
    assert all(m.training for m in found)
    assert not any(m.training for m in model.eval().modules())


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "encoder", "decoder"])
def test_installing_that_fails_halfway_leaves_the_model(hosts: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = hosts.case(name)
    model = case[0]
    before, keys = output(case), list(model.state_dict())
    last = host(model).layers()[-1].module
    add = torch.nn.Module.add_module

    def fails(self: Any, key: str, module: Any) -> None:
        if self is last and key == "maclin_mechanism" and module is not None and module.name == "favor":
            raise RuntimeError("no")
        add(self, key, module)

    monkeypatch.setattr(torch.nn.Module, "add_module", fails)
    with pytest.raises(RuntimeError, match="no"):
        convert_(model, "favor")
    assert not host(model).converted
    assert list(model.state_dict()) == keys
    assert torch.equal(output(case), before)
    convert_(model, "elu")
    converted = output(case)
    with pytest.raises(RuntimeError, match="no"):
        convert_(model, "favor")
    assert torch.equal(output(case), converted)
    restore_(model)
    assert torch.equal(output(case), before)
