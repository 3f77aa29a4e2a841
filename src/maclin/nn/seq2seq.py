"""The encoder-decoder: one sequence in, another out, as in translation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import MacformerConfig
from .encoders import MacformerEncoder
from .frontends import TokenEmbedding
from .generation import check_sampling, continued, evaluating
from .language import check_text, next_token_loss
from .model import MacformerModel, ModelOutput
from .positions import LearnedPositions
from .stack import Stack, StackState


class MacformerSeq2Seq(MacformerModel):
    """Scores of the next target token, from the source and the target up to here.

    Each decoder layer attends to the target so far and to the source, both by the configured mechanisms.

    Args:
        config: ``decoder_mechanism`` causal; ``cross_mechanism`` not tied to positions, so not window.

    Raises:
        OptionError: a front end that takes no ids, or pooling="cls".
        CapabilityError: a mechanism that cannot be used in its place.

    Example:
        >>> model = MacformerSeq2Seq(MacformerConfig(vocab_size=8000, num_layers=3, num_heads=4))
        >>> model(source, target, source_mask, target_mask, labels=target).loss.backward()
        >>> made = model.generate(source, source_mask, bos_id=1, eos_id=2, max_new_tokens=60)
    """

    def __init__(self, config: MacformerConfig) -> None:
        super().__init__(config)
        check_text(config, "an encoder-decoder")
        self.encoder = MacformerEncoder(config)
        self.front_end = TokenEmbedding(config.output_vocab_size, config.embed_dim)
        self.stack = Stack(config, "decoder")
        self.head = None if config.tie_embeddings else nn.Linear(config.embed_dim, config.output_vocab_size)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """Scores (B, N, target vocabulary): those at i are of target token i + 1.

        Args:
            source: ids (B, S).
            target: ids (B, N), from the start mark on.
            source_mask: (B, S) bool, True = attend.
            target_mask: (B, N) bool, True = attend.
            labels: ids (B, N), usually target itself: the loss compares scores at i with label i + 1, where that is
                not -100 and not masked.

        Raises:
            InputError: inputs or labels that do not fit.
        """
        memory, memory_mask = self.encoder(source, source_mask)
        vectors, mask = self.front_end(target, target_mask)
        hidden, _ = self.stack(vectors, mask, memory=memory, memory_mask=memory_mask)
        logits = self.scores(hidden)
        return ModelOutput(logits, None if labels is None else next_token_loss(logits, labels, mask))

    def scores(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., E) -> a score per target id."""
        return self.front_end.scores(hidden) if self.head is None else self.head(hidden)

    def generate(
        self,
        source: Tensor,
        mask: Tensor | None = None,
        *,
        bos_id: int,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Make targets, token by token; the target so far is in the mechanisms' states, the source is read each time.

        Args:
            source: ids (B, S).
            mask: (B, S) bool, True = attend.
            bos_id: what targets start with.
            max_new_tokens: at most so many tokens.
            temperature: 0 takes the best token; otherwise tokens are drawn from softmax(scores / temperature).
            top_k: draw from so many of the best only.
            eos_id: ends a sequence; once all have ended, so does the generation.
            generator: of what is drawn; None is torch's own.

        Returns:
            Ids (B, at most max_new_tokens), without the start mark; behind an end mark 0.

        Raises:
            InputError: inputs that do not fit, or more tokens than learned positions.
            OptionError: options that cannot be.
        """
        check_sampling(self.config.output_vocab_size, max_new_tokens, temperature, top_k, bos_id=bos_id, eos_id=eos_id)
        if isinstance(self.stack.positions, LearnedPositions):
            self.stack.positions.check(max_new_tokens)
        with evaluating(self):
            memory, memory_mask = self.encoder(source, mask)
            state: StackState | None = None

            def step(ids: Tensor) -> Tensor:
                nonlocal state
                vectors, _ = self.front_end(ids)
                hidden, state = self.stack(
                    vectors, memory=memory, memory_mask=memory_mask, state=state, return_state=True
                )
                return self.scores(hidden[:, -1])

            start = torch.full((len(source), 1), bos_id, dtype=torch.long, device=source.device)
            return continued(
                step(start),
                step,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                eos_id=eos_id,
                generator=generator,
            )
