"""Mechanisms that learn from data: on which tokens, in the audit and in the conversion."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from maclin.adopt import audit, calibrated_layers, capture, convert_, default_candidates, plan, restore_
from maclin.adopt import calibrate as calibrate_of
from maclin.adopt.calibrate import for_learning, learned, needs_data, sampled, short_config
from maclin.adopt.exact import exact_attention
from maclin.adopt.hosts import host
from maclin.core import mechanisms
from maclin.core.errors import InputError, OptionError
from maclin.core.mechanisms.base import calibrate
from maclin.records import Audit, Plan, from_json, to_json

RAW = ("macformer", {"ppsbn": False, "num_features": 20})


def documents(tiny: Any, number: int = 6, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of two documents of different lengths."""
    return [tiny.batch((30, 24), seed=seed + i) for i in range(number // 2)]


def sequences(model: Any, batches: list[dict[str, Tensor]], layer: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of each document by itself, without padding."""
    found = []
    for call in capture(model, batches).calls[layer]:
        assert call.key_mask is not None
        for b in range(call.q.shape[0]):
            real = call.key_mask[b]
            found.append(tuple(x[b : b + 1, :, real] for x in (call.q, call.k, call.v)))
    return found


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_learns_is_measured_on_documents_it_has_not_seen(tiny: Any, name: str) -> None:
    model, batches = tiny.make(name), documents(tiny)
    found = audit(model, batches, [RAW, "elu"])
    row = found.layers[1]
    every = sequences(model, batches, row.layer)
    sizes = {"head_dim": 8, "num_heads": 4, "num_kv_heads": row.num_kv_heads}
    longest = max(k.shape[2] for _, k, _ in every)
    taken = [parts for i, parts in enumerate(every) if i % 3 == 2]
    q, k, v = (
        torch.cat([torch.nn.functional.pad(parts[j], (0, 0, 0, longest - parts[j].shape[2])) for parts in taken])
        for j in range(3)
    )
    mask = torch.stack([torch.arange(longest) < parts[1].shape[2] for parts in taken])
    causal = name == "llama"
    mech = calibrate(mechanisms.mechanism(RAW[0], **sizes, **RAW[1]), q, k, v, mask, is_causal=causal)
    for number, tried in ((0, mech), (1, mechanisms.mechanism("elu", **sizes))):
        wrong = exact = 0.0
        for i, (q, k, v) in enumerate(every):
            if i % 3 == 2:
                continue
            groups = 4 // row.num_kv_heads
            out = torch.nn.functional.scaled_dot_product_attention(
                q.double(),
                k.double().repeat_interleave(groups, 1),
                v.double().repeat_interleave(groups, 1),
                is_causal=causal,
            )
            wrong += float((tried(q, k, v, is_causal=causal) - out).square().sum())
            exact += float(out.square().sum())
        assert row.errors[number].rel_error == pytest.approx((wrong / exact) ** 0.5, rel=1e-3)
    error = row.errors[0]
    assert (error.asked, error.config) == (RAW[1], short_config(mech))
    assert error.config["centred"] is True
    assert sum(error.config["counts"]) <= 20
    assert (found.num_documents, found.num_calibration_documents) == (4, 2)
    assert row.num_tokens == 30 + 24 + 24 + 30  # documents 0, 1, 3 and 4
    assert from_json(Audit, to_json(found)) == found


def test_without_anything_that_learns_all_documents_are_measured(tiny: Any) -> None:
    model, batches = tiny.make("bert"), documents(tiny)
    found = audit(model, batches, ["elu", ("macformer", {"estimator": "published"})])
    assert (found.num_documents, found.num_calibration_documents) == (6, 0)
    assert all(error.asked is None for error in found.layers[0].errors)
    assert found == audit(model, iter(batches), ["elu", ("macformer", {"estimator": "published"})])


def test_too_few_documents_to_learn_from_is_a_reason(tiny: Any) -> None:
    model = tiny.make("bert")
    found = audit(model, [tiny.batch((30, 30))], ["macformer", "elu"])
    assert "at least 3 documents" in str(found.layers[0].errors[0].reason)
    assert (found.layers[0].num_tokens, found.num_calibration_documents) == (60, 0)
    short = audit(model, [tiny.batch((9, 9, 9))], ["macformer", "elu"]).layers[0]
    assert "9 tokens to calibrate on" in str(short.errors[0].reason)
    assert short.num_tokens == 27  # nothing has learned, so nothing need be kept apart


def test_an_iterator_of_batches_is_enough(tiny: Any) -> None:
    model, batches = tiny.make("bert"), documents(tiny)
    assert audit(model, iter(batches), [RAW]) == audit(model, batches, [RAW])


def test_progress_tells_of_calibrated_layers(tiny: Any) -> None:
    model, done, layers = tiny.make("bert"), list[int](), list[str]()
    audit(model, documents(tiny), [RAW], progress=done.append, calibrating=layers.append)
    assert (done, layers) == ([1, 2, 3], [layer.name for layer in host(model).layers()])


def test_the_sample_of_a_layer_is_bounded_and_spread(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_of, "SEQUENCES", 4)
    monkeypatch.setattr(calibrate_of, "LENGTH", 10)
    model = tiny.make("bert")
    batches = [tiny.batch((30, 6), seed=i) for i in range(6)]
    layers = host(model).layers()
    (_, sample), (_, other) = sampled(model, batches, layers)
    every = sequences(model, batches, layers[0].name)
    assert sample.key_mask is not None
    assert sample.key_mask.sum(1).tolist() == [10, 10, 10]  # documents 0, 4 and 8, cut
    for row, document in enumerate((0, 4, 8)):
        torch.testing.assert_close(sample.k[row], every[document][1][0, :, :10], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(calibrate_of, "HELD_BYTES", 1)  # then each layer takes a run of its own
    again = [call for _, call in sampled(model, batches, layers)]
    assert torch.equal(again[0].q, sample.q)
    assert torch.equal(again[1].q, other.q)


def test_a_shared_module_learns_from_all_its_calls(tiny: Any) -> None:
    model = tiny.make("albert")
    ((layer, sample),) = sampled(model, [tiny.batch((11, 5))], host(model).layers())
    assert layer.calls == 3
    assert sample.key_mask is not None
    assert sorted(sample.key_mask.sum(1).tolist()) == [5, 5, 5, 11, 11, 11]
    convert_(model, *RAW[:1], batches=documents(tiny), **RAW[1])
    (made,) = [m for m in model.modules() if isinstance(m, mechanisms.Mechanism)]
    assert made.config["centred"] is True


def test_conversion_calibrates_on_the_layers_own_q_k_v(tiny: Any) -> None:
    model, batches, held_out = tiny.make("bert"), documents(tiny), tiny.batch((30, 28), seed=9)
    before, keys = tiny.hidden(model, held_out), list(model.state_dict())
    exact = copy.deepcopy(model)
    convert_(model, "macformer", batches=iter(batches), **RAW[1])
    made: dict[str, Any] = {
        n.removesuffix(".maclin_mechanism"): m for n, m in model.named_modules() if n.endswith("maclin_mechanism")
    }
    errors = []
    for name, calls in capture(exact, [held_out]).calls.items():
        (call,) = calls
        plain = mechanisms.mechanism("macformer", head_dim=8, num_heads=4, **RAW[1])
        out = exact_attention(call).out
        own, without = (
            float((mech(call.q, call.k, call.v, key_mask=call.key_mask) - out).norm() / out.norm())
            for mech in (made[name], plain)
        )
        errors.append((own, without))
    assert all(own < without for own, without in errors)
    restore_(model)
    assert torch.equal(tiny.hidden(model, held_out), before)
    assert list(model.state_dict()) == keys


def test_a_calibrated_plan_needs_data_and_then_does_what_it_says(tiny: Any) -> None:
    model, batches = tiny.make("bert"), documents(tiny)
    decided = plan(audit(model, batches, [RAW]), tolerance=0.99, length=4096)
    decided = from_json(Plan, to_json(decided))
    assert {row.mechanism for row in decided.rows} == {"macformer"}
    keys = list(model.state_dict())
    with pytest.raises(OptionError, match="pass batches="):
        convert_(model, decided)
    with pytest.raises(OptionError, match="pass batches="):
        convert_(model, {row.layer: (row.mechanism, row.config) for row in decided.rows})
    assert list(model.state_dict()) == keys
    assert convert_(model, decided, batches=batches) == decided
    made = [m for m in model.modules() if isinstance(m, mechanisms.Mechanism)]
    assert [m.config["counts"] for m in made] == [row.config["counts"] for row in decided.rows]
    other = tiny.make("bert")
    convert_(other, decided, uncalibrated=True)
    assert not torch.equal(tiny.hidden(other, batches[0]), tiny.hidden(model, batches[0]))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(tiny.hidden(other, batches[0]), tiny.hidden(model, batches[0]), atol=1e-6, rtol=0)


def test_a_plan_of_running_statistics_needs_data_too(tiny: Any) -> None:
    model, batches = tiny.make("bert"), documents(tiny)
    statistics = ("macformer", {"ppsbn": "batch", "estimator": "taylor"})
    decided = plan(audit(model, batches, [statistics]), tolerance=0.999, length=4096)
    assert {row.mechanism for row in decided.rows} == {"macformer"}
    with pytest.raises(OptionError, match="pass batches="):
        convert_(model, decided)
    convert_(model, decided, batches=batches)
    made: list[Any] = [m for m in model.modules() if isinstance(m, mechanisms.Mechanism)]
    assert all(float(m.q_statistics.running_mean.abs().max()) > 0 for m in made)


def test_too_few_tokens_leave_the_model_alone(tiny: Any) -> None:
    model = tiny.make("bert")
    keys = list(model.state_dict())
    with pytest.raises(InputError, match=r"layer\.0\..*5 tokens to calibrate on"):
        convert_(model, "macformer", batches=[tiny.batch((5,))])
    assert list(model.state_dict()) == keys
    assert not host(model).converted


def test_auto_audits_plans_and_converts(tiny: Any) -> None:
    model, batches = tiny.make("bert"), documents(tiny)
    options = {"tolerance": 0.97, "length": 4096, "mechanisms": [RAW, "efficient"]}
    decided = convert_(model, "auto", batches=iter(batches), **options)
    assert isinstance(decided, Plan)
    assert decided == plan(audit(tiny.make("bert"), batches, [RAW, "efficient"]), 0.97, 4096)
    found = {n: m.name for n, m in model.named_modules() if isinstance(m, mechanisms.Mechanism)}
    assert found == {f"{r.layer}.maclin_mechanism": r.mechanism for r in decided.rows if r.mechanism != "softmax"}
    assert found
    restore_(model)
    for arguments, message in (({}, "pass batches="), ({"batches": batches, "window": 3}, "no option 'window'")):
        with pytest.raises(OptionError, match=message):
            convert_(model, "auto", **arguments)
    assert not host(model).converted


def test_auto_is_no_mechanism_of_its_own() -> None:
    with pytest.raises(OptionError, match=r"maclin\.choose.*convert_"):
        mechanisms.mechanism("auto", head_dim=8, num_heads=4)


def test_a_tolerance_that_is_out_of_reach_keeps_the_layer_exact(tiny: Any) -> None:
    asked = {"ppsbn": False, "num_features": "auto", "tolerance": 0.001}
    found = audit(tiny.make("bert"), documents(tiny), [("macformer", asked), "elu"])
    error = found.layers[0].errors[0]
    assert error.reached is False
    assert error.rel_error is not None
    assert "radius" in error.note
    row = plan(found, tolerance=0.999, length=10**6, costs="operations").rows[0]  # measured, it would be within this
    assert row.mechanism in ("elu", "softmax")
    assert "radius" in row.reason
    alternative = next(a for a in row.alternatives if a.mechanism == "macformer")
    assert (alternative.within_tolerance, alternative.note) == (False, error.note)


def test_ready_mechanisms_are_taken_again_and_again(tiny: Any) -> None:
    model, batches = tiny.make("bert"), documents(tiny)
    first = host(model).layers()[0].name
    ready = calibrated_layers(model, {first: RAW}, batches)
    assert not host(model).converted
    convert_(model, ready)
    once = tiny.hidden(model, batches[0])
    restore_(model)
    convert_(model, ready)
    assert torch.equal(tiny.hidden(model, batches[0]), once)


def test_learning_is_the_same_every_time(tiny: Any) -> None:
    model = tiny.make("bert")
    ((_, sample),) = sampled(model, documents(tiny), host(model).layers()[:1])
    drawn = mechanisms.mechanism("macformer", head_dim=8, num_heads=4, unbiased=True, num_features=24)
    state = torch.get_rng_state()
    one, other = learned(drawn, sample), learned(drawn, sample)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert one.learns_from_data


def test_what_is_tried_by_default() -> None:
    tried = default_candidates(16)
    assert {name for name, _ in tried} == set(mechanisms.names()) - {"softmax", "by_head"}
    assert [config for name, config in tried if name == "macformer"] == [
        {},
        {"ppsbn": False, "num_features": 64},
        {"ppsbn": False, "num_features": 128},
    ]
    learns = [name for name in mechanisms.names() if mechanisms.mechanism(name, **_sizes(name)).learns_from_data]
    assert learns == ["macformer", "hedgehog", "hybrid"]
    assert [d for d in range(7) if for_learning(d)] == [2, 5]


def _sizes(name: str) -> dict[str, Any]:
    pooled = {"projection": "mean-pool"} if name == "linformer" else {}
    return {"head_dim": 8, "num_heads": 4, **pooled}


def config_of(hybrid: Any) -> dict[str, Any]:
    """Everything that the linear part was built with."""
    return hybrid.linear.config


def test_a_hybrid_says_what_is_not_default_and_its_window() -> None:
    sizes = {"head_dim": 8, "num_heads": 2}
    made = mechanisms.mechanism(
        "hybrid", **sizes, linear_options={"ppsbn": False, "num_features": 24, "centred": False}
    )
    assert short_config(made) == {"window": 64, "linear_options": {"ppsbn": False, "num_features": 24}}
    assert mechanisms.mechanism("hybrid", **sizes, **made.config).config == made.config
    whole = {**made.config, "linear_options": config_of(made)}  # as earlier versions wrote it
    old = mechanisms.mechanism("hybrid", **sizes, **whole)
    assert config_of(old) == config_of(made)
    assert old.config == made.config


def test_a_calibrated_hybrid_is_built_from_what_it_says() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 400, 8) for _ in range(3))
    taught = calibrate(mechanisms.mechanism("hybrid", head_dim=8, num_heads=2, window=5), q, k, v)
    said = short_config(taught)
    assert needs_data(said)
    assert set(said["linear_options"]) == {"ppsbn", "num_features", "counts", "centred"}
    built = mechanisms.mechanism("hybrid", head_dim=8, num_heads=2, **said)
    built.load_state_dict(taught.state_dict())
    torch.testing.assert_close(built(q, k, v), taught(q, k, v))
