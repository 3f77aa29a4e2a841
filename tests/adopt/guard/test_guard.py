"""A guarded model: what stays as it is, what is answered exactly, what is counted, and inputs made to break it."""

import copy
import io
import math
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maclin
from maclin.adopt.guard import Flag, Guard, GuardWarning, guard, unguard
from maclin.core import reference
from maclin.core.errors import InputError, MaclinError, OptionError
from maclin.core.mechanisms import Mechanism, mechanism

HUGE = 1e9


class Attention(nn.Module):
    """One layer that is given q, k and v, so that a test can choose them."""

    def __init__(self, name: str = "elu", heads: int = 4, key_heads: int = 2, width: int = 8, **options: Any) -> None:
        super().__init__()
        self.maclin_mechanism = mechanism(name, head_dim=width, num_heads=heads, num_kv_heads=key_heads, **options)
        self.eval()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return self.maclin_mechanism(q, k, v, **options)


def made(batch: int = 2, n: int = 200, size: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, 4, n, 8), (batch, 2, n, 8), (batch, 2, n, 8)
    q, k, v = (torch.randn(shape, generator=g) for shape in shapes)
    return size * q, k, v + 1


def guarding(model: nn.Module, **options: Any) -> Guard:
    """Every call is checked, however short: a tiny model takes less time than the guard."""
    return guard(model, **{"max_share": None, **options})


def only(watching: Guard) -> Any:
    (layer,) = watching.record().layers
    return layer


def true_error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


# a model that is watched stays what it is


@pytest.mark.parametrize("name", ["bert", "llama", "albert"])
def test_outputs_keys_and_restoring_stay_as_they_were(tiny: Any, name: str) -> None:
    model, batch = tiny.make(name), tiny.batch((30, 12, 21))
    before = tiny.hidden(model, batch)
    maclin.convert_(model, "elu")
    converted, keys = tiny.hidden(model, batch), list(model.state_dict())
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    watching = maclin.guard(model, tolerance=HUGE, max_share=None)
    assert torch.equal(tiny.hidden(model, batch), converted)
    assert list(model.state_dict()) == keys
    assert all(layer.checked == 3 * layer.calls > 0 for layer in watching.record().layers)
    maclin.unguard(model)
    assert not watching.active
    assert torch.equal(tiny.hidden(model, batch), converted)
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == hooks
    assert all("forward" not in vars(module) for module in model.modules())
    guarding(model, tolerance=0.01)
    maclin.restore_(model)
    assert torch.equal(tiny.hidden(model, batch), before)
    unguard(model)
    assert torch.equal(tiny.hidden(model, batch), before)


def test_layers_go_by_their_names_and_exact_ones_are_left_alone(tiny: Any) -> None:
    model = tiny.make("bert")
    first, second = (f"encoder.layer.{i}.attention.self" for i in range(2))
    maclin.convert_(model, {first: "softmax", second: "elu"})
    assert list(guard(model).watches) == [second]
    unguard(model)
    maclin.convert_(model, "elu")
    assert list(guard(model).watches) == [first, second]
    watching = guarding(model, tolerance={second: 0.3})
    assert {name: watch.tolerance for name, watch in watching.watches.items()} == {second: 0.3}


def test_a_guarded_model_is_not_converted_again(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch((30, 12))
    before = tiny.hidden(model, batch)
    maclin.convert_(model, "elu")
    converted = tiny.hidden(model, batch)
    watching = guarding(model, tolerance=1e-6)
    with pytest.raises(MaclinError, match=r"call maclin\.unguard first"):
        maclin.convert_(model, "favor")
    assert watching.active
    torch.testing.assert_close(tiny.hidden(model, batch), before, atol=1e-5, rtol=0)
    unguard(model)
    assert torch.equal(tiny.hidden(model, batch), converted)
    maclin.convert_(model, "favor")
    with guarding(model, tolerance=1e-6) as watching:
        assert [layer.mechanism for layer in watching.record().layers] == ["favor", "favor"]
        torch.testing.assert_close(tiny.hidden(model, batch), before, atol=1e-5, rtol=0)


def test_restoring_leaves_the_guard_behind_and_it_says_so(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch((30, 12))
    before = tiny.hidden(model, batch)
    maclin.convert_(model, "elu")
    watching = guarding(model, tolerance=1e-6)
    assert all(layer.attached for layer in watching.record().layers)
    maclin.restore_(model)
    assert torch.equal(tiny.hidden(model, batch), before)
    assert not any(layer.attached or layer.calls for layer in watching.record().layers)
    unguard(model)
    assert not any(layer.attached for layer in watching.record().layers)


def test_a_mechanism_made_of_others_is_one_layer() -> None:
    model = Attention("hybrid", window=4, linear="favor")
    with guarding(model, tolerance=HUGE) as watching:
        model(*made(), is_causal=True)
    assert only(watching).mechanism == "hybrid"
    assert only(watching).checked == 2


def test_the_block_ends_the_guard_even_with_an_error() -> None:
    model = Attention()
    with pytest.raises(RuntimeError, match="stop"), guard(model) as watching:
        raise RuntimeError("stop")
    assert not watching.active
    with pytest.raises(MaclinError, match="not"):
        unguard(model)


def test_guarding_again_replaces() -> None:
    model = Attention()
    first = guarding(model, tolerance=HUGE)
    second = guarding(model, tolerance=HUGE)
    model(*made())
    assert (only(first).calls, only(second).calls) == (0, 1)
    first.remove()
    assert second.active
    unguard(model)


def test_copies_are_guarded_on_their_own(tiny: Any) -> None:
    model, batch = tiny.make("bert"), tiny.batch()
    maclin.convert_(model, "favor")
    converted = tiny.hidden(model, batch)
    watching = guarding(model, tolerance=HUGE, on_flag=threading.Lock)  # what cannot be copied stays behind
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert torch.equal(tiny.hidden(other, batch), converted)
        assert watching.record().layers[0].calls == 0
        unguard(other)
        assert torch.equal(tiny.hidden(other, batch), converted)
    assert watching.active


def test_a_state_dict_goes_from_a_guarded_model_into_one_that_is_not(tiny: Any) -> None:
    model, other = tiny.make("bert"), tiny.make("bert")
    for one, seed in ((model, 5), (other, 6)):
        maclin.convert_(one, "favor", generator=torch.Generator().manual_seed(seed))
    guarding(model, tolerance=HUGE)
    other.load_state_dict(model.state_dict())
    assert torch.equal(tiny.hidden(other, tiny.batch()), tiny.hidden(model, tiny.batch()))


def test_somebody_elses_forward_is_called_and_given_back() -> None:
    model, seen = Attention(), []
    inner = model.maclin_mechanism

    def logged(*args: Any, **options: Any) -> Any:
        seen.append(1)
        return Mechanism.forward(inner, *args, **options)

    object.__setattr__(inner, "forward", logged)
    with guarding(model, tolerance=HUGE) as watching:
        model(*made())
    assert (only(watching).checked, seen) == (2, [1])
    assert vars(inner)["forward"] is logged


def test_compiled_code_is_left_for_the_guard() -> None:
    model, (q, k, v) = Attention(), made()
    wanted = model(q, k, v)
    with guarding(model, tolerance=HUGE) as watching:
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            assert torch.equal(compiled(q, k, v), wanted)
        assert only(watching).checked == 4
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="disable"):
            torch.compile(model, backend="eager", fullgraph=True)(q, k, v)
    torch._dynamo.reset()


# what is wrong is found, and answered exactly


def test_estimates_are_near_the_true_error_and_reproducible() -> None:
    for name in ("elu", "favor", "window", "macformer"):
        model, (q, k, v) = Attention(name), made(n=600)
        exact = reference.softmax_attention(q, k, v, is_causal=True)
        found = []
        for _ in range(2):
            with guarding(model, tolerance=HUGE) as watching:
                out = model(q[:1], k[:1], v[:1], is_causal=True)
            found.append(only(watching).last)
        assert found[0] == found[1]
        true = true_error(out, exact[:1])
        assert found[0].rel_error == pytest.approx(true, rel=0.4)
        assert found[0].low <= true * 1.05
        assert found[0].high >= true * 0.95
        with guarding(model, tolerance=HUGE, seed=1) as watching:
            model(q[:1], k[:1], v[:1], is_causal=True)
        assert only(watching).last != found[0]


@pytest.mark.parametrize("is_causal", [False, True])
def test_only_the_sequence_that_is_wrong_is_answered_exactly(is_causal: bool) -> None:
    """Sharpened logits: one text of the batch attends as no elu features can, the other almost evenly."""
    model, (q, k, v) = Attention(), made()
    q = torch.stack([0.01 * q[0], 20 * q[1]])
    k = torch.stack([0.01 * k[0], k[1]])
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[1, 150:] = False
    options: dict[str, Any] = {"key_mask": mask, "is_causal": is_causal}
    plain = model(q, k, v, **options)
    exact = reference.softmax_attention(q, k, v, **options)
    assert true_error(plain[0], exact[0]) < 0.05 < 0.2 < true_error(plain[1][:, :150], exact[1][:, :150])
    flags: list[Flag] = []
    with guarding(model, tolerance=0.1, on_flag=flags.append) as watching:
        out = model(q, k, v, **options)
    assert torch.equal(out[0], plain[0])
    torch.testing.assert_close(out[1].double(), exact[1], atol=1e-5, rtol=1e-4)
    assert [(flag.sequence, flag.reason, flag.exact) for flag in flags] == [(1, "error", True)]
    assert flags[0].estimate is not None
    assert only(watching).flagged["error"] == only(watching).answered_exactly == 1


def test_a_converted_model_above_its_tolerance_is_the_original_again(tiny: Any) -> None:
    model, batch = tiny.make("llama"), tiny.batch((30, 25), "left")
    before = tiny.hidden(model, batch)
    maclin.convert_(model, "favor")
    with guarding(model, tolerance=1e-6) as watching:
        torch.testing.assert_close(tiny.hidden(model, batch), before, atol=1e-5, rtol=0)
    assert all(layer.answered_exactly == 2 for layer in watching.record().layers)


def test_a_warning_leaves_the_output_and_comes_once_per_layer() -> None:
    model, qkv = Attention(), made(size=20)
    plain = model(*qkv)
    with guarding(model, tolerance=0.1, action="warn") as watching:
        with pytest.warns(GuardWarning, match="relative error .* where at most 0.1 is wanted"):
            assert torch.equal(model(*qkv), plain)
        assert torch.equal(model(*qkv), plain)  # a second warning would be an error here
        watching.reset()
        with pytest.warns(GuardWarning):
            model(*qkv)
    assert (only(watching).flagged["error"], only(watching).answered_exactly) == (2, 0)


def test_an_input_from_another_domain_is_reported_as_drift_and_adapted_to() -> None:
    model = Attention()
    usual = [dict(zip("qkv", made(seed=i), strict=True)) for i in range(6)]
    with guarding(model, tolerance=HUGE, batches=usual) as watching:
        assert only(watching).calls == 0
        model(**usual[0])
        shifts = {row.statistic: row.shift for row in only(watching).drift}
        assert all(abs(shift) < 3 for shift in shifts.values())
        for seed in range(8):
            q, k, v = made(seed=100 + seed)
            model(3 * q, 2 * k, v)
        for _ in range(3):  # the first usual one has faded
            model(3 * q, 2 * k, v)
        shifts = {row.statistic: row.shift for row in only(watching).drift}
        assert shifts["q_norm"] > 10
        assert shifts["k_norm"] > 10
        assert shifts["entropy_ratio"] < -10
        watching.recalibrate()
        assert {row.shift for row in only(watching).drift} == {None}
        model(3 * q, 2 * k, v)
        assert all(abs(row.shift) < 3 for row in only(watching).drift)


def test_outliers_in_the_output_are_seen_in_every_row() -> None:
    """One row of 1600 is 300: hardly ever sampled, and longer than any average of values."""
    model, qkv = Attention(), made(batch=1, n=400)
    inner = model.maclin_mechanism

    def broken(*args: Any, **options: Any) -> Any:
        out: Any = Mechanism.forward(inner, *args, **options)
        out[0, 2, 77] = 300.0
        return out

    object.__setattr__(inner, "forward", broken)
    exact = reference.softmax_attention(*qkv)
    with guarding(model, tolerance=4.0, sample_rows=2, seed=3) as watching:
        torch.testing.assert_close(model(*qkv).double(), exact, atol=1e-5, rtol=1e-4)
    assert only(watching).flagged == {"error": 0, "bound": 1, "nonfinite": 0, "denominator": 0}


def test_values_with_one_outlier_are_judged_by_their_own_error() -> None:
    model, (q, k, v) = Attention(), made(batch=1, n=400)
    v[0, :, 13] = 1e3
    true = true_error(model(q, k, v), reference.softmax_attention(q, k, v))
    for tolerance, wrong in ((true / 2.5, True), (true * 2.5, False)):
        with guarding(model, tolerance=tolerance) as watching:
            model(q, k, v)
        assert (only(watching).flagged_total > 0) == wrong


@pytest.mark.parametrize(("rows_hit", "found"), [(1, False), (100, True)])
def test_a_key_that_few_rows_attend_to(rows_hit: int, found: bool) -> None:
    """An adversarial key: one row that is never sampled looks at nothing else. So few escape; a share of 1/4 does not.

    What escapes is bounded all the same: ||out|| and ||exact|| are at most the longest value, so one row in 1600 adds
    at most (2 max ||v||)² / 1600 to the mean squared error.
    """
    model, (q, k, v) = Attention(), made(batch=1, n=400, size=0.001)
    k[0, :, 200], v[0, :, 200] = -8.0, -1.0  # to elu features a key that is hardly there
    with guarding(model, tolerance=0.3, sample_rows=4, action="warn", seed=2) as watching, warnings.catch_warnings():
        warnings.simplefilter("ignore", GuardWarning)
        q[0, :, 399 - rows_hit : 399] = -3.0
        out = model(q, k, v)
    exact = reference.softmax_attention(q, k, v)
    error = (out.double() - exact).norm(dim=-1)[0]
    assert error.max() > 1  # and yet:
    assert bool(only(watching).flagged_total) == found
    assert float(error.square().mean()) <= (2 * float(v.norm(dim=-1).max())) ** 2 * (rows_hit + 1) / 400 + 0.1


def test_a_batch_of_padding_is_counted_and_left() -> None:
    model, (q, k, v) = Attention(), made()
    mask = torch.zeros(2, 200, dtype=torch.bool)
    plain = model(q, k, v, key_mask=mask)
    with guarding(model, tolerance=0.01) as watching:
        assert torch.equal(model(q, k, v, key_mask=mask), plain)
        mask[1, :2] = True
        model(q, k, v, key_mask=mask)
    assert only(watching).not_checked["empty"] == 3
    assert (only(watching).sequences, only(watching).checked) == (4, 1)


def test_padding_does_not_count_even_where_it_is_nan() -> None:
    model, (q, k, v) = Attention("window", window=5), made()
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[:, 150:] = False
    short = [x[:, :, :150] for x in (q, k, v)]
    true = true_error(model(*short), reference.softmax_attention(*short))
    q[:, :, 150:] = math.nan
    k[:, :, 150:], v[:, :, 150:] = 1e6, 1e6
    with guarding(model, tolerance=HUGE, sample_rows=150) as watching:
        model(q[:1], k[:1], v[:1], key_mask=mask[:1])
        model(q[1:], k[1:], v[1:], key_mask=mask[1:])
        found = watching.record().layers[0]
    assert found.flagged_total == 0
    assert found.rel_error.total / 2 == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_in_the_input_is_flagged_and_said_not_to_be_the_mechanisms(where: str) -> None:
    model, qkv = Attention(), dict(zip("qkv", made(), strict=True))
    qkv[where][1, 0, 55, 3] = math.nan
    with guarding(model, tolerance=0.9) as watching:
        out = model(**qkv)
    assert only(watching).flagged["nonfinite"] == 1
    assert only(watching).nonfinite_inputs == 1
    assert bool(out[0].isfinite().all())


def test_nan_of_the_mechanism_alone_is_answered_exactly() -> None:
    model, qkv = Attention("elu"), made()
    inner = model.maclin_mechanism

    def broken(*args: Any, **options: Any) -> Any:
        out: Any = Mechanism.forward(inner, *args, **options)
        out[1, 0, 3] = math.inf
        return out

    object.__setattr__(inner, "forward", broken)
    with guarding(model, tolerance=HUGE, every=100) as watching:
        for _ in range(2):  # the second call is not checked, and yet looked at
            out = model(*qkv)
            wanted = reference.softmax_attention(*qkv)[1]
            torch.testing.assert_close(out[1].double(), wanted, atol=1e-5, rtol=1e-4)
    assert only(watching).flagged["nonfinite"] == 2
    assert only(watching).nonfinite_inputs == 0
    assert only(watching).not_checked["turn"] == 2


def test_denominators_near_zero_are_counted_now_and_then() -> None:
    """Unbiased features of long q and k: many denominators are negative."""
    model = Attention("macformer", num_features=16, ppsbn=False, estimator="published")
    q, k, v = made(size=4)
    with maclin.guarded() as counts:
        model(q, k, v)
    bad = counts.guarded + counts.negative
    assert bad > 0.01 * counts.rows
    with guarding(model, tolerance=HUGE, denominators_every=2) as watching:
        model(q, k, v)
        assert only(watching).counted_denominators == 0
        out = model(q, k, v)
    layer = only(watching)
    assert (layer.bad_denominators, layer.counted_denominators) == (bad, counts.rows)
    assert layer.flagged["denominator"] == 2
    torch.testing.assert_close(out.double(), reference.softmax_attention(q, k, v), atol=1e-5, rtol=1e-4)


def test_a_layer_that_stays_wrong_is_held_until_it_is_released() -> None:
    model, qkv = Attention(), made(size=20)
    good = made(size=0.01)
    calls = []
    inner = model.maclin_mechanism

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return Mechanism.forward(inner, *args, **options)

    object.__setattr__(inner, "forward", counted)
    with guarding(model, tolerance=0.3, hold_after=2) as watching:
        for inputs in (qkv, good, qkv, qkv):
            model(*inputs)
        assert only(watching).held_exact
        assert len(calls) == 4
        out = model(*good)
        torch.testing.assert_close(out.double(), reference.softmax_attention(*good), atol=1e-5, rtol=1e-4)
        assert (len(calls), only(watching).not_checked["held"]) == (4, 2)
        asked: dict[str, Any] = {"is_causal": True, "return_state": True}  # as decoders ask that may go on
        out, state = inner(*good, **asked)
        wanted = reference.softmax_attention(*good, is_causal=True)
        torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-4)
        for ours, theirs in zip(state, Mechanism.forward(inner, *good, **asked)[1], strict=True):
            assert torch.equal(ours, theirs)
        calls.pop()
        watching.release("")
        model(*good)
        assert (len(calls), only(watching).held_exact) == (5, False)
        with pytest.raises(InputError, match="no guarded layer 'x'"):
            watching.release("x")


# what cannot be checked is counted, and costs nothing


def test_decoding_with_a_state_is_counted_as_not_checked() -> None:
    model, (q, k, v) = Attention(), made()
    whole = model(q, k, v, is_causal=True)
    with guarding(model, tolerance=1e-6) as watching:
        out, state = model(q[:, :, :150], k[:, :, :150], v[:, :, :150], is_causal=True, return_state=True)
        wanted = reference.softmax_attention(q[:, :, :150], k[:, :, :150], v[:, :, :150], is_causal=True)
        torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-4)
        for start, stop in ((150, 199), (199, 200)):  # a chunk, a step: the state is the mechanism's own
            step = slice(start, stop)
            out, state = model(
                q[:, :, step], k[:, :, step], v[:, :, step], is_causal=True, state=state, return_state=True
            )
            torch.testing.assert_close(out, whole[:, :, step], atol=1e-5, rtol=1e-4)
    counted = only(watching).not_checked
    assert (counted["state"], counted["decoding"], only(watching).checked) == (2, 2, 2)


def test_generation_counts_its_steps(tiny: Any) -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(tiny.make("llama").config).eval()
    batch, options = tiny.batch((6, 4), "left"), {"max_new_tokens": 5, "do_sample": False}
    maclin.convert_(model, "elu")
    wanted = model.generate(**batch, **options)
    with guarding(model, tolerance=HUGE) as watching:
        assert torch.equal(model.generate(**batch, **options), wanted)
    for layer in watching.record().layers:
        assert layer.checked == 2
        assert layer.not_checked["decoding"] == 2 * (wanted.shape[1] - 6 - 1)


def test_training_and_packed_sequences_are_not_checked() -> None:
    model, (q, k, v) = Attention(), made(batch=1)
    bounds = torch.tensor([0, 50, 200])
    with guarding(model, tolerance=1e-6) as watching:
        packed = model(q, k, v, cu_seqlens=bounds)
        model.train()
        model(q, k, v)
    torch.testing.assert_close(packed[:, :, 50:], model(q[:, :, 50:], k[:, :, 50:], v[:, :, 50:]))
    assert (only(watching).not_checked["packed"], only(watching).not_checked["train"]) == (1, 1)


def test_autocast_is_judged_once() -> None:
    model, qkv = Attention(), made()
    with guarding(model, tolerance=HUGE) as watching, torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*qkv)
    assert out.dtype == torch.bfloat16
    assert (only(watching).calls, only(watching).checked) == (1, 2)
    with guarding(model, tolerance=1e-6), torch.autocast("cpu", dtype=torch.bfloat16):
        exact = model(*qkv)
    assert exact.dtype == torch.bfloat16
    torch.testing.assert_close(exact.double(), reference.softmax_attention(*qkv), atol=2e-2, rtol=2e-2)


def test_gradients_flow_through_what_is_answered_exactly() -> None:
    model, (q, k, v) = Attention(), made(size=20)
    with torch.enable_grad(), guarding(model, tolerance=1e-6):
        v.requires_grad_()
        model(q, k, v).sum().backward()
    assert v.grad is not None
    assert float(v.grad.sum()) == pytest.approx(q.shape[0] * q.shape[1] * 200 * 8, rel=1e-4)  # weights sum to 1


def test_every_so_many_calls() -> None:
    model, qkv = Attention(), made()
    with guarding(model, tolerance=HUGE, every=3) as watching:
        for _ in range(7):
            model(*qkv)
    assert (only(watching).checked, only(watching).not_checked["turn"]) == (6, 8)


def test_threads_count_without_losing_any() -> None:
    model, qkv = Attention(), made(n=12)
    wanted = model(*qkv)
    wrong: list[Any] = []

    def serve() -> None:
        with torch.no_grad():
            wrong.extend(None for _ in range(40) if not torch.allclose(model(*qkv), wanted, atol=1e-6))

    with guarding(model, tolerance=HUGE, max_share=None) as watching:
        threads = [threading.Thread(target=serve) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    layer = only(watching)
    assert not wrong
    assert (layer.calls, layer.checked, layer.rel_error.count) == (160, 320, 320)
    assert watching.record().forwards == 160


# adapting


def test_recalibrating_on_other_documents_teaches_the_mechanisms_that_learn(tiny: Any) -> None:
    model = tiny.make("bert")
    documents = [tiny.batch((40, 38), seed=i) for i in range(3)]
    maclin.convert_(model, {"encoder.layer.0.attention.self": ("macformer", {"ppsbn": "batch", "num_features": 16}),
                            "encoder.layer.1.attention.self": "elu"}, batches=documents[:1])  # fmt: skip
    with guarding(model, tolerance=HUGE) as watching:
        old = {name: watch.mechanism for name, watch in watching.watches.items()}
        watching.recalibrate(documents[1:])
        new = {name: watch.mechanism for name, watch in watching.watches.items()}
        assert [old[name] is new[name] for name in old] == [False, True]
        assert all(row.calibration_mean is not None for layer in watching.record().layers for row in layer.drift)
        tiny.hidden(model, documents[0])
        assert all(layer.checked == 2 for layer in watching.record().layers)
        with pytest.raises(InputError, match="at least one batch"):
            watching.recalibrate([])
        with pytest.raises(InputError):
            watching.recalibrate([{"input_ids": torch.ones(1, 3, dtype=torch.long), "nonsense": 3}])
        assert watching.active
        assert {name: watch.mechanism for name, watch in watching.watches.items()} == new
    with pytest.raises(MaclinError, match="removed"):
        watching.recalibrate()


# what is refused


def test_a_bad_call_is_refused_as_without_the_guard() -> None:
    model, (q, k, v) = Attention(), made()
    for bad in ((q[0], k[0], v[0]), (q[:, :3], k, v), (q, k, v[:, :, :5])):
        with pytest.raises(InputError) as plain:
            model(*bad)
        with guarding(model) as watching, pytest.raises(InputError) as found:
            model(*bad)
        assert str(found.value) == str(plain.value)
        model(q, k, v)
        assert only(watching).calls == 0
        assert watching.budget.current is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "positive relative error"),
        ({"tolerance": math.nan}, "positive relative error"),
        ({"tolerance": {"": -1}}, "positive relative error"),
        ({"sample_rows": 1}, "at least 2"),
        ({"sample_rows": 2.5}, "whole number"),
        ({"action": "stop"}, "'exact', 'warn'"),
        ({"confidence": 0.5}, "between 0.5 and 1"),
        ({"max_share": 0}, "above 0"),
        ({"max_bad_share": None}, "above 0"),
        ({"every": 0}, "at least 1"),
        ({"hold_after": 0}, "at least 1"),
    ],
)
def test_bad_options_leave_the_model_alone(options: dict[str, Any], message: str) -> None:
    model = Attention()
    with pytest.raises(OptionError, match=message):
        guarding(model, **options)
    assert "forward" not in vars(model.maclin_mechanism)


def test_what_there_is_nothing_to_guard_in_is_refused(tiny: Any) -> None:
    with pytest.raises(InputError, match="convert it first"):
        guard(tiny.make("bert"))
    with pytest.raises(InputError, match="convert it first"):
        guard(Attention("softmax"))
    with pytest.raises(InputError, match="no converted layer 'a'"):
        guard(Attention(), tolerance={"a": 0.1})
    with pytest.raises(InputError, match="no layer in the mapping"):
        guard(Attention(), tolerance={})
    with pytest.raises(InputError, match="got str"):
        guard("model")  # pyright: ignore[reportArgumentType]
    model = Attention()
    with pytest.raises(InputError, match="at least one batch"):
        guarding(model, batches=[])
    with pytest.raises(InputError, match="cannot run"):
        guarding(model, batches=[{"q": torch.ones(1)}])
    assert "forward" not in vars(model.maclin_mechanism)
    with pytest.raises(MaclinError):
        unguard(model)
