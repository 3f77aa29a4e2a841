"""The models: every mechanism trains, gradients reach everything, what is configured arrives, the rest is said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import maclin
from maclin.nn import (
    MacformerClassifier,
    MacformerConfig,
    MacformerEncoder,
    MacformerLM,
    MacformerMatcher,
    MacformerModel,
    MacformerRegressor,
    MacformerSeq2Seq,
    MacformerTagger,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from maclin.nn.encoders import cross_entropy

NAMES = maclin.mechanisms.names()
CAUSAL = [name for name in NAMES if maclin.mechanisms.row(name).causal]


def config(mechanism: Any = "macformer", **options: Any) -> MacformerConfig:
    return MacformerConfig(
        **{
            "vocab_size": 20,
            "embed_dim": 16,
            "ff_dim": 24,
            "max_length": 24,
            "num_outputs": 3,
            "mechanism": mechanism,
            "dropout": 0.0,
            **options,
        }
    )


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 20, shape)


def padded(x: Tensor, left: bool, width: int = 5) -> tuple[Tensor, Tensor]:
    """x with other tokens on one side, and the mask that tells them apart."""
    other = ids(len(x), width)
    mask = torch.cat(
        [torch.zeros_like(other), torch.ones_like(x)] if left else [torch.ones_like(x), torch.zeros_like(other)], 1
    )
    return torch.cat([other, x] if left else [x, other], 1), mask.bool()


def steps(model: nn.Module, loss: Callable[[], Tensor], number: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(number):
        optimizer.zero_grad()
        made = loss()
        made.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name
        optimizer.step()
        losses.append(float(made.detach()))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    return losses


def check_gradients(model: nn.Module, without: tuple[str, ...] = ()) -> None:
    for name, parameter in model.named_parameters():
        if any(part in name for part in without):
            continue
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_every_mechanism_trains_an_encoder(name: str, dtype: torch.dtype) -> None:
    model = MacformerClassifier(config(name))
    x, mask = padded(ids(4, 9), left=False)
    labels = torch.tensor([0, 1, 2, 0])

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            made = model(x, mask, labels).loss
        assert made is not None
        assert made.dtype == torch.float32
        return made

    losses = steps(model, loss)
    assert losses[-1] < losses[0]
    check_gradients(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_mechanism_trains_a_language_model(name: str, dtype: torch.dtype) -> None:
    model = MacformerLM(config(name))
    x = ids(4, 12)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            made = model(x, labels=x).loss
        assert made is not None
        return made

    losses = steps(model, loss)
    assert losses[-1] < losses[0]
    check_gradients(model)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in ("window", "hybrid")])
def test_every_causal_mechanism_trains_an_encoder_decoder(name: str) -> None:
    model = MacformerSeq2Seq(config(name))
    source, target = ids(4, 9), ids(4, 7)

    def loss() -> Tensor:
        made = model(source, target, labels=target).loss
        assert made is not None
        return made

    losses = steps(model, loss)
    assert losses[-1] < losses[0]
    # mean looks at no query, so what makes the queries of cross-attention alone learns nothing
    check_gradients(model, without=("norm2",) if name == "mean" else ())


@pytest.mark.parametrize("position", ["learned", "rotary", "sinusoidal"])
def test_gradients_reach_every_other_part(position: str) -> None:
    options: dict[str, Any] = {"position": position, "pooling": "cls", "num_kv_heads": 1, "tie_embeddings": False}
    x, y = ids(2, 9), ids(2, 7)
    options |= {"max_length": 9}
    models: list[tuple[MacformerModel, Callable[[Any], Any]]] = [
        (MacformerTagger(config(**options)), lambda m: m(x, labels=x % 3)),
        (MacformerRegressor(config(**options)), lambda m: m(x, labels=torch.randn(2, 3))),
        (MacformerMatcher(config(**options)), lambda m: m(x, y, labels=torch.tensor([0, 1]))),
        (MacformerLM(config(**options | {"pooling": "mean"})), lambda m: m(x, labels=x)),
        (MacformerSeq2Seq(config(**options | {"pooling": "mean"})), lambda m: m(x, x, labels=x)),
    ]
    for model, call in models:
        call(model).loss.backward()
        check_gradients(model)


@pytest.mark.parametrize(
    ("frontend", "x"),
    [
        ({"frontend": "bytes"}, torch.randint(1, 257, (2, 20))),
        ({"frontend": "patches", "channels": 3}, torch.randn(2, 3, 8, 8)),
        ({"frontend": "waveform", "stride": 4}, torch.randn(2, 50)),
        ({"frontend": "series", "channels": 5}, torch.randn(2, 20, 5)),
    ],
)
def test_every_front_end_trains(frontend: dict[str, Any], x: Tensor) -> None:
    model = MacformerClassifier(config(**frontend | {"vocab_size": None}))
    losses = steps(model, lambda: model(x, labels=torch.tensor([0, 2])).loss)
    assert losses[-1] < losses[0]
    check_gradients(model)


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "rotary", "none"])
def test_the_order_of_tokens_is_felt_through_positions_alone(position: str) -> None:
    model = MacformerClassifier(config("softmax", position=position)).double().eval()
    x = ids(2, 9)
    moved = float((model(x.flip(1)).logits - model(x).logits).detach().abs().max())
    assert moved < 1e-9 if position == "none" else moved > 1e-4


def test_everything_configured_arrives() -> None:
    options: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "dropout": 0.3,
        "attention_dropout": 0.2,
        "activation": "relu",
        "norm_first": False,
        "layer_norm_eps": 1e-3,
        "bias": False,
        "num_layers": 3,
    }
    for model in (MacformerEncoder(config("softmax", **options)), MacformerSeq2Seq(config("softmax", **options))):
        layers = model.stack.layers
        assert len(layers) == 3
        assert model.stack.norm is None
        for layer in layers:
            assert isinstance(layer, TransformerEncoderLayer | TransformerDecoderLayer)
            assert layer.self_attn.num_heads == 4
            assert layer.linear1.out_features == 24
            assert layer.activation is F.relu
            assert not layer.norm_first
            assert {m.p for m in layer.modules() if isinstance(m, nn.Dropout)} == {0.3}
            assert {m.eps for m in layer.modules() if isinstance(m, nn.LayerNorm)} == {1e-3}
            assert not [name for name, _ in layer.named_parameters() if "bias" in name]
        for _, attention in model.attentions():
            assert attention.num_kv_heads == 2
            assert attention.mechanism.config["dropout_p"] == 0.2


def test_what_enters_the_layers_is_dropped_too() -> None:
    model = MacformerEncoder(config("softmax", dropout=0.5)).train()
    for part in model.stack.layers.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    x = ids(1, 9)
    assert not torch.equal(model(x)[0], model(x)[0])


def test_layers_may_differ() -> None:
    model = MacformerEncoder(config(mechanism=["softmax", ("window", {"window": 2})]))
    assert [attention.mechanism.name for _, attention in model.attentions()] == ["softmax", "window"]
    assert [name for name, _ in model.attentions()] == ["stack.layers.0.self_attn", "stack.layers.1.self_attn"]


def test_equal_seeds_give_equal_weights_under_every_mechanism() -> None:
    def weights(name: str) -> dict[str, Tensor]:
        torch.manual_seed(1)
        found = MacformerClassifier(config(name)).state_dict()
        return {key: value for key, value in found.items() if ".mechanism." not in key}

    wanted = weights("softmax")
    for name in NAMES:
        got = weights(name)
        assert all(torch.equal(got[key], value) for key, value in wanted.items()), name


def test_linformer_gets_the_length_and_shares_its_projection() -> None:
    options: dict[str, Any] = {"options": {"sharing": "layerwise", "proj_len": 4}, "pooling": "cls"}
    model = MacformerClassifier(config("linformer", **options))
    first, second = (attention.mechanism for _, attention in model.encoder.attentions())
    assert first.config["seq_len"] == 25
    assert first.E is second.E
    model(ids(2, 24))
    with pytest.raises(maclin.InputError, match="seq_len=25"):
        model(ids(2, 25))


def test_torchs_encoder_gives_the_same_from_the_same_weights() -> None:
    model = MacformerEncoder(config("softmax", position="none")).eval()
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, 0.0, F.gelu, batch_first=True, norm_first=True),
        2,
        nn.LayerNorm(16),
        enable_nested_tensor=False,
    ).eval()
    theirs.load_state_dict(model.stack.state_dict())
    x, mask = padded(ids(2, 9), left=False)
    hidden, _ = model(x, mask)
    vectors, _ = model.front_end(x)
    torch.testing.assert_close(hidden[mask], theirs(vectors, src_key_padding_mask=~mask)[mask], rtol=0, atol=1e-5)


def test_pooling_is_what_it_says() -> None:
    x, mask = padded(ids(2, 4), left=False, width=3)
    mask[1, 2:] = False
    for pooling in ("mean", "last"):
        model = MacformerEncoder(config("softmax", pooling=pooling)).eval()
        hidden, _ = model(x, mask)
        wanted = [hidden[0, :4], hidden[1, :2]]
        got = model.pooled(x, mask)
        for i in range(2):
            torch.testing.assert_close(got[i], wanted[i].mean(0) if pooling == "mean" else wanted[i][-1])
        nothing = model.pooled(x, torch.zeros_like(mask))
        assert float(nothing.detach().abs().max()) == 0


def test_a_match_is_made_of_both_vectors() -> None:
    model = MacformerMatcher(config("softmax")).eval()
    (x, mask), y = padded(ids(2, 9), left=False), ids(2, 6)
    u, w = model.encoder.pooled(x[:, :9]), model.encoder.pooled(y)
    wanted = model.head(F.gelu(model.hidden(torch.cat([u, w, u * w, u - w], dim=1))))
    torch.testing.assert_close(model(x, y, mask).logits, wanted)
    more, its_mask = padded(y, left=False)
    torch.testing.assert_close(model(x[:, :9], more, mask2=its_mask).logits, wanted)


def test_losses_are_torchs() -> None:
    logits = torch.randn(2, 3, 4)
    labels = torch.tensor([[0, -100, 3], [1, 2, -100]])
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    assert float(cross_entropy(logits, torch.full((2, 3), -100))) == 0
    model = MacformerRegressor(config(num_outputs=1)).eval()
    x, wanted = ids(3, 5), torch.randn(3)
    made = model(x, labels=wanted)
    torch.testing.assert_close(made.loss, (made.logits[:, 0] - wanted).square().mean())
    lm = MacformerLM(config()).eval()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 5])
    made = lm(x, mask, labels=x)
    chances = made.logits.log_softmax(-1)
    judged = [-chances[i, j, x[i, j + 1]] for i in range(3) for j in range(4) if mask[i, j + 1]]
    torch.testing.assert_close(made.loss, torch.stack(judged).mean())


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: MacformerLM(config("linformer")), maclin.CapabilityError, "no causal form.*macformer"),
        (lambda: MacformerSeq2Seq(config("revisited_linformer")), maclin.CapabilityError, "no causal form"),
        (lambda: MacformerSeq2Seq(config("window")), maclin.CapabilityError, "cross_mechanism="),
        (lambda: MacformerSeq2Seq(config(options={"ppsbn": "batch"})), maclin.CapabilityError, "see the future"),
        (lambda: MacformerEncoder(config("rfa", options={"gate": True})), maclin.CapabilityError, "works along time"),
        (lambda: MacformerEncoder(config("elu", position="rotary")), maclin.CapabilityError, "does not allow rotary"),
        (lambda: MacformerLM(config(frontend="series", vocab_size=None)), maclin.OptionError, "reads ids"),
        (lambda: MacformerLM(config(pooling="cls")), maclin.OptionError, "leave pooling out"),
    ],
)
def test_what_cannot_be_built_is_said(build: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MacformerClassifier(config())(ids(2, 5), labels=torch.tensor([0, 3])), "a label is 3; wanted 0 to 2"),
        (lambda: MacformerClassifier(config())(ids(2, 5), labels=torch.tensor([0.0, 1.0])), "integers"),
        (lambda: MacformerClassifier(config())(ids(2, 5), labels=torch.tensor([0])), r"wanted \(2,\)"),
        (lambda: MacformerRegressor(config())(ids(2, 5), labels=torch.randn(2)), r"wanted \(2, 3\), floats"),
        (lambda: MacformerMatcher(config())(ids(2, 5), ids(3, 5)), "wanted pairs"),
        (lambda: MacformerLM(config())(ids(2, 5), labels=ids(2, 4)), "not shifted"),
        (lambda: MacformerClassifier(config(position="learned"))(ids(2, 25)), "25 tokens, and the table"),
    ],
)
def test_what_cannot_be_computed_is_said(call: Callable[[], object], words: str) -> None:
    with pytest.raises(maclin.InputError, match=words):
        call()
