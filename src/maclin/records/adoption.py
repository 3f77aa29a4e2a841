"""What is known of a model: its attention, how well mechanisms stand in, which layers to replace."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Config
from .text import shown_options, text_table


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
    output_change: float | None = None  # squared relative change of the model's output with it in this layer alone


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
    value_dim: int = 0  # numbers of v per head; 0 is as head_dim
    is_causal: bool = False
    calls: int = 1  # of one forward pass; above 1 where layers share their weights
    energy_by_head: tuple[float, ...] = ()  # share of each head in the squared norm of the exact output
    sensitivity: float | None = None  # squared relative change of the model's output per squared relative error here


@dataclass(frozen=True)
class Audit:
    """Measured error of every mechanism on every layer of a model."""

    layers: tuple[LayerAudit, ...]
    length: int  # tokens of the longest document in the audit
    num_documents: int
    warnings: tuple[str, ...] = ()
    architecture: str = ""  # class name of the audited model
    num_calibration_documents: int = 0  # kept apart for mechanisms that learn from data, not among num_documents
    device: str = ""  # where the model was: "cpu", "cuda:0"
    dtype: str = ""  # of q, k and v

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
    relative_cost: float | None  # over that of exact attention at the plan's length, by the plan's costs
    within_tolerance: bool  # of the plan; True where none was asked for
    note: str = ""
    latency_ms: float | None = None  # of one call; None where costs are operations


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
    relative_cost: float | None = None  # of the choice over exact attention, by the plan's costs
    latency_ms: float | None = None  # of one call; None where costs are operations
    exact_latency_ms: float | None = None
    weight: float | None = None  # of its squared relative error in that of the plan

    @property
    def exact_heads(self) -> int | None:
        """Heads that stay exact softmax attention; None where the number of heads is not known."""
        if self.mechanism == "softmax":
            return self.num_heads or None
        if self.mechanism != "by_head":
            return 0
        return sum(len(group["heads"]) for group in self.config["heads"] if group["mechanism"] == "softmax")

    @property
    def is_linear(self) -> bool:
        """Whether the layer becomes of linear cost as a whole."""
        return self.mechanism != "softmax" and not self.exact_heads


@dataclass(frozen=True)
class PlanPoint:
    """One of the plans that no other beats in cost and error both."""

    relative_cost: float  # of all attention over exact attention
    rel_error: float  # as ``Plan.rel_error``
    num_linear: int  # layers of linear cost
    num_changed: int  # layers that do not stay as they are
    attention_ms: float | None = None


@dataclass(frozen=True)
class Plan:
    """Which mechanism each layer gets. Decides, never mutates: ``maclin.convert_`` carries it out; ``print`` shows it.

    ``rel_error`` is sqrt(sum of weight x squared relative error over the layers). With the sensitivities that the audit
    measured as weights it predicts the relative error of the model's output, to first order and for errors of the
    layers that have nothing to do with each other; otherwise it is the root mean square over the layers.
    """

    tolerance: float | None  # of each layer; None where none was asked for
    length: int  # tokens that costs refer to
    rows: tuple[PlanRow, ...]
    audited: str = ""  # architecture of the model the plan is for
    costs: str = "operations"  # or "measured": latencies on ``device``
    device: str = ""  # processor and threads, or GPU, where costs were measured
    speedup: float | None = None  # what was asked for
    speedup_of: str = "attention"  # or "model"
    relative_cost: float | None = None  # of all attention over exact attention, by ``costs``
    attention_ms: float | None = None  # of all layers, for one sequence of ``length`` tokens
    exact_attention_ms: float | None = None
    model_ms: float | None = None  # of the model as it was, where known
    rel_error: float | None = None
    predicts_output: bool = False  # whether ``rel_error`` is that of the model's output
    frontier: tuple[PlanPoint, ...] = ()  # the fastest last; thinned where there are many
    notes: tuple[str, ...] = ()

    @property
    def linear_share(self) -> float:
        """Share of the layers that stop being exact softmax attention; of a layer the share of such heads."""
        changed = 0.0
        for row in self.rows:
            exact = row.exact_heads or 0
            changed += 0.0 if row.mechanism == "softmax" else 1.0 - exact / max(row.num_heads, exact, 1)
        return changed / max(len(self.rows), 1)

    @property
    def attention_speedup(self) -> float | None:
        """Exact attention over that of the plan, by its costs."""
        return None if not self.relative_cost else 1.0 / self.relative_cost

    @property
    def model_speedup(self) -> float | None:
        """Of the whole model, where its latency and those of attention are known."""
        if self.model_ms is None or self.attention_ms is None or self.exact_attention_ms is None:
            return None
        return self.model_ms / (self.model_ms - self.exact_attention_ms + self.attention_ms)

    def __str__(self) -> str:
        """What was decided for each layer, then the plans between which one may choose."""
        rows = [
            (
                row.layer,
                f"{row.mechanism}{_shown(row.config)}",
                row.rel_error,
                row.relative_cost,
                row.latency_ms,
                row.exact_latency_ms,
            )
            for row in self.rows
        ]
        head = [self.summary, text_table(("layer", "becomes", "error", "cost", "ms", "exact ms"), rows)]
        if self.frontier:
            points = [
                (1.0 / point.relative_cost if point.relative_cost else None, point.rel_error, *counts)
                for point in self.frontier
                for counts in [(str(point.num_linear), str(point.num_changed))]
            ]
            head.append("No plan is both faster and more accurate than one of these:")
            head.append(text_table(("speed-up", "error", "linear layers", "changed"), points))
        return "\n".join([*head, *(f"! {note}" for note in self.notes)])

    @property
    def budget(self) -> str:
        """What the plan was asked to keep, in words."""
        asked = [] if self.speedup is None else [f"at a speed-up of {self.speedup:g} of the {self.speedup_of}"]
        asked += [] if self.tolerance is None else [f"within the tolerance of {self.tolerance:g}"]
        return " and ".join(asked) or "at the least error"

    @property
    def summary(self) -> str:
        """One sentence."""
        linear = sum(row.is_linear for row in self.rows)
        partly = sum(row.mechanism != "softmax" for row in self.rows) - linear
        text = f"{linear} of {len(self.rows)} layers of linear cost"
        text += f", {partly} more in part" if partly else ""
        if self.attention_speedup is not None:
            by = f"as measured at {self.length} tokens" if self.costs == "measured" else "in multiply-adds"
            text += f"; attention {self.attention_speedup:.2f} times as fast {by}"
        if self.model_speedup is not None:
            text += f", the model {self.model_speedup:.2f} times"
        if self.rel_error is not None:
            what = "of the model's output, as predicted," if self.predicts_output else "over the layers"
            text += f"; error {what} {self.rel_error:.3g}"
        return text


def _shown(config: Config) -> str:
    """Options behind a name, without nested ones; of a mechanism per head how many heads have what."""
    groups = config.get("heads")
    if not isinstance(groups, list | tuple):
        return shown_options(config, brackets=True)
    parts = (f"{len(group['heads'])} {group['mechanism']}{_shown(group.get('options', {}))}" for group in groups)
    return f" ({', '.join(parts)})"


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
