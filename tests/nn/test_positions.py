"""Positions against their formulas and transformers' own; which mechanisms allow rotary ones, and why."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import maclin
from maclin.nn import LearnedPositions, Rotary, SinusoidalPositions
from maclin.nn.positions import check_rotary, positions_of

REFUSED = {"efficient", "elu"}
OPTIONS = {"linformer": {"seq_len": 64}}


def test_rotary_is_that_of_llama() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 70, 4000]])
    q, k = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16)
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    wanted_q, wanted_k = apply_rotary_pos_emb(q, k, cos, sin)
    rotation = Rotary(16)(positions)
    # transformers makes its angles in float32
    assert torch.allclose(rotation(q), wanted_q, atol=2e-3)
    assert torch.allclose(rotation(k)[..., :4, :], wanted_k[..., :4, :], atol=1e-6)


def test_rotary_turns_each_plane_by_its_angle() -> None:
    position, planes, theta = 12345, 3, 500.0
    x = torch.randn(1, 1, 1, 2 * planes, dtype=torch.float64)
    got = Rotary(2 * planes, theta)(torch.tensor([[position]]))(x)[0, 0, 0]
    for c in range(planes):
        turned = complex(x[0, 0, 0, c], x[0, 0, 0, c + planes]) * complex(
            math.cos(position * theta ** (-c / planes)), math.sin(position * theta ** (-c / planes))
        )
        assert abs(complex(got[c], got[c + planes]) - turned) < 1e-6


def test_products_of_turned_vectors_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    rotary = Rotary(8)

    def product(i: int, j: int) -> float:
        at_i, at_j = (rotary(torch.tensor([[place]])) for place in (i, j))
        return float((at_i(q) * at_j(k)).sum())

    assert product(5, 2) == pytest.approx(product(100005, 100002), abs=1e-5)
    assert abs(product(5, 2) - product(5, 3)) > 1e-3


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoidal_is_its_formula(width: int) -> None:
    got = SinusoidalPositions(width)(torch.tensor([[0, 1, 9, 5000]]))[0]
    for row, p in enumerate((0, 1, 9, 5000)):
        for channel in range(width):
            angle = p / 10000 ** (channel // 2 * 2 / width)
            wanted = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert float(got[row, channel]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("made", [SinusoidalPositions(6), Rotary(6)])
def test_looking_up_is_computing(made: torch.nn.Module) -> None:
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])
    for table, wanted in zip(made(positions, from_zero=True), made(positions), strict=True):
        assert torch.equal(table, wanted)


def test_learned_positions_end() -> None:
    table = LearnedPositions(10, 4)
    positions = torch.tensor([[3, 9]])
    assert torch.equal(table(positions), table.weight[positions])
    with pytest.raises(maclin.InputError, match=r"11 tokens.*table of learned positions has 10.*max_length=11"):
        table(torch.arange(11)[None])
    with pytest.raises(maclin.InputError, match="11 tokens"):
        table(torch.tensor([[10]]))
    # padding counts for nothing: 20 places, of which 10 are attended
    mask = torch.arange(20)[None] >= 10
    assert torch.equal(table(positions_of(mask, 20, mask.device))[:, 10:], table(torch.arange(10)[None]))


def test_padding_moves_no_position() -> None:
    left, right = torch.tensor([[0, 0, 1, 1, 1]]).bool(), torch.tensor([[1, 1, 1, 0, 0]]).bool()
    assert positions_of(left, 5, left.device)[0, 2:].tolist() == [0, 1, 2]
    assert positions_of(right, 5, right.device)[0, :3].tolist() == [0, 1, 2]
    assert positions_of(None, 3, right.device).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("name", maclin.mechanisms.names())
def test_each_mechanism_allows_rotary_or_says_why_not(name: str) -> None:
    mechanism = maclin.mechanism(name, head_dim=8, num_heads=2, **OPTIONS.get(name, {}))
    if name in REFUSED:
        with pytest.raises(maclin.CapabilityError, match=rf"{name} does not allow rotary.*softmax"):
            check_rotary(mechanism)
    else:
        check_rotary(mechanism)


def shifted(mechanism: maclin.Mechanism) -> float:
    """How far a common shift of all positions by 3 moves the output, relative to it."""
    q, k, v = (torch.randn(2, 2, 12, 8, dtype=torch.float64) for _ in range(3))

    def out(start: int) -> Tensor:
        # in float64 throughout: the class gives float32 tables
        positions = torch.arange(start, start + 12, dtype=torch.float64)
        angles = positions[:, None] * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        turn = type(Rotary(8)(torch.zeros(1, 1, dtype=torch.long)))(angles.cos()[None, None], angles.sin()[None, None])
        with torch.no_grad():
            made = mechanism(turn(q), turn(k), v)
        assert isinstance(made, Tensor)
        return made

    first = out(0)
    return float((out(3) - first).norm() / first.norm())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("softmax", {}),
        ("mean", {}),
        ("window", {"window": 3}),
        ("taylor", {}),
        ("linformer", {"seq_len": 12}),
        ("linformer", {"projection": "mean-pool", "proj_len": 4}),
        ("macformer", {"ppsbn": False, "estimator": "taylor"}),
        ("efficient", {"normalisation": "scaling"}),
    ],
)
def test_with_exact_products_a_common_shift_is_not_felt(name: str, options: dict[str, Any]) -> None:
    mechanism = maclin.mechanism(name, head_dim=8, num_heads=2, **options).double().eval()
    check_rotary(mechanism)
    assert shifted(mechanism) < 1e-9


@pytest.mark.parametrize(
    ("name", "options"), [("elu", {}), ("efficient", {}), ("linformer", {"projection": "max-pool", "proj_len": 4})]
)
def test_where_it_is_refused_a_common_shift_is_felt(name: str, options: dict[str, Any]) -> None:
    mechanism = maclin.mechanism(name, head_dim=8, num_heads=2, **options).double().eval()
    with pytest.raises(maclin.CapabilityError):
        check_rotary(mechanism)
    assert shifted(mechanism) > 1e-3


@pytest.mark.parametrize(("head_dim", "theta", "words"), [(7, 10000.0, "even"), (8, 1.0, "above 1")])
def test_bad_rotary_options(head_dim: int, theta: float, words: str) -> None:
    with pytest.raises(maclin.OptionError, match=words):
        Rotary(head_dim, theta)
