"""From a task and a mechanism to the model that is trained, and from the model to what it scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from ..bench.specs import Spec
from ..nn.calibrate import calibrate_
from ..nn.config import MacformerConfig
from ..nn.encoders import MacformerClassifier, MacformerMatcher, MacformerTagger
from ..nn.language import MacformerLM
from ..nn.model import MacformerModel
from ..nn.seq2seq import MacformerSeq2Seq
from ..training.schedule import mixed_seed
from .objective import Batch, Objective
from .scores import bleu, chrf
from .settings import ModelSettings
from .specs import config_of
from .task import Split, Task, collate


def build_model(task: Task, spec: Spec, settings: ModelSettings, length: int, seed: int) -> MacformerModel:
    """The model of a task with one mechanism in every layer; equal seeds give equal weights under every mechanism.

    classify and match: an encoder with pooling, in two towers for a pair. tag: an answer at every position, from an
    encoder, or from a causal stack where the task is causal. language: a causal language model. translate: an
    encoder-decoder.

    Args:
        task: what is to be answered.
        spec: the mechanism.
        settings: sizes.
        length: most positions of a sequence.
        seed: of all weights and draws.

    Raises:
        CapabilityError: the mechanism cannot do the task.
        OptionError: sizes that cannot be.
    """
    tokens = task.field.kind == "tokens"
    front: dict[str, Any] = (
        {"frontend": "tokens", "vocab_size": task.field.vocab_size}
        if tokens
        else {"frontend": "series", "channels": task.field.channels}
    )
    config = MacformerConfig(
        embed_dim=settings.width,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        ff_dim=settings.feedforward,
        mechanism=spec.name,
        options=config_of(spec),
        position=settings.position,
        max_length=length,
        pooling="mean" if _model(task) in (MacformerLM, MacformerSeq2Seq) else settings.pooling,
        num_outputs=task.num_classes,
        dropout=settings.dropout,
        **front,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(seed, _WEIGHTS))
        model = _model(task)(config)
    _sharpened_(model, settings.qk_gain)
    return model


@torch.no_grad()
def _sharpened_(model: MacformerModel, gain: float) -> None:
    for _, attention in model.attentions():
        assert attention.in_proj_weight is not None  # all inputs have the width of the model
        attention.in_proj_weight[: attention.embed_dim + attention.kv_embed_dim] *= gain


_WEIGHTS = 1  # tells the seed of the weights from that of the order of the examples


def _model(task: Task) -> type[MacformerModel]:
    if task.kind == "tag":
        return MacformerLM if task.causal else MacformerTagger
    return {
        "classify": MacformerClassifier,
        "match": MacformerMatcher,
        "language": MacformerLM,
        "translate": MacformerSeq2Seq,
    }[task.kind]


def calibrated_(model: MacformerModel, batch: Batch) -> None:
    """Let the mechanisms of a model that learn from data do so, in place; those that do not stay as they are.

    Args:
        model: that was not trained yet.
        batch: of its task; 16 sequences are enough.

    Raises:
        InputError: too few tokens to learn from.
    """
    calibrate_(model, [{name: tensor for name, tensor in batch.items() if name != "y"}])


def objective_of(task: Task) -> Objective:
    """What the model of a task is trained on."""
    return Objective(task, {"match": _pairs, "translate": _translation}.get(task.kind, _single))


def _single(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(batch["x"], batch["mask"]).logits


def _pairs(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(batch["x1"], batch["x2"], batch["mask1"], batch["mask2"]).logits


def _translation(model: nn.Module, batch: Batch) -> torch.Tensor:
    # the end mark is only predicted
    target, mask = batch["target"][:, :-1], batch["target_mask"][:, :-1]
    return model(batch["source"], target, batch["source_mask"], mask).logits


def test_scores(
    task: Task, model: MacformerModel, split: Split, loss: float | None, accuracy: float, batch_size: int
) -> dict[str, float | None]:
    """Every figure of a split, by its name: accuracy, loss, and perplexity, bleu and chrf where the task has them.

    Args:
        task: whose figures.
        model: trained.
        split: that was judged.
        loss: mean cross entropy on it.
        accuracy: share of right answers on it.
        batch_size: examples that are translated at once.
    """
    scores: dict[str, float | None] = {"accuracy": accuracy, "loss": loss}
    if task.kind in ("language", "translate"):
        scores["perplexity"] = math.exp(loss) if loss is not None and loss < 700 else None
    if task.kind == "translate":
        assert isinstance(model, MacformerSeq2Seq)
        outputs, references = translated(task, model, split, batch_size)
        scores |= {"bleu": bleu(outputs, references), "chrf": chrf(outputs, references)}
    return scores


@torch.no_grad()
def translated(task: Task, model: MacformerSeq2Seq, split: Split, batch_size: int) -> tuple[list[str], list[str]]:
    """What the model makes of every source, greedily, and what is right; as text, by the task's ``decode``."""
    decode: Any = getattr(task, "decode")  # noqa: B009  (only a task of kind translate has it)
    outputs: list[str] = []
    references: list[str] = []
    device = next(model.parameters()).device
    examples = [split[i] for i in range(len(split))]
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        batch = {key: tensor.to(device) for key, tensor in collate(task, part).items()}
        targets = [np.asarray(example["target"]) for example in part]
        made = model.generate(
            batch["source"],
            batch["source_mask"],
            bos_id=int(targets[0][0]),
            eos_id=int(targets[0][-1]),
            max_new_tokens=min(batch["target"].shape[1] + 8, model.config.max_length),
        )
        outputs += [decode(row) for row in made.cpu().numpy()]
        references += [decode(target[1:]) for target in targets]
    return outputs, references
