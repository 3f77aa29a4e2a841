"""MultiheadAttention against torch's own, flag by flag, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maclin
from maclin.core.reference import softmax_attention
from maclin.nn import MultiheadAttention

CAUSAL = nn.Transformer.generate_square_subsequent_mask


def pair(*args: Any, **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's attention and ours with softmax, of equal weights, biases not 0."""
    theirs = nn.MultiheadAttention(*args, **options).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    ours = MultiheadAttention(*args, **options, mechanism="softmax").eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).detach().abs().max()) <= 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 12, "vdim": 10}, {"kdim": 12}])
def test_cross_attention_equals_torchs(bias: bool, batch_first: bool, widths: dict[str, int]) -> None:
    theirs, ours = pair(16, 4, bias=bias, batch_first=batch_first, **widths)
    q, k, v = (
        torch.randn(3, 5, 16),
        torch.randn(3, 7, widths.get("kdim", 16)),
        torch.randn(3, 7, widths.get("vdim", 16)),
    )
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = padding[2, :3] = True
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    for mask in (None, padding, torch.zeros(3, 7).masked_fill(padding, -torch.inf)):
        close(ours(q, k, v, mask)[0], theirs(q, k, v, mask)[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_equals_torchs(batch_first: bool) -> None:
    theirs, ours = pair(16, 4, batch_first=batch_first)
    x = torch.randn(3, 7, 16) if batch_first else torch.randn(7, 3, 16)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    for mask in (None, padding):
        close(ours(x, x, x, mask)[0], theirs(x, x, x, mask)[0])
        causal = CAUSAL(7)
        wanted = theirs(x, x, x, mask, need_weights=False, attn_mask=causal.isinf(), is_causal=True)[0]
        close(ours(x, x, x, mask, is_causal=True)[0], wanted)
        close(ours(x, x, x, mask, attn_mask=causal, is_causal=True)[0], wanted)
        close(ours(x, x, x, mask, attn_mask=causal.isinf())[0], wanted)
        close(ours(x, x, x, mask, attn_mask=torch.zeros(7, 7))[0], theirs(x, x, x, mask)[0])


def test_a_single_sequence_equals_torchs() -> None:
    theirs, ours = pair(16, 4)
    q, k = torch.randn(5, 16), torch.randn(7, 16)
    padding = torch.tensor([False] * 5 + [True] * 2)
    close(ours(q, k, k, padding)[0], theirs(q, k, k, padding)[0])
    close(ours(q, q, q, is_causal=True)[0], theirs(q, q, q, attn_mask=CAUSAL(5), is_causal=True)[0])


def test_gradients_equal_torchs() -> None:
    theirs, ours = pair(16, 4, batch_first=True)
    x = torch.randn(2, 6, 16)
    for module in (theirs, ours):
        module(x, x, x, need_weights=False)[0].square().sum().backward()
    for (name, wanted), got in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("widths", [{}, {"kdim": 12, "vdim": 10}])
@pytest.mark.parametrize("mechanism", ["softmax", "macformer", "favor"])
def test_the_start_is_torchs(widths: dict[str, Any], mechanism: str) -> None:
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(16, 4, **widths)
    behind = torch.rand(())
    torch.manual_seed(3)
    ours = MultiheadAttention(16, 4, **widths, mechanism=mechanism)
    assert torch.equal(torch.rand(()), behind), "what a mechanism draws must not move torch's generator on"
    state = ours.state_dict()
    for name, wanted in theirs.state_dict().items():
        assert torch.equal(state[name], wanted), name


def test_checkpoints_load_both_ways() -> None:
    ours = MultiheadAttention(16, 4, mechanism="softmax")
    theirs = nn.MultiheadAttention(16, 4)
    theirs.load_state_dict(ours.state_dict())
    linear = MultiheadAttention(16, 4, mechanism="macformer")
    missing, unknown = linear.load_state_dict(theirs.state_dict(), strict=False)
    assert not unknown
    assert all(name.startswith("mechanism.") for name in missing)


def test_two_attentions_draw_apart_and_equal_seeds_alike() -> None:
    def directions() -> list[Tensor]:
        torch.manual_seed(5)
        made = [MultiheadAttention(16, 2, mechanism="favor").mechanism for _ in range(2)]
        return [m.get_buffer("directions") for m in made]

    (first, second), again = directions(), directions()
    assert not torch.equal(first, second)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])


def test_shared_key_heads_are_repeated_ones() -> None:
    ours = MultiheadAttention(16, 4, mechanism="softmax", num_kv_heads=2, batch_first=True).double()
    assert ours.in_proj_weight is not None
    assert ours.in_proj_weight.shape == (16 + 2 * 8, 16)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    q, k, v = (ours.in_proj_weight @ x.mT).mT.split([16, 8, 8], dim=-1)

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, 4)).transpose(1, 2)

    wanted = softmax_attention(heads(q), heads(k), heads(v))
    assert torch.allclose(ours(x, x, x)[0], ours.out_proj(wanted.transpose(1, 2).flatten(2)), atol=1e-12)


@pytest.mark.parametrize("name", [n for n in maclin.mechanisms.names() if n != "linformer"])
def test_every_mechanism_gets_the_heads_and_the_mask(name: str) -> None:
    ours = MultiheadAttention(16, 2, mechanism=name).eval()
    q, k = torch.randn(5, 3, 16), torch.randn(7, 3, 16)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = True
    out, weights = ours(q, k, k, padding)
    assert weights is None
    alone = ours(q[:, 0], k[:4, 0], k[:4, 0])[0]
    # window: where a query stands is counted from the last key, so a cropped call is another call
    if name not in ("window", "hybrid"):
        assert torch.allclose(out[:, 0], alone, atol=1e-5)
    assert torch.allclose(out[:, 1], ours(q[:, 1], k[:, 1], k[:, 1])[0], atol=1e-5)


def test_a_query_without_keys_gives_the_bias() -> None:
    ours = MultiheadAttention(16, 2, mechanism="macformer", batch_first=True)
    nn.init.normal_(ours.out_proj.bias)
    x = torch.randn(1, 4, 16)
    out, _ = ours(x, x, x, torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(out, ours.out_proj.bias.expand_as(out))


def test_dropout_drops_weights_in_training_only() -> None:
    ours = MultiheadAttention(16, 2, dropout=0.5, mechanism="softmax", batch_first=True)
    x = torch.randn(1, 6, 16)
    with torch.no_grad():
        exact = ours.eval()(x, x, x)[0]
        ours.train()
        drawn = torch.stack([ours(x, x, x)[0] for _ in range(800)])
    assert float((drawn[0] - exact).abs().max()) > 1e-3
    assert float((drawn.mean(0) - exact).abs().max()) < 6 * float(drawn.std(0).max()) / 800**0.5


def test_a_built_mechanism_is_taken_as_it_is() -> None:
    built = maclin.mechanism("favor", head_dim=8, num_heads=2, num_kv_heads=1, num_features=16)
    assert MultiheadAttention(16, 2, num_kv_heads=1, mechanism=built).mechanism is built


def test_buffers_follow_device_and_dtype() -> None:
    ours = MultiheadAttention(16, 2, mechanism="macformer", dtype=torch.float64, estimator="published")
    assert {x.dtype for x in ours.state_dict().values() if x.is_floating_point()} == {torch.float64}
    assert {x.device.type for x in MultiheadAttention(16, 2, mechanism="favor", device="meta").parameters()} == {"meta"}


def test_rotary_counts_attended_tokens() -> None:
    ours = MultiheadAttention(16, 2, mechanism="softmax", position="rotary", batch_first=True).eval()
    x = torch.randn(2, 6, 16)
    moved = torch.cat([torch.randn(2, 3, 16), x], dim=1)
    padding = torch.tensor([True] * 3 + [False] * 6).expand(2, -1)
    assert torch.allclose(ours(moved, moved, moved, padding)[0][:, 3:], ours(x, x, x)[0], atol=1e-6)
    plain = MultiheadAttention(16, 2, mechanism="softmax", batch_first=True).eval()
    plain.load_state_dict(ours.state_dict())
    assert not torch.allclose(plain(x, x, x)[0], ours(x, x, x)[0], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"embed_dim": 15}, maclin.OptionError, "multiple"),
        ({"num_heads": 0}, maclin.OptionError, "positive"),
        ({"add_bias_kv": True}, maclin.OptionError, "add a token"),
        ({"add_zero_attn": True}, maclin.OptionError, "add_zero_attn"),
        ({"dropout": 0.1}, maclin.CapabilityError, "mechanism='softmax'"),
        ({"mechanism": "nonsense"}, maclin.OptionError, "known are"),
        ({"mechanism": "elu", "num_features": 3}, maclin.OptionError, "no option 'num_features'"),
        ({"num_kv_heads": 3}, maclin.OptionError, "multiple of num_kv_heads"),
        ({"position": "learned"}, maclin.OptionError, "'rotary' and None"),
        ({"position": "rotary", "mechanism": "elu"}, maclin.CapabilityError, "no function of the product"),
        ({"mechanism": maclin.mechanism("elu", head_dim=4, num_heads=4)}, maclin.OptionError, r"wanted \(8, 2, 2\)"),
        ({"mechanism": maclin.mechanism("elu", head_dim=8, num_heads=2), "x": 1}, maclin.OptionError, "built already"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MultiheadAttention(**{"embed_dim": 16, "num_heads": 2, **options})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"attn_mask": torch.rand(6, 6)}, maclin.CapabilityError, "key_padding_mask"),
        ({"attn_mask": torch.eye(6, dtype=torch.bool)}, maclin.CapabilityError, "never makes"),
        ({"attn_mask": torch.zeros(4, 6, 6)}, maclin.CapabilityError, "never makes"),
        ({"attn_mask": torch.zeros(6, 6), "is_causal": True}, maclin.InputError, "not the causal mask"),
        ({"key_padding_mask": torch.rand(2, 6)}, maclin.CapabilityError, "other than 0 and -inf"),
        ({"key_padding_mask": torch.ones(2, 6, dtype=torch.long)}, maclin.InputError, "bool with True = ignore"),
        ({"key_padding_mask": torch.ones(6, 2, dtype=torch.bool)}, maclin.InputError, r"wanted \(2, 6\)"),
        ({"query": torch.rand(2, 6, 8)}, maclin.InputError, "widths 16, 16, 16"),
        ({"query": torch.rand(3, 6, 16)}, maclin.InputError, "one batch size"),
        ({"query": torch.rand(6, 16)}, maclin.InputError, r"\(batch, tokens, width\)"),
        ({"value": torch.rand(2, 5, 16)}, maclin.InputError, "as many values as keys"),
    ],
)
def test_bad_inputs_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    ours = MultiheadAttention(16, 2, mechanism="efficient", batch_first=True)
    x = torch.rand(2, 6, 16)
    with pytest.raises(error, match=words):
        ours(**{"query": x, "key": x, "value": x, **options})


def test_what_the_mechanism_lacks_is_its_own_refusal() -> None:
    x = torch.rand(6, 16)
    with pytest.raises(maclin.CapabilityError, match="is_causal"):
        MultiheadAttention(16, 2, mechanism="revisited_linformer")(x, x, x, is_causal=True)
    with pytest.raises(maclin.CapabilityError, match="two sequences"):
        MultiheadAttention(16, 2, position="rotary")(x[:4], x, x)
