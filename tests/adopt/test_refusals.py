from typing import Any

import pytest
import torch

from maclin.adopt import audit, convert_, plan, restore_
from maclin.adopt.hosts import host
from maclin.core.errors import CapabilityError, InputError


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


def test_cross_attention_is_refused_and_the_rest_converts(tiny: Any) -> None:
    model = tiny.make("bart")
    batch = {**tiny.batch(), "decoder_input_ids": tiny.batch((4, 4, 4))["input_ids"]}
    untouched(tiny, model, batch, "elu", "cross-attention")
    refused = [name for name, reason in reasons(model).items() if reason]
    assert refused == ["decoder.layers.0.encoder_attn", "decoder.layers.1.encoder_attn"]
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        convert_(model, "softmax", filter_fn=lambda module, name: name not in refused)
        torch.testing.assert_close(model(**batch).last_hidden_state, before, atol=1e-5, rtol=0)
        convert_(model, "elu", filter_fn=lambda module, name: name not in refused)
        assert not torch.equal(model(**batch).last_hidden_state, before)
        restore_(model)
        assert torch.equal(model(**batch).last_hidden_state, before)


def test_refused_layers_are_audited_as_refused_and_planned_exact(tiny: Any) -> None:
    model = tiny.make("bart")
    batch = {**tiny.batch(), "decoder_input_ids": tiny.batch((4, 4, 4))["input_ids"]}
    found = audit(model, [batch], mechanisms=["elu"])
    row = found.layer("decoder.layers.0.encoder_attn")
    assert row.refused is not None
    assert (row.num_tokens, row.errors, row.uniform_rel_error) == (0, (), None)
    decided = plan(found, 0.99)
    by_layer = {r.layer: r for r in decided.rows}
    assert by_layer["decoder.layers.0.encoder_attn"].mechanism == "softmax"
    assert "cross-attention" in by_layer["decoder.layers.0.encoder_attn"].reason
    convert_(model, decided)


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
