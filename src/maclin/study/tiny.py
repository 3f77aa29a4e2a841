"""A Transformer small enough to be trained on two cores while one waits, with any mechanism inside."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maclin.core.errors import OptionError
from maclin.core.mechanisms import Mechanism


@dataclass(frozen=True)
class Examples:
    """Token ids with one label each; ``mask`` is None where nothing is padded.

    Shape: ids (n, L) int64, labels (n,) int64, mask (n, L) bool with True = token.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Examples:
        """The examples at these places."""
        return Examples(self.ids[index], self.labels[index], None if self.mask is None else self.mask[index])


@dataclass(frozen=True)
class Task:
    """A classification task: examples to train on, and others from other documents to judge on."""

    name: str
    source: str
    classes: tuple[str, ...]
    vocab: int  # ids are below it
    train: Examples
    held_out: Examples

    @property
    def majority_accuracy(self) -> float:
        """Held-out accuracy of always answering the label that is most frequent in training."""
        answer = self.train.labels.bincount(minlength=len(self.classes)).argmax()
        return (self.held_out.labels == answer).double().mean().item()


class Attention(nn.Module):
    """Self-attention with a mechanism between the projections: (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int, mechanism: Mechanism) -> None:
        super().__init__()
        self.mechanism = mechanism
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend among the tokens of each sample, those of ``mask`` (B, L)."""
        batch, length, width = x.shape
        heads = self.mechanism.num_heads
        q, k, v = self.qkv(x).view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        out = self.mechanism(q, k, v, key_mask=mask)
        return self.out(out.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    """Pre-norm encoder layer: x + attention(norm(x)), then x + feed-forward(norm(x)) of twice the width."""

    def __init__(self, width: int, mechanism: Mechanism) -> None:
        super().__init__()
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, mechanism)
        self.forward_part = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, width) -> the same."""
        x = x + self.attention(self.norm_attention(x), mask)
        return x + self.forward_part(self.norm_forward(x))


class TinyClassifier(nn.Module):
    """Pre-norm encoder with learned positions, and a linear answer from the mean over the tokens.

    Args:
        vocab: ids are below it.
        width: of the model; a multiple of ``num_heads``.
        num_heads: of attention.
        num_layers: encoder layers.
        seq_len: longest input.
        num_classes: answers.
        mechanism_factory: layer index -> mechanism with ``head_dim`` width / num_heads and ``num_heads`` heads; called
            once per layer, in order, under ``seed``, so that a layer can share what an earlier one has learned.
        seed: of all initial weights and, where the factory passes no generator, of the mechanisms' draws.

    Raises:
        OptionError: sizes that do not fit each other, or a mechanism of other sizes.
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        num_heads: int,
        num_layers: int,
        seq_len: int,
        num_classes: int,
        mechanism_factory: Callable[[int], Mechanism],
        seed: int = 0,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise OptionError(f"width {width} is not a multiple of num_heads {num_heads}; choose one that is")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # the mechanisms draw last, so that the other weights are the same whatever the mechanism
            self.tokens = nn.Embedding(vocab, width)
            self.positions = nn.Parameter(0.02 * torch.randn(seq_len, width))
            self.norm = nn.LayerNorm(width)
            self.answer = nn.Linear(width, num_classes)
            states = [torch.randint(2**31, ()).item() for _ in range(num_layers)]
            layers: list[Layer] = []
            for index, state in enumerate(states):
                torch.manual_seed(int(state))
                mechanism = mechanism_factory(index)
                if mechanism.num_heads != num_heads or mechanism.head_dim * num_heads != width:
                    raise OptionError(
                        f"the factory made {mechanism.name} with {mechanism.num_heads} heads of {mechanism.head_dim} "
                        f"for layer {index}; wanted {num_heads} heads of {width // num_heads}"
                    )
                torch.manual_seed(int(state) + 1)
                layers.append(Layer(width, mechanism))
            self.layers = nn.ModuleList(layers)
        nn.init.normal_(self.tokens.weight, std=0.02, generator=torch.Generator().manual_seed(seed))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of ids (B, L), with mask (B, L), True = token."""
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        if mask is None:
            return self.answer(x.mean(1))
        weight = mask.to(x.dtype)[..., None]
        return self.answer((x * weight).sum(1) / weight.sum(1).clamp_min(1.0))


def train(
    model: TinyClassifier,
    data: Task,
    steps: int,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    *,
    warm_up: float = 0.1,
    weight_decay: float = 0.01,
    clip: float | None = 1.0,
    evaluate_every: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train a model by AdamW, linear warm-up then cosine to 0, and judge it on the held-out examples.

    The same arguments give the same figures on the same machine and number of threads. A loss that is not finite
    ends the training and is reported, not raised; nothing is chosen by the held-out examples.

    Args:
        model: moves in place; is left in eval mode.
        data: the task.
        steps: of the optimiser.
        batch_size: examples per step, drawn epoch by epoch without repetition.
        lr: largest rate.
        seed: of the order of the examples.
        warm_up: share of the steps.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; None clips nothing.
        evaluate_every: steps between looks at the held-out examples; None looks at the end only.
        on_step: is told step and loss.

    Returns:
        JSON values: losses (one per step done), held_out (step, accuracy, loss per look), accuracy and held_out_loss
        at the end (None if diverged), max_grad_norm before clipping (of the finite ones), diverged_at_step (of the
        first loss that is not finite; ``steps`` for the held-out loss at the end; None if it never happened),
        gradient_diverged_at_step, num_steps, seconds.

    Raises:
        OptionError: fewer than one step, or a batch larger than the training set.
    """
    if steps < 1 or not 1 <= batch_size <= len(data.train):
        raise OptionError(
            f"wanted at least 1 step and a batch of 1 to {len(data.train)} examples, got {steps} and {batch_size}"
        )
    start = time.perf_counter()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    rise = max(round(warm_up * steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, rise, steps))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    looks: list[dict[str, float | int | None]] = []
    largest = 0.0
    diverged: int | None = None
    gradient_diverged: int | None = None
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(data.train), generator=generator)
        batch, order = data.train.take(order[:batch_size]), order[batch_size:]
        loss = F.cross_entropy(model(batch.ids, batch.mask), batch.labels)
        value = loss.item()
        if not math.isfinite(value):
            diverged = step
            break
        losses.append(value)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip).item()
        if math.isfinite(norm):
            largest = max(largest, norm)
        elif gradient_diverged is None:
            gradient_diverged = step
        optimiser.step()
        schedule.step()
        if on_step is not None:
            on_step(step, value)
        if evaluate_every is not None and (step + 1) % evaluate_every == 0 and step + 1 < steps:
            looks.append({"step": step + 1, **evaluate(model, data.held_out)})
            model.train()
    model.eval()
    end: dict[str, float | None] = {"accuracy": None, "loss": None}
    if diverged is None:
        end = evaluate(model, data.held_out)
        diverged = steps if end["loss"] is None else None
        looks.append({"step": steps, **end})
    return {
        "losses": losses,
        "held_out": looks,
        "accuracy": None if diverged is not None else end["accuracy"],
        "held_out_loss": end["loss"],
        "max_grad_norm": largest,
        "diverged_at_step": diverged,
        "gradient_diverged_at_step": gradient_diverged,
        "num_steps": len(losses),
        "seconds": round(time.perf_counter() - start, 3),
    }


@torch.no_grad()
def evaluate(model: TinyClassifier, examples: Examples, batch_size: int = 64) -> dict[str, float | None]:
    """Accuracy and mean cross-entropy ("loss") in eval mode; both None where the loss is not finite."""
    model.eval()
    loss, correct = 0.0, 0
    for index in torch.arange(len(examples)).split(batch_size):
        part = examples.take(index)
        logits = model(part.ids, part.mask)
        loss += F.cross_entropy(logits, part.labels, reduction="sum").item()
        correct += int((logits.argmax(-1) == part.labels).sum())
    if not math.isfinite(loss):
        return {"accuracy": None, "loss": None}
    return {"accuracy": correct / len(examples), "loss": loss / len(examples)}


def _rate(step: int, rise: int, steps: int) -> float:
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))
