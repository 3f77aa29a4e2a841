"""What the guard costs and how often it is right, on a tiny decoder beside errors that are computed here."""

from typing import Any

import pytest
import torch

import maclin
from maclin.adopt import guard_rates
from maclin.adopt.guard import guard
from maclin.core import reference
from maclin.core.errors import InputError


def test_rates_and_true_errors_of_a_tiny_decoder(tiny: Any) -> None:
    model = tiny.make("llama", max_position_embeddings=512)
    maclin.convert_(model, {"layers.0.self_attn": "favor", "layers.1.self_attn": ("window", {"window": 60})})
    batches = [tiny.batch((400, 300), "left", seed=i) for i in range(2)]
    before = tiny.hidden(model, batches[0])
    found = guard_rates(model, batches, (1e-4, 0.02, 100.0), draws=4, runs=1, sample_rows=16)
    assert torch.equal(tiny.hidden(model, batches[0]), before)
    assert (found.num_layers, found.num_tokens, found.num_estimates) == (2, 400, 2 * 2 * 2 * 4)
    assert len(found.true_errors) == 8
    assert found.true_errors == pytest.approx(tuple(errors(model, batches)), rel=1e-3)
    least, _, most = found.rates
    assert (least.above, least.detected_share, least.false_share) == (32, 1.0, None)
    assert (most.below, most.false_share, most.detected_share) == (32, 0.0, None)
    assert 1 <= found.worst_ratio < 2
    assert found.covered_low_share > 0.9
    assert found.covered_high_share > 0.9
    assert found.guard_ms > 0
    assert found.share == pytest.approx(found.guard_ms / found.forward_ms, rel=2)


def errors(model: Any, batches: list[Any]) -> list[float]:
    """Relative errors by the float64 oracle, of what each mechanism was given."""
    found: list[float] = []

    def look(module: Any, args: Any, options: Any, out: Any) -> None:
        mask, causal = options["key_mask"], options["is_causal"]
        out = out[0] if isinstance(out, tuple) else out
        exact = reference.softmax_attention(*args, key_mask=mask, is_causal=causal, scale=options["scale"])
        for i in range(2):
            real = torch.ones(400, dtype=torch.bool) if mask is None else mask[i]
            difference = (out[i].double() - exact[i])[:, real].norm()
            found.append(float(difference / exact[i][:, real].norm()))

    hooks = [m.register_forward_hook(look, with_kwargs=True) for m in model.modules() if hasattr(m, "feature_map")]
    hooks += [m.register_forward_hook(look, with_kwargs=True) for m in model.modules() if hasattr(m, "window")]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def test_without_documents_there_is_nothing_to_say(tiny: Any) -> None:
    model = tiny.make("bert")
    maclin.convert_(model, "elu")
    with pytest.raises(InputError, match="at least one batch"):
        guard_rates(model, [])
    with pytest.raises(InputError, match="more than one token"):
        guard_rates(model, [{"input_ids": torch.ones(1, 1, dtype=torch.long)}])
    guard(model)
    maclin.unguard(model)
