"""Layers by what converting them costs in accuracy, the least harmful first."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from maclin.adopt.planning.costs import relative_cost
from maclin.adopt.planning.options import convertible
from maclin.core.errors import MaclinError
from maclin.records import Audit, Config, LayerAudit, MechanismError


class Step(NamedTuple):
    """One layer of the frontier: what it is converted to, and the error that was measured for it."""

    layer: str
    mechanism: str
    config: Config
    rel_error: float


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
    measured = [e for e in layer.errors if e.rel_error is not None and convertible(e.mechanism)]
    return min(measured, key=lambda e: e.rel_error or 0.0, default=None)


def _saves(error: MechanismError, layer: LayerAudit, length: int) -> bool:
    try:
        return relative_cost(error.mechanism, error.config, layer, length) < 1.0
    except MaclinError:
        return False
