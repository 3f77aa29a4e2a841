"""Mechanisms as text."""

from __future__ import annotations

import pytest
import torch

import maclin
from maclin.bench import parse_spec, parse_specs
from maclin.bench.specs import default_spec
from maclin.core.errors import OptionError
from maclin.core.mechanisms.macformer import Macformer


def test_options_are_json_where_they_are_json() -> None:
    first, second = parse_specs("macformer:num_features=12:counts=[1,8,3]:ppsbn=false:kernel=exp, efficient")
    assert first.name == "macformer"
    assert first.options == {"num_features": 12, "counts": [1, 8, 3], "ppsbn": False, "kernel": "exp"}
    assert first.text == "macformer:num_features=12:counts=[1,8,3]:ppsbn=false:kernel=exp"
    assert (second.name, second.options) == ("efficient", {})
    mech = first.build(8, 2)
    assert isinstance(mech, Macformer)
    assert mech.config["ppsbn"] is False
    assert not mech.training


def test_the_same_seed_draws_the_same() -> None:
    spec = parse_spec("favor:num_features=16")
    one, two, other = spec.build(8, 2), spec.build(8, 2), spec.build(8, 2, seed=1)
    states = [torch.cat([x.flatten() for x in mech.state_dict().values()]) for mech in (one, two, other)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", maclin.mechanisms.names())
def test_every_mechanism_can_be_built_by_default(name: str) -> None:
    assert default_spec(name).build(8, 2).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "wanted mechanisms with commas"),
        ("macformer,sofmax", "unknown mechanism 'sofmax'; known are"),
        ("macformer:num_features", "wanted name:option=value"),
        ("macformer:=3", "wanted name:option=value"),
        ("elu,elu", "'elu' is named twice"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_specs(text)


def test_an_unknown_option_lists_the_known() -> None:
    with pytest.raises(OptionError, match="favor has no option 'features'; known are"):
        parse_spec("favor:features=3").build(8, 2)
