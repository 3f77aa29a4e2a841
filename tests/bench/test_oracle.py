from typing import Any

import pytest
import torch

import maclin
from maclin.bench import oracle_check, sweep_attention

OPTIONS = {"linformer": {"projection": "mean-pool"}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("name", maclin.mechanisms.names())
def test_every_mechanism_passes(name: str, head_dim: int, dtype: torch.dtype) -> None:
    mech = maclin.mechanism(name, head_dim=head_dim, num_heads=4, num_kv_heads=2, **OPTIONS.get(name, {}))
    assert oracle_check(mech.eval().to(dtype), dtype=dtype) is None


def wrong_by(factor: float) -> maclin.Mechanism:
    mech = maclin.mechanism("softmax", head_dim=16, num_heads=2)

    def hook(module: torch.nn.Module, args: Any, out: Any) -> Any:
        return factor * out

    mech.register_forward_hook(hook)
    return mech


def test_a_wrong_mechanism_gets_no_speed() -> None:
    mech = wrong_by(1.01)
    reason = "softmax is off its oracle by 0.01 at 16 tokens; allowed is 0.0001"
    assert oracle_check(mech) == reason
    row = next(row for row in sweep_attention({"wrong": mech}, [8], num_heads=2, head_dim=16) if row.subject == "wrong")
    assert (row.latency_ms, row.reason) == (None, reason)


def test_not_a_number_is_wrong() -> None:
    assert oracle_check(wrong_by(float("nan"))) is not None


def test_what_is_no_mechanism_is_not_asked() -> None:
    assert oracle_check(print) is None
