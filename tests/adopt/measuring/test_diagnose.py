"""The diagnosis against float64 oracles, head by head."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.adopt import capture, diagnose_layers
from maclin.core.errors import InputError
from maclin.core.reference import allowed_pairs, kernel_attention, softmax_attention
from maclin.records import Diagnosis, from_json, to_json


def tensors(size: float = 1.0, key_heads: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(4, 4, 30, 8, generator=generator) * size
    k, v = (torch.randn(4, key_heads, 30, 8, generator=generator) * s + 0.3 for s in (size, 1.0))
    mask = torch.ones(4, 30, dtype=torch.bool)
    mask[1, 20:] = False
    return q, k, v, mask


def by_head(x: Tensor, exact: Tensor, mask: Tensor) -> list[float]:
    real = mask[:, None, :, None]
    return (((x - exact) * real).square().sum((0, 2, 3)) / (exact * real).square().sum((0, 2, 3))).sqrt().tolist()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", [{"ppsbn": False}, {"temperature": "learned"}, {"estimator": "published"}])
def test_errors_equal_those_of_the_oracles(options: dict[str, Any], is_causal: bool) -> None:
    q, k, v, mask = tensors(0.6)
    mech = maclin.mechanism("macformer", head_dim=8, num_heads=4, num_kv_heads=2, num_features=24, **options)
    mech: Any = maclin.calibrate(mech, q, k, v, mask, is_causal=is_causal)
    found = maclin.diagnose(mech, q, k, v, mask, is_causal=is_causal)
    call: dict[str, Any] = {"key_mask": mask, "is_causal": is_causal}
    exact = softmax_attention(q, k, v, **call)
    x, y = mech.normalised(q, k)
    ideal = kernel_attention(x, y, v, mech.kernel, **call)
    with torch.no_grad():
        out = mech.eval()(q, k, v, **call).double()
        allowed = allowed_pairs(q, k, mask, is_causal).expand(4, 4, 30, 30) & mask[:, None, :, None]
        uniform = softmax_attention(torch.zeros_like(q), k, v, **call)
        phi = mech.query_map(q).double() @ mech.feature_map(k).double().repeat_interleave(2, 1).mT
    for field, wanted in (
        ("softmax_rel_error", by_head(out, exact, mask)),
        ("kernel_rel_error", by_head(out, ideal, mask)),
        ("kernel_gap", by_head(ideal, exact, mask)),
        ("uniform_rel_error", by_head(uniform, exact, mask)),
        ("negative_similarity_share", (((phi < 0) & allowed).sum((0, 2, 3)) / allowed.sum((0, 2, 3))).tolist()),
        ("negative_share", (((phi * allowed).sum(-1) < 0) & mask[:, None]).sum((0, 2)).div(mask.sum()).tolist()),
    ):
        got = [getattr(head, field) for head in found.heads]
        assert got == pytest.approx(wanted, rel=2e-3, abs=2e-4), field
    predicted = mech.predicted_rel_error(q, k, v, mask, is_causal=is_causal)
    assert [head.predicted_rel_error for head in found.heads] == [predicted[h // 2] for h in range(4)]
    real = mask[:, None, :, None]
    total = float(((out - exact) * real).norm() / (exact * real).norm())
    assert found.softmax_rel_error == pytest.approx(total, rel=1e-3)
    assert (found.num_sequences, found.num_tokens) == (4, 110)
    assert from_json(Diagnosis, to_json(found)) == found


def test_the_radius_is_that_of_centred_vectors() -> None:
    q, k, v, mask = tensors()
    mech: Any = maclin.mechanism("macformer", head_dim=8, num_heads=4, num_kv_heads=2, ppsbn=False)
    raw = maclin.diagnose(mech, q, k, v, mask)
    for head in range(4):
        x, y = q[:, head][mask].double(), k[:, head // 2][mask].double()
        products = (x.norm(dim=-1)[:, None] * y.norm(dim=-1)).flatten() / math.sqrt(8)
        row = raw.heads[head]
        assert row.radius_max == pytest.approx(float(products.max()), rel=1e-4)
        assert row.radius_p50 == pytest.approx(float(products.median()), rel=1e-3)
        assert row.radius_p99 == pytest.approx(float(products.quantile(0.99)), rel=1e-3)
    taught: Any = maclin.calibrate(mech, q, k, v, mask)
    found = maclin.diagnose(taught, q, k, v, mask)
    x = q[:, 3][mask].double() - taught.map.q_centre[1].double()
    y = k[:, 1][mask].double() - taught.map.k_centre[1].double()
    largest = float(x.norm(dim=-1).max() * y.norm(dim=-1).max()) / math.sqrt(8)
    assert found.heads[3].radius_max == pytest.approx(largest, rel=1e-4)
    assert found.heads[3].radius_max != pytest.approx(raw.heads[3].radius_max, rel=1e-2)
    unit = maclin.diagnose(maclin.mechanism("macformer", head_dim=8, num_heads=4, num_kv_heads=2), q, k, v, mask)
    assert unit.heads[0].radius_max == pytest.approx(1 / math.sqrt(8), rel=1e-4)


def test_guarded_denominators_are_counted_by_head() -> None:
    q, k, v, mask = tensors(2.0)
    q[:, 1], q[:, 3] = q[:, 1] * 0.01, q[:, 3] * 0.01  # of heads that share their keys with a wild one
    mech = maclin.mechanism("macformer", head_dim=8, num_heads=4, num_kv_heads=2, ppsbn=False)
    mech = maclin.calibrate(mech, q, k, v, mask)
    found = maclin.diagnose(mech, q, k, v, mask)
    with maclin.guarded() as counts, torch.no_grad():
        mech(q, k, v, key_mask=mask)
        rows = counts.rows
    assert rows == 4 * 4 * 30  # padded queries too, which the diagnosis leaves out
    shares = [head.guarded_share for head in found.heads]
    with maclin.guarded() as counts, torch.no_grad():
        for b in range(4):
            n = int(mask[b].sum())
            mech(q[b : b + 1, :, :n], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
    assert counts.guarded > 0
    assert sum(share or 0.0 for share in shares) / 4 == pytest.approx(counts.guarded / counts.rows)


def test_a_head_that_is_no_better_than_averaging_is_named() -> None:
    q, k, v, mask = tensors(2.0)
    taylor = maclin.diagnose(maclin.mechanism("taylor", head_dim=8, num_heads=4, num_kv_heads=2), q, k, v, mask)
    assert len(taylor.warnings) == 4
    assert "the features do not follow it" in taylor.heads[0].warning
    assert "denominators are negative" in taylor.heads[0].warning
    mean = maclin.diagnose(maclin.mechanism("mean", head_dim=8, num_heads=4, num_kv_heads=2), q, k, v, mask)
    assert all(warning.startswith(f"head {i}: no better than") for i, warning in enumerate(mean.warnings))
    assert mean.softmax_rel_error == pytest.approx(mean.uniform_rel_error, rel=1e-4)
    exact = maclin.diagnose(maclin.mechanism("softmax", head_dim=8, num_heads=4, num_kv_heads=2), q, k, v, mask)
    assert exact.softmax_rel_error < 1e-5
    assert exact.warnings == ()
    constant = q * 0 + 1.0, k * 0 + 1.0
    flat = maclin.diagnose(maclin.mechanism("softmax", head_dim=8, num_heads=4, num_kv_heads=2), *constant, v, mask)
    assert flat.heads[0].entropy_ratio == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", maclin.mechanisms.names())
def test_every_mechanism_can_be_looked_at(name: str) -> None:
    q, k, v, mask = tensors()
    options: dict[str, Any] = {"projection": "mean-pool"} if name == "linformer" else {}
    mech = maclin.mechanism(name, head_dim=8, num_heads=4, num_kv_heads=2, **options)
    found = maclin.diagnose(mech, q, k, v, mask)
    assert mech.training
    missing = {
        field
        for field in ("predicted_rel_error", "kernel_rel_error", "kernel_gap", "negative_share", "guarded_share")
        if getattr(found.heads[0], field) is None
    }
    assert bool(missing) == bool(found.reasons)
    without = (
        "mean",
        "window",
        "linformer",
        "efficient",
        "revisited_linformer",
        "elu",
        "hedgehog",
        "by_head",
        "hybrid",
    )
    assert ("kernel_gap" in missing) == (name in without)
    text = str(found)
    assert len(text.splitlines()) == 2 + 4 + len(found.warnings) + len(found.reasons)
    assert ("n/a" in text) == bool(missing)


def test_statistics_of_a_batch_do_not_move() -> None:
    q, k, v, mask = tensors()
    mech: Any = maclin.mechanism("macformer", head_dim=8, num_heads=4, num_kv_heads=2, ppsbn="batch").train()
    before = mech.q_statistics.running_mean.clone()
    maclin.diagnose(mech, q, k, v, mask)
    assert torch.equal(mech.q_statistics.running_mean, before)
    assert all(module.training for module in mech.modules())


def test_shapes_are_checked() -> None:
    q, k, v, _ = tensors()
    with pytest.raises(InputError, match="wanted"):
        maclin.diagnose(maclin.mechanism("elu", head_dim=8, num_heads=3), q, k, v)


transformers = pytest.importorskip("transformers")


def test_layers_of_a_model_are_diagnosed_on_other_documents(tiny: Any) -> None:
    model = tiny.make("bert")
    batches = [tiny.batch((30, 24), seed=i) for i in range(3)]
    config = {"ppsbn": False, "num_features": 20}
    found = dict(diagnose_layers(model, iter(batches), "macformer", config, ["1"]))
    assert list(found) == ["encoder.layer.1.attention.self"]
    (diagnosis,) = found.values()
    assert (diagnosis.num_sequences, diagnosis.num_tokens) == (4, 108)  # documents 2 and 5 were learned from
    calls = capture(model, batches).calls["encoder.layer.1.attention.self"]
    elu = dict(diagnose_layers(model, batches[:1], "elu", None, ["encoder.layer.1.attention.self"]))
    mech = maclin.mechanism("elu", head_dim=8, num_heads=4)
    alone = maclin.diagnose(mech, calls[0].q, calls[0].k, calls[0].v, calls[0].key_mask)
    assert elu["encoder.layer.1.attention.self"].softmax_rel_error == pytest.approx(alone.softmax_rel_error, rel=1e-4)
    with pytest.raises(InputError, match=r"no attention layer '7'.*0 to 1"):
        list(diagnose_layers(model, batches, "elu", None, ["7"]))
    with pytest.raises(InputError, match="at least 3 documents"):
        list(diagnose_layers(model, batches[:1]))
