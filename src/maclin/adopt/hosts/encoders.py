"""Text encoders and decoders of transformers as embedding models: the mean of the last hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from maclin.core.errors import InputError

T = TypeVar("T")
_NO_LIMIT = 10**9  # tokenizers without a limit say 1e30


class Encoder:
    """A plain transformers model: embeddings are the mean of its last hidden states over the tokens of a text.

    Args:
        model: whose ``last_hidden_state`` is averaged.
        tokenizer: its tokenizer.
    """

    host = "transformers"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model: nn.Module = model
        self.max_length = position_limit(model, tokenizer)
        self.default_length = self.max_length
        self._tokenizer = tokenizer
        self._config: PreTrainedConfig = model.config

    def tokenize(self, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
        """One padded batch of forward arguments, with an attention_mask."""
        batch = self._tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return dict(batch)

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeddings (B, E) of one batch."""
        device = next(self.model.parameters()).device
        batch = {key: x.to(device) for key, x in batch.items()}
        hidden = self.model(**batch).last_hidden_state
        weight = batch["attention_mask"].to(hidden.dtype)[..., None]
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)

    def sizes(self) -> dict[str, Any]:
        """Architecture and sizes, as fields of ``ModelInfo``."""
        return sizes(self.model, self._config)


def open_pipeline(directory: Path, device: str | torch.device) -> Encoder:
    """Load a directory that ``save_pretrained`` wrote.

    Raises:
        InputError: it cannot be read; the message says why.
    """
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

    def opened() -> Encoder:
        model, info = AutoModel.from_pretrained(
            str(directory), weights_only=True, dtype="auto", output_loading_info=True, **options
        )
        # the library fills gaps with random numbers; only a pooler, which is not used here, may be one
        missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
        if missing:
            raise InputError(
                f"wanted all weights of a {type(model).__name__} in {directory}, but {len(missing)} are missing, "
                f"{missing[0]} for one; save the whole model with save_pretrained"
            )
        return Encoder(model.to(device).eval(), AutoTokenizer.from_pretrained(str(directory), **options))

    return attempt(opened, directory)


def attempt(open_it: Callable[[], T], directory: Path) -> T:
    """What ``open_it`` returns, without the progress bar of the library and with its errors in one sentence.

    Raises:
        InputError: the directory cannot be read.
    """
    known = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError)
    failures = (*known, SafetensorError, UnpicklingError)
    try:
        with _without_progress_bar():
            return open_it()
    except failures as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise InputError(
            f"cannot load a model from {directory} ({type(error).__name__}: {first}); wanted a directory that "
            "save_pretrained wrote, of an architecture that transformers itself contains, with its tokenizer"
        ) from error


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def position_limit(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Most tokens that the model has positions for, and that the tokenizer was made for."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PreTrainedConfig) else None
    limit = int(getattr(text, "max_position_embeddings", None) or _NO_LIMIT)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limit -= module.padding_idx + 1  # RoBERTa counts positions from behind the padding index
    if limit >= _NO_LIMIT:
        limit = min(int(min(tokenizer.model_max_length, _NO_LIMIT)), _NO_LIMIT)
    return limit


def sizes(model: nn.Module, config: PreTrainedConfig) -> dict[str, Any]:
    """Architecture and sizes of a transformers model, as fields of ``ModelInfo``."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    return {
        "architecture": type(model).__name__,
        "num_layers": int(text.num_hidden_layers),
        "num_heads": heads,
        "num_kv_heads": int(getattr(text, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        "embed_dim": int(text.hidden_size),
    }
