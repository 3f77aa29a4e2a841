"""The layers against torch's, alone and inside torch's stacks, whose fused path must not pass them by."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maclin
from maclin.core.mechanisms import Mechanism
from maclin.nn import MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer

CAUSAL = nn.Transformer.generate_square_subsequent_mask
FORMS = [
    {"norm_first": True, "batch_first": True},
    {"norm_first": False, "batch_first": True, "activation": "gelu"},
    {"norm_first": True, "batch_first": False, "bias": False},
    {"norm_first": False, "batch_first": False, "layer_norm_eps": 1e-2, "activation": torch.tanh},
]


def shaken(module: nn.Module) -> nn.Module:
    """Norms and biases away from 1 and 0, so that none may be forgotten."""
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return module


def calls(module: nn.Module) -> list[str]:
    """Names of the mechanisms inside, one more at every call; without hooks, which alone keep torch from fusing."""
    made: list[str] = []

    def watched(mechanism: Mechanism) -> Callable[..., Any]:
        forward = mechanism.forward

        def call(*args: Any, **options: Any) -> Any:
            made.append(mechanism.name)
            return forward(*args, **options)

        return call

    for part in module.modules():
        if isinstance(part, Mechanism):
            part.forward = watched(part)
    return made


def encoder_of(layer: nn.Module, num_layers: int) -> nn.TransformerEncoder:
    """torch's stack of our layers; its annotation wants a layer of torch, its code does not."""
    stack: Any = nn.TransformerEncoder
    return stack(layer, num_layers, enable_nested_tensor=False)


@pytest.mark.parametrize("form", FORMS)
def test_the_encoder_layer_equals_torchs(form: dict[str, Any]) -> None:
    theirs = shaken(nn.TransformerEncoderLayer(16, 4, 24, **form)).eval()
    ours = TransformerEncoderLayer(16, 4, 24, **form, mechanism="softmax").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 7, 16)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = True
    x = x if form["batch_first"] else x.transpose(0, 1)
    for options in ({}, {"src_key_padding_mask": padding}, {"src_mask": CAUSAL(7), "is_causal": True}):
        torch.testing.assert_close(ours(x, **options), theirs(x, **options), rtol=0, atol=4e-6)
    alone = x[0] if form["batch_first"] else x[:, 0]
    torch.testing.assert_close(ours(alone), theirs(alone), rtol=0, atol=4e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_decoder_layer_equals_torchs(form: dict[str, Any]) -> None:
    theirs = shaken(nn.TransformerDecoderLayer(16, 4, 24, **form)).eval()
    ours = TransformerDecoderLayer(16, 4, 24, **form, mechanism="softmax").eval()
    ours.load_state_dict(theirs.state_dict())
    x, memory = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    padding, padding_x = torch.zeros(3, 7, dtype=torch.bool), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 5:] = padding_x[1, 4:] = True
    if not form["batch_first"]:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    for options in (
        {},
        {"memory_key_padding_mask": padding, "tgt_key_padding_mask": padding_x},
        {"tgt_mask": CAUSAL(5), "tgt_is_causal": True},
    ):
        torch.testing.assert_close(ours(x, memory, **options), theirs(x, memory, **options), rtol=0, atol=4e-6)


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_calls_our_attention(norm_first: bool) -> None:
    layer = TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first, mechanism="efficient")
    stack = encoder_of(layer, 2).eval()
    made = calls(stack)
    x = torch.randn(3, 7, 16)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = True
    with torch.no_grad():
        got = stack(x, src_key_padding_mask=padding)
        wanted = x
        for one in stack.layers:
            wanted = one(wanted, src_key_padding_mask=padding)
    assert made == ["efficient"] * 4
    assert torch.equal(got, wanted)
    softmax = encoder_of(
        TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first, mechanism="softmax"), 2
    ).eval()
    softmax.load_state_dict(stack.state_dict())
    with torch.no_grad():
        assert not torch.allclose(got, softmax(x, src_key_padding_mask=padding), atol=1e-3)


def test_our_attention_within_torchs_layer_is_called() -> None:
    """In eval mode without gradients torch's layer would fuse past a subclass of its own attention."""
    theirs = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        before = theirs(x)
        ours = MultiheadAttention(16, 2, batch_first=True, mechanism="mean").eval()
        ours.load_state_dict(theirs.self_attn.state_dict())
        theirs.self_attn = ours  # pyright: ignore[reportAttributeAccessIssue]
        made = calls(theirs)
        after = theirs(x)
    assert made == ["mean"]
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")  # torch says it once in a process
def test_a_nested_tensor_is_refused_with_the_way_out() -> None:
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 1).eval()
    stack.layers[0].self_attn = MultiheadAttention(16, 2, batch_first=True)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    with torch.no_grad(), pytest.raises(maclin.CapabilityError, match="enable_nested_tensor=False"):
        stack(torch.randn(2, 5, 16), src_key_padding_mask=padding)


def test_torchs_decoder_and_transformer_call_our_attention() -> None:
    layer: Any = TransformerDecoderLayer(16, 2, 24, batch_first=True, mechanism="favor")
    decoder = nn.TransformerDecoder(layer, 2)
    encoder = encoder_of(TransformerEncoderLayer(16, 2, 24, batch_first=True, mechanism="elu"), 1)
    model = nn.Transformer(16, 2, batch_first=True, custom_encoder=encoder, custom_decoder=decoder).eval()
    made = calls(model)
    source, target = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    with torch.no_grad():
        got = model(source, target, tgt_mask=CAUSAL(4))
        assert made == ["elu", *["favor"] * 4]
        memory = encoder(source)
        changed = target.clone()
        changed[:, 3] = 0.0
        again = decoder(changed, memory, tgt_mask=CAUSAL(4))
    assert torch.allclose(got[:, :3], again[:, :3], atol=1e-6), "the mask was causal, so the last token is not seen"


def test_dropout_reaches_weights_where_there_are_any() -> None:
    def dropped(layer: TransformerEncoderLayer) -> float:
        return layer.self_attn.dropout

    assert dropped(TransformerEncoderLayer(16, 2, mechanism="softmax", dropout=0.3)) == 0.3
    assert dropped(TransformerEncoderLayer(16, 2, mechanism="softmax", dropout=0.3, attention_dropout=0.0)) == 0.0
    assert dropped(TransformerEncoderLayer(16, 2, mechanism="elu", dropout=0.3)) == 0.0
    with pytest.raises(maclin.CapabilityError, match="dropout"):
        TransformerEncoderLayer(16, 2, mechanism="elu", attention_dropout=0.1)


@pytest.mark.parametrize("norm_first", [True, False])
def test_layers_drop_what_torchs_drop(norm_first: bool) -> None:
    sizes: dict[str, Any] = {"dropout": 0.4, "batch_first": True, "norm_first": norm_first}
    encoders = (
        nn.TransformerEncoderLayer(16, 2, 24, **sizes),
        TransformerEncoderLayer(16, 2, 24, **sizes, mechanism="softmax", attention_dropout=0.0),
    )
    decoders = (
        nn.TransformerDecoderLayer(16, 2, 24, **sizes),
        TransformerDecoderLayer(16, 2, 24, **sizes, mechanism="softmax", attention_dropout=0.0),
    )
    # one sequence: what is drawn for which number depends on the order in memory, which is torch's (N, B, E)
    x, memory = torch.randn(1, 5, 16), torch.randn(1, 6, 16)
    mask = torch.ones(1, 6, dtype=torch.bool)

    def drawn(call: Callable[[], Tensor]) -> Tensor:
        torch.manual_seed(7)
        return call()

    for theirs, ours in (encoders, decoders):
        ours.load_state_dict(theirs.state_dict())
        for part in theirs.modules():
            if isinstance(part, nn.MultiheadAttention):
                part.dropout = 0.0
    wanted = drawn(lambda: encoders[0](memory))
    torch.testing.assert_close(drawn(lambda: encoders[1](memory)), wanted)
    torch.testing.assert_close(drawn(lambda: encoders[1].encode(memory, key_mask=mask)[0]), wanted)
    wanted = drawn(lambda: decoders[0](x, memory, tgt_mask=CAUSAL(5), tgt_is_causal=True))
    torch.testing.assert_close(drawn(lambda: decoders[1](x, memory, tgt_is_causal=True)), wanted)
    torch.testing.assert_close(drawn(lambda: decoders[1].decode(x, memory, memory_mask=mask)[0]), wanted)


def test_the_two_ways_to_call_a_layer_agree() -> None:
    encoder = TransformerEncoderLayer(16, 2, 24, batch_first=True, mechanism="favor", position="rotary").eval()
    decoder = TransformerDecoderLayer(
        16, 2, 24, batch_first=True, mechanism="favor", cross_mechanism="revisited_linformer"
    ).eval()
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    torch.testing.assert_close(
        encoder(memory, src_key_padding_mask=~mask, is_causal=True),
        encoder.encode(memory, key_mask=mask, is_causal=True)[0],
    )
    torch.testing.assert_close(
        decoder(x, memory, memory_key_padding_mask=~mask, tgt_is_causal=True),
        decoder.decode(x, memory, memory_mask=mask)[0],
    )


def test_the_state_of_a_layer_continues_it() -> None:
    layer = TransformerEncoderLayer(16, 2, 24, mechanism="macformer").eval()
    x = torch.randn(2, 9, 16)
    whole, _ = layer.encode(x, is_causal=True)
    first, state = layer.encode(x[:, :5], is_causal=True, return_state=True)
    second, _ = layer.encode(x[:, 5:], is_causal=True, state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "swish"}, "'relu', 'gelu', or pass a function"),
        ({"dim_feedforward": 0}, "dim_feedforward"),
        ({"dropout": 1.5}, "probability"),
        ({"mechanism": maclin.mechanism("elu", head_dim=8, num_heads=2)}, "cross_mechanism"),
        ({"cross_options": {"num_features": 8}}, "cross_options is given"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(maclin.OptionError, match=words):
        TransformerDecoderLayer(**{"d_model": 16, "nhead": 2, **options})


def test_gradients_reach_the_mechanism() -> None:
    layer = TransformerEncoderLayer(16, 2, 24, mechanism="macformer", temperature="learned")
    out: Tensor = layer(torch.randn(5, 2, 16))
    out.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
