"""Front ends: each against its plain computation; padding equals cropping; shapes that are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import maclin
from maclin.nn import MacformerConfig
from maclin.nn.frontends import PatchEmbedding, SeriesEmbedding, TokenEmbedding, WaveformEmbedding, front_end


def bias_of(made: PatchEmbedding | WaveformEmbedding) -> Tensor:
    assert made.projection.bias is not None
    return made.projection.bias


def test_tokens_are_rows_of_the_table() -> None:
    made = TokenEmbedding(10, 16)
    ids = torch.tensor([[3, 9, 0]])
    vectors, mask = made(ids)
    assert mask is None
    assert torch.allclose(vectors[0, :2], made.weight[[3, 9]] * 4.0)
    assert float(vectors[0, 2].detach().abs().max()) == 0
    large = TokenEmbedding(2000, 64)
    assert float(large(torch.arange(1, 2000)[None])[0].detach().square().mean()) == pytest.approx(1.0, rel=0.02)
    assert torch.equal(made.scores(vectors), vectors @ made.weight.T)


def test_padding_is_not_learned_from_inputs() -> None:
    made = TokenEmbedding(10, 4)
    made(torch.tensor([[0, 3]]))[0].sum().backward()
    assert made.weight.grad is not None
    assert made.weight.grad[0].tolist() == [0.0] * 4
    assert made.weight.grad[3].abs().min() > 0


def test_patches_are_linear_maps_row_by_row() -> None:
    made = PatchEmbedding(3, 4, 5)
    x = torch.randn(2, 3, 8, 12)
    vectors, _ = made(x)
    assert vectors.shape == (2, 6, 5)
    patch = x[1, :, 4:8, 8:12].flatten()  # second row, third column
    wanted = made.projection.weight.flatten(1) @ patch + bias_of(made)
    assert torch.allclose(vectors[1, 5], wanted, atol=1e-5)


def test_a_waveform_token_sees_twice_its_stride() -> None:
    made = WaveformEmbedding(1, 4, 5)
    x = torch.randn(2, 18)
    vectors, _ = made(x)
    assert vectors.shape == (2, 5, 5)
    padded = F.pad(x, (2, 10))
    for token in range(5):
        wanted = made.projection.weight[:, 0] @ padded[1, 4 * token : 4 * token + 8] + bias_of(made)
        assert torch.allclose(vectors[1, token], wanted, atol=1e-5)


def test_a_waveform_of_stride_one_is_a_series() -> None:
    wave, series = WaveformEmbedding(2, 1, 5), SeriesEmbedding(2, 5)
    with torch.no_grad():
        series.projection.weight.copy_(wave.projection.weight[..., 0])
        series.projection.bias.copy_(bias_of(wave))
    x = torch.randn(2, 7, 2)
    assert torch.allclose(wave(x)[0], series(x)[0], atol=1e-6)


@pytest.mark.parametrize("made", [WaveformEmbedding(1, 4, 5), WaveformEmbedding(1, 3, 5), SeriesEmbedding(1, 5)])
@pytest.mark.parametrize("length", [1, 7, 8, 11])
def test_padding_equals_cropping(made: torch.nn.Module, length: int) -> None:
    x = torch.randn(1, 19)
    mask = torch.arange(19)[None] < length
    vectors, tokens = made(x.masked_fill(~mask, torch.nan), mask)
    cropped, _ = made(x[:, :length])
    assert tokens.shape == vectors.shape[:2]
    assert int(tokens.sum()) == cropped.shape[1]
    assert torch.allclose(vectors[tokens], cropped[0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "x"),
    [
        ({"vocab_size": 9}, torch.tensor([[1, 8]])),
        ({"frontend": "bytes"}, torch.tensor([[1, 256]])),
        ({"frontend": "patches", "channels": 3, "patch_size": 2}, torch.randn(1, 3, 4, 4)),
        ({"frontend": "waveform", "stride": 2}, torch.randn(1, 9)),
        ({"frontend": "series", "channels": 4}, torch.randn(1, 9, 4)),
    ],
)
def test_each_is_what_the_configuration_says(options: dict[str, Any], x: Tensor) -> None:
    vectors, _ = front_end(MacformerConfig(**options))(x)
    assert vectors.shape[2] == 64


@pytest.mark.parametrize(
    ("options", "x", "words"),
    [
        ({"vocab_size": 9}, torch.tensor([[1, 9]]), "from 1 to 9; wanted 0 to 8"),
        ({"vocab_size": 9}, torch.tensor([[-1, 3]]), "from -1 to 3"),
        ({"vocab_size": 9}, torch.tensor([1, 3]), r"wanted \(batch, length\)"),
        ({"vocab_size": 9}, torch.rand(1, 3), "int64 or int32"),
        ({"frontend": "patches"}, torch.rand(1, 1, 9, 8), "multiples of patch_size 4"),
        ({"frontend": "patches"}, torch.rand(1, 2, 8, 8), r"\(batch, 1, height, width\)"),
        ({"frontend": "waveform"}, torch.rand(1, 8, 2), r"or \(batch, time\)"),
        ({"frontend": "series", "channels": 2}, torch.rand(1, 8), r"\(batch, time, 2\), floats"),
        ({"frontend": "series"}, torch.ones(1, 8, dtype=torch.long), "floats"),
        ({"frontend": "series"}, torch.rand(1, 0), "a series has shape"),
    ],
)
def test_other_inputs_are_refused(options: dict[str, Any], x: Tensor, words: str) -> None:
    with pytest.raises(maclin.InputError, match=words):
        front_end(MacformerConfig(**options))(x)


def test_other_masks_are_refused() -> None:
    for mask in (torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 2)):
        with pytest.raises(maclin.InputError, match=r"wanted \(1, 2\) bool, True = attend"):
            TokenEmbedding(9, 4)(torch.tensor([[1, 2]]), mask)
