"""Records: what was measured, decided and concluded, as frozen dataclasses with units in the field names.

Every room may import this one; it imports nothing of ours. ``to_json`` and ``from_json`` are exact
inverses, so a report can be read back by another version of the same schema. A figure that was not
measured is ``None``, and the record says why; it is never zero and never estimated.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

SCHEMA_VERSION = "1.1"
"""Version of ``report.json``: the first number changes when a reader of the old schema would be wrong."""

Config = dict[str, Any]
"""Constructor arguments of a mechanism, as passed to ``maclin.mechanism``; JSON values only."""


@dataclass(frozen=True)
class Environment:
    """Where and with what the figures were measured."""

    date_utc: str
    maclin_version: str
    python_version: str
    torch_version: str
    transformers_version: str | None
    platform: str
    processor: str
    device: str  # "cpu", "cuda:0"
    num_threads: int
    dtype: str


@dataclass(frozen=True)
class ModelInfo:
    """The model that was judged."""

    name: str
    host: str  # "transformers", "sentence-transformers"
    architecture: str  # class name
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    max_length: int | None  # tokens, special ones included
    num_parameters: int


@dataclass(frozen=True)
class DataInfo:
    """The documents that the model was judged on."""

    source: str
    num_calibration_documents: int
    num_held_out_documents: int
    num_calibration_tokens: int
    num_held_out_tokens: int
    document_tokens: tuple[int, ...]  # of every document, after truncation to the model's limit
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeadStatistics:
    """What one attention head does on the calibration documents.

    ``entropy_ratio`` is the mean entropy of the rows of the attention matrix over log of the keys
    attended: 1 is uniform, 0 looks at one key. ``logit_std`` is the standard deviation of the scaled
    logits over the keys of a row, averaged over rows. ``radius`` is the largest norm of q times the
    largest norm of k, scaled as the logits are.
    """

    entropy_ratio: float
    logit_std: float
    q_norm: float  # root mean square over tokens
    k_norm: float
    radius: float


@dataclass(frozen=True)
class MechanismError:
    """Relative error of one mechanism on one layer: ||out - exact||_F / ||exact||_F over all tokens.

    A mechanism that learns from data was calibrated on other documents of the same layer. ``rel_error`` is None
    where the mechanism could not be applied; ``reason`` then says why.
    """

    mechanism: str
    config: Config
    rel_error: float | None
    rel_error_by_head: tuple[float, ...] = ()
    guarded_share: float | None = None  # share of output rows whose denominator was guarded
    negative_share: float | None = None  # share of output rows whose denominator was negative
    reason: str | None = None
    asked: Config | None = None  # where calibration made ``config`` of it: the configuration that was asked for
    reached: bool | None = None  # whether calibration came within the tolerance that the configuration asks for
    note: str = ""  # what calibration has to say


@dataclass(frozen=True)
class LayerAudit:
    """One attention layer: its statistics, and the error of every mechanism beside uniform."""

    layer: str  # qualified module name
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    heads: tuple[HeadStatistics, ...]
    uniform_rel_error: float | None  # None where refused
    uniform_rel_error_by_head: tuple[float, ...]
    errors: tuple[MechanismError, ...]
    refused: str | None = None  # why this layer cannot be converted at all


@dataclass(frozen=True)
class Audit:
    """Measured error of every mechanism on every layer of a model."""

    layers: tuple[LayerAudit, ...]
    length: int  # tokens of the longest document in the audit
    num_documents: int
    warnings: tuple[str, ...] = ()
    architecture: str = ""  # class name of the audited model
    num_calibration_documents: int = 0  # kept apart for mechanisms that learn from data, not among num_documents

    def layer(self, name: str) -> LayerAudit:
        """The audit of the layer of that name; KeyError lists the known names."""
        for row in self.layers:
            if row.layer == name:
                return row
        raise KeyError(f"no audited layer {name!r}; audited are {[row.layer for row in self.layers]}")


@dataclass(frozen=True)
class Alternative:
    """One candidate of a plan row, with what speaks for and against it."""

    mechanism: str
    config: Config
    rel_error: float | None
    relative_cost: float | None  # estimated operations over those of exact attention at the plan's length
    within_tolerance: bool
    note: str = ""


@dataclass(frozen=True)
class PlanRow:
    """What becomes of one layer, and between which candidates the choice was made."""

    layer: str
    mechanism: str  # "softmax": stays exact
    config: Config
    rel_error: float | None
    reason: str
    best_linear: str | None  # the most accurate mechanism of linear cost, chosen or not
    best_linear_config: Config
    best_linear_rel_error: float | None
    alternatives: tuple[Alternative, ...] = ()
    num_heads: int = 0  # of the audited layer, 0 where not known
    head_dim: int = 0


@dataclass(frozen=True)
class Plan:
    """Which mechanism each layer gets. Decides, never mutates: ``maclin.convert_`` carries it out."""

    tolerance: float
    length: int  # tokens the relative cost refers to
    rows: tuple[PlanRow, ...]
    audited: str = ""  # architecture of the model the plan is for

    @property
    def linear_share(self) -> float:
        """Share of the layers that stop being exact softmax attention."""
        return sum(row.mechanism != "softmax" for row in self.rows) / max(len(self.rows), 1)


@dataclass(frozen=True)
class FrontierPoint:
    """Quality and cost of the whole model with its ``num_linear`` least harmful layers converted."""

    num_linear: int
    linear_layers: tuple[str, ...]
    mechanisms: tuple[str, ...]  # of linear_layers, in the same order
    cosine_mean: float  # of the embeddings with and without conversion, held-out documents
    cosine_p05: float  # fifth percentile
    neighbour_agreement: float | None  # share of held-out documents whose nearest neighbour is unchanged
    latency_ms: float | None  # one document at ``length`` tokens
    peak_bytes: int | None
    length: int
    configs: tuple[Config, ...] = ()  # of mechanisms, in the same order


@dataclass(frozen=True)
class Timing:
    """Latency and memory of one thing at one length. None where not measured; ``reason`` says why."""

    subject: str  # a mechanism's name, or "original" and "converted" for whole models
    scope: str  # "attention" or "model"
    length: int
    latency_ms: float | None  # median
    latency_ms_low: float | None = None  # quartiles
    latency_ms_high: float | None = None
    num_runs: int = 0
    peak_bytes: int | None = None  # beyond the inputs, output included
    reason: str | None = None
    num_linear: int | None = None  # scope "model", subject "converted": how many layers were linear


@dataclass(frozen=True)
class BreakEven:
    """From which length on a mechanism is faster than fused softmax."""

    subject: str
    scope: str
    length: int | None  # smallest measured length from which on it is always faster; None: never, as measured
    note: str


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
        rows = [(row.mechanism, _options(row.asked), row.rel_error, row.relative_cost, row.note) for row in self.rows]
        rows.append(("uniform", "baseline", self.uniform_rel_error, None, ""))
        head = f"{self.mechanism}{_options(self.config, brackets=True)}: {self.reason}"
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
            f"{self.mechanism}{_options(self.config, brackets=True)}: error {self.softmax_rel_error:.3g}, uniform "
            f"{self.uniform_rel_error:.3g}, on {self.num_sequences} sequences, {self.num_tokens} tokens",
            text_table(columns, rows),
            *(f"! {warning}" for warning in self.warnings),
            *self.reasons,
        ]
        return "\n".join(lines)


def text_table(columns: tuple[str, ...], rows: typing.Sequence[tuple[Cell, ...]]) -> str:
    """A table as lines of text: words to the left, numbers to the right with three figures, None as n/a."""
    body = [
        ["n/a" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *body, strict=True)]
    left = [all(isinstance(row[i], str | None) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if flush else cell.rjust(width)
            for cell, width, flush in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in [list(columns), *body]
    )


def _options(config: Config, brackets: bool = False) -> str:
    shown = ", ".join(
        f"{name}={'+'.join(map(str, value)) if isinstance(value, list) else value}" for name, value in config.items()
    )
    return f" ({shown})" if brackets and shown else shown


Cell = str | float | None
"""One cell of a table: words, or a number that is shown with three figures; None is shown as n/a."""


@dataclass(frozen=True)
class StudyTable:
    """A table of a study, rows in the order of reading."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a chart; ``low`` and ``high`` are the spread over seeds, empty where there is none."""

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    is_baseline: bool = False


@dataclass(frozen=True)
class LineChart:
    """Lines over one pair of axes."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    note: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Numbers over two axes of categories: values[i][j] stands at y[i], x[j]; None is shown as n/a."""

    title: str
    x_label: str
    y_label: str
    value_label: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Study:
    """What one of the papers' experiments found; ``study.json`` is this record.

    ``measurements`` holds every measured cell as it was measured; tables and charts are drawn from it.
    """

    schema_version: str
    name: str  # "projection", "approximation", "ppsbn", "theory"
    question: str
    findings: tuple[str, ...]  # sentences, the answer first
    settings: Config
    environment: Environment
    measurements: tuple[Config, ...]
    tables: tuple[StudyTable, ...] = ()
    charts: tuple[LineChart, ...] = ()
    heat_maps: tuple[HeatMap, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each step


R = TypeVar("R")


def to_json(record: Any, *, indent: int | None = 2) -> str:
    """A record as JSON text; numbers that are not finite become null."""
    return json.dumps(_finite(dataclasses.asdict(record)), indent=indent, ensure_ascii=False, allow_nan=False)


def from_json(cls: type[R], text: str) -> R:
    """The record that ``to_json`` wrote.

    Raises:
        ValueError: the text is not JSON, a field is missing or unknown, or the schema's first number differs;
            the message names the field.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"wanted the JSON of a {cls.__name__}, got text that is not JSON ({error})") from error
    if cls in (Report, Study):
        version = data.get("schema_version") if isinstance(data, dict) else None
        if str(version).split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise ValueError(
                f"wanted a {cls.__name__.lower()} of schema {SCHEMA_VERSION}, got {version!r}; make it again with this "
                "maclin"
            )
    return _build(cls, data, cls.__name__)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _build(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kinds = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        if len(kinds) == 1:
            return _build(kinds[0], value, where)
        chosen = next((arg for arg in kinds if _is_scalar(arg, value)), None)
        if chosen is None:
            raise ValueError(f"{where}: wanted {' or '.join(arg.__name__ for arg in kinds)}, got {value!r}")
        return _build(chosen, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: wanted a list, got {type(value).__name__}")
        return tuple(_build(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: wanted an object, got {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(f"{where}: unknown field {unknown[0]!r}; known are {sorted(hints)}")
        required = {
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        missing = sorted(required - set(value))
        if missing:
            raise ValueError(f"{where}: field {missing[0]!r} is missing")
        return kind(**{name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if kind is float and value is None:  # to_json writes null for what is not finite
        return math.nan
    if kind in (int, float, str, bool) and not _is_scalar(kind, value):
        raise ValueError(f"{where}: wanted {kind.__name__}, got {value!r}")
    return float(value) if kind is float else value


def _is_scalar(kind: Any, value: Any) -> bool:
    """Whether a JSON value is of that scalar kind: a whole number is a float too, true and false are no numbers."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
