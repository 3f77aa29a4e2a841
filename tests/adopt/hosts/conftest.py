"""Tiny models of every host with random weights, the inputs that they take, and what is to be compared of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
TOKENS: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED: dict[str, Any] = {**SMALL, **TOKENS, "num_key_value_heads": 2}
HALF: dict[str, Any] = {"layers": 2, "attention_heads": 4, "ffn_dim": 32}
BOTH: dict[str, Any] = {f"{half}_{key}": size for half in ("encoder", "decoder") for key, size in HALF.items()}
BOTH.update(d_model=32, **TOKENS)
SOUND: dict[str, Any] = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3]}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "text", {**SMALL, **TOKENS}),
    "roberta": ("Roberta", "text", {**SMALL, **TOKENS, "pad_token_id": 1, "bos_token_id": 0}),
    "albert": ("Albert", "text", {**SMALL, **TOKENS, "num_hidden_layers": 3, "embedding_size": 16}),
    "distilbert": ("DistilBert", "text", {**TOKENS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 32}),
    "vit": ("ViT", "image", {**SMALL, "image_size": 16, "patch_size": 4}),
    "dinov2": ("Dinov2", "image", {**SMALL, "image_size": 16, "patch_size": 4}),
    "wav2vec2": ("Wav2Vec2", "sound", {**SMALL, **TOKENS, **SOUND, "num_conv_pos_embeddings": 8,
                                       "num_conv_pos_embedding_groups": 4, "feat_extract_norm": "layer"}),
    "gpt2": ("GPT2", "text", {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("Llama", "text", GROUPED),
    "qwen2": ("Qwen2", "text", GROUPED),
    "qwen3": ("Qwen3", "text", {**GROUPED, "head_dim": 16}),
    "mistral": ("Mistral", "text", {**GROUPED, "sliding_window": None}),
    "bart": ("Bart", "both", {**BOTH, "max_position_embeddings": 64}),
    "whisper": ("Whisper", "spectrogram", {**BOTH, "num_mel_bins": 8, "max_source_positions": 16,
                                           "max_target_positions": 32, "decoder_start_token_id": 1}),
}  # fmt: skip
TORCH = ("mha", "encoder", "encoder_layer", "decoder", "transformer")
Case = tuple[nn.Module, dict[str, Any], Callable[[Any], Tensor]]
"""A model, keyword arguments for it, and what is to be compared of its output: nothing that is padding."""


def ids(lengths: tuple[int, ...], seed: int, side: str) -> dict[str, Tensor]:
    """Random tokens, each row padded on one side."""
    longest = max(lengths)
    tokens = torch.randint(3, 50, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(longest - length, None)] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def past(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def transformers_case(name: str, side: str, options: dict[str, Any]) -> Case:
    import transformers

    family, kind, config = CONFIGS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(
        getattr(transformers, f"{family}Config")(**{**config, **options})
    ).eval()
    if kind == "image":
        return model, {"pixel_values": numbers(2, 3, 16, 16)}, lambda out: out.last_hidden_state
    if kind == "spectrogram":
        batch = {"input_features": numbers(2, 8, 32), "decoder_input_ids": ids((5, 5), 1, "right")["input_ids"]}
        return model, batch, lambda out: out.last_hidden_state
    if kind == "sound":
        mask = torch.ones(2, 200, dtype=torch.long)
        mask[1, 120:] = 0
        batch = {"input_values": numbers(2, 200) * mask, "attention_mask": mask}
        frames = ((120 - 10) // 5 + 1 - 3) // 2 + 1
        return model, batch, lambda out: torch.cat([out.last_hidden_state[0], out.last_hidden_state[1, :frames]])
    batch = ids((11, 5, 8), 0, side)
    real = batch["attention_mask"].bool()
    if kind == "both":
        batch["decoder_input_ids"] = ids((4, 4, 4), 1, "right")["input_ids"]
        return model, batch, lambda out: out.last_hidden_state
    return model, batch, lambda out: out.last_hidden_state[real]


def torch_case(name: str, batch_first: bool, options: dict[str, Any]) -> Case:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"batch_first": batch_first, "dropout": 0.0, **options}
    padding = torch.arange(9).expand(3, 9) >= torch.tensor([[9], [4], [7]])

    def sequence(length: int, seed: int = 0) -> Tensor:
        x = numbers(3, length, 32, seed=seed)
        return x if batch_first else x.transpose(0, 1)

    def unpadded(out: Any) -> Tensor:
        out = out[0] if isinstance(out, tuple) else out
        return (out if batch_first else out.transpose(0, 1))[~padding]

    layer: dict[str, Any] = {"d_model": 32, "nhead": 4, "dim_feedforward": 32, **sizes}
    both = {"tgt": sequence(6, 1), "tgt_mask": past(6), "memory_key_padding_mask": padding}
    match name:
        case "mha":
            x = sequence(9)
            model: nn.Module = nn.MultiheadAttention(32, 4, **sizes)
            batch: dict[str, Any] = {"query": x, "key": x, "value": x, "key_padding_mask": padding}
        case "encoder_layer":
            model = nn.TransformerEncoderLayer(**layer)
            batch = {"src": sequence(9), "src_key_padding_mask": padding}
        case "encoder":
            model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2, enable_nested_tensor=batch_first)
            batch = {"src": sequence(9), "src_key_padding_mask": padding}
        case "decoder":
            model = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), 2)
            batch = {"memory": sequence(9), **both}
        case _:
            model = nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **layer)
            batch = {"src": sequence(9), "src_key_padding_mask": padding, **both}
    return model.eval(), batch, unpadded if name in ("mha", "encoder", "encoder_layer") else lambda out: out


def shaken(model: nn.Module) -> nn.Module:
    """With weights so large that attention is far from uniform, as it would be with initial ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


class Hosts:
    """Makes a model of any host by name, with inputs for it."""

    def case(self, name: str, side: str = "right", batch_first: bool = True, **options: Any) -> Case:
        if name in CONFIGS:
            pytest.importorskip("transformers")
            case = transformers_case(name, side, options)
        else:
            case = torch_case(name, batch_first, options)
        return shaken(case[0]), case[1], case[2]


@pytest.fixture(scope="session")
def hosts() -> Hosts:
    return Hosts()
