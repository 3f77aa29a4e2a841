import copy
import io
import pickle
from typing import Any

import pytest
import torch

from maclin.adopt import audit, convert_, plan, restore_
from maclin.adopt.hosts import host
from maclin.core import mechanisms
from maclin.core.errors import CapabilityError, InputError, MaclinError, OptionError

ENCODERS = ["bert", "roberta", "distilbert", "albert"]
DECODERS = ["gpt2", "llama"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ENCODERS + DECODERS)
def test_converted_to_softmax_equals_the_host(tiny: Any, name: str, side: str, implementation: str) -> None:
    model = tiny.make(name, attn_implementation=implementation)
    batches = [tiny.batch(lengths, side, seed) for seed, lengths in enumerate([(11, 5, 8), (7, 7), (1,), (40, 3)])]
    before = [tiny.hidden(model, batch) for batch in batches]
    convert_(model, "softmax")
    for batch, wanted in zip(batches, before, strict=True):
        torch.testing.assert_close(tiny.hidden(model, batch), wanted, atol=1e-5, rtol=0)


def test_images_converted_to_softmax_equal_the_host(tiny: Any) -> None:
    model = tiny.make("vit")
    before = tiny.hidden(model, tiny.images())
    convert_(model, "softmax")
    torch.testing.assert_close(tiny.hidden(model, tiny.images()), before, atol=1e-5, rtol=0)


def test_it_is_the_mechanism_that_runs(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    seen = []
    convert_(model, "softmax")
    for module in model.modules():
        if isinstance(module, mechanisms.Mechanism):
            module.register_forward_hook(lambda m, args, out: seen.append(m.name))
    tiny.hidden(model, batch)
    assert seen == ["softmax", "softmax"]


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS, "vit"])
def test_restored_is_bit_equal_with_the_same_keys(tiny: Any, name: str) -> None:
    model = tiny.make(name)
    batch = tiny.images() if name == "vit" else tiny.batch()
    before, keys = tiny.hidden(model, batch), list(model.state_dict())
    implementation = model.config._attn_implementation
    convert_(model, "favor")
    assert not torch.equal(tiny.hidden(model, batch), before)
    assert set(keys) <= set(model.state_dict())
    assert any("maclin_mechanism" in key for key in model.state_dict())
    restore_(model)
    assert torch.equal(tiny.hidden(model, batch), before)
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == implementation
    model(**batch, output_attentions=False)


def test_weights_stay_the_same_tensors(tiny: Any) -> None:
    model = tiny.make("bert")
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    convert_(model, "elu")
    assert {name: p.data_ptr() for name, p in model.named_parameters() if name in before} == before


@pytest.mark.parametrize("mechanism", [n for n in mechanisms.names() if mechanisms.row(n).causal])
@pytest.mark.parametrize("name", DECODERS)
def test_a_causal_model_stays_causal(tiny: Any, name: str, mechanism: str) -> None:
    model = tiny.make(name)
    convert_(model, mechanism)
    batch = tiny.batch((10, 10))
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 6:] = 4
    with torch.no_grad():
        one, other = (model(**b).last_hidden_state[:, :6] for b in (batch, changed))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mechanism", [n for n in mechanisms.names() if n != "linformer"])
def test_padding_does_not_change_a_token(tiny: Any, mechanism: str) -> None:
    model = tiny.make("bert")
    convert_(model, mechanism)
    alone = tiny.batch((6,))
    padded = {key: torch.nn.functional.pad(x, (0, 5), value=0) for key, x in alone.items()}
    torch.testing.assert_close(tiny.hidden(model, padded), tiny.hidden(model, alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mechanism", ["softmax", "elu", "macformer"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoding_with_a_cache_equals_the_whole_sequence(tiny: Any, name: str, side: str, mechanism: str) -> None:
    model, lengths = tiny.make(name), (9, 9) if side == "right" else (9, 6)
    batch = tiny.batch(lengths, side)
    reference = copy.deepcopy(model)
    convert_(model, mechanism)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = model(**batch, position_ids=positions).last_hidden_state[:, -1]
        start = {key: x[:, :-1] for key, x in batch.items()}
        first = model(**start, position_ids=positions[:, :-1], use_cache=True)
        step = model(
            input_ids=batch["input_ids"][:, -1:],
            attention_mask=batch["attention_mask"],
            position_ids=positions[:, -1:],
            past_key_values=first.past_key_values,
        ).last_hidden_state[:, -1]
        exact = reference(**batch, position_ids=positions).last_hidden_state[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-4)
    if mechanism == "softmax":
        torch.testing.assert_close(step, exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("what", ["softmax", {"layers.1.self_attn": "softmax"}])
def test_a_chunk_after_a_past_is_aligned_with_its_end(tiny: Any, what: Any) -> None:
    model = tiny.make("llama")
    batch = tiny.batch((9, 9))
    wanted = tiny.hidden(model, batch).view(2, 9, -1)[:, 5:]
    convert_(model, what)
    with torch.no_grad():
        past = model(**{key: x[:, :5] for key, x in batch.items()}, use_cache=True).past_key_values
        out = model(input_ids=batch["input_ids"][:, 5:], attention_mask=batch["attention_mask"], past_key_values=past)
    torch.testing.assert_close(out.last_hidden_state, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mechanism", ["softmax", "elu"])
def test_generation_needs_no_change(tiny: Any, mechanism: str) -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(tiny.make("llama").config).eval()
    batch, options = tiny.batch((6, 4), "left"), {"max_new_tokens": 5, "do_sample": False}
    wanted = model.generate(**batch, **options)
    convert_(model, mechanism)
    found = model.generate(**batch, **options)
    assert found.shape == wanted.shape
    if mechanism == "softmax":
        assert torch.equal(found, wanted)


def test_layers_left_out_keep_the_hosts_attention(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    before = tiny.hidden(model, batch)
    convert_(model, {"encoder.layer.1.attention.self": "softmax"})
    torch.testing.assert_close(tiny.hidden(model, batch), before, atol=1e-5, rtol=0)
    convert_(model, "elu", filter_fn=lambda module, name: name.startswith("encoder.layer.1"))
    assert [n for n, m in model.named_modules() if isinstance(m, mechanisms.Mechanism)] == [
        "encoder.layer.1.attention.self.maclin_mechanism"
    ]
    with torch.no_grad():
        first = model(**batch, output_hidden_states=True).hidden_states[1]
        restore_(model)
        torch.testing.assert_close(first, model(**batch, output_hidden_states=True).hidden_states[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_exact_layers_of_a_mixed_decoder_equal_the_host(tiny: Any, name: str) -> None:
    model, batch = tiny.make(name), tiny.batch(side="left")
    before = tiny.hidden(model, batch)
    last = host(model).layers()[-1].name
    convert_(model, {last: "softmax"})
    torch.testing.assert_close(tiny.hidden(model, batch), before, atol=1e-5, rtol=0)


def test_shared_layers_get_one_mechanism(tiny: Any) -> None:
    model = tiny.make("albert")
    (layer,) = host(model).layers()
    assert layer.calls == 3
    convert_(model, "elu")
    assert sum(isinstance(m, mechanisms.Mechanism) for m in model.modules()) == 1


def test_grouped_heads_are_not_repeated(tiny: Any) -> None:
    layer = host(tiny.make("llama")).layers()[0]
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.is_causal) == (4, 2, 8, True)


def test_converting_again_replaces_and_the_same_seed_repeats(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    before = tiny.hidden(model, batch)
    convert_(model, "favor")
    first = tiny.hidden(model, batch)
    convert_(model, "elu")
    convert_(model, "favor")
    assert torch.equal(tiny.hidden(model, batch), first)
    convert_(model, "favor", generator=torch.Generator().manual_seed(7))
    assert not torch.equal(tiny.hidden(model, batch), first)
    restore_(model)
    assert torch.equal(tiny.hidden(model, batch), before)


def test_options_reach_the_mechanism(tiny: Any) -> None:
    model = tiny.make("bert")
    convert_(model, "window", window=3)
    assert {m.window for m in model.modules() if isinstance(m, mechanisms.Mechanism)} == {3}


def test_a_ready_mechanism_is_taken_as_it_is(tiny: Any) -> None:
    model = tiny.make("bert")
    ready = mechanisms.mechanism("elu", head_dim=8, num_heads=4)
    convert_(model, {"encoder.layer.0.attention.self": ready})
    assert model.encoder.layer[0].attention.self.maclin_mechanism is ready
    wrong = mechanisms.mechanism("elu", head_dim=16, num_heads=4)
    with pytest.raises(InputError, match="16"):
        convert_(model, {"encoder.layer.0.attention.self": wrong})
    with pytest.raises(InputError, match="wanted a mechanism"):
        convert_(model, {"encoder.layer.0.attention.self": torch.nn.Identity()})


def test_a_converted_copy_is_its_own(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    before = tiny.hidden(model, batch)
    convert_(model, "macformer")
    converted = tiny.hidden(model, batch)
    copied = copy.deepcopy(model)
    restore_(copied)
    assert torch.equal(tiny.hidden(copied, batch), before)
    assert torch.equal(tiny.hidden(model, batch), converted)
    with pytest.raises(CapabilityError):
        model(**batch, output_attentions=True)
    copied.set_attn_implementation("eager")
    assert copied(**batch, output_attentions=True).attentions


def test_a_converted_model_survives_pickling(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    before = tiny.hidden(model, batch)
    convert_(model, "macformer")
    converted = tiny.hidden(model, batch)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert torch.equal(tiny.hidden(loaded, batch), converted)
        restore_(loaded)
        assert torch.equal(tiny.hidden(loaded, batch), before)


def test_a_state_dict_goes_into_a_model_converted_alike(tiny: Any) -> None:
    model, other = tiny.make("bert"), tiny.make("bert")
    convert_(model, "favor", generator=torch.Generator().manual_seed(5))
    convert_(other, "favor")
    other.load_state_dict(model.state_dict())
    assert torch.equal(tiny.hidden(other, tiny.batch()), tiny.hidden(model, tiny.batch()))


def test_half_precision_and_train_mode_are_taken_over(tiny: Any) -> None:
    model = tiny.make("bert").to(torch.bfloat16).train()
    convert_(model, "favor")
    found = [m for m in model.modules() if isinstance(m, mechanisms.Mechanism)]
    assert len(found) == 2
    assert all(m.training for m in found)
    assert model.training
    assert tiny.hidden(model.eval(), tiny.batch()).isfinite().all()


def test_gradients_reach_the_weights(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    convert_(model, "elu")
    model(**batch).last_hidden_state.sum().backward()
    assert model.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


def test_a_wrapped_model_is_found_inside(tiny: Any) -> None:
    inner, batch = tiny.make("bert"), tiny.batch()
    wrapped = torch.nn.ModuleDict({"encoder": inner})
    before = tiny.hidden(inner, batch)
    convert_(wrapped, "elu")
    assert not torch.equal(tiny.hidden(inner, batch), before)
    restore_(wrapped)
    assert torch.equal(tiny.hidden(inner, batch), before)


def test_a_plan_is_carried_out(tiny: Any) -> None:
    model = tiny.make("bert")
    decided = plan(audit(model, [tiny.batch((30, 28))], mechanisms=[("window", {"window": 4}), "elu"]), 0.9)
    convert_(model, decided)
    found = {n: m.name for n, m in model.named_modules() if isinstance(m, mechanisms.Mechanism)}
    wanted = {f"{r.layer}.maclin_mechanism": r.mechanism for r in decided.rows if r.mechanism != "softmax"}
    assert found == wanted


def test_a_plan_of_exact_layers_changes_nothing(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    before = tiny.hidden(model, batch)
    convert_(model, plan(audit(model, [batch], mechanisms=["elu"]), 0.001))
    torch.testing.assert_close(tiny.hidden(model, batch), before, atol=1e-5, rtol=0)
    restore_(model)
    assert torch.equal(tiny.hidden(model, batch), before)


def test_a_plan_for_another_model_is_refused(tiny: Any) -> None:
    decided = plan(audit(tiny.make("bert"), [tiny.batch()], mechanisms=["elu"]), 0.9)
    for other, message in (
        (tiny.make("distilbert"), "BertModel with layer"),
        (tiny.make("bert", num_hidden_layers=3), "no row for layer 'encoder.layer.2"),
        (tiny.make("bert", num_hidden_layers=1), "which this model lacks"),
        (tiny.make("bert", num_attention_heads=2), "2 heads"),
    ):
        batch = tiny.batch()
        before = tiny.hidden(other, batch)
        with pytest.raises(InputError, match=message):
            convert_(other, decided)
        assert torch.equal(tiny.hidden(other, batch), before)
        assert not host(other).converted


@pytest.mark.parametrize(
    ("what", "options", "error", "message"),
    [
        ("sofmax", {}, OptionError, "known are softmax"),
        ("elu", {"window": 3}, OptionError, "no option 'window'"),
        ({"encoder.layer.7": "elu"}, {}, InputError, "encoder.layer.0.attention.self"),
        ({}, {}, InputError, "no layer is left"),
        ({"encoder.layer.0.attention.self": "elu"}, {"window": 3}, OptionError, "go with a mechanism's name"),
        (3, {}, InputError, "got int"),
        ("linformer", {"proj_len": 0, "projection": "mean-pool"}, OptionError, "proj_len"),
    ],
)
def test_bad_requests_leave_the_model_alone(
    tiny: Any, what: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    before, keys = tiny.hidden(model, batch), list(model.state_dict())
    with pytest.raises(error, match=message):
        convert_(model, what, **options)
    assert torch.equal(tiny.hidden(model, batch), before)
    assert list(model.state_dict()) == keys
    assert not model._forward_pre_hooks


def test_a_failure_on_the_way_is_undone(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    before, keys = tiny.hidden(model, batch), list(model.state_dict())

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(model, "register_forward_pre_hook", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        convert_(model, "elu")
    monkeypatch.undo()
    assert torch.equal(tiny.hidden(model, batch), before)
    assert list(model.state_dict()) == keys


def test_restoring_what_is_not_converted_is_an_error(tiny: Any) -> None:
    model = tiny.make("bert")
    with pytest.raises(MaclinError, match="not"):
        restore_(model)
    convert_(model, "elu")
    restore_(model)
    with pytest.raises(MaclinError, match="BertModel"):
        restore_(model)


def test_what_is_no_known_model_is_refused() -> None:
    with pytest.raises(CapabilityError, match="transformers"):
        convert_(torch.nn.Linear(2, 2), "elu")
    with pytest.raises(InputError, match="got str"):
        convert_("a path", "elu")  # pyright: ignore[reportArgumentType]
