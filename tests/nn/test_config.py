"""MacformerConfig: what it accepts, what a bare name stands for, JSON there and back."""

import json
from typing import Any

import pytest

import maclin
from maclin.nn import MacformerConfig


def test_it_survives_json() -> None:
    config = MacformerConfig(
        vocab_size=30,
        num_layers=3,
        mechanism=["softmax", ("macformer", {"counts": (1, 32, 4)}), ("window", {"window": 3})],
        decoder_mechanism="favor",
        num_decoder_layers=2,
        cross_mechanism=["elu", ("rfa", {"num_features": 8})],
    )
    again = MacformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    single = MacformerConfig(vocab_size=30, options={"counts": (1, 32, 4)})
    assert MacformerConfig.from_dict(json.loads(json.dumps(single.to_dict()))) == single
    assert again.layers() == config.layers()
    with pytest.raises(AttributeError):
        config.embed_dim = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_what_each_layer_gets() -> None:
    config = MacformerConfig(vocab_size=30)
    assert config.layers() == (("macformer", {"temperature": "learned"}),) * 2
    assert config.layers("cross") == config.layers("decoder") == config.layers()
    assert MacformerConfig(vocab_size=30, options={}).layers() == (("macformer", {}),) * 2
    listed = MacformerConfig(vocab_size=30, mechanism=["softmax", ("macformer", {"kernel": "inv"})])
    assert listed.layers() == (("softmax", {}), ("macformer", {"kernel": "inv"}))
    apart = MacformerConfig(vocab_size=30, options={"kernel": "inv"}, cross_mechanism="macformer")
    assert apart.layers("decoder") == (("macformer", {"kernel": "inv"}),) * 2
    assert apart.layers("cross") == (("macformer", {"temperature": "learned"}),) * 2


def test_a_list_does_not_fit_a_decoder_of_another_depth() -> None:
    config = MacformerConfig(vocab_size=30, mechanism=["softmax", "elu"], num_decoder_layers=3)
    with pytest.raises(maclin.OptionError, match="lists 2 layers, and the decoder has 3"):
        config.layers("decoder")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"num_layers": 2.0}, "num_layers is 2.0"),
        ({"num_heads": True}, "num_heads is True"),
        ({"num_heads": 3}, "not a multiple of num_heads 3"),
        ({"num_kv_heads": 3, "num_heads": 4}, "num_kv_heads 3"),
        ({"position": "relative"}, "'sinusoidal', 'learned'|'rotary'"),
        ({"frontend": "text"}, "'bytes'"),
        ({"pooling": "max"}, "'mean', 'cls', 'last'"),
        ({"activation": "swish"}, "'relu', 'gelu'"),
        ({"dropout": 1.0}, "probability"),
        ({"attention_dropout": -0.1}, "probability"),
        ({"vocab_size": None}, "padding included"),
        ({"frontend": "bytes", "vocab_size": 256}, "at least 257"),
        ({"frontend": "series"}, "takes no ids"),
        ({"position": "rotary", "embed_dim": 6}, "pairs of channels"),
        ({"mechanism": "soft"}, "unknown mechanism 'soft'"),
        ({"mechanism": "elu", "options": {"num_features": 3}}, "elu has no option 'num_features'"),
        ({"mechanism": ["elu", "softmax"], "options": {}}, "a list holds them itself"),
        ({"mechanism": ["elu"]}, "a list of 2 choices"),
        ({"mechanism": ["elu", ("elu",)]}, "pair of name and options"),
        ({"mechanism": ["elu", ("favor", {"x": 1})]}, "favor has no option 'x'"),
        ({"cross_mechanism": ["elu"]}, "cross_mechanism is"),
        ({"options": {"kernel": maclin.KERNELS["exp"]}}, "JSON has no form"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(maclin.OptionError, match=words):
        MacformerConfig(**{"vocab_size": 30, **options})


def test_unknown_fields_are_named() -> None:
    with pytest.raises(maclin.InputError, match=r"no field 'width'; known are embed_dim"):
        MacformerConfig.from_dict({"vocab_size": 3, "width": 4})
