"""Decoding with a state: equal to the full-sequence forward, whatever the way to the cache."""

import copy
import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from maclin.adopt import convert_, restore_
from maclin.adopt.hosts.cache import StateLayer
from maclin.core import mechanisms
from maclin.core.errors import CapabilityError, InputError

VOCAB = 50
TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SMALL: dict[str, Any] = {
    **TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    **TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 1,
}  # fmt: skip
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "LlamaForCausalLM": ("LlamaConfig", SMALL),
    "Qwen2ForCausalLM": ("Qwen2Config", SMALL),
    "Qwen3ForCausalLM": ("Qwen3Config", SMALL),
    "MistralForCausalLM": ("MistralConfig", {**SMALL, "sliding_window": None}),
}
SPEAKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BartForConditionalGeneration": ("BartConfig", {**SEQ2SEQ, "max_position_embeddings": 64}),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64},
    ),
}
STATEFUL = [name for name in mechanisms.names() if mechanisms.row(name).causal and name != "softmax"]


def made(name: str, **options: Any) -> Any:
    """A random model in float64, in which what is left is not rounding but an error."""
    import transformers

    family, config = {**DECODERS, **SPEAKERS}[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, family)(**{**config, **options})).eval().double()
    with torch.no_grad():  # initial weights are so small that attention would be all but uniform
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.generation_config.pad_token_id = 0
    return model


def left_padded(lengths: tuple[int, ...] = (11, 5, 8), seed: int = 0) -> dict[str, torch.Tensor]:
    longest = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def whole(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of one forward pass over everything, without a cache."""
    return model(**batch, position_ids=positions(batch["attention_mask"]), use_cache=False).logits


@torch.no_grad()
def in_chunks(model: Any, batch: dict[str, torch.Tensor], cuts: list[int], past: Any = None) -> tuple[Any, Any]:
    """Logits of chunk after chunk through a cache, and the cache."""
    place, parts, start = positions(batch["attention_mask"]), [], 0
    for stop in [*cuts, batch["input_ids"].shape[1]]:
        out = model(
            input_ids=batch["input_ids"][:, start:stop],
            attention_mask=batch["attention_mask"][:, :stop],
            position_ids=place[:, start:stop],
            past_key_values=past,
            use_cache=True,
        )
        parts.append(out.logits)
        past, start = out.past_key_values, stop
    return torch.cat(parts, 1), past


def close(one: torch.Tensor, other: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(one[kept], other[kept], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "mechanism"),
    [("LlamaForCausalLM", mechanism) for mechanism in STATEFUL]
    + [(name, mechanism) for name in DECODERS if "Llama" not in name for mechanism in ("macformer", "window", "rfa")],
)
def test_chunk_by_chunk_equals_the_whole_sequence(name: str, mechanism: str) -> None:
    model, batch = made(name), left_padded()
    convert_(model, mechanism)
    got, past = in_chunks(model, batch, [4, 5, 8, 9, 10])
    assert [type(layer) for layer in past.layers] == [StateLayer, StateLayer]
    close(got, whole(model, batch), batch)


@pytest.mark.parametrize("mechanism", [name for name in STATEFUL if mechanisms.row(name).linear])
def test_the_state_does_not_grow_with_the_context(mechanism: str) -> None:
    model = made("LlamaForCausalLM")
    convert_(model, mechanism)
    sizes = []
    for length in (3, 90):
        _, past = in_chunks(model, left_padded((length, 2)), [1])
        assert past.get_seq_length() == length
        sizes.append([layer.nbytes for layer in past.layers])
    assert sizes[0] == sizes[1]
    assert min(sizes[0]) > 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2},
                                     {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
                                     {"prefill_chunk_size": 4}], ids=lambda o: "-".join(o) or "greedy")  # fmt: skip
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_generating_with_the_state_equals_generating_without_a_cache(name: str, options: dict[str, Any]) -> None:
    model, batch = made(name), left_padded()
    convert_(model, "macformer")
    found = []
    for use_cache in (True, False):
        asked = {key: x for key, x in options.items() if use_cache or key != "prefill_chunk_size"}
        torch.manual_seed(1)
        out = model.generate(
            **batch, **asked, max_new_tokens=12, use_cache=use_cache, output_scores=True, return_dict_in_generate=True
        )
        found.append(out)
    with_state, without = found
    assert [type(layer) for layer in with_state.past_key_values.layers] == [StateLayer, StateLayer]
    assert torch.equal(with_state.sequences, without.sequences)
    for one, other in zip(with_state.scores, without.scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)  # generate keeps its scores in float32


@pytest.mark.parametrize("mechanism", ["macformer", "window"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Qwen3ForCausalLM"])
def test_exact_layers_keep_their_keys_beside_the_states(name: str, mechanism: str) -> None:
    model, batch = made(name, num_hidden_layers=3), left_padded()
    layers = [layer for layer, module in model.named_modules() if layer.endswith((".attn", ".self_attn"))]
    for exact in range(3):
        convert_(model, {layer: mechanism for i, layer in enumerate(layers) if i != exact})
        got, past = in_chunks(model, batch, [4, 5, 8, 9, 10])
        kinds = [DynamicLayer if i == exact else StateLayer for i in range(3)]
        assert [type(layer) for layer in past.layers] == kinds
        assert past.get_seq_length() == past.get_seq_length(exact) == 11
        close(got, whole(model, batch), batch)
        with_state, without = (model.generate(**batch, max_new_tokens=6, use_cache=use) for use in (True, False))
        assert torch.equal(with_state, without)


def test_softmax_keeps_the_layer_of_the_host() -> None:
    model, batch = made("LlamaForCausalLM"), left_padded()
    wanted = whole(model, batch)
    convert_(model, "softmax")
    got, past = in_chunks(model, batch, [4, 5, 8])
    assert [type(layer) for layer in past.layers] == [DynamicLayer, DynamicLayer]
    close(got, wanted, batch)


@pytest.mark.parametrize("with_config", [True, False])
def test_a_cache_made_by_hand_is_filled_with_states(with_config: bool) -> None:
    model, batch = made("LlamaForCausalLM"), left_padded()
    convert_(model, "favor")
    past = DynamicCache(config=model.config) if with_config else DynamicCache()
    got, same = in_chunks(model, batch, [4, 5], past)
    assert same is past
    assert [type(layer) for layer in past.layers] == [StateLayer, StateLayer]
    close(got, whole(model, batch), batch)


def test_a_cache_with_keys_of_the_same_model_is_read_as_it_is() -> None:
    model, batch = made("LlamaForCausalLM"), left_padded()
    convert_(model, "favor")
    wanted = whole(model, batch)
    keys: list[Any] = []
    handles = [
        module.register_forward_hook(lambda m, args, out: keys.append(args[1:3]))
        for module in model.modules()
        if isinstance(module, mechanisms.Mechanism)
    ]
    whole(model, {key: x[:, :7] for key, x in batch.items()})
    for handle in handles:
        handle.remove()
    past = DynamicCache(keys)
    late = model(
        input_ids=batch["input_ids"][:, 7:],
        attention_mask=batch["attention_mask"],
        position_ids=positions(batch["attention_mask"])[:, 7:],
        past_key_values=past,
    ).logits
    assert [type(layer) for layer in past.layers] == [DynamicLayer, DynamicLayer]
    torch.testing.assert_close(late, wanted[:, 7:], atol=1e-7, rtol=1e-6)


def test_a_conversation_goes_on_from_its_cache() -> None:
    model = made("LlamaForCausalLM")
    convert_(model, "macformer")
    ids = left_padded((9,))["input_ids"]
    past = DynamicCache(config=model.config)
    first = model.generate(ids, max_new_tokens=4, past_key_values=past)
    longer = torch.cat([first, ids[:, :3]], 1)
    second = model.generate(longer, max_new_tokens=5, past_key_values=past)
    assert past.get_seq_length() == second.shape[1] - 1
    assert torch.equal(second, model.generate(longer, max_new_tokens=5, use_cache=False))


def test_rows_can_be_reordered_repeated_selected_and_forgotten() -> None:
    model, batch = made("LlamaForCausalLM"), left_padded((7, 5, 6))
    convert_(model, "macformer")
    start = {key: x[:, :-1] for key, x in batch.items()}
    _, past = in_chunks(model, start, [2])

    def last(rows: list[int], change: Any) -> torch.Tensor:
        moved = copy.deepcopy(past)
        change(moved)
        mask = batch["attention_mask"][rows]
        with torch.no_grad():
            return model(
                input_ids=batch["input_ids"][rows, -1:],
                attention_mask=mask,
                position_ids=positions(mask)[:, -1:],
                past_key_values=moved,
            ).logits[:, -1]

    wanted = whole(model, batch)[:, -1]
    for rows, change in (
        ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
        ([2, 1], lambda cache: cache.batch_select_indices(torch.tensor([2, 1]))),
    ):
        torch.testing.assert_close(last(rows, change), wanted[rows], atol=1e-7, rtol=1e-6)
    past.reset()
    assert past.get_seq_length() == 0
    got, _ = in_chunks(model, batch, [2], past)
    close(got, whole(model, batch), batch)


@pytest.mark.parametrize("mechanism", ["macformer", "window", "favor"])
@pytest.mark.parametrize("name", SPEAKERS)
def test_an_encoder_decoder_speaks_with_states(name: str, mechanism: str) -> None:
    model = made(name)
    convert_(model, mechanism, filter_fn=lambda module, layer: "decoder" in layer and layer.endswith("self_attn"))
    if "Whisper" in name:
        source = {"input_features": torch.randn(2, 8, 24, dtype=torch.float64)}
    else:
        source = left_padded((9, 9))
    ids = left_padded((8, 8), seed=3)["input_ids"]
    with torch.no_grad():
        wanted = model(**source, decoder_input_ids=ids, use_cache=False).logits
        past, parts = None, []
        for start, stop in ((0, 3), (3, 4), (4, 6), (6, 7), (7, 8)):
            out = model(**source, decoder_input_ids=ids[:, start:stop], past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-7, rtol=1e-6)
    assert isinstance(past, EncoderDecoderCache)
    assert {type(layer) for layer in past.self_attention_cache.layers[:2]} == {StateLayer}
    assert {type(layer) for layer in past.cross_attention_cache.layers[:2]} == {DynamicLayer}
    main = source.pop("input_ids" if "input_ids" in source else "input_features")
    for options in ({}, {"num_beams": 3}):
        with_state, without = (
            model.generate(main, **source, max_new_tokens=9, use_cache=use, **options) for use in (True, False)
        )
        assert torch.equal(with_state, without)


def test_restored_the_cache_is_the_hosts_again() -> None:
    model, batch = made("LlamaForCausalLM"), left_padded()
    before = model.generate(**batch, max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    attributes = set(model.__dict__)
    convert_(model, "macformer")
    restore_(model)
    after = model.generate(**batch, max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(one, other) for one, other in zip(before.logits, after.logits, strict=True))
    assert [type(layer) for layer in after.past_key_values.layers] == [DynamicLayer, DynamicLayer]
    assert set(model.__dict__) == attributes
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_generates_on_its_own(again: Any) -> None:
    model, batch = made("LlamaForCausalLM"), left_padded()
    convert_(model, "macformer")
    wanted = model.generate(**batch, max_new_tokens=8)
    copied = again(model)
    restore_(model)
    out = copied.generate(**batch, max_new_tokens=8, return_dict_in_generate=True)
    assert torch.equal(out.sequences, wanted)
    assert [type(layer) for layer in out.past_key_values.layers] == [StateLayer, StateLayer]
    restore_(copied)
    assert torch.equal(copied.generate(**batch, max_new_tokens=8), model.generate(**batch, max_new_tokens=8))


@pytest.mark.parametrize("how", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_is_refused_before_it_starts(how: str) -> None:
    model, batch = made("LlamaForCausalLM"), left_padded((6,))
    options = {how: copy.deepcopy(model) if how == "assistant_model" else 2}
    convert_(model, "macformer")
    with pytest.raises(CapabilityError, match=r"sums over all tokens before.*assisted"):
        model.generate(**batch, max_new_tokens=4, **options)


def test_a_converted_model_cannot_assist() -> None:
    model, batch = made("LlamaForCausalLM"), left_padded((6,))
    assistant = copy.deepcopy(model)
    convert_(assistant, "macformer")
    with pytest.raises(CapabilityError, match="assisted"):
        model.generate(**batch, max_new_tokens=4, assistant_model=assistant)


@pytest.mark.parametrize("kind", ["static", "offloaded_static", "quantized"])
def test_other_kinds_of_cache_are_refused(kind: str) -> None:
    model, batch = made("LlamaForCausalLM"), left_padded((6,))
    convert_(model, "macformer")
    with pytest.raises(CapabilityError, match=rf"wanted a dynamic cache, got a {kind} cache.*leave cache_implement"):
        model.generate(**batch, max_new_tokens=4, cache_implementation=kind)


def test_a_static_cache_by_hand_is_refused() -> None:
    from transformers import StaticCache

    model, batch = made("LlamaForCausalLM"), left_padded((6,))
    convert_(model, "macformer")
    with pytest.raises(CapabilityError, match="got a StaticCache that keeps a fixed number of keys"):
        model(**batch, past_key_values=StaticCache(config=model.config, max_cache_len=20))


def test_what_a_state_cannot_give_is_refused() -> None:
    model, batch = made("LlamaForCausalLM"), left_padded((6,))
    convert_(model, "macformer")
    _, past = in_chunks(model, batch, [3])
    past.crop(0)
    with pytest.raises(CapabilityError, match="cropping"):
        past.crop(-1)
    with pytest.raises(CapabilityError, match="a state of constant size and no keys"):
        list(past)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = past.layers[0].nonsense


def test_a_cache_of_another_conversion_is_refused() -> None:
    model, batch = made("LlamaForCausalLM"), left_padded((6,))
    step = {"input_ids": batch["input_ids"][:, -1:]}
    convert_(model, "macformer")
    _, past = in_chunks(model, batch, [3])
    convert_(model, "elu")
    with pytest.raises(InputError, match=r"filled by \('macformer'.*'elu'.*new cache"):
        model(**step, past_key_values=past)
    restore_(model)
    with pytest.raises(InputError, match="not converted"):
        model(**step, past_key_values=past)


def test_a_call_that_failed_spoils_its_cache() -> None:
    model, batch = made("LlamaForCausalLM"), left_padded((6,))
    convert_(model, "macformer")
    _, past = in_chunks(model, batch, [3])
    step = {"input_ids": batch["input_ids"][:, -1:], "past_key_values": past}
    broken = next(module for module in model.modules() if isinstance(module, mechanisms.Mechanism))
    handle = broken.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        model(**step)
    handle.remove()
    with pytest.raises(CapabilityError, match=r"did not reach.*that call failed.*new cache"):
        model(**step)


def test_training_goes_through_the_states() -> None:
    """use_cache is on by default, so a plain forward in train mode makes a cache, too."""
    model, batch = made("LlamaForCausalLM", attention_dropout=0.0), left_padded((8, 8))
    convert_(model, "elu")
    model.train()
    grads = []
    for use_cache in (True, False):
        model.zero_grad()
        model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=use_cache).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)
