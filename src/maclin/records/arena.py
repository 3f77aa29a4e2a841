"""What the arena found: training runs, what a training step costs, and the tables made of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from .base import Config, Environment


@dataclass(frozen=True)
class ArenaLook:
    """One look at the validation split during training."""

    step: int  # steps done
    seconds: float  # of training until then; validation and checkpoints left out
    loss: float | None
    score: float | None  # in ``ArenaTask.watched``


@dataclass(frozen=True)
class ArenaRun:
    """One training from scratch, and what its best checkpoint scores on the test split.

    ``score`` is None where the mechanism could not do the task; ``reason`` then says why.
    """

    label: str  # mechanism and what is not a default
    mechanism: str
    config: Config
    seed: int
    score: float | None = None  # in the metric of the task, of the checkpoint that was best on the validation split
    scores: dict[str, float | None] = field(default_factory=dict)  # every figure of the test split, by its name
    best_step: int | None = None
    num_steps: int = 0
    num_skipped_steps: int = 0  # loss or gradient was not finite
    num_parameters: int | None = None
    seconds: float | None = None  # of training
    tokens_per_second: float | None = None
    looks: tuple[ArenaLook, ...] = ()
    resumed_at_steps: tuple[int, ...] = ()
    reason: str | None = None
    environment: Environment | None = None


@dataclass(frozen=True)
class ArenaCost:
    """Latency and memory of one training step, forward and backward, measured beside the others of the same length."""

    label: str  # of the runs; "softmax (unfused)" has the attention matrix in memory
    length: int
    batch_size: int
    latency_ms: float | None  # median
    latency_ms_low: float | None = None  # quartiles
    latency_ms_high: float | None = None
    num_runs: int = 0
    peak_bytes: int | None = None  # beyond the model and the batch
    reason: str | None = None  # why not measured


@dataclass(frozen=True)
class ArenaTask:
    """The task, its data and what an answer scores that never looks at the sequence."""

    name: str
    preset: str
    metric: str  # "accuracy", "bleu", "perplexity"
    watched: str  # what is looked at during training, on the validation split: "accuracy" or "perplexity"
    higher_is_better: bool
    length: int
    full_length: int  # of the preset "standard"
    num_train: int
    num_valid: int
    num_test: int
    trivial_name: str
    trivial_score: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ArenaTaskResult:
    """Everything that was run on one task with one preset."""

    task: ArenaTask
    settings: Config
    runs: tuple[ArenaRun, ...]
    costs: tuple[ArenaCost, ...] = ()


@dataclass(frozen=True)
class ArenaResult:
    """The tables of a directory; ``arena.json`` is this record."""

    schema_version: str
    environment: Environment
    tasks: tuple[ArenaTaskResult, ...]
    warnings: tuple[str, ...] = ()
