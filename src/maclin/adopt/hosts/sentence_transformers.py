"""sentence-transformers models: their own pipeline, from tokenizer to pooling and normalisation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PreTrainedModel

from maclin.adopt.hosts.encoders import attempt, position_limit, sizes
from maclin.core.errors import InputError


class SentencePipeline:
    """A SentenceTransformer: embeddings are what its modules make, pooling and normalisation included.

    Args:
        model: the pipeline; its first module holds the transformers model.
    """

    host = "sentence-transformers"

    def __init__(self, model: SentenceTransformer) -> None:
        inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if inner is None:
            raise InputError("wanted a SentenceTransformer with a transformers model inside, got one without")
        self.model = model
        self._inner = inner
        self._arguments = tuple(inspect.signature(inner.forward).parameters)
        self.default_length = int(model.max_seq_length or position_limit(inner, model.tokenizer))
        self.max_length = position_limit(inner, model.tokenizer)
        features = self._features(["text"], self.max_length)  # what is not of one text: the length of the prompt
        self._constants = {key: x for key, x in features.items() if not isinstance(x, Tensor)}

    def tokenize(self, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
        """One padded batch of forward arguments, with an attention_mask."""
        features = self._features(texts, max_length)
        return {key: features[key] for key in self._arguments if isinstance(features.get(key), Tensor)}

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeddings (B, E) of one batch."""
        device = next(self.model.parameters()).device
        features = {**self._constants, **{key: x.to(device) for key, x in batch.items()}}
        return self.model(features)["sentence_embedding"]

    def _features(self, texts: Sequence[str], max_length: int) -> dict[str, Any]:
        """What the pipeline's first module takes, with its default prompt, cut at ``max_length``."""
        before = self.model.max_seq_length
        self.model.max_seq_length = max_length
        try:
            prompt = self.model.prompts.get(self.model.default_prompt_name or "")
            return self.model.preprocess(list(texts), prompt=prompt or None)
        finally:
            self.model.max_seq_length = before

    def sizes(self) -> dict[str, Any]:
        """Architecture and sizes, as fields of ``ModelInfo``."""
        return sizes(self._inner, self._inner.config)


def open_pipeline(directory: Path, device: str | torch.device) -> SentencePipeline:
    """Load a directory that ``SentenceTransformer.save`` wrote.

    Raises:
        InputError: it cannot be read; the message says why.
    """

    def opened() -> SentencePipeline:
        model = SentenceTransformer(
            str(directory),
            device=str(device),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"weights_only": True},
        )
        return SentencePipeline(model.eval())

    return attempt(opened, directory)
