"""attention() beside torch's own, and the front door."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import maclin
from maclin.core import mechanisms
from maclin.core.errors import CapabilityError, InputError, MaclinError, OptionError


@pytest.fixture
def tensors(qkv) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(9, 12, heads=4, kv_heads=4, dtype=torch.float32)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_softmax_is_torchs_attention(tensors, scale):
    q, k, v = tensors
    torch.testing.assert_close(
        maclin.attention(q, k, v, mechanism="softmax", scale=scale), scaled_dot_product_attention(q, k, v, scale=scale)
    )
    mask = torch.rand(2, 1, 1, 12) > 0.3
    mask[..., 0] = True
    torch.testing.assert_close(
        maclin.attention(q, k, v, mask, mechanism="softmax", scale=scale),
        scaled_dot_product_attention(q, k, v, mask, scale=scale),
    )
    square = maclin.attention(q, k[:, :, :9], v[:, :, :9], is_causal=True, mechanism="softmax", scale=scale)
    torch.testing.assert_close(
        square, scaled_dot_product_attention(q, k[:, :, :9], v[:, :, :9], is_causal=True, scale=scale)
    )


def test_causal_is_aligned_with_the_last_key(tensors):
    q, k, v = tensors
    allowed = torch.ones(9, 12, dtype=torch.bool).tril(3)
    torch.testing.assert_close(
        maclin.attention(q, k, v, is_causal=True, mechanism="softmax"), scaled_dot_product_attention(q, k, v, allowed)
    )


def test_shared_heads_need_enable_gqa(qkv):
    q, k, v = qkv(9, 12, dtype=torch.float32)
    torch.testing.assert_close(
        maclin.attention(q, k, v, enable_gqa=True, mechanism="softmax"),
        scaled_dot_product_attention(q, k, v, enable_gqa=True),
    )
    with pytest.raises(InputError, match=r"query has 4 heads and key 2; pass enable_gqa=True"):
        maclin.attention(q, k, v, mechanism="softmax")
    with pytest.raises(OptionError, match="num_heads 4 is not a multiple of num_kv_heads 3"):
        maclin.attention(q, q[:, :3], q[:, :3], enable_gqa=True)


def test_dropout_is_torchs(tensors):
    q, k, v = tensors
    torch.manual_seed(3)
    got = maclin.attention(q, k, v, dropout_p=0.5, mechanism="softmax")
    torch.manual_seed(3)
    torch.testing.assert_close(got, scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert not torch.allclose(got, scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("mechanism", ["macformer", "revisited_linformer", "built"])
def test_dropout_is_refused_where_there_are_no_weights(tensors, mechanism):
    if mechanism == "built":
        mechanism = maclin.mechanism("softmax", head_dim=8, num_heads=4)
    with pytest.raises(CapabilityError, match=r"dropout.*pass dropout_p=0"):
        maclin.attention(*tensors, dropout_p=0.1, mechanism=mechanism)


@pytest.mark.parametrize("shape", [(2, 1, 1, 12), (1, 1, 1, 12), (1, 1, 12), (1, 12), (12,), (2, 1, 1, 1), (), (1,)])
def test_masks_over_keys_are_taken(tensors, shape):
    q, k, v = tensors
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    if mask.numel() > 1:
        mask[..., :2] = True
    whole = mask.expand(2, 1, 1, 12) if mask.dim() else mask.reshape(1, 1, 1, 1).expand(2, 1, 1, 12)
    wanted = scaled_dot_product_attention(q, k, v, whole.expand(2, 1, 9, 12))
    torch.testing.assert_close(maclin.attention(q, k, v, mask, mechanism="softmax"), wanted)


@pytest.mark.parametrize(
    "shape", [(2, 1, 9, 12), (2, 4, 1, 12), (9, 12), (2, 12), (3, 1, 1, 12), (1, 1, 1, 11), (1, 1, 1, 1, 12)]
)
@pytest.mark.parametrize("mechanism", ["softmax", "elu"])
def test_masks_that_are_not_over_keys_are_refused(tensors, shape, mechanism):
    q, k, v = tensors
    with pytest.raises(CapabilityError, match=r"takes bool masks over keys only, \(2, 1, 1, 12\)"):
        maclin.attention(q, k, v, torch.ones(shape, dtype=torch.bool), mechanism=mechanism)


def test_float_masks_are_refused(tensors):
    q, k, v = tensors
    with pytest.raises(CapabilityError, match=r"dtype torch.float32; a mechanism of linear cost takes bool masks"):
        maclin.attention(q, k, v, torch.zeros(2, 1, 1, 12), mechanism="mean")


OPTIONS = {"linformer": {"seq_len": 12}}


@pytest.mark.parametrize("name", mechanisms.names())
def test_equal_calls_give_equal_results_and_leave_torchs_generator_alone(tensors, name):
    options = OPTIONS.get(name, {})
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = maclin.attention(*tensors, mechanism=name, **options)
    assert torch.equal(one, maclin.attention(*tensors, mechanism=name, **options))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.shape == (2, 4, 9, 5)


def test_a_generator_draws_another(tensors):
    one = maclin.attention(*tensors, mechanism="rfa")
    other = maclin.attention(*tensors, mechanism="rfa", generator=torch.Generator().manual_seed(7))
    assert not torch.equal(one, other)


def test_options_reach_the_mechanism(tensors):
    wide, narrow = (maclin.attention(*tensors, mechanism="window", window=w) for w in (100, 1))
    torch.testing.assert_close(wide, scaled_dot_product_attention(*tensors))
    assert not torch.allclose(wide, narrow)


def test_a_built_mechanism_is_used_as_it_is(tensors):
    mech = maclin.mechanism("favor", head_dim=8, num_heads=4)
    assert torch.equal(maclin.attention(*tensors, mechanism=mech), mech(*tensors))
    with pytest.raises(InputError, match=r"options \['num_features'\] are for a named mechanism"):
        maclin.attention(*tensors, mechanism=mech, num_features=3)


def test_unknown_names_and_options_list_the_known(tensors):
    with pytest.raises(OptionError, match=f"unknown mechanism 'linear'; known are {', '.join(mechanisms.names())}"):
        maclin.attention(*tensors, mechanism="linear")
    with pytest.raises(OptionError, match="favor has no option 'features'; known are num_features, generator"):
        maclin.attention(*tensors, mechanism="favor", features=3)
    with pytest.raises(OptionError, match="mean has no option 'window'; known are none"):
        maclin.attention(*tensors, mechanism="mean", window=3)


def test_shapes_are_checked_before_anything_is_built(tensors):
    q, k, v = tensors
    with pytest.raises(InputError, match=r"have 3, 4, 4 dimensions; wanted 4 each"):
        maclin.attention(q[0], k, v)
    with pytest.raises(InputError, match=r"v has shape|do not fit"):
        maclin.attention(q, k, v[:, :, 1:])


def test_the_errors_are_one_family():
    for error in (CapabilityError, InputError, OptionError):
        assert issubclass(error, MaclinError)
        assert issubclass(error, ValueError)


def test_the_front_door_keeps_what_it_promises():
    assert dir(maclin) == sorted(maclin.__all__)
    for name in maclin.__all__:
        assert getattr(maclin, name) is not None, name
    assert maclin.mechanisms is importlib.import_module("maclin.core.mechanisms")
    with pytest.raises(AttributeError, match="module 'maclin' has no attribute 'softmax'"):
        _ = maclin.softmax


def test_the_front_door_loads_the_rest_at_first_use():
    code = (
        "import sys, maclin; "
        "rooms = lambda: {m.split('.')[1] for m in sys.modules if m.startswith('maclin.')}; "
        "assert rooms() <= {'core', '_version'}, rooms(); "
        "maclin.Audit; assert 'records' in rooms(); "
        "maclin.testing.check_mechanism; assert 'adopt' not in rooms(), rooms(); "
        "maclin.audit; assert 'adopt' in rooms()"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_the_names_of_the_registry():
    for name in mechanisms.names():
        assert mechanisms.row(name).name == name
        assert mechanisms.row(name).summary
