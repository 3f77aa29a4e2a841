"""What each layer may become: its audited mechanisms with their costs, and mixtures of them by head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from maclin.adopt.planning.costs import EXACT, Costs
from maclin.adopt.planning.heads import Part, assignments
from maclin.core import mechanisms as registry
from maclin.core.errors import InputError, MaclinError
from maclin.records import Alternative, Config, LayerAudit, MechanismError

BY_HEAD = "by_head"
_SHOWN = 6  # mixtures by head among the alternatives of a layer


@dataclass(frozen=True)
class Option:
    """One thing that a layer may become.

    Args:
        mechanism: its name; exact attention is one of the options.
        config: its options.
        rel_error: of the layer's attention output.
        cost: of all calls of the layer.
        linear: whether the layer is then of linear cost.
        output_change: squared relative change of the model's output with it in this layer alone, where it was measured.
    """

    mechanism: str
    config: Config
    rel_error: float
    cost: float
    linear: bool
    output_change: float | None = None

    @property
    def changed(self) -> bool:
        """Whether the layer does not stay as it is."""
        return self.mechanism != EXACT


@dataclass(frozen=True)
class LayerOptions:
    """What one layer may become, and what was looked at.

    Args:
        layer: its audit.
        exact_cost: of all calls of the layer as it is; None where the layer cannot be converted.
        options: exact attention first.
        alternatives: every candidate with what spoke for and against it, the most accurate first.
    """

    layer: LayerAudit
    exact_cost: float | None
    options: tuple[Option, ...]
    alternatives: tuple[Alternative, ...]


def convertible(name: str) -> bool:
    """Whether a mechanism is of linear cost and no baseline."""
    row = registry.row(name)
    return row.linear and not row.baseline


def layer_options(layer: LayerAudit, costs: Costs, tolerance: float | None, per_head: bool) -> LayerOptions:
    """Everything that a layer may become.

    Args:
        layer: its audit.
        costs: of its mechanisms.
        tolerance: largest relative error that is allowed; None is any.
        per_head: also mixtures by head.

    Raises:
        InputError: mixtures by head of an audit without errors by head.
    """
    if layer.refused is not None:
        return LayerOptions(layer, None, (Option(EXACT, {}, 0.0, 0.0, False),), ())
    exact_ms = costs.of(layer, EXACT, {}).value
    exact = layer.calls * exact_ms
    options = [Option(EXACT, {}, 0.0, exact, False)]
    alternatives: list[Alternative] = []
    for error in layer.errors:
        alternative = _alternative(error, layer, costs, tolerance, exact_ms)
        alternatives.append(alternative)
        if error.rel_error is None or alternative.relative_cost is None or not convertible(error.mechanism):
            continue
        if alternative.within_tolerance:
            cost = exact * alternative.relative_cost
            options.append(Option(error.mechanism, error.config, error.rel_error, cost, True, error.output_change))
    if per_head:
        mixtures = _mixtures(layer, costs, tolerance)
        options.extend(mixtures)
        alternatives.extend(_shown(mixtures, layer, costs, exact))
    return LayerOptions(layer, exact, tuple(options), tuple(sorted(alternatives, key=_by_error)))


def _alternative(
    error: MechanismError, layer: LayerAudit, costs: Costs, tolerance: float | None, exact: float
) -> Alternative:
    within = error.rel_error is not None and (tolerance is None or error.rel_error <= tolerance)
    relative: float | None = None
    note = ""
    try:
        relative = costs.of(layer, error.mechanism, error.config).value / exact
    except MaclinError as refused:
        note = str(refused)
    if error.rel_error is None:
        note = error.reason or note
    elif error.reached is False and tolerance is not None:
        within, note = False, error.note
    elif registry.row(error.mechanism).baseline:
        note = "a baseline, there to compare with"
    elif relative is not None and relative >= 1.0:
        note = f"not cheaper than exact attention at {costs.length} tokens"
    milliseconds = relative * exact if relative is not None and costs.kind == "measured" else None
    return Alternative(error.mechanism, error.config, error.rel_error, relative, within, note, milliseconds)


def _by_error(alternative: Alternative) -> float:
    return math.inf if alternative.rel_error is None else alternative.rel_error


def _mixtures(layer: LayerAudit, costs: Costs, tolerance: float | None) -> list[Option]:
    """Mixtures by head that no other beats, the cheapest first; the heads of one key head stay together."""
    units = layer.num_kv_heads
    each = layer.num_heads // units
    if units < 2:
        return []
    if len(layer.energy_by_head) != layer.num_heads:
        raise InputError(
            f"layer {layer.layer!r}: the audit does not say how much each head carries, as those of earlier versions; "
            "run maclin.audit again, or plan without per_head"
        )
    known: list[tuple[str, Config]] = [(EXACT, {})]
    by_head: list[tuple[float, ...]] = [(0.0,) * layer.num_heads]
    for error in layer.errors:
        if convertible(error.mechanism) and len(error.rel_error_by_head) == layer.num_heads:
            known.append((error.mechanism, error.config))
            by_head.append(error.rel_error_by_head)
    parts: list[Part] = []
    taken: list[tuple[str, Config]] = []
    for (name, config), errors in zip(known, by_head, strict=True):
        try:
            whole, none = costs.of(layer, name, config).value, costs.of(layer, name, config, 0).value
        except MaclinError:
            continue
        squared = [share * error**2 for share, error in zip(layer.energy_by_head, errors, strict=True)]
        parts.append(
            Part(none, (whole - none) / units, tuple(sum(squared[i * each : (i + 1) * each]) for i in range(units)))
        )
        taken.append((name, config))
    found: list[Option] = []
    for assignment in assignments(parts, costs.per_head(layer)):
        error = math.sqrt(max(assignment.error, 0.0))
        if tolerance is None or error <= tolerance:
            groups = _groups(assignment.parts, taken, each)
            linear = all(group["mechanism"] != EXACT for group in groups)
            found.append(Option(BY_HEAD, {"heads": groups}, error, layer.calls * assignment.cost, linear))
    return found


def _groups(parts: Sequence[int], known: Sequence[tuple[str, Config]], each: int) -> list[Config]:
    """As by_head holds them: the query heads of each part, by the first."""
    heads: dict[int, list[int]] = {}
    for unit, part in enumerate(parts):
        heads.setdefault(part, []).extend(range(unit * each, (unit + 1) * each))
    return [{"heads": own, "mechanism": known[part][0], "options": dict(known[part][1])} for part, own in heads.items()]


def _shown(mixtures: Sequence[Option], layer: LayerAudit, costs: Costs, exact: float) -> list[Alternative]:
    """Some of the mixtures that are cheaper than exact attention, evenly from the cheapest to the most accurate."""
    cheaper = [option for option in mixtures if option.cost < exact]
    step = max(1, math.ceil(len(cheaper) / _SHOWN))
    chosen = cheaper[::step] if len(cheaper) <= _SHOWN else [*cheaper[: -step // 2 : step], cheaper[-1]]
    return [
        Alternative(
            option.mechanism,
            option.config,
            option.rel_error,
            option.cost / exact,
            True,
            latency_ms=option.cost / layer.calls if costs.kind == "measured" else None,
        )
        for option in chosen
    ]
