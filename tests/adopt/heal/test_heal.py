"""``maclin.heal`` from end to end on tiny models: what it changes, what it promises, what it leaves alone."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import maclin
from maclin.adopt import HealRecipe
from maclin.adopt.heal import healing
from maclin.records import HealResult, from_json, to_json

HYBRID_OF_WINDOW_2: dict[str, Any] = {"window": 2, "linear": "hedgehog", "linear_options": {"num_features": 16}}
SHORT = HealRecipe(transfer_steps=12, num_looks=3, lr=1e-3)


def outputs(model: Any, batches: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**b).last_hidden_state[b["attention_mask"].bool()] for b in batches])


def embeddings(model: Any, batches: Any) -> torch.Tensor:
    """By the formula, not by healing's own code."""
    found = []
    with torch.no_grad():
        for batch in batches:
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].float()
            found.append(torch.einsum("bne,bn->be", hidden, mask) / mask.sum(1, keepdim=True))
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


@pytest.mark.parametrize("train", ["all", "features"])
def test_the_errors_are_those_of_the_model_that_comes_back(patients: Any, train: Any) -> None:
    original = patients.tiny.make("bert")
    model, batches, held = patients.model(), patients.batches(), patients.batches(9)[6:]
    before = (embeddings(model, held) * embeddings(original, held)).sum(-1)
    result = maclin.heal(model, batches, held, steps=8, train=train, recipe=SHORT, precision="fp32")
    after = (embeddings(model, held) * embeddings(original, held)).sum(-1)
    assert result.measure == "1 - cosine"
    assert result.error_before == pytest.approx(1 - float(before.mean()), abs=1e-5)
    assert result.error_after == pytest.approx(1 - float(after.mean()), abs=2e-4)  # targets are kept in half precision
    assert result.error_after < result.error_before
    assert [look.stage for look in result.looks][:2] == ["converted", "transfer"]
    assert result.distillation_steps == 8
    assert result.stopped == "budget"
    weights = dict(model.named_parameters())
    changed = {n for n, p in original.named_parameters() if not torch.equal(p, weights[n])}
    assert all(n.startswith("encoder.layer.") for n in changed)
    assert bool(changed) == (train == "all" and result.best_stage == "distillation")
    assert from_json(HealResult, to_json(result)) == result


def test_weights_that_are_not_trained_give_the_original_back_to_the_bit(patients: Any) -> None:
    original, model, batches = patients.tiny.make("bert"), patients.model(), patients.batches()
    maclin.heal(model, batches, steps=3, train="features", recipe=SHORT)
    maclin.restore_(model)
    assert torch.equal(outputs(model, batches), outputs(original, batches))


def test_a_decoder_is_healed_by_its_logits(patients: Any) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    batches = patients.batches(5)
    held = batches[3:]
    original = copy.deepcopy(model)
    maclin.convert_(model, "hybrid", window=2, linear="hedgehog", linear_options={"num_features": 16})

    def divergence() -> float:
        total = 0.0
        with torch.no_grad():
            for batch in held:
                mask = batch["attention_mask"].bool()
                theirs, ours = (m(**batch).logits[mask].log_softmax(-1) for m in (original, model))
                total += float((theirs.exp() * (theirs - ours)).sum(-1).mean())
        return total / len(held)

    before = divergence()
    result = maclin.heal(
        model, batches[:3], held, steps=6, recipe=HealRecipe(transfer_steps=12, top_k=50), precision="fp32"
    )
    assert result.measure == "KL divergence"
    assert result.error_before == pytest.approx(before, rel=1e-3)
    assert result.error_after == pytest.approx(divergence(), rel=1e-3)
    assert result.error_after < before
    assert all(config.use_cache for config in [model.config])


def test_a_model_that_only_gets_worse_is_given_back_as_it_came(patients: Any) -> None:
    model, batches = patients.model(), patients.batches()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ruin = HealRecipe(transfer_steps=0, lr=3.0, clip=1e6, warm_up=0.0, num_looks=4)
    result = maclin.heal(model, batches, steps=4, recipe=ruin)
    assert result.best_stage in ("converted", "transfer")
    assert result.error_after == result.error_before
    assert max(look.error for look in result.looks) > 2 * result.error_before
    assert any("as it came" in warning for warning in result.warnings)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_transfer_never_leaves_a_layer_worse(patients: Any) -> None:
    model, batches = patients.model(), patients.batches()
    wild = HealRecipe(transfer_steps=6, transfer_lr=50.0)
    result = maclin.heal(model, batches, steps=0, recipe=wild)
    assert all(row.error_after is None or row.error_after < (row.error_before or 0.0) for row in result.layers)
    assert result.stopped == "budget"
    assert result.error_after <= result.error_before


def test_a_closed_form_is_tried_and_kept_where_it_is_better(patients: Any) -> None:
    model = patients.model("bert", "macformer", num_features=32)
    result = maclin.heal(model, patients.batches(8, (48, 40, 44)), steps=0, recipe=HealRecipe(transfer_steps=0))
    kept = [row for row in result.layers if row.note == "calibrated"]
    assert kept
    assert all(row.error_after is not None and row.error_after < (row.error_before or 0) for row in kept)


def test_a_copy_and_the_brought_back_weights_teach_the_same(patients: Any) -> None:
    results = []
    models = []
    for teacher in ("auto", "copy", "own"):
        model = patients.model()
        given = patients.tiny.make("bert") if teacher == "own" else teacher
        results.append(maclin.heal(model, patients.batches(), steps=5, teacher=given, recipe=SHORT))
        models.append(model)
    states = [model.state_dict() for model in models]
    for name, x in states[0].items():
        torch.testing.assert_close(states[1][name], x, atol=2e-3, rtol=2e-3)  # targets in half precision or not
        assert torch.equal(states[1][name], states[2][name])
    assert results[1].looks[-1].error == pytest.approx(results[0].looks[-1].error, rel=0.05)


def test_small_caches_give_the_same_weights(patients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    counts = []
    for size, chunk in ((1 << 30, 32), (1, 2)):
        model = patients.model()
        made: list[int] = []
        monkeypatch.setattr(
            healing.DiskTeacher, "_make", lambda self, wanted, made=made, of=healing.DiskTeacher._make: (
                made.append(len(wanted)), of(self, wanted))[1],
        )  # fmt: skip
        recipe = HealRecipe(transfer_steps=0, cache_bytes=size, chunk=chunk)
        maclin.heal(model, patients.batches(), steps=10, recipe=recipe)
        states.append(model.state_dict())
        counts.append(len(made))
        monkeypatch.undo()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    assert counts[0] == 1
    assert counts[1] >= 5


def test_modes_gradients_and_hooks_are_as_before(patients: Any) -> None:
    model = patients.model().train()
    model.encoder.layer[0].output.dense.weight.requires_grad_(False)
    marked = torch.ones_like(model.pooler.dense.weight)
    model.pooler.dense.weight.grad = marked
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    maclin.heal(model, patients.batches(), steps=2, recipe=SHORT)
    assert model.training
    assert all(module.training for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.pooler.dense.weight.grad is marked
    assert all(p.grad is None for name, p in model.named_parameters() if "pooler.dense.weight" not in name)
    assert not any(module._forward_hooks for module in model.modules())
    assert "_bidirectional" not in vars(model.encoder.layer[0].attention.self.maclin_mechanism)


def test_only_some_layers_and_their_blocks(patients: Any) -> None:
    model = patients.tiny.make("bert")
    before = {name: p.clone() for name, p in model.named_parameters()}
    maclin.convert_(model, {"encoder.layer.1.attention.self": ("window", {"window": 2})})
    result = maclin.heal(model, patients.batches(), steps=4, recipe=SHORT)
    changed = {name for name, p in before.items() if not torch.equal(p, dict(model.named_parameters())[name])}
    assert changed
    assert all(name.startswith("encoder.layer.1.") for name in changed)
    assert [row.layer for row in result.layers] == ["encoder.layer.1.attention.self"]


def test_the_metric_is_recorded_at_each_look(patients: Any) -> None:
    model = patients.model()
    seen: list[int] = []

    def metric(given: torch.nn.Module) -> float:
        assert given is model
        assert not given.training
        seen.append(1)
        return float(len(seen))

    result = maclin.heal(model, patients.batches(), steps=3, metric=metric, recipe=SHORT)
    assert [look.metric for look in result.looks] == [float(i + 1) for i in range(len(seen))]
    assert result.metric_before == 1.0
    assert result.metric_after in [look.metric for look in result.looks]


def test_distillation_stops_where_nothing_gets_better(patients: Any) -> None:
    still = HealRecipe(transfer_steps=0, lr=1e-30, evaluate_every=1, patience=3, weight_decay=0.0)
    result = maclin.heal(patients.model(), patients.batches(), steps=50, recipe=still)
    assert result.stopped == "no progress"
    assert result.distillation_steps < 10


def test_a_budget_in_minutes_ends_it(patients: Any) -> None:
    result = maclin.heal(patients.model(), patients.batches(), budget_minutes=0.03, recipe=SHORT)
    assert result.stopped == "budget"
    assert result.seconds < 60.0


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_low_rank_adapters_are_merged(patients: Any, tmp_path: Path) -> None:
    original, model = patients.tiny.make("bert"), patients.model()
    names = list(model.state_dict())
    batches, held = patients.batches(), patients.batches(9)[6:]
    result = maclin.heal(model, batches, held, steps=8, train="low_rank", recipe=SHORT, out=tmp_path, precision="fp32")
    assert list(model.state_dict()) == names
    assert result.error_after < result.error_before
    weights = dict(model.named_parameters())
    for name, p in original.named_parameters():
        change = weights[name] - p
        if name.startswith("encoder.layer.") and p.dim() == 2 and result.best_stage == "distillation":
            assert int(torch.linalg.matrix_rank(change, atol=1e-5)) <= SHORT.rank
        else:
            assert torch.equal(weights[name], p), name


def test_other_outputs_can_be_compared(patients: Any) -> None:
    batches = patients.batches()

    def first_token(output: Any, batch: Any) -> torch.Tensor:
        return output.last_hidden_state[:, 0]

    original, before = patients.tiny.make("bert"), patients.model()
    held = patients.batches(8)[6:]

    def cosine(read: Any) -> float:
        found = []
        with torch.no_grad():
            for batch in held:
                ours, theirs = (read(m(**batch).last_hidden_state, batch) for m in (before, original))
                found.append(1 - float(torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean()))
        return sum(found) / len(found)

    choices: tuple[tuple[Any, Any], ...] = (
        (first_token, lambda hidden, batch: hidden[:, 0]),
        ("tokens", lambda hidden, batch: hidden[batch["attention_mask"].bool()]),
    )
    for output, read in choices:
        result = maclin.heal(patients.model(), batches, held, steps=0, output=output, recipe=SHORT, precision="fp32")
        assert result.error_before == pytest.approx(cosine(read), abs=1e-5)
    result = maclin.heal(patients.model(), batches, held, steps=0, output="none", recipe=SHORT, precision="fp32")
    assert result.measure == "hidden states"
    with torch.no_grad():
        squares = []
        for batch in held:
            mask = batch["attention_mask"].bool()
            ours, theirs = (m(**batch).last_hidden_state[mask] for m in (before, original))
            squares.append(float((ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum()))
    assert result.error_before == pytest.approx(sum(x**0.5 for x in squares) / len(squares), rel=1e-3)


def test_a_model_of_torch_s_own_layers(patients: Any) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 32, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.4)
    padding = torch.zeros(3, 20, dtype=torch.bool)
    padding[1, 12:] = True
    batches = [{"src": torch.randn(3, 20, 32), "src_key_padding_mask": padding} for _ in range(5)]
    with torch.no_grad():
        wanted = model(**batches[4])[~padding]
    maclin.convert_(model, "hybrid", **HYBRID_OF_WINDOW_2)
    result = maclin.heal(model, batches[:4], batches[4:], steps=3, train="features", recipe=SHORT, precision="fp32")
    assert result.measure == "1 - cosine per token"
    with torch.no_grad():
        found = model(**batches[4])[~padding]
    error = 1 - float(torch.nn.functional.cosine_similarity(found, wanted, dim=-1).mean())
    assert result.error_after == pytest.approx(error, abs=2e-4)
    assert result.error_after < result.error_before


@pytest.mark.parametrize("train", ["all", "features"])
def test_bfloat16_heals_as_well(patients: Any, train: Any) -> None:
    batches, curves = patients.batches(8), []
    for precision in ("fp32", "bf16", "auto"):
        result = maclin.heal(patients.model(), batches, steps=6, train=train, recipe=SHORT, precision=precision)
        curves.append([look.hidden_error for look in result.looks])
    assert curves[1] == pytest.approx(curves[0], rel=0.02)
    assert curves[1] != curves[0]
    assert curves[2] in curves[:2]  # what the processor is best at
