"""From an audit to a plan: which mechanism each layer gets, by a table that can be read. Decides, never mutates."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from maclin.adopt.hosts.base import AttentionLayer
from maclin.core import mechanisms as registry
from maclin.core.errors import InputError, MaclinError, OptionError
from maclin.files import write_whole
from maclin.records import Alternative, Audit, Config, LayerAudit, MechanismError, Plan, PlanRow, from_json, to_json

EXACT = "softmax"
"""What a layer is called that stays as it is."""


class Step(NamedTuple):
    """One layer of the frontier: what it is converted to, and the error that was measured for it."""

    layer: str
    mechanism: str
    config: Config
    rel_error: float


def plan(audit: Audit, tolerance: float = 0.1, length: int | None = None) -> Plan:
    """Per layer the cheapest mechanism within the tolerance, exact attention where there is none.

    Candidates are the audited mechanisms that are not baselines and whose measured error on that layer is within
    the tolerance (and, with num_features="auto", within that of their own configuration); the one with the fewest
    multiply-adds at ``length`` tokens wins, if those are fewer than exact
    attention's. Every row keeps all alternatives with what spoke for and against them.

    Args:
        audit: what ``maclin.audit`` measured.
        tolerance: largest relative error of a layer's attention output, between 0 and 1.
        length: tokens for which costs are compared (default: the longest audited document).

    Returns:
        The plan; ``plan.linear_share`` is the share of layers that become linear.

    Raises:
        OptionError: a tolerance outside (0, 1), or a length below 1.
        InputError: an audit without layers.

    Example:
        >>> maclin.convert_(model, maclin.plan(maclin.audit(model, batches), tolerance=0.3))
    """
    if not 0 < tolerance < 1:
        raise OptionError(f"wanted a tolerance between 0 and 1 (a relative error, 0.1 is 10 %), got {tolerance}")
    if length is not None and length < 1:
        raise OptionError(f"wanted a length of at least 1 token, got {length}")
    if not audit.layers:
        raise InputError("wanted an audit of at least one layer, got none; run maclin.audit on the model first")
    tokens = max(audit.length if length is None else length, 1)
    rows = tuple(_row(layer, tolerance, tokens) for layer in audit.layers)
    return Plan(tolerance, tokens, rows, audit.architecture)


def frontier_order(audit: Audit) -> list[Step]:
    """Layers in the order in which to convert them, least harmful first.

    Each with its most accurate mechanism of linear cost that is not a baseline, by the measured error; those with fewer
    multiply-adds than exact attention at the longest audited document come first, since a conversion is to save.
    ``window`` counts (its cost is linear); averaging does not. Layers that cannot be converted are left out.

    Args:
        audit: what ``maclin.audit`` measured.
    """
    steps = []
    for layer in audit.layers:
        cheaper = [e for e in layer.errors if e.rel_error is not None and _saves(e, layer, max(audit.length, 1))]
        best = best_linear(replace(layer, errors=tuple(cheaper))) or best_linear(layer)
        if best is not None and best.rel_error is not None:
            steps.append(Step(layer.layer, best.mechanism, best.config, best.rel_error))
    return sorted(steps, key=lambda step: step.rel_error)


def best_linear(layer: LayerAudit) -> MechanismError | None:
    """The most accurate mechanism of linear cost on a layer, baselines left out; None where none was measured."""
    measured = [e for e in layer.errors if e.rel_error is not None and _convertible(e.mechanism)]
    return min(measured, key=lambda e: e.rel_error or 0.0, default=None)


def relative_cost(name: str, config: Config, layer: LayerAudit | AttentionLayer, length: int) -> float:
    """Multiply-adds of a mechanism over those of exact attention, both on ``length`` tokens of one layer.

    Args:
        name: mechanism.
        config: its options.
        layer: supplies head counts and width.
        length: tokens.
    """
    sizes = {"head_dim": layer.head_dim, "num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    ours = registry.mechanism(name, **sizes, **config).cost(length, length, layer.head_dim)
    theirs = registry.mechanism(EXACT, **sizes).cost(length, length, layer.head_dim)
    return ours / theirs


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan as JSON; folders above it are made.

    Raises:
        MaclinError: the file cannot be written; what was there before is kept.
    """
    try:
        write_whole(Path(path), to_json(plan).encode())
    except OSError as error:
        raise MaclinError(
            f"cannot write the plan to {path}: {error.strerror or error}; choose another place"
        ) from error


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan that ``save_plan`` wrote.

    Raises:
        InputError: the file cannot be read or is not a plan; the message names the field.
    """
    try:
        return from_json(Plan, Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read a plan from {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"wanted a plan that maclin.save_plan wrote, got {path}: {error}") from error


def _saves(error: MechanismError, layer: LayerAudit, length: int) -> bool:
    try:
        return relative_cost(error.mechanism, error.config, layer, length) < 1.0
    except MaclinError:
        return False


def _convertible(name: str) -> bool:
    row = registry.row(name)
    return row.linear and not row.baseline


def _row(layer: LayerAudit, tolerance: float, length: int) -> PlanRow:
    alternatives = tuple(sorted((_alternative(e, layer, tolerance, length) for e in layer.errors), key=_by_error))
    best = best_linear(layer)
    fitting = [a for a in alternatives if a.within_tolerance and not a.note and a.relative_cost is not None]
    chosen = min(fitting, key=lambda a: a.relative_cost or 0.0, default=None)
    if chosen is not None:
        name, config, error = chosen.mechanism, chosen.config, chosen.rel_error
        reason = f"cheapest within {tolerance:g}: {chosen.relative_cost:.2f} of exact attention's operations"
        reason += "".join(f"; {e.mechanism}: {e.note}" for e in layer.errors if e.reached is False and e.note)
    else:
        name, config, error = EXACT, {}, 0.0
        reason = _why_exact(layer, alternatives, best, tolerance, length)
    return PlanRow(
        layer=layer.layer,
        mechanism=name,
        config=config,
        rel_error=error,
        reason=reason,
        best_linear=None if best is None else best.mechanism,
        best_linear_config={} if best is None else best.config,
        best_linear_rel_error=None if best is None else best.rel_error,
        alternatives=alternatives,
        num_heads=layer.num_heads,
        head_dim=layer.head_dim,
    )


def _why_exact(
    layer: LayerAudit, alternatives: tuple[Alternative, ...], best: MechanismError | None, tolerance: float, length: int
) -> str:
    if layer.refused is not None:
        return f"stays exact: {layer.refused}"
    if best is None:
        return "stays exact: no mechanism of linear cost could be applied"
    if any(a.within_tolerance for a in alternatives if _convertible(a.mechanism)):
        return f"stays exact: what is within {tolerance:g} is not cheaper than exact attention at {length} tokens"
    if best.reached is False:
        return f"stays exact: {best.mechanism} did not reach the tolerance of its own configuration: {best.note}"
    unreached = [f"; {e.mechanism}: {e.note}" for e in layer.errors if e.reached is False and e.note]
    return (
        f"stays exact: the best of linear cost, {best.mechanism}, is at {best.rel_error:.3g}, above {tolerance:g}"
        + "".join(unreached)
    )


def _alternative(error: MechanismError, layer: LayerAudit, tolerance: float, length: int) -> Alternative:
    within = error.rel_error is not None and error.rel_error <= tolerance
    cost: float | None = None
    note = ""
    try:
        cost = relative_cost(error.mechanism, error.config, layer, length)
    except MaclinError as refused:
        note = str(refused)
    if error.rel_error is None:
        note = error.reason or note
    elif error.reached is False:
        within, note = False, error.note
    elif registry.row(error.mechanism).baseline:
        note = "a baseline, there to compare with"
    elif cost is not None and cost >= 1.0:
        note = f"not cheaper than exact attention at {length} tokens"
    return Alternative(error.mechanism, error.config, error.rel_error, cost, within, note)


def _by_error(alternative: Alternative) -> float:
    return float("inf") if alternative.rel_error is None else alternative.rel_error
