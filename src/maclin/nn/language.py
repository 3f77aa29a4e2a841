"""The causal language model, which generates with a memory that does not grow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.errors import InputError, OptionError
from .config import MacformerConfig
from .encoders import IGNORED, cross_entropy
from .frontends import TokenEmbedding, check_mask
from .generation import check_sampling, continued, evaluating
from .model import MacformerModel, ModelOutput
from .positions import LearnedPositions
from .stack import Stack, StackState


class MacformerLM(MacformerModel):
    """Scores of the next token, from the tokens up to here.

    With a mechanism whose state has a constant size (all feature maps, and window) a token costs the same time and
    memory wherever it stands; softmax keeps all keys and values.

    Args:
        config: ``frontend`` "tokens" or "bytes"; every mechanism causal.

    Raises:
        OptionError: a front end that takes no ids, or pooling="cls".
        CapabilityError: a mechanism that has no causal form.

    Example:
        >>> model = MacformerLM(MacformerConfig(vocab_size=1000, position="rotary"))
        >>> model(ids, labels=ids).loss.backward()
        >>> new = model.generate(prompt, max_new_tokens=50, temperature=0.8, top_k=40)
    """

    def __init__(self, config: MacformerConfig) -> None:
        super().__init__(config)
        check_text(config, "a language model")
        self.front_end = TokenEmbedding(config.input_vocab_size, config.embed_dim)
        self.stack = Stack(config, "causal")
        self.head = None if config.tie_embeddings else nn.Linear(config.embed_dim, config.input_vocab_size)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        state: StackState | None = None,
        return_state: bool = False,
    ) -> ModelOutput:
        """Scores (B, N, vocabulary): those at i are of token i + 1.

        Args:
            x: ids (B, N).
            mask: (B, N) bool, True = attend.
            labels: ids (B, N) of the same tokens, usually x itself: the loss compares scores at i with label i + 1,
                where that is not -100 and not masked.
            state: what an earlier call returned; x and mask are then the new tokens only.
            return_state: whether to return the state after the last token.

        Raises:
            InputError: inputs or labels that do not fit.
        """
        vectors, mask = self.front_end(x, mask)
        hidden, new_state = self.stack(vectors, mask, state=state, return_state=return_state)
        logits = self.scores(hidden)
        return ModelOutput(logits, None if labels is None else next_token_loss(logits, labels, mask), new_state)

    def scores(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., E) -> a score per id."""
        return self.front_end.scores(hidden) if self.head is None else self.head(hidden)

    def generate(
        self,
        prompt: Tensor,
        mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts, token by token, each from the mechanisms' states alone.

        Args:
            prompt: ids (B, N), N >= 1, shorter ones padded on the left.
            mask: (B, N) bool, True = attend; the last column is all True.
            max_new_tokens: at most so many new tokens.
            temperature: 0 takes the best token; otherwise tokens are drawn from softmax(scores / temperature).
            top_k: draw from so many of the best only.
            eos_id: ends a sequence; once all have ended, so does the generation.
            generator: of what is drawn; None is torch's own.

        Returns:
            New ids (B, at most max_new_tokens); behind an end mark 0. Id 0, padding, is never chosen.

        Raises:
            InputError: no prompt, padding on its right, or more tokens than learned positions.
            OptionError: options that cannot be.
        """
        check_sampling(self.config.input_vocab_size, max_new_tokens, temperature, top_k, eos_id=eos_id)
        if prompt.dim() != 2 or prompt.numel() == 0:
            raise InputError(f"prompt has shape {tuple(prompt.shape)}; wanted (batch, tokens), at least one token each")
        check_mask(mask, prompt.shape)
        if mask is not None and not bool(mask[:, -1].all()):
            raise InputError(
                "a prompt ends in padding; wanted shorter prompts padded on the left, so that each ends in its "
                "last token"
            )
        if isinstance(self.stack.positions, LearnedPositions):
            longest = prompt.shape[1] if mask is None else int(mask.sum(-1).max())
            self.stack.positions.check(longest + max_new_tokens - 1)  # nothing is read after the last new token
        with evaluating(self):
            hidden, state = self.stack(*self.front_end(prompt, mask), return_state=True)

            def step(ids: Tensor) -> Tensor:
                nonlocal state
                made = self(ids, state=state, return_state=True)
                state = made.state
                return made.logits[:, -1]

            return continued(
                self.scores(hidden[:, -1]),
                step,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                eos_id=eos_id,
                generator=generator,
            )


def check_text(config: MacformerConfig, what: str) -> None:
    """Refuse a configuration of something that neither reads nor writes ids; raises OptionError."""
    if config.frontend not in ("tokens", "bytes"):
        raise OptionError(f"frontend is {config.frontend!r}, and {what} reads ids; wanted 'tokens' or 'bytes'")
    if config.pooling == "cls":
        raise OptionError(f"pooling='cls' puts a token in front, and {what} makes no one vector; leave pooling out")


def next_token_loss(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Cross-entropy of scores at i (B, N, V) with label i + 1 (B, N); -100 and masked labels are not judged."""
    if labels.shape != logits.shape[:2]:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}; wanted {tuple(logits.shape[:2])}, the same tokens, not shifted"
        )
    if mask is not None:
        labels = labels.masked_fill(~mask, IGNORED)
    return cross_entropy(logits[:, :-1], labels[:, 1:])
