"""The call contract that all mechanisms share: what is refused and how it is said, packing, states, buffers."""

import copy

import pytest
import torch

import maclin
from maclin.core import mechanisms
from maclin.core.errors import CapabilityError, InputError, OptionError


def build(name: str, **options) -> maclin.Mechanism:
    return maclin.mechanism(name, head_dim=8, num_heads=4, num_kv_heads=2, **options).double()


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (torch.tensor(12), r"is \[12\] with shape \(\)"),
        (torch.tensor([[0, 12]]), r"is \[0, 12\] with shape \(1, 2\)"),
        (torch.tensor([0.0, 12.0]), "dtype torch.float32"),
        (torch.tensor([0, 5]), r"wanted one row of ascending integers from 0 to the number of tokens, 12"),
        (torch.tensor([1, 12]), "wanted one row of ascending integers"),
        (torch.tensor([0, 9, 5, 12]), "wanted one row of ascending integers"),
        (torch.tensor([0]), "wanted one row of ascending integers"),
        (torch.arange(30), r"\[0, 1, 2, 3, '...', 26, 27, 28, 29\]"),
    ],
)
def test_sequence_bounds_that_cannot_be_are_refused(qkv, bounds, message):
    with pytest.raises(InputError, match=f"elu: cu_seqlens .*{message}"):
        build("elu")(*qkv(12, 12, batch=1), cu_seqlens=bounds)


def test_packing_needs_one_sample_and_no_state(qkv):
    bounds = torch.tensor([0, 12])
    with pytest.raises(InputError, match="wanted batch 1 and as many queries as keys"):
        build("elu")(*qkv(12, 12), cu_seqlens=bounds)
    with pytest.raises(InputError, match="wanted batch 1 and as many queries as keys"):
        build("elu")(*qkv(7, 12, batch=1), cu_seqlens=bounds)
    with pytest.raises(CapabilityError, match="cu_seqlens and state exclude each other"):
        build("elu")(*qkv(12, 12, batch=1), cu_seqlens=bounds, is_causal=True, return_state=True)


@pytest.mark.parametrize("name", ["elu", "softmax", "revisited_linformer"])
def test_packed_sequences_keep_their_masks(qkv, name):
    q, k, v = qkv(12, 12, batch=1)
    mask = torch.tensor([[True] * 3 + [False] * 2 + [True] * 5 + [False] * 2])
    got = build(name)(q, k, v, key_mask=mask, cu_seqlens=torch.tensor([0, 5, 5, 12]))
    for a, b in ((0, 5), (5, 12)):
        alone = build(name)(*(x[:, :, a:b] for x in (q, k, v)), key_mask=mask[:, a:b])
        torch.testing.assert_close(got[:, :, a:b], alone)


@pytest.mark.parametrize("name", [name for name in mechanisms.names() if mechanisms.row(name).causal])
def test_a_state_of_another_batch_is_refused(qkv, name):
    mech = build(name).eval()
    _, state = mech(*qkv(3, 3, batch=3), is_causal=True, return_state=True)
    with pytest.raises(InputError, match=f"{name}: state has shapes"):
        mech(*qkv(3, 3, batch=2), is_causal=True, state=state)
    with pytest.raises(InputError, match=f"{name}: state has shapes"):
        mech(*qkv(3, 3, batch=3), is_causal=True, state=state[:-1])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_cannot_be_are_refused(qkv, scale):
    with pytest.raises(InputError, match="wanted a positive finite number, or None"):
        build("softmax")(*qkv(3, 3), scale=scale)


def test_tensors_that_do_not_fit_are_named(qkv):
    q, k, v = qkv(3, 5)
    mech = build("mean")
    for arguments, message in (
        ((q[:, :2], k, v), r"q has shape \(2, 2, 3, 8\); wanted \(batch, 4, tokens, 8\)"),
        ((q, k[..., :4], v), r"k has shape \(2, 2, 5, 4\); wanted \(batch, 2, tokens, 8\)"),
        ((q, k, v[:, :1]), r"v has shape \(2, 1, 5, 5\); wanted \(batch, 2, tokens, any\)"),
        ((q, k, v[:, :, 1:]), "do not fit; wanted one batch size, and as many values as keys"),
        ((q[:1], k, v), "do not fit; wanted one batch size"),
        ((q, k, v.float()), "torch.float64, torch.float64, torch.float32; wanted one floating dtype"),
        (tuple(x.long() for x in (q, k, v)), "wanted one floating dtype"),
        ((q, k, v.to("meta")), "are on cpu, cpu, meta; wanted one device"),
    ):
        with pytest.raises(InputError, match=f"mean: .*{message}"):
            mech(*arguments)
    for mask in (
        torch.ones(2, 5),
        torch.ones(2, 4).bool(),
        torch.ones(5).bool(),
        torch.ones(2, 5, device="meta").bool(),
    ):
        with pytest.raises(InputError, match=r"key_mask has shape .* wanted \(2, 5\) bool with True = attend on cpu"):
            mech(q, k, v, key_mask=mask)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"head_dim": 0, "num_heads": 2}, "head_dim is 0; wanted a positive integer"),
        ({"head_dim": 4, "num_heads": 0}, "num_heads is 0; wanted a positive integer"),
        ({"head_dim": 4, "num_heads": 4, "num_kv_heads": 0}, "num_kv_heads is 0; wanted a positive integer"),
        ({"head_dim": 4, "num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(OptionError, match=f"mean: {message}"):
        maclin.mechanism("mean", **sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in mechanisms.names() if mechanisms.row(name).random])
def test_draws_are_not_rounded(name, dtype):
    mech = maclin.mechanism(name, head_dim=8, num_heads=2)
    narrow = copy.deepcopy(mech).to(dtype)
    for key, buffer in mech.named_buffers():
        assert torch.equal(narrow.get_buffer(key), buffer)
    assert any(buffer.is_floating_point() for buffer in mech.buffers())


@pytest.mark.parametrize("name", mechanisms.names())
def test_costs_are_linear_where_the_registry_says_so(name):
    mech = build(name, **({"projection": "mean-pool"} if name == "linformer" else {}))
    one, two, four = (mech.cost(n, n, 16) for n in (1 << 17, 1 << 18, 1 << 19))
    assert one > 0
    if mechanisms.row(name).linear:
        assert four - two == 2 * (two - one)
    else:
        assert (two, four) == (4 * one, 16 * one)


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("mean", 17),
        ("elu", 8 * 17),
        ("efficient", 8 * 17),
        ("taylor", 9 * 17),
        ("favor", 128 * (8 + 17)),
        ("rfa", 64 * 8 + 128 * 17),
    ],
)
def test_costs_are_those_of_the_table_in_the_docs(name, per_token):
    assert maclin.mechanism(name, head_dim=8, num_heads=2).cost(100, 300, 16) == 400 * per_token


@pytest.mark.parametrize("name", mechanisms.names())
def test_a_configuration_builds_the_like_again(name):
    mech = build(name, **({"seq_len": 64} if name == "linformer" else {}))
    again = build(name, **mech.config)
    assert again.config == mech.config
    assert again.extra_repr() == mech.extra_repr()
    assert [p.shape for p in again.parameters()] == [p.shape for p in mech.parameters()]
