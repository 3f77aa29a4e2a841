"""SmolLM2-135M-Instruct: a decoder of 30 layers with grouped keys and rotary positions; its metric is perplexity.

Its weights were quantised to 4 bits; here they are float32 again, so that what is compared is this model with itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from maclin.adopt.hosts.cache import StateLayer
from maclin.core.errors import InputError
from maclin.progress import Progress, Silent

from .gguf import Gguf, read_gguf
from .packages import SMOLLM, unpacked

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NORMAL = 1  # kind of a token of text; others are special
CHUNK = 2048
"""Tokens of a stretch of text whose perplexity is taken."""


@dataclass(frozen=True)
class SmolLM:
    """The model with its tokenizer.

    Attributes:
        model: the decoder.
        tokenizer: byte-level pairs; it adds nothing.
    """

    model: LlamaForCausalLM
    tokenizer: Tokenizer

    def ids(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def load(progress: Progress | None = None) -> SmolLM:
    """The packaged model, in evaluation mode and float32.

    Raises:
        InputError: the package cannot be had; the message says where to put it.
    """
    file = read_gguf(unpacked(SMOLLM, progress or Silent()) / _FILE)
    return SmolLM(_model(file), _tokenizer(file))


def _model(file: Gguf) -> LlamaForCausalLM:
    values = {key.removeprefix("llama."): value for key, value in file.values.items()}
    embed = file.tensors["token_embd.weight"]
    config = LlamaConfig(
        vocab_size=len(embed),
        hidden_size=values["embedding_length"],
        intermediate_size=values["feed_forward_length"],
        num_hidden_layers=values["block_count"],
        num_attention_heads=values["attention.head_count"],
        num_key_value_heads=values["attention.head_count_kv"],
        max_position_embeddings=values["context_length"],
        rms_norm_eps=values["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": values["rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=values["tokenizer.ggml.bos_token_id"],
        eos_token_id=values["tokenizer.ggml.eos_token_id"],
        pad_token_id=values["tokenizer.ggml.padding_token_id"],
    )
    state = {"model.embed_tokens.weight": torch.tensor(embed), "lm_head.weight": torch.tensor(embed)}
    state["model.norm.weight"] = torch.tensor(file.tensors["output_norm.weight"])
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for theirs, ours in _NAMES.items():
        for layer in range(values["block_count"]):
            weight = torch.tensor(file.tensors[f"blk.{layer}.{theirs}.weight"])
            if theirs in heads:
                weight = _halves(weight, heads[theirs])
            state[f"model.layers.{layer}.{ours}.weight"] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # what is no weight, the frequencies of the rotation, is made by the constructor: so once more, off the meta device
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k in the order of transformers: of each rotated pair, the first numbers, then the second ones."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width).contiguous()


def _tokenizer(file: Gguf) -> Tokenizer:
    words: list[str] = file.values["tokenizer.ggml.tokens"]
    merges = [(a, b) for a, _, b in (pair.partition(" ") for pair in file.values["tokenizer.ggml.merges"])]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = file.values["tokenizer.ggml.token_type"]
    made.add_special_tokens([word for word, kind in zip(words, kinds, strict=True) if kind != _NORMAL])
    return made


def chunks(lm: SmolLM, texts: Sequence[str], number: int, length: int = CHUNK, per_text: int = 1) -> Tensor:
    """Stretches of text as tokens, (number, length): so many from each text, from its start on.

    Args:
        lm: the model with its tokenizer.
        texts: documents, taken in turn; those that are too short are left out.
        number: stretches.
        length: tokens of each.
        per_text: most stretches from one document.

    Raises:
        InputError: the texts are too few or too short.
    """
    rows: list[list[int]] = []
    for text in texts:
        ids = lm.ids(text)
        rows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)][:per_text]
        if len(rows) >= number:
            return torch.tensor(rows[:number])
    raise InputError(f"wanted {number} stretches of {length} tokens, the {len(texts)} texts hold {len(rows)}")


@torch.no_grad()
def nll(lm: SmolLM, rows: Tensor, progress: Callable[[int], None] | None = None) -> Tensor:
    """Mean negative log-likelihood of the tokens of each row but its first, in nats: (rows,).

    Args:
        lm: the model.
        rows: tokens (rows, length).
        progress: is told after each row.
    """
    found = []
    for i, row in enumerate(rows):
        hidden = lm.model.model(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]
        total = sum(
            float(torch.nn.functional.cross_entropy(lm.model.lm_head(h).float(), y, reduction="sum"))
            for h, y in zip(hidden.split(256), row[1:].split(256), strict=True)
        )
        found.append(total / (len(row) - 1))
        if progress is not None:
            progress(i + 1)
    return torch.tensor(found)


def perplexity(lm: SmolLM, rows: Tensor) -> float:
    """exp of the mean over all tokens of rows of one length."""
    return math.exp(float(nll(lm, rows).mean()))


@torch.no_grad()
def step_seconds(lm: SmolLM, context: Tensor, steps: int = 16, prefill_chunk: int = 1024) -> dict[str, Any]:
    """Seconds of single decoding steps behind a long context.

    Args:
        lm: the model, converted or not; its own ``generate`` prepares the cache.
        context: tokens (1, length).
        steps: that are timed, after one that is not.
        prefill_chunk: tokens of the context read at once.

    Returns:
        ``median``, ``q1`` and ``q3`` of one step in seconds, ``prefill`` in seconds, and ``cache_bytes`` at the end.
    """
    clock = _Clock()
    handle = lm.model.model.register_forward_pre_hook(clock.before, with_kwargs=True)
    start = time.perf_counter()
    try:
        cache = _generated(lm, context, steps + 3, prefill_chunk)
        clock.times.append(time.perf_counter())
    finally:
        handle.remove()
    singles = [b - a for a, b, n in zip(clock.times, clock.times[1:], clock.lengths, strict=False) if n == 1]
    first = next(t for t, n in zip(clock.times, clock.lengths, strict=False) if n == 1)
    kept = torch.tensor(singles[1 : steps + 1], dtype=torch.float64)
    return {
        "median": float(kept.median()),
        "q1": float(kept.quantile(0.25)),
        "q3": float(kept.quantile(0.75)),
        "prefill": first - start,
        "cache_bytes": cache_bytes(cache),
    }


def state_bytes(lm: SmolLM, context: Tensor, prefill_chunk: int = 1024) -> int:
    """Bytes that the converted layers keep of a context (1, length), a few steps behind it.

    Whole storages count: what a state is a view of is kept as well.
    """
    cache = _generated(lm, context, 4, prefill_chunk)
    return sum(cache_bytes(layer) for layer in cache.layers if isinstance(layer, StateLayer))


@torch.no_grad()
def _generated(lm: SmolLM, context: Tensor, tokens: int, prefill_chunk: int) -> Any:
    """The cache after a context and so many tokens more, chosen greedily."""
    model: Any = lm.model
    out = model.generate(
        context,
        attention_mask=torch.ones_like(context),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        prefill_chunk_size=prefill_chunk,
        pad_token_id=lm.model.config.pad_token_id,
    )
    return out.past_key_values


class _Clock:
    """When each forward pass began, and of how many tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.lengths: list[int] = []

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.times.append(time.perf_counter())
        ids = args[0] if args else kwargs["input_ids"]
        self.lengths.append(ids.shape[1])


def cache_bytes(cache: object) -> int:
    """Bytes of all tensors that a cache holds, each storage once."""
    found: dict[int, int] = {}
    seen: set[int] = set()

    def walk(x: object) -> None:
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif id(x) not in seen:
            seen.add(id(x))
            if isinstance(x, dict):
                for value in x.values():
                    walk(value)
            elif isinstance(x, list | tuple):
                for value in x:
                    walk(value)
            elif hasattr(x, "__dict__") and not isinstance(x, torch.nn.Module):
                walk(vars(x))

    walk(cache)
    return sum(found.values())
