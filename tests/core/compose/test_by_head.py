"""by_head against its parts, called one head at a time."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.core.compose.by_head import ByHead
from maclin.core.errors import CapabilityError, InputError, OptionError

WINDOW = ("window", {"window": 3})
MIXED: list[Any] = ["softmax", WINDOW, "elu", "softmax"]


def by_head(heads: Any, num_heads: int = 4, num_kv_heads: int = 2, **options: Any) -> ByHead:
    made = maclin.mechanism(
        "by_head", head_dim=8, num_heads=num_heads, num_kv_heads=num_kv_heads, heads=heads, **options
    )
    assert isinstance(made, ByHead)
    return made


def one_by_one(heads: list[Any], q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
    """Each head alone, with its own key head."""
    shared = q.shape[1] // k.shape[1]
    parts = []
    for head, entry in enumerate(heads):
        name, options = (entry, {}) if isinstance(entry, str) else entry
        mech = maclin.mechanism(name, head_dim=q.shape[3], num_heads=1, **options).double()
        key = head // shared
        parts.append(mech(q[:, head : head + 1], k[:, key : key + 1], v[:, key : key + 1], **call))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    ("heads", "num_kv_heads"),
    [
        (MIXED, 2),  # key heads split between groups
        (MIXED, 4),
        (MIXED, 1),
        (["elu", "elu", WINDOW, WINDOW], 2),
        (["softmax", "elu", "elu", "elu"], 2),  # a group with unequal numbers of query heads of its key heads
        (["efficient", "softmax", "efficient", "softmax"], 2),
    ],
)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_every_head_is_what_its_mechanism_makes_of_it(qkv, key_mask, heads, num_kv_heads, is_causal, scale):
    q, k, v = qkv(21, 33, kv_heads=num_kv_heads)
    call = {"key_mask": key_mask("random", 33), "is_causal": is_causal, "scale": scale}
    out = by_head(heads, 4, num_kv_heads).double()(q, k, v, **call)
    torch.testing.assert_close(out, one_by_one(heads, q, k, v, **call), rtol=1e-12, atol=1e-12)


def test_packed_sequences_do_not_see_each_other(qkv):
    q, k, v = qkv(30, 30, batch=1)
    mech = by_head(MIXED).double()
    out = mech(q, k, v, cu_seqlens=torch.tensor([0, 11, 30]))
    alone = [one_by_one(MIXED, *(x[:, :, a:b] for x in (q, k, v))) for a, b in ((0, 11), (11, 30))]
    torch.testing.assert_close(out, torch.cat(alone, 2), rtol=1e-12, atol=1e-12)


def test_a_state_goes_on_where_it_ended_also_in_another_instance(qkv):
    q, k, v = qkv(40, 40)
    whole = one_by_one(MIXED, q, k, v, is_causal=True)
    first, second = by_head(MIXED).double(), by_head(MIXED).double()
    out, state = first(q[:, :, :25], k[:, :, :25], v[:, :, :25], is_causal=True, return_state=True)
    assert all(isinstance(x, Tensor) and x.shape[0] == 2 for x in state)
    with maclin.guarded() as counts:
        rest = second(q[:, :, 25:], k[:, :, 25:], v[:, :, 25:], is_causal=True, state=state)
    assert counts.rows == 2 * 15  # one head of elu; finding out how long the state is counts for nothing
    torch.testing.assert_close(torch.cat([out, rest], 2), whole, rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match="wanted 10 tensors for a batch of 2"):
        second(q, k, v, is_causal=True, state=state[:-1])
    with pytest.raises(InputError, match="by_head: state has shapes"):
        second(*(x[:1] for x in (q, k, v)), is_causal=True, state=state)


def test_configurations_are_json_and_build_the_like(qkv):
    mech = by_head([("favor", {"num_features": 16}), "softmax", ("favor", {"num_features": 16}), WINDOW]).double()
    config = json.loads(json.dumps(mech.config))
    assert config == {
        "heads": [
            {"heads": [0, 2], "mechanism": "favor", "options": {"num_features": 16}},
            {"heads": [1], "mechanism": "softmax", "options": {}},
            {"heads": [3], "mechanism": "window", "options": {"window": 3}},
        ]
    }
    again = by_head(**config).double()
    assert again.config == mech.config
    again.load_state_dict(mech.state_dict())
    assert torch.equal(again(*qkv(9, 9)), mech(*qkv(9, 9)))
    assert mech.exact_heads == (1,)
    assert by_head(None).exact_heads == (0, 1, 2, 3)


def test_draws_come_from_the_generator():
    heads = [("favor", {"num_features": 16}), "softmax", ("rfa", {"num_features": 16}), "elu"]
    one, same, other = (by_head(heads, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    states = [[x for x in mech.state_dict().values() if x.is_floating_point()] for mech in (one, same, other)]
    assert states[0]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))
    same.resample_(torch.Generator().manual_seed(1))
    assert not any(torch.equal(a, b) for a, b in zip(states[0], same.state_dict().values(), strict=False))


def test_parts_learn_from_their_own_heads(qkv):
    q, k, v = (x.float() for x in qkv(60, 60, batch=6))
    options = {"ppsbn": False, "num_features": 20}
    generator = torch.Generator().manual_seed(0)
    mech = by_head(["softmax", "softmax", ("macformer", options), ("macformer", options)], generator=generator)
    assert mech.learns_from_data
    assert not by_head(MIXED).learns_from_data
    learned = maclin.calibrate(mech, q, k, v)
    alone = maclin.calibrate(
        maclin.mechanism("macformer", head_dim=8, num_heads=2, num_kv_heads=1, **options), q[:, 2:], k[:, 1:], v[:, 1:]
    )
    torch.testing.assert_close(learned(q, k, v)[:, 2:], alone(q[:, 2:], k[:, 1:], v[:, 1:]))
    assert learned.config["heads"][1]["options"]["counts"] == alone.config["counts"]
    assert "counts" not in mech.config["heads"][1]["options"]
    rebuilt = by_head(**learned.config)
    rebuilt.load_state_dict(copy.deepcopy(learned.state_dict()))
    assert torch.equal(rebuilt(q, k, v), learned(q, k, v))


def test_cost_is_the_mean_of_the_heads():
    mech = by_head(["softmax", "elu", "elu", "elu"])
    softmax, elu = (maclin.mechanism(name, head_dim=8, num_heads=1).cost(100, 300, 16) for name in ("softmax", "elu"))
    assert mech.cost(100, 300, 16) == -(-(softmax + 3 * elu) // 4)


def test_what_a_part_lacks_is_refused_by_name(qkv):
    mech = by_head(["softmax", "softmax", "efficient", "revisited_linformer"]).double()
    assert not mech.causal
    with pytest.raises(CapabilityError, match=r"is_causal=True: revisited_linformer of heads \[3\]"):
        mech(*qkv(5, 5), is_causal=True)
    along_time = by_head(["softmax", "softmax", "elu", ("rfa", {"gate": True, "num_features": 8})]).double()
    with pytest.raises(CapabilityError, match=r"is_causal=False: rfa of heads \[3\]"):
        along_time(*qkv(5, 5))
    assert along_time(*qkv(5, 5), is_causal=True).shape == (2, 4, 5, 5)
    with pytest.raises(OptionError, match="no call can be answered by both"):
        by_head(["softmax", "softmax", "revisited_linformer", ("rfa", {"gate": True, "num_features": 8})])


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (["elu"], "1 entries; wanted one for each of the 4"),
        ([], "0 entries"),
        ("elu", "wanted a list with an entry for each of the 4 heads"),
        (["elu", "elu", "elu", 3], "head 3 is 3; wanted a mechanism's name"),
        (["elu", "elu", "elu", ("window", 3)], "a pair of name and options"),
        (["elu", "elu", "elu", "lineer"], r"heads \[3\]: unknown mechanism 'lineer'"),
        (["elu", "elu", "elu", ("window", {"width": 3})], r"heads \[3\]: window has no option 'width'"),
        (["elu", "elu", "elu", ("favor", {"num_features": 0})], r"heads \[3\]: favor: num_features is 0"),
        (["elu", "elu", "elu", "by_head"], "by_head itself"),
        ([{"heads": [0, 1], "mechanism": "elu"}], r"name heads \[0, 1\]; wanted each of 0 to 3 once"),
        ([{"heads": [0, 1, 2, 3, 3], "mechanism": "elu"}], "each of 0 to 3 once"),
        ([{"heads": [0, 1, 2, 4], "mechanism": "elu"}], "whole numbers from 0 to 3"),
        ([{"heads": [], "mechanism": "elu"}], "a group is"),
        ([{"heads": [0], "mechanism": "elu", "config": {}}], "a group is"),
    ],
)
def test_bad_heads_are_named(heads, message):
    with pytest.raises(OptionError, match=f"by_head: .*{message}"):
        by_head(heads)
