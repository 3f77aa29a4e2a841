"""Random shapes, strides, masks and lengths, zero included, against the float64 oracles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import maclin
from maclin.core import reference

SETTINGS = settings(max_examples=40)


@st.composite
def calls(draw: st.DrawFn, causal: bool) -> dict:
    """A call of any mechanism: sizes, strides and a mask."""
    n, s = draw(st.integers(0, 20)), draw(st.integers(0, 40))
    if causal and n > s:
        n, s = s, n
    key_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, d, dv = draw(st.integers(0, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def tensor(heads: int, length: int, width: int) -> Tensor:
        """Normal numbers, in one of the layouts that hosts hand over."""
        layout = draw(st.sampled_from(["plain", "transposed", "strided", "shared", "sliced"]))
        shape = {
            "plain": (batch, heads, length, width),
            "transposed": (batch, length, heads, width),  # as a projection makes them
            "strided": (batch, heads, width, length),
            "shared": (1, 1, length, width),  # broadcast over batch and heads
            "sliced": (batch, heads, 2 * length, width + 3),
        }[layout]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if layout == "transposed":
            return x.transpose(1, 2)
        if layout == "strided":
            return x.mT
        if layout == "shared":
            return x.expand(batch, heads, length, width)
        return x[:, :, ::2, 3:] if layout == "sliced" else x

    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, s, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9]))
        if draw(st.booleans()):
            mask = mask[:, :1].expand(batch, s)
    h = key_heads * groups
    return {
        "tensors": (tensor(h, n, d), tensor(key_heads, s, d), tensor(key_heads, s, dv)),
        "key_mask": mask,
        "scale": draw(st.sampled_from([None, 0.1, 2.0])),
        "is_causal": causal,
    }


def assert_right(name: str, wanted: Tensor, call: dict, **options) -> None:
    q, k, v = call["tensors"]
    sizes = {"head_dim": q.shape[3], "num_heads": q.shape[1], "num_kv_heads": k.shape[1]}
    arguments = {key: call[key] for key in ("key_mask", "scale", "is_causal")}
    kept = [x.clone() for x in (q, k, v)]
    got = maclin.mechanism(name, **sizes, **options).double()(q, k, v, **arguments)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), kept, strict=True))


@SETTINGS
@given(st.booleans().flatmap(lambda causal: calls(causal)))
def test_softmax(call):
    arguments = {key: call[key] for key in ("key_mask", "scale", "is_causal")}
    assert_right("softmax", reference.softmax_attention(*call["tensors"], **arguments), call)


@SETTINGS
@given(st.booleans().flatmap(lambda causal: calls(causal)), st.integers(1, 30))
def test_window(call, window):
    arguments = {key: call[key] for key in ("key_mask", "scale", "is_causal")}
    wanted = reference.softmax_attention(*call["tensors"], window=window, **arguments)
    assert_right("window", wanted, call, window=window)


@SETTINGS
@given(st.booleans().flatmap(lambda causal: calls(causal)), st.sampled_from(["softmax", "scaling"]))
def test_efficient(call, normalisation):
    wanted = reference.efficient_attention(
        *call["tensors"],
        normalisation=normalisation,
        scale=1.0 if call["scale"] is None else call["scale"],
        key_mask=call["key_mask"],
        is_causal=call["is_causal"],
    )
    assert_right("efficient", wanted, call, normalisation=normalisation)


@SETTINGS
@given(st.booleans().flatmap(lambda causal: calls(causal)))
def test_elu(call):
    q, k, v = call["tensors"]
    scale = 1.0 if call["scale"] is None else call["scale"]
    phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in (scale * q, k))
    wanted = reference.feature_attention(phi_q, phi_k, v, key_mask=call["key_mask"], is_causal=call["is_causal"])
    assert_right("elu", wanted, call)


@SETTINGS
@given(calls(False))
def test_mean_pooling_to_one_slot_is_the_mean(call):
    q, k, v = call["tensors"]
    ones_q, ones_k = (x.new_ones(*x.shape[:-1], 1) for x in (q, k))
    wanted = reference.feature_attention(ones_q, ones_k, v, key_mask=call["key_mask"])
    assert_right("linformer", wanted, call, projection="mean-pool", proj_len=1)
    assert_right("mean", wanted, call)


@SETTINGS
@given(st.booleans().flatmap(lambda causal: calls(causal)))
def test_a_call_in_two_steps_is_one_call(call):
    """However the keys are cut, the state carries all that is needed; every mechanism with a state."""
    if not call["is_causal"]:
        call = {
            **call,
            "is_causal": True,
            "tensors": tuple(x[:, :, : call["tensors"][1].shape[2]] for x in call["tensors"]),
        }
    q, k, v = call["tensors"]
    n, s = q.shape[2], k.shape[2]
    mask = torch.ones(k.shape[0], s, dtype=torch.bool) if call["key_mask"] is None else call["key_mask"]
    for name in ("efficient", "elu", "favor", "softmax", "window"):
        options = {"window": 5} if name == "window" else {}
        sizes = {"head_dim": q.shape[3], "num_heads": q.shape[1], "num_kv_heads": k.shape[1]}
        mech = maclin.mechanism(name, **sizes, **options).double()
        whole = mech(q, k, v, key_mask=mask, is_causal=True)
        _, state = mech(
            q[:, :, :0],
            k[:, :, : s - n],
            v[:, :, : s - n],
            key_mask=mask[:, : s - n],
            is_causal=True,
            return_state=True,
        )
        rest = mech(q, k[:, :, s - n :], v[:, :, s - n :], key_mask=mask[:, s - n :], is_causal=True, state=state)
        torch.testing.assert_close(rest, whole, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_the_calls_that_are_drawn_are_varied(causal):
    """Guards the strategy itself: zero lengths, masks, groups and layouts all occur."""
    seen: set[str] = set()

    @settings(SETTINGS, database=None)
    @given(calls(causal))
    def collect(call: dict) -> None:
        q, k, v = call["tensors"]
        seen.update(["no queries"] if q.shape[2] == 0 else ["queries"])
        seen.update(["no keys"] if k.shape[2] == 0 else ["keys"])
        seen.update(["no batch"] if q.shape[0] == 0 else [])
        seen.update(["groups"] if q.shape[1] != k.shape[1] else [])
        seen.update(["mask"] if call["key_mask"] is not None else [])
        seen.update(["strides"] if not all(x.is_contiguous() for x in (q, k, v)) else [])
        seen.update(["broadcast"] if any(x.numel() and 0 in x.stride() for x in (q, k, v)) else [])

    collect()
    assert seen == {"no queries", "queries", "no keys", "keys", "no batch", "groups", "mask", "strides", "broadcast"}
