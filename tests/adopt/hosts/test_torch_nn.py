from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maclin.adopt import audit, capture, convert_, plan, restore_
from maclin.adopt.hosts import host
from maclin.core.errors import CapabilityError, InputError, MaclinError
from maclin.core.mechanisms import Mechanism, mechanism

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(nested tensors|enable_nested_tensor)"
)  # torch's encoders, unconverted

PADDING = torch.arange(9).expand(2, 9) >= torch.tensor([[9], [5]])
PAST = torch.ones(9, 9, dtype=torch.bool).triu(1)


def tokens(batch: int = 2, length: int = 9, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(32, 4, **{"batch_first": True, **options}).eval()


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 32, **{"batch_first": True, "dropout": 0.0, **options})
    return nn.TransformerEncoder(layer, layers).eval()


class Own(nn.Module):
    """A model of one's own, that drops the weights or works on with them."""

    def __init__(self, uses_weights: bool = False) -> None:
        super().__init__()
        self.attention, self.head, self.uses_weights = attention(), nn.Linear(32, 3), uses_weights

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(x, x, x)
        return self.head(out * weights.sum(-1, keepdim=True) if self.uses_weights else out)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fused_path_never_answers_for_a_converted_layer(norm_first: bool) -> None:
    """Evaluation, without gradients, padded: where torch would call neither self_attn nor any replacement of it."""
    model = encoder(norm_first=norm_first)
    ran: list[str] = []
    convert_(model, "mean")
    for module in model.modules():
        if isinstance(module, Mechanism):
            forward = module.forward

            def counted(*args: Any, forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
                ran.append("mean")
                return forward(*args, **kwargs)

            module.forward = counted  # pyright: ignore[reportAttributeAccessIssue]  # no hook: hooks end the fused path
    with torch.inference_mode():
        for padding in (None, PADDING):
            model(tokens(), src_key_padding_mask=padding)
            model.layers[0](tokens(), src_key_padding_mask=padding)
    assert len(ran) == 6


def test_a_layer_that_only_looks_swapped_is_measured_as_softmax_by_torch() -> None:
    """The trap itself, so that the test above is known to stand before it: torch never calls this replacement."""

    class Replaced(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("called")

    model: Any = encoder(1)
    model.layers[0].self_attn.__class__ = Replaced
    with torch.inference_mode():
        assert model(tokens()).isfinite().all()


def test_an_exact_first_layer_hands_no_nested_tensor_to_a_converted_one() -> None:
    model = encoder(3)
    with torch.no_grad():
        before = model(tokens(), src_key_padding_mask=PADDING)
        convert_(model, {"layers.1.self_attn": "softmax"})
        found = model(tokens(), src_key_padding_mask=PADDING)
        torch.testing.assert_close(found[~PADDING], before[~PADDING], atol=1e-5, rtol=1e-5)
        assert not model.use_nested_tensor
        restore_(model)
        assert model.use_nested_tensor
        assert torch.equal(model(tokens(), src_key_padding_mask=PADDING), before)


@pytest.mark.parametrize("given", ["bool", "float", "hint", "hint alone", "with padding"])
def test_every_way_to_say_causal(given: str) -> None:
    model, x = encoder(), tokens()
    real = ~PADDING if given == "with padding" else torch.ones(2, 9, dtype=torch.bool)
    arguments: dict[str, Any] = {
        "bool": {"mask": PAST},
        "float": {"mask": nn.Transformer.generate_square_subsequent_mask(9)},
        "hint": {"mask": PAST, "is_causal": True},
        "hint alone": {"is_causal": True},
        "with padding": {"mask": PAST, "src_key_padding_mask": PADDING},
    }[given]
    with torch.no_grad():
        wanted = model(x, **{"mask": PAST, **arguments})
        convert_(model, "softmax")
        torch.testing.assert_close(model(x, **arguments)[real], wanted[real], atol=1e-5, rtol=1e-5)
        convert_(model, "elu")
        other = torch.cat([x[:, :6], tokens(seed=1)[:, 6:]], 1)
        one, two = (model(y, **arguments)[:, :6][real[:, :6]] for y in (x, other))
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
        restore_(model)


def test_a_mask_of_nothing_is_no_mask() -> None:
    model, x = attention(), tokens()
    convert_(model, "mean")
    free = model(x, x, x)[0]
    assert torch.equal(model(x, x, x, attn_mask=torch.zeros(9, 9))[0], free)
    assert not torch.allclose(model(x, x, x, attn_mask=PAST)[0], free)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"attn_mask": torch.eye(9, dtype=torch.bool)}, "more than causality"),
        ({"attn_mask": torch.full((9, 9), 0.5)}, "adds a bias"),
        ({"attn_mask": torch.zeros(8, 9, 9)}, "per sequence and head"),
        ({"key_padding_mask": torch.full((2, 9), -0.5)}, "key_padding_mask adds other numbers"),
    ],
)
def test_what_is_no_padding_and_no_causality_is_refused(arguments: dict[str, Tensor], reason: str) -> None:
    model, x = attention(), tokens()
    batch = {"query": x, "key": x, "value": x, **arguments}
    (found,) = host(model).layers(batch)
    assert reason in str(found.refused)
    before = model(**batch)[0]
    with pytest.raises(CapabilityError, match=reason):
        convert_(model, "elu", batch=batch)
    assert torch.equal(model(**batch)[0], before)
    convert_(model, "elu")
    with pytest.raises(CapabilityError, match=reason):
        model(**batch)


@pytest.mark.parametrize(("option", "reason"), [("add_bias_kv", "learned biases"), ("add_zero_attn", "zeros")])
def test_more_keys_than_tokens_are_refused(option: str, reason: str) -> None:
    with pytest.raises(CapabilityError, match=reason):
        convert_(attention(**{option: True}), "elu")


def test_a_subclass_is_refused() -> None:
    class Other(nn.MultiheadAttention):
        pass

    model = Own()
    model.attention = Other(32, 4, batch_first=True)
    (found,) = host(model).layers(tokens())
    assert "Other" in str(found.refused)


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 16, "vdim": 8}, {"batch_first": False}])
def test_other_projections_and_layouts(options: dict[str, Any]) -> None:
    model = attention(**options)
    q, k, v = tokens(), tokens(length=7, width=model.kdim, seed=1), tokens(length=7, width=model.vdim, seed=2)
    if not model.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    wanted = model(q, k, v)[0]
    convert_(model, "softmax")
    torch.testing.assert_close(model(q, k, v)[0], wanted, atol=1e-6, rtol=1e-5)
    one = [x[0] if model.batch_first else x[:, 0] for x in (q, k, v)]
    torch.testing.assert_close(
        model(*one)[0], wanted[0] if model.batch_first else wanted[:, 0], atol=1e-6, rtol=1e-5
    )  # unbatched


def test_captured_q_k_and_v_are_the_projections() -> None:
    model, x = attention(), tokens()
    captured = capture(model, [{"query": x, "key": x, "value": x, "key_padding_mask": PADDING}])
    (call,) = captured.calls[""]
    projected = x @ model.in_proj_weight.T + model.in_proj_bias
    for found, wanted in zip((call.q, call.k, call.v), projected.split(32, -1), strict=True):
        torch.testing.assert_close(found, wanted.view(2, 9, 4, 8).transpose(1, 2))
    assert call.key_mask is not None
    assert torch.equal(call.key_mask, ~PADDING)
    assert (call.scale, call.is_causal, call.is_cross) == (None, False, False)


def test_dropout_in_training_is_refused_but_for_softmax() -> None:
    model = encoder(dropout=0.2).train()
    convert_(model, "elu")
    with pytest.raises(CapabilityError, match=r"attention dropout of 0\.2"):
        model(tokens())
    model.eval()(tokens())
    convert_(model, "softmax")
    assert model.train()(tokens()).isfinite().all()


def test_nested_tensors_are_refused() -> None:
    model = attention()
    convert_(model, "elu")
    x = torch.nested.nested_tensor([tokens()[0], tokens()[1, :4]])
    with pytest.raises(CapabilityError, match="nested"):
        model(x, x, x)


def test_a_model_of_ones_own_is_found_on_its_inputs() -> None:
    model: Any = Own()
    documents = [tokens(length=64, seed=seed) for seed in range(6)]
    before = model(documents[0])
    with pytest.raises(CapabilityError, match=r"pass batch= \(or batches=\)"):
        convert_(model, "elu")
    with pytest.raises(CapabilityError, match="cannot run on the given inputs"):
        convert_(model, "elu", batch={"y": tokens()})
    convert_(model, "macformer", batches=documents)
    assert model.attention.maclin_mechanism.calibration is not None
    restore_(model)
    found = audit(model, iter(documents), mechanisms=["elu"])
    assert [row.layer for row in found.layers] == ["attention"]
    assert convert_(model, plan(found, 0.9), batches=documents) is not None
    convert_(model, "softmax", batch=documents[0])
    torch.testing.assert_close(model(documents[0]), before, atol=1e-6, rtol=1e-5)
    with pytest.raises(InputError, match="Own's inputs"):
        audit(model, [documents[0], tokens(width=8)], mechanisms=["elu"])


def test_weights_that_the_model_works_on_with_are_refused() -> None:
    model, x = Own(uses_weights=True), tokens()
    before = model(x)
    with pytest.raises(CapabilityError, match="works on with its attention weights"):
        convert_(model, "elu", batch=x)
    assert torch.equal(model(x), before)
    assert type(model.attention) is nn.MultiheadAttention


def test_a_part_of_a_converted_model_is_refused() -> None:
    model = encoder()
    convert_(model, "elu")
    with pytest.raises(CapabilityError, match="part of a model"):
        convert_(model.layers[0], "mean")
    with pytest.raises(MaclinError, match="not"):
        restore_(model.layers[0])


def test_a_state_dict_goes_both_ways() -> None:
    model, other = encoder(), encoder()
    convert_(model, "favor", generator=torch.Generator().manual_seed(3))
    convert_(other, "favor")
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens()), other(tokens()))
    encoder().load_state_dict({k: x for k, x in model.state_dict().items() if "maclin_mechanism" not in k})


def test_decoders_are_found_causal_and_cross() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 32, batch_first=True), 1)
    own, cross = host(model).layers()
    assert (own.name, own.is_causal, own.is_cross) == ("layers.0.self_attn", True, False)
    assert (cross.name, cross.is_causal, cross.is_cross) == ("layers.0.multihead_attn", False, True)
    with pytest.raises(CapabilityError, match=r"multihead_attn.*cross-attention, and window"):
        convert_(model, "window")
    with pytest.raises(CapabilityError, match=r"self_attn.*no causal form"):
        convert_(model, "revisited_linformer")


def test_a_ready_mechanism_in_a_layer_of_its_own() -> None:
    model = attention()
    ready = mechanism("elu", head_dim=8, num_heads=4)
    convert_(model, {"": ready})
    assert model.maclin_mechanism is ready


@pytest.mark.slow
def test_a_compiled_model_is_the_same() -> None:
    model = encoder()
    convert_(model, "elu")
    with torch.no_grad():
        wanted = model(tokens(), src_key_padding_mask=PADDING)
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens(), src_key_padding_mask=PADDING), wanted, atol=1e-5, rtol=1e-5)
        causal = model(tokens(), mask=PAST, is_causal=True)
        torch.testing.assert_close(compiled(tokens(), mask=PAST, is_causal=True), causal, atol=1e-5, rtol=1e-5)
