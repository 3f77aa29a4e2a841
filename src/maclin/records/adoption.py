"""What is known of a model: its attention, how well mechanisms stand in, which layers to replace."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Config


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
