"""Example inputs for transformers models, to find their attention layers with."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from maclin.core.errors import CapabilityError

TOKENS = 7  # of the longer made-up sequence


def has_example(root: PreTrainedModel) -> bool:
    """Whether ``example_batch`` knows what this model takes."""
    return _kind(root) is not None


def example_batch(root: PreTrainedModel) -> dict[str, Tensor]:
    """Small inputs that the model can run on: two sequences, one of them padded, or one blank image or recording.

    Raises:
        CapabilityError: the model takes something else.
    """
    kind, config = _kind(root), root.config
    if kind is None:
        raise CapabilityError(
            f"{type(root).__name__} takes {root.main_input_name}, for which no example can be made up; pass batch= "
            "with inputs for it"
        )
    if kind == "text":
        batch = _text(root.device, config.get_text_config().vocab_size)
    elif kind == "image":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        shape = (1, getattr(config, "num_channels", 3), height, width)
        pixels = torch.linspace(-1, 1, shape[1] * height * width, device=root.device)
        batch = {"pixel_values": pixels.view(shape).to(root.dtype)}
    elif kind == "spectrogram":
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        batch = {"input_features": torch.zeros(shape, device=root.device, dtype=root.dtype)}
    else:
        batch = _recording(root, config)
    if config.is_encoder_decoder:
        rows = next(iter(batch.values())).shape[0]
        batch["decoder_input_ids"] = torch.arange(3, 8, device=root.device).expand(rows, -1)
    return batch


def _kind(root: PreTrainedModel) -> str | None:
    name, config = root.main_input_name, root.config
    if {"text_config", "vision_config"} <= set(config.sub_configs):
        return None  # texts and images, in whatever relation
    if name == "input_ids" and hasattr(config.get_text_config(), "vocab_size"):
        return "text"
    if name == "pixel_values" and hasattr(config, "image_size"):
        return "image"
    if name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return "spectrogram"
    if name == "input_values" and hasattr(config, "conv_stride") and hasattr(config, "conv_kernel"):
        return "recording"
    return None


def _text(device: torch.device, vocab: int) -> dict[str, Tensor]:
    ids = torch.arange(3, 3 + 2 * TOKENS, device=device).remainder(vocab).view(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _recording(root: PreTrainedModel, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Samples of a wave that the convolutions turn into ``TOKENS`` frames, the second recording shorter."""
    samples = TOKENS
    for stride, kernel in reversed(list(zip(config.conv_stride, config.conv_kernel, strict=True))):
        samples = (samples - 1) * stride + kernel
    wave = torch.arange(2 * samples, device=root.device).sin().view(2, samples).to(root.dtype)
    mask = torch.ones(2, samples, dtype=torch.long, device=root.device)
    mask[1, samples - math.prod(config.conv_stride) * 2 :] = 0
    return {"input_values": wave, "attention_mask": mask}
