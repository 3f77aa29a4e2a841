"""Tiny models with random weights, built from configurations, and batches for them."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

VOCAB = 50
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**SMALL, **TOKENS, "max_position_embeddings": 64}),
    "roberta": ("Roberta", {**SMALL, **TOKENS, "pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 64}),
    "distilbert": ("DistilBert", {**TOKENS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 32}),
    "albert": ("Albert", {**SMALL, **TOKENS, "num_hidden_layers": 3, "embedding_size": 16}),
    "vit": ("ViT", {**SMALL, "image_size": 16, "patch_size": 4}),
    "gpt2": ("GPT2", {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("Llama", {**SMALL, **TOKENS, "num_key_value_heads": 2}),
    "mistral": ("Mistral", {**SMALL, **TOKENS, "num_key_value_heads": 2}),
    "gemma2": ("Gemma2", {**SMALL, **TOKENS, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}),
    "gpt_oss": ("GptOss", {**SMALL, **TOKENS, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2,
                           "num_experts_per_tok": 1}),
    "bart": ("Bart", {**TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                      "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
                      "max_position_embeddings": 64}),
    "t5": ("T5", {**TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}),
}  # fmt: skip

if importlib.util.find_spec("transformers") is None:
    collect_ignore = ["test_convert.py", "test_refusals.py", "measuring/test_audit.py", "test_load.py"]


class Tiny:
    """Makes models of one attention kind each, and inputs for them."""

    def make(self, name: str, **options: Any) -> Any:
        import transformers

        family, config = CONFIGS[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**config, **options})
        model = getattr(transformers, f"{family}Model")(config).eval()
        with torch.no_grad():  # initial weights are so small that attention would be all but uniform
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.3)
        return model

    def batch(
        self, lengths: tuple[int, ...] = (11, 5, 8), side: str = "right", seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """Random tokens, each row padded on one side."""
        longest = max(lengths)
        ids = torch.randint(3, VOCAB, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            mask[row, slice(0, length) if side == "right" else slice(longest - length, None)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def images(self) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}

    @torch.no_grad()
    def hidden(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Last hidden states of the tokens that are not padding."""
        out = model(**inputs).last_hidden_state
        return out[inputs["attention_mask"].bool()] if "attention_mask" in inputs else out


@pytest.fixture(scope="package", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Latencies that plans measure are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACLIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()
