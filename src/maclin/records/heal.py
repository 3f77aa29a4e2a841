"""What healing did to a converted model: its learning curve, layer by layer and as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from .base import SCHEMA_VERSION, Config, Environment


@dataclass(frozen=True)
class HealLook:
    """One look at the held-out batches.

    Both errors are means over them. ``hidden_error`` is the relative error of the compared hidden states,
    ||x - x'||_F / ||x - mean(x)||_F; ``error`` is that of the final output, in ``HealResult.measure``.
    """

    stage: str  # "converted", "transfer", "distillation"
    step: int  # of the stage
    seconds: float  # since the beginning, of all runs together
    error: float
    hidden_error: float | None
    train_loss: float | None = None  # mean since the last look
    metric: float | None = None  # the user's own


@dataclass(frozen=True)
class HealLayer:
    """Relative error of one converted layer's attention output on held-out batches, its inputs being the original's."""

    layer: str
    mechanism: str
    error_before: float | None
    error_after: float | None  # after attention transfer; None where it was not reached
    note: str = ""  # "calibrated", "trained", or why neither


@dataclass(frozen=True)
class Drift:
    """How far the token ids of healing lie from those it is judged on; shares of tokens, padding left out."""

    unknown_share: float | None  # the tokenizer's unknown id; None where that id is not known
    unseen_share: float | None  # of held-out tokens whose id is in no batch to heal on
    distance: float | None  # Jensen-Shannon divergence of the two distributions of ids, in bits: 0 to 1
    top_share: float | None  # the most frequent id that is not in every sequence
    num_tokens: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class HealResult:
    """What came of healing; ``heal.json`` is this record."""

    measure: str  # "1 - cosine", "1 - cosine per token", "KL divergence", "hidden states"
    error_before: float
    error_after: float  # of the model as it was left: the best look
    best_stage: str  # where that was
    best_step: int
    stopped: str  # "budget", "no progress", "interrupted", "not finite", "nothing to train"
    looks: tuple[HealLook, ...]
    layers: tuple[HealLayer, ...]
    settings: Config
    num_batches: int
    num_held_out: int
    num_trained: int  # parameters
    transfer_steps: int
    distillation_steps: int
    num_skipped_steps: int
    resumed_at_seconds: tuple[float, ...]
    seconds: float
    drift: Drift | None = None
    metric_before: float | None = None
    metric_after: float | None = None
    warnings: tuple[str, ...] = ()
    seconds_of: dict[str, float] = field(default_factory=dict)  # of each part
    environment: Environment | None = None
    schema_version: str = SCHEMA_VERSION
