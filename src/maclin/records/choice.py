"""Which mechanism suits given tensors, and what one does on them, head by head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .base import Config
from .text import shown_options, text_table


@dataclass(frozen=True)
class ChoiceRow:
    """One mechanism that was tried on given q, k and v; measured on sequences that it has not learned from."""

    mechanism: str
    config: Config  # what calibration made of ``asked``, where it learns from data
    asked: Config
    rel_error: float | None  # against softmax attention; None where it could not be applied
    relative_cost: float | None  # multiply-adds over those of exact attention at the choice's length
    within_tolerance: bool | None  # None where none was asked for
    note: str = ""
    break_even_length: int | None = None  # tokens from which on it is faster than exact attention on this device


@dataclass(frozen=True)
class Choice:
    """Which mechanism suits given q, k and v, and by how much; ``print`` shows it as a table.

    ``margin`` is the relative error of the runner-up minus that of the winner, ``better_share`` the share of the
    measured sequences on which the winner's is the smaller one.
    """

    mechanism: str  # the winner; "softmax" where nothing cheaper is within the tolerance
    config: Config
    rel_error: float
    reason: str
    runner_up: str | None
    runner_up_config: Config
    margin: float | None
    better_share: float | None
    uniform_rel_error: float
    tolerance: float | None
    length: int  # tokens the relative cost refers to
    num_learning: int  # sequences
    num_measured: int
    rows: tuple[ChoiceRow, ...]  # the best first

    def __str__(self) -> str:
        """What was chosen, then every row."""
        rows = [
            (row.mechanism, shown_options(row.asked), row.rel_error, row.relative_cost, row.note) for row in self.rows
        ]
        rows.append(("uniform", "baseline", self.uniform_rel_error, None, ""))
        head = f"{self.mechanism}{shown_options(self.config, brackets=True)}: {self.reason}"
        return f"{head}\n{text_table(('mechanism', 'options', 'error', 'cost', 'note'), rows)}"


@dataclass(frozen=True)
class HeadDiagnosis:
    """What one query head does under a mechanism; None where a notion does not exist, see ``Diagnosis.reasons``.

    ``radius`` is |x||y| over pairs of a query and a key as they reach the kernel: normalised, centred, times
    temperature and scale. Errors are relative, of the output: ``kernel_rel_error`` against exact attention of the
    mechanism's own kernel, which is what its features estimate; ``kernel_gap`` that exact attention against softmax
    attention of q and k as they are; ``softmax_rel_error`` the mechanism against the latter.
    """

    head: int
    radius_p50: float
    radius_p99: float
    radius_max: float
    entropy_ratio: float  # of softmax attention; 1 is uniform
    predicted_rel_error: float | None
    kernel_rel_error: float | None
    kernel_gap: float | None
    softmax_rel_error: float
    uniform_rel_error: float  # of averaging, against softmax attention
    negative_similarity_share: float | None  # of pairs with <phi(q), phi(k)> < 0
    negative_share: float | None  # of rows with a negative denominator
    guarded_share: float | None  # of rows whose denominator was too small, or below the floor of the features
    warning: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """How a mechanism does on given q, k and v, head by head; ``print`` shows it as a table."""

    mechanism: str
    config: Config
    num_features: int | None
    num_sequences: int
    num_tokens: int
    softmax_rel_error: float
    uniform_rel_error: float
    clamped_share: float  # of keys whose weight was cut
    heads: tuple[HeadDiagnosis, ...]
    reasons: tuple[str, ...] = ()  # why a field is None, and what else is to be known

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of all heads."""
        return tuple(f"head {head.head}: {head.warning}" for head in self.heads if head.warning)

    def __str__(self) -> str:
        """The sum, a row for each head, then warnings and reasons."""
        columns = (
            "head", "radius p50", "p99", "max", "entropy", "predicted", "to kernel", "kernel gap", "to softmax",
            "uniform", "phi phi < 0", "den. < 0", "guarded",
        )  # fmt: skip
        fields = [field.name for field in dataclasses.fields(HeadDiagnosis) if field.name not in ("head", "warning")]
        rows = [(str(head.head), *(getattr(head, name) for name in fields)) for head in self.heads]
        lines = [
            f"{self.mechanism}{shown_options(self.config, brackets=True)}: error {self.softmax_rel_error:.3g}, uniform "
            f"{self.uniform_rel_error:.3g}, on {self.num_sequences} sequences, {self.num_tokens} tokens",
            text_table(columns, rows),
            *(f"! {warning}" for warning in self.warnings),
            *self.reasons,
        ]
        return "\n".join(lines)
