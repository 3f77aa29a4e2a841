"""The report of a proof of concept: verdict, rollout, return on investment."""

from __future__ import annotations

from dataclasses import dataclass, field

from .adoption import Audit, DataInfo, FrontierPoint, ModelInfo, Plan
from .base import Environment
from .timing import BreakEven, Timing


@dataclass(frozen=True)
class Verdict:
    """The conclusion, the rule it follows from, and the reason in words.

    ``pays_from_length`` speaks of the whole model where that was ever faster, and otherwise of the
    attention alone; ``pays_scope`` says which.
    """

    decision: str  # "go", "go-after-healing", "no-go"
    reason: str
    rule: str
    recommended_num_linear: int
    pays_from_length: int | None  # tokens; None where it never did in what was measured
    pays_scope: str | None = None  # "model" or "attention"; None where pays_from_length is


@dataclass(frozen=True)
class RoiResult:
    """What a month of requests costs before and after, over the lengths that were measured.

    Three ways to serve are compared: ``before`` is the original model, ``after`` the converted one, and
    ``dispatch`` the original below ``dispatch_from_length`` and the converted one from there on. Money is
    in ``currency``; it counts the covered requests only.
    """

    currency: str
    price_per_hour: float  # of the machine
    requests_per_day: float
    utilisation: float  # share of the paid time in which the machine works on a request
    days_per_month: float
    num_linear: int | None  # layers of the converted model that was timed
    num_lengths: int  # in the sample of request lengths
    num_shorter: int  # below covered_from_length, not covered
    num_longer: int  # above covered_to_length, not covered
    covered_share: float
    covered_from_length: int  # tokens; both models were measured from here
    covered_to_length: int  # to here
    dispatch_from_length: int | None  # None: the original always
    mean_latency_before_ms: float
    mean_latency_after_ms: float
    mean_latency_dispatch_ms: float
    monthly_cost_before: float
    monthly_cost_after: float
    monthly_cost_dispatch: float
    monthly_saving_after: float
    monthly_saving_dispatch: float
    effort_cost: float | None  # None: not stated
    payback_months_after: float | None  # None: never, or no effort stated
    payback_months_dispatch: float | None
    formulas: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Indicator:
    """A number to watch during a rollout, with the threshold that this report supports."""

    name: str
    threshold: str
    source: str  # which measurement supports it


@dataclass(frozen=True)
class RolloutStage:
    """One stage of a rollout: what runs, what must hold to go on, when to go back."""

    name: str  # offline, shadow, canary, full
    action: str
    traffic_share: float
    indicators: tuple[Indicator, ...]
    go_on_when: str
    go_back_when: str


@dataclass(frozen=True)
class Report:
    """Everything one proof of concept found; ``report.json`` is this record."""

    schema_version: str
    environment: Environment
    model: ModelInfo
    data: DataInfo
    audit: Audit
    plan: Plan
    frontier: tuple[FrontierPoint, ...]
    timings: tuple[Timing, ...]
    break_even: tuple[BreakEven, ...]
    verdict: Verdict
    rollout: tuple[RolloutStage, ...]
    host_check_max_abs_error: float | None  # converted to "softmax" against the untouched model
    restore_is_bit_equal: bool | None
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each step
    warnings: tuple[str, ...] = ()
