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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", maclin.mechanisms.names())
def test_every_mechanism_passes_with_its_gradients(name: str, causal: bool) -> None:
    mech = maclin.mechanism(name, head_dim=16, num_heads=4, num_kv_heads=2, **OPTIONS.get(name, {}))
    assert oracle_check(mech.eval(), backward=True, causal=causal) is None


@pytest.mark.parametrize("name", ["macformer", "favor", "elu", "efficient", "taylor"])
def test_several_blocks_are_checked_where_the_oracle_is_quick(name: str) -> None:
    mech = maclin.mechanism(name, head_dim=16, num_heads=1).eval()
    assert oracle_check(mech, lengths=(300,), backward=True) is None


def test_what_goes_wrong_in_long_sequences_only_is_found() -> None:
    mech = maclin.mechanism("elu", head_dim=16, num_heads=1)

    def hook(module: torch.nn.Module, args: Any, out: Any) -> Any:
        return out if out.shape[2] < 100 else 1.1 * out

    mech.register_forward_hook(hook)
    assert oracle_check(mech) is None
    assert oracle_check(mech, lengths=(48, 200)) is not None


def test_wrong_gradients_are_found_where_they_are_asked_for() -> None:
    mech = maclin.mechanism("softmax", head_dim=16, num_heads=2)

    def hook(module: torch.nn.Module, args: Any) -> Any:
        q, k, v = args
        return q, 2 * k - k.detach(), v  # the same numbers, twice the gradient

    mech.register_forward_pre_hook(hook)
    assert oracle_check(mech) is None
    wrong = oracle_check(mech, backward=True)
    assert wrong == "softmax is off its oracle by 1 in the gradient of k at 16 tokens; allowed is 0.0002"


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
