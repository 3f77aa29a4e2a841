from typing import Any

import pytest
import torch

from maclin.adopt import audit, convert_, plan, restore_
from maclin.adopt.hosts import host
from maclin.core.errors import CapabilityError, InputError, OptionError
from maclin.core.mechanisms import Mechanism, mechanism


def reasons(model: Any) -> dict[str, str | None]:
    return {layer.name: layer.refused for layer in host(model).layers()}


def untouched(tiny: Any, model: Any, batch: dict[str, Any], what: str, message: str) -> None:
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        with pytest.raises(CapabilityError, match=message):
            convert_(model, what)
        assert torch.equal(model(**batch).last_hidden_state, before)


def test_position_bias_is_refused(tiny: Any) -> None:
    batch = {**tiny.batch(), "decoder_input_ids": tiny.batch((4, 4, 4))["input_ids"]}
    untouched(tiny, tiny.make("t5"), batch, "elu", "position bias|attention interface")


@pytest.mark.parametrize("argument", ["position_bias", "softcap", "s_aux", "head_mask", "sliding_window", "seq_idx"])
def test_arguments_that_change_the_formula_are_reasons(argument: str) -> None:
    from maclin.adopt.hosts.interface import reason_against

    assert reason_against({argument: 3})
    assert reason_against({argument: None, "output_attentions": False}) is None


def test_alibi_and_relative_positions_are_named(tiny: Any) -> None:
    import transformers

    sizes: Any = {"hidden_size": 32, "vocab_size": 50, "pad_token_id": 0}
    alibi = transformers.BloomConfig(n_layer=1, n_head=4, **sizes)
    with pytest.raises(CapabilityError, match="ALiBi"):
        convert_(transformers.BloomModel(alibi), "elu")
    relative = transformers.MPNetConfig(num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, **sizes)
    with pytest.raises(CapabilityError, match="relative positions"):
        convert_(transformers.MPNetModel(relative), "elu")


def test_quantised_projections_are_refused(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    attention = model.encoder.layer[1].attention.self

    class Int8(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(32, 32)
            self.kept = self.weight.detach().clone()
            del self.weight
            self.weight = torch.nn.Parameter((self.kept * 100).to(torch.int8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 100, self.bias)

    attention.value = Int8()
    untouched(tiny, model, batch, "elu", r"layer 'encoder.layer.1.*quantised \(value: Int8\)")
    convert_(model, "elu", filter_fn=lambda module, name: "layer.0" in name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamically_quantised_models_are_refused_and_quantising_a_converted_one_works(tiny: Any) -> None:
    if not torch.backends.quantized.supported_engines[1:]:
        pytest.skip("this build of torch has no engine for quantised layers")
    model, batch = tiny.make("bert"), tiny.batch()
    with pytest.raises(CapabilityError, match="quantised"):
        convert_(torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}), "elu")
    convert_(model, "elu")
    single = tiny.hidden(model, batch)
    after = tiny.hidden(torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}), batch)
    assert (after - single).norm() < 0.1 * single.norm()


def test_weights_on_the_meta_device_are_refused(tiny: Any) -> None:
    model = tiny.make("bert").to("meta")
    with pytest.raises(CapabilityError, match="meta device"):
        convert_(model, "elu")


def test_a_plan_for_another_model_leaves_the_model(tiny: Any) -> None:
    model, other = tiny.make("bert"), tiny.make("roberta", num_attention_heads=8)
    batch = tiny.batch()
    foreign = plan(audit(other, [batch], mechanisms=["elu"]), 0.99)
    before = tiny.hidden(model, batch)
    with pytest.raises(InputError, match="wanted a plan for this model"):
        convert_(model, foreign)
    assert torch.equal(tiny.hidden(model, batch), before)


def test_a_head_that_a_mechanism_cannot_take_leaves_the_model(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    before = tiny.hidden(model, batch)
    with pytest.raises(OptionError, match=r"layer 'encoder\.layer\.0\.attention\.self': window"):
        convert_(model, "window", window=0)
    wide = {"encoder.layer.1.attention.self": mechanism("elu", head_dim=64, num_heads=4)}
    with pytest.raises(InputError, match=r"layer 'encoder\.layer\.1.*got \(64, 4, 4\)"):
        convert_(model, {"encoder.layer.0.attention.self": "elu", **wide})
    assert torch.equal(tiny.hidden(model, batch), before)


@pytest.mark.parametrize(("family", "options"), [("Falcon", {}), ("Nystromformer", {}), ("FNet", {})])
def test_attention_outside_the_interface_is_refused(family: str, options: dict[str, Any]) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(**sizes, vocab_size=50, pad_token_id=0, **options)
    with pytest.raises(CapabilityError, match="attention interface"):
        convert_(getattr(transformers, f"{family}Model")(config), "elu")


def test_a_sliding_window_is_refused_and_none_is_not(tiny: Any) -> None:
    untouched(tiny, tiny.make("mistral", sliding_window=4), tiny.batch(), "elu", "sliding window of 4 tokens")
    assert set(reasons(tiny.make("mistral", sliding_window=None)).values()) == {None}


def test_softcap_and_sinks_are_refused(tiny: Any) -> None:
    untouched(tiny, tiny.make("gemma2"), tiny.batch(), "softmax", "softcap")
    untouched(tiny, tiny.make("gpt_oss"), tiny.batch(), "softmax", "sinks")


def encoder_decoder(tiny: Any) -> tuple[Any, dict[str, Any]]:
    return tiny.make("bart"), {**tiny.batch(), "decoder_input_ids": tiny.batch((4, 4, 4))["input_ids"]}


def test_cross_attention_is_refused_where_positions_count_and_the_rest_converts(tiny: Any) -> None:
    model, batch = encoder_decoder(tiny)
    untouched(tiny, model, batch, "window", "cross-attention, and window goes by the positions")
    crossed = [layer.name for layer in host(model).layers() if layer.is_cross]
    assert crossed == ["decoder.layers.0.encoder_attn", "decoder.layers.1.encoder_attn"]
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        convert_(model, "window", window=50, filter_fn=lambda module, name: name not in crossed)
        torch.testing.assert_close(model(**batch).last_hidden_state, before, atol=1e-5, rtol=0)
        convert_(model, "elu")
        assert not torch.equal(model(**batch).last_hidden_state, before)
        restore_(model)
        assert torch.equal(model(**batch).last_hidden_state, before)


def test_every_refused_layer_is_listed_with_the_filter_that_leaves_them_out(tiny: Any) -> None:
    model, _ = encoder_decoder(tiny)
    with pytest.raises(CapabilityError, match=r"2 of 6 layers") as refused:
        convert_(model, "window")
    expression = str(refused.value).split("filter_fn=")[1].split(", a mapping")[0]
    convert_(model, "window", filter_fn=eval(expression))
    placed = [name for name, module in model.named_modules() if isinstance(module, Mechanism)]
    assert len(placed) == 4
    with pytest.raises(CapabilityError, match=r"2 of 6 .*decoder\.layers\.0\.self_attn.*it is causal, and revisited"):
        convert_(model, "revisited_linformer")
    assert [name for name, module in model.named_modules() if isinstance(module, Mechanism)] == placed


def test_cross_attention_is_not_measured_and_planned_exact(tiny: Any) -> None:
    model, batch = encoder_decoder(tiny)
    found = audit(model, [batch], mechanisms=["elu"])
    row = found.layer("decoder.layers.0.encoder_attn")
    assert row.refused is not None
    assert (row.num_tokens, row.errors, row.uniform_rel_error) == (0, (), None)
    decided = plan(found, 0.99)
    by_layer = {r.layer: r for r in decided.rows}
    assert by_layer["decoder.layers.0.encoder_attn"].mechanism == "softmax"
    assert "cross-attention" in by_layer["decoder.layers.0.encoder_attn"].reason
    convert_(model, decided)


def test_what_learns_from_data_is_refused_on_cross_attention_where_data_are_given(tiny: Any) -> None:
    model, batch = encoder_decoder(tiny)
    with pytest.raises(CapabilityError, match="macformer learns from data, for which there is self-attention only"):
        convert_(model, "macformer", batches=[batch])
    convert_(model, "macformer")


def test_a_mixed_model_keeps_refused_layers_as_they_were(tiny: Any) -> None:
    sizes = {"layer_types": ["sliding_attention", "full_attention"], "attn_logit_softcapping": None}
    model = tiny.make("gemma2", sliding_window=4, **sizes)
    batch = tiny.batch((12, 7), "left")
    before = tiny.hidden(model, batch)
    refused = {name for name, reason in reasons(model).items() if reason}
    assert refused == {"layers.0.self_attn"}
    convert_(model, "softmax", filter_fn=lambda module, name: name not in refused)
    torch.testing.assert_close(tiny.hidden(model, batch), before, atol=1e-5, rtol=0)


def test_a_formula_of_the_hosts_own_is_noticed(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.bert import modeling_bert

    original = modeling_bert.eager_attention_forward

    def other(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        return original(module, query * 1.5, *args, **kwargs)

    monkeypatch.setattr(modeling_bert, "eager_attention_forward", other)
    assert all("not softmax" in str(reason) for reason in reasons(tiny.make("bert")).values())


def test_a_flag_that_contradicts_the_mask_is_noticed(tiny: Any) -> None:
    model = tiny.make("llama")
    model.layers[0].self_attn.is_causal = False
    assert [bool(reason and "disagree" in reason) for reason in reasons(model).values()] == [True, False]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_attention_weights_are_refused(tiny: Any, name: str) -> None:
    model, batch = tiny.make(name), tiny.batch()
    convert_(model, "elu")
    with pytest.raises(CapabilityError, match="output_attentions"):
        model(**batch, output_attentions=True)
    model(**batch, output_attentions=False)
    configured = tiny.make(name, attn_implementation="eager", output_attentions=True)
    with pytest.raises(CapabilityError, match="output_attentions"):
        convert_(configured, "elu")


def test_packed_sequences_are_refused_at_the_call(tiny: Any) -> None:
    model = tiny.make("llama")
    convert_(model, "softmax")
    ids = tiny.batch((8,))["input_ids"]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with pytest.raises(CapabilityError, match="packed sequences"):
        model(input_ids=ids, position_ids=packed, use_cache=False)
    with pytest.raises(CapabilityError, match="packed sequences"):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 3, 8]), use_cache=False)


def test_a_mask_made_by_hand_is_refused_at_the_call(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch((6, 6))
    convert_(model, "softmax")
    with pytest.raises(CapabilityError, match="2-D"):
        model(input_ids=batch["input_ids"], attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool))


def test_a_static_cache_is_refused_at_the_call(tiny: Any) -> None:
    from transformers import StaticCache

    model, batch = tiny.make("llama"), tiny.batch((6, 6))
    convert_(model, "softmax")
    cache = StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(CapabilityError, match="static cache"), torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)


def test_dropout_in_training_is_refused_but_for_softmax(tiny: Any) -> None:
    model, batch = tiny.make("bert", attention_probs_dropout_prob=0.3), tiny.batch()
    convert_(model, "elu")
    model.eval()(**batch)
    with pytest.raises(CapabilityError, match="dropout"):
        model.train()(**batch)
    convert_(model, "softmax")
    assert model.train()(**batch).last_hidden_state.isfinite().all()
    without = tiny.make("bert", attention_probs_dropout_prob=0.0).train()
    convert_(without, "elu")
    without(**batch)


def test_a_mechanism_without_a_causal_form_is_refused_for_a_decoder(tiny: Any) -> None:
    untouched(tiny, tiny.make("gpt2"), tiny.batch(), "revisited_linformer", "causal")


def test_part_of_a_converted_model_is_refused(tiny: Any) -> None:
    from transformers import BertForMaskedLM

    whole = BertForMaskedLM(tiny.make("bert").config).eval()
    convert_(whole, "elu")
    with pytest.raises(CapabilityError, match="part of a model"):
        convert_(whole.bert, "window")
    restore_(whole)
    convert_(whole.bert, "window")


def test_a_batch_that_does_not_fit_is_an_input_error(tiny: Any) -> None:
    model = tiny.make("bert")
    with pytest.raises(InputError, match="BertModel"):
        audit(model, [{"input_ids": torch.full((1, 4), 999)}], mechanisms=["elu"])
    with pytest.raises(InputError, match="mapping"):
        audit(model, ["text"], mechanisms=["elu"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="got none"):
        audit(model, [], mechanisms=["elu"])


def test_two_models_in_one_are_refused(tiny: Any) -> None:
    both = torch.nn.ModuleList([tiny.make("bert"), tiny.make("bert")])
    with pytest.raises(CapabilityError, match="one by one"):
        convert_(both, "elu")
