import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maclin.adopt import audit, capture, default_candidates, default_config
from maclin.adopt.capture import token_mask
from maclin.adopt.exact import exact_attention, uniform_attention
from maclin.adopt.hosts import host
from maclin.adopt.hosts.base import AttentionCall
from maclin.core import mechanisms
from maclin.core.errors import CapabilityError, InputError, OptionError
from maclin.records import Audit, from_json, to_json

CHEAP = ["mean", "elu", ("window", {"window": 4})]


def projections(model: Any, hidden: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a tiny BERT's layer in float64, written out: (B, H, N, D)."""
    attention = model.encoder.layer[layer].attention.self
    parts = []
    for linear in (attention.query, attention.key, attention.value):
        x = hidden.double() @ linear.weight.double().T + linear.bias.double()
        parts.append(x.view(*hidden.shape[:2], 4, 8).transpose(1, 2))
    return parts[0], parts[1], parts[2]


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention output, weights and logits in float64; ``allowed`` (B, N, S)."""
    logits = torch.einsum("bhnd,bhsd->bhns", q, k) / math.sqrt(q.shape[-1])
    weights = logits.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhns,bhsd->bhnd", weights, v), weights, logits


@torch.no_grad()
def expected(model: Any, batches: list[dict[str, Tensor]], layer: int, name: str) -> dict[str, Any]:
    """Errors and statistics of one layer of a tiny BERT, computed token by token."""
    sums: dict[str, Any] = {"exact": 0.0, "wrong": 0.0, "uniform": 0.0, "rows": []}
    for batch in batches:
        hidden = model(**batch, output_hidden_states=True).hidden_states[layer]
        q, k, v = projections(model, hidden, layer)
        for b, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            one = slice(b, b + 1), slice(None), slice(0, length)
            out, weights, logits = dense(q[one], k[one], v[one], torch.ones(1, length, length, dtype=torch.bool))
            mech = mechanisms.mechanism(name, head_dim=8, num_heads=4).double()
            sums["exact"] = sums["exact"] + out.square().sum((0, 2, 3))
            sums["wrong"] = sums["wrong"] + (mech(q[one], k[one], v[one]) - out).square().sum((0, 2, 3))
            sums["uniform"] = sums["uniform"] + (v[one].mean(2, keepdim=True) - out).square().sum((0, 2, 3))
            if length > 1:
                entropy = -(weights * weights.log()).sum(-1) / math.log(length)
                spread = logits.std(-1, correction=0)
                sums["rows"].append(
                    torch.stack([entropy[0], spread[0], q[one].norm(dim=-1)[0], k[one].norm(dim=-1)[0]])
                )
    return sums


@pytest.mark.parametrize("layer", [0, 1])
def test_errors_and_statistics_equal_a_dense_computation(tiny: Any, layer: int) -> None:
    model = tiny.make("bert")
    batches = [tiny.batch((11, 5, 8)), tiny.batch((6, 9), seed=1)]
    row = audit(model, batches, mechanisms=["elu", "mean"]).layers[layer]
    wanted = expected(model, batches, layer, "elu")
    exact, wrong, uniform = wanted["exact"], wanted["wrong"], wanted["uniform"]
    assert row.num_tokens == 39
    assert row.errors[0].rel_error == pytest.approx(math.sqrt(wrong.sum() / exact.sum()), rel=1e-4)
    assert row.errors[0].rel_error_by_head == pytest.approx((wrong / exact).sqrt().tolist(), rel=1e-4)
    assert row.uniform_rel_error == pytest.approx(math.sqrt(uniform.sum() / exact.sum()), rel=1e-4)
    assert row.uniform_rel_error_by_head == pytest.approx((uniform / exact).sqrt().tolist(), rel=1e-4)
    assert row.errors[1].rel_error == pytest.approx(row.uniform_rel_error, rel=1e-4)
    rows = torch.cat(wanted["rows"], dim=-1)  # (4 statistics, H, tokens)
    for head, found in enumerate(row.heads):
        entropy, spread, q_norm, k_norm = rows[:, head]
        assert found.entropy_ratio == pytest.approx(float(entropy.mean()), rel=1e-4)
        assert found.logit_std == pytest.approx(float(spread.mean()), rel=1e-4)
        assert found.q_norm == pytest.approx(float(q_norm.square().mean().sqrt()), rel=1e-4)
        assert found.k_norm == pytest.approx(float(k_norm.square().mean().sqrt()), rel=1e-4)
        assert found.radius == pytest.approx(float(q_norm.max() * k_norm.max()) / math.sqrt(8), rel=1e-4)


def test_blocks_do_not_matter(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from maclin.adopt import exact

    model, batches = tiny.make("llama"), [tiny.batch((30, 17), "left")]
    whole = audit(model, batches, mechanisms=CHEAP)
    monkeypatch.setattr(exact, "_BLOCK_NUMBERS", 1000)
    for one, other in zip(whole.layers, audit(model, batches, mechanisms=CHEAP).layers, strict=True):
        assert one.uniform_rel_error == pytest.approx(other.uniform_rel_error, rel=1e-5)
        assert one.heads[0].entropy_ratio == pytest.approx(other.heads[0].entropy_ratio, rel=1e-5)
        assert [e.rel_error for e in one.errors] == pytest.approx([e.rel_error for e in other.errors], rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padding_and_batching_do_not_matter(tiny: Any, name: str) -> None:
    model = tiny.make(name)
    lengths = (11, 5, 8)
    together = tiny.batch(lengths)
    apart = [{key: x[i : i + 1, :n] for key, x in together.items()} for i, n in enumerate(lengths)]
    for one, other in zip(audit(model, [together], CHEAP).layers, audit(model, apart, CHEAP).layers, strict=True):
        assert one.num_tokens == other.num_tokens == 24
        assert [e.rel_error for e in one.errors] == pytest.approx([e.rel_error for e in other.errors], rel=1e-4)


def test_causal_layers_are_compared_with_causal_attention(tiny: Any) -> None:
    model, batch = tiny.make("gpt2"), tiny.batch((7,))
    calls = capture(model, [batch]).calls["h.0.attn"]
    q, k, v = (x.double() for x in (calls[0].q, calls[0].k, calls[0].v))
    past = torch.ones(7, 7, dtype=torch.bool).tril()
    out, _, _ = dense(q, k, v, past[None])
    uniform = (past.double() / past.sum(1, keepdim=True)) @ v
    row = audit(model, [batch], mechanisms=["softmax", "linformer", "mean"]).layers[0]
    assert row.uniform_rel_error == pytest.approx(float((uniform - out).norm() / out.norm()), rel=1e-4)
    assert row.errors[0].rel_error == pytest.approx(0.0, abs=1e-5)
    assert row.errors[1].rel_error is None
    assert "causal" in str(row.errors[1].reason)
    assert row.errors[2].rel_error == pytest.approx(row.uniform_rel_error, rel=1e-4)


def test_fewer_queries_than_keys_are_the_last_ones() -> None:
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((4, 3), (2, 7), (2, 7)))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :5] = False
    call = AttentionCall("a", q, k, v, mask, True, None)
    allowed = torch.ones(3, 7, dtype=torch.bool).tril(4)[None] & mask[:, None]
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    real = allowed.any(-1)
    assert torch.equal(real, token_mask(call))
    out, _, _ = dense(q, k, v, allowed)
    uniform = (allowed / allowed.sum(-1, keepdim=True).clamp_min(1)).double()[:, None] @ v
    for found, wanted in ((exact_attention(call).out, out), (uniform_attention(call), uniform)):
        torch.testing.assert_close(found.mT[:, :, :, 1:], wanted.mT[:, :, :, 1:])
    assert not exact_attention(call).out[1, :, 0].any()


def test_every_registered_mechanism_is_tried(tiny: Any) -> None:
    found = audit(tiny.make("bert"), [tiny.batch((30, 20))])
    assert [(e.mechanism, e.config) for e in found.layers[0].errors] == default_candidates(8)
    for error in found.layers[0].errors:
        assert (error.rel_error is None) == (error.reason is not None)
        assert len(error.rel_error_by_head) == (0 if error.rel_error is None else 4)
    linformer = next(e for e in found.layers[0].errors if e.mechanism == "linformer")
    assert linformer.config == default_config("linformer", 8) == {"projection": "mean-pool", "proj_len": 16}
    assert from_json(Audit, to_json(found)) == found


def test_a_mechanism_that_cannot_be_built_or_run_keeps_its_reason(tiny: Any) -> None:
    wanted = [("linformer", {"seq_len": 4, "projection": "learned"}), ("window", {"window": 0})]
    errors = audit(tiny.make("bert"), [tiny.batch()], mechanisms=wanted).layers[0].errors
    assert [e.rel_error for e in errors] == [None, None]
    assert "seq_len" in str(errors[0].reason)
    assert "window is 0" in str(errors[1].reason)


def test_guarded_denominators_are_counted(tiny: Any) -> None:
    errors = audit(tiny.make("bert"), [tiny.batch()], mechanisms=["taylor", "window"]).layers[0].errors
    assert errors[0].negative_share is not None
    assert 0 < errors[0].negative_share <= 1
    assert errors[1].negative_share is None


def test_the_model_is_left_as_it_was(tiny: Any) -> None:
    model, batch = tiny.make("bert").train(), tiny.batch()
    model.encoder.layer[0].eval()
    modes = [m.training for m in model.modules()]
    keys, implementation = list(model.state_dict()), model.config._attn_implementation
    audit(model, [batch], mechanisms=["elu"])
    assert [m.training for m in model.modules()] == modes
    assert (list(model.state_dict()), model.config._attn_implementation) == (keys, implementation)


def test_a_converted_model_is_audited_with_exact_attention(tiny: Any) -> None:
    from maclin.adopt import convert_

    model, batch = tiny.make("bert"), tiny.batch()
    before = audit(model, [batch], mechanisms=["elu"])
    convert_(model, "mean")
    converted = tiny.hidden(model, batch)
    after = audit(model, [batch], mechanisms=["elu"])
    assert after.layers[1].errors[0].rel_error == pytest.approx(before.layers[1].errors[0].rel_error, rel=1e-4)
    assert torch.equal(tiny.hidden(model, batch), converted)


def test_shared_layers_are_one_row_over_all_calls(tiny: Any) -> None:
    found = audit(tiny.make("albert"), [tiny.batch((11, 5))], mechanisms=["elu"])
    assert len(found.layers) == 1
    assert (found.layers[0].num_tokens, found.num_documents, found.length) == (16, 2, 11)


def test_images_are_audited(tiny: Any) -> None:
    found = audit(tiny.make("vit"), [tiny.images()], mechanisms=["mean"])
    assert [row.num_tokens for row in found.layers] == [34, 34]
    assert found.layers[0].errors[0].rel_error == pytest.approx(found.layers[0].uniform_rel_error, rel=1e-4)


def test_a_small_calibration_set_is_a_warning(tiny: Any) -> None:
    found = audit(tiny.make("bert"), [tiny.batch()], mechanisms=["elu"])
    assert "3 documents, 24 tokens" in found.warnings[0]
    assert (found.num_documents, found.length, found.architecture) == (3, 11, "BertModel")


def test_progress_is_reported(tiny: Any) -> None:
    seen: list[int] = []
    audit(tiny.make("bert"), [tiny.batch(), tiny.batch(seed=1)], mechanisms=["mean"], progress=seen.append)
    assert seen == [1, 2]


def test_unknown_mechanisms_are_refused(tiny: Any) -> None:
    with pytest.raises(OptionError, match="known are softmax"):
        audit(tiny.make("bert"), [tiny.batch()], mechanisms=["lineer"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_found(tiny: Any, value: float) -> None:
    model = tiny.make("bert")
    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.bias[3] = value
    for look in (lambda: audit(model, [tiny.batch()], ["elu"]), lambda: capture(model, [tiny.batch()])):
        with pytest.raises(InputError, match=r"k of layer 'encoder\.layer\.1\.attention\.self'.*batch 0"):
            look()


def test_lack_of_memory_is_one_sentence(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from maclin.core.errors import MaclinError

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    model = tiny.make("bert")
    monkeypatch.setattr(model.encoder, "forward", fail)
    with pytest.raises(MaclinError, match=r"\(3, 11\) does not fit in memory"):
        host(model).observe(tiny.batch(), {}, lambda call: None)


def test_captured_tensors_are_those_of_the_model(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    captured = capture(model, [batch, tiny.batch(seed=1)])
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[1]
    (call, _) = captured.calls["encoder.layer.1.attention.self"]
    for mine, theirs in zip((call.q, call.k, call.v), projections(model, hidden, 1), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-4, rtol=1e-4)
    assert call.key_mask is not None
    assert torch.equal(call.key_mask, batch["attention_mask"].bool())
    assert (call.is_causal, call.scale) == (False, None)


def test_capture_keeps_the_named_layers_up_to_a_limit(tiny: Any) -> None:
    model = tiny.make("llama")
    batches = [tiny.batch(seed=seed) for seed in range(4)]
    captured = capture(model, batches, layers=["layers.1.self_attn"], max_tokens=40)
    assert list(captured.calls) == ["layers.1.self_attn"]
    assert len(captured.calls["layers.1.self_attn"]) == 2
    assert captured.calls["layers.1.self_attn"][0].k.shape == (3, 2, 11, 8)
    assert len(captured.layers) == 2
    with pytest.raises(InputError, match=r"layers\.0\.self_attn"):
        capture(model, batches, layers=["layer"])
    with pytest.raises(InputError, match="max_tokens"):
        capture(model, batches, max_tokens=0)
    with pytest.raises(InputError, match="got none"):
        capture(model, [])


def test_a_scale_of_the_hosts_own_is_passed_on(tiny: Any) -> None:
    model, batch = tiny.make("gpt2", scale_attn_by_inverse_layer_idx=True), tiny.batch()
    calls = capture(model, [batch]).calls
    assert [calls[name][0].scale for name in ("h.0.attn", "h.1.attn")] == [None, pytest.approx(8**-0.5 / 2)]


def test_inputs_that_cannot_be_made_up_are_asked_for(tiny: Any) -> None:
    model = tiny.make("bert")
    model.main_input_name = "input_values"
    with pytest.raises(CapabilityError, match="pass batch="):
        host(model).layers()
    assert len(host(model).layers(tiny.batch())) == 2
    assert replace(host(model).layers(tiny.batch())[0], calls=1).refused is None
