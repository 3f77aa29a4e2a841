"""A plan in words: what became of each layer and why, the frontier, and what else is to be known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from maclin.adopt.planning.costs import EXACT, Costs
from maclin.adopt.planning.knapsack import Solution
from maclin.adopt.planning.options import LayerOptions, Option
from maclin.adopt.planning.order import best_linear
from maclin.core.errors import MaclinError
from maclin.records import Config, LayerAudit, MechanismError, PlanPoint, PlanRow

POINTS = 24
"""Of the frontier that are kept."""


@dataclass(frozen=True)
class Budget:
    """What a plan has to keep."""

    tolerance: float | None
    speedup: float | None
    of: str
    model_ms: float | None
    min_layers: int
    max_layers: int | None

    @property
    def fastest(self) -> bool:
        """Whether the fastest plan is wanted, rather than the most accurate."""
        return self.speedup is None and self.min_layers == 0


def points(
    found: Sequence[Solution], given: Sequence[LayerOptions], exact: float, measured: bool
) -> tuple[PlanPoint, ...]:
    """The frontier, from the most accurate to the fastest, thinned evenly."""
    if not exact:
        return ()
    step = max(1, math.ceil(len(found) / POINTS))
    kept = [*found[:-1:step], found[-1]]
    made: list[PlanPoint] = []
    for solution in reversed(kept):
        options = [layer.options[pick] for layer, pick in zip(given, solution.picks, strict=True)]
        made.append(
            PlanPoint(
                solution.cost / exact,
                math.sqrt(max(solution.error, 0.0)),
                sum(option.linear for option in options),
                sum(option.changed for option in options),
                solution.cost if measured else None,
            )
        )
    return tuple(made)


def notes(given: Sequence[LayerOptions], costs: Costs, exact: bool, per_head: bool) -> list[str]:
    """What else is to be known of a plan."""
    found: list[str] = []
    refused = sum(options.exact_cost is None for options in given)
    if refused:
        found.append(f"{refused} layers cannot be converted; their attention is in no cost of this plan")
    shorter = [
        length
        for options in given
        if options.exact_cost is not None
        for name, config in [(EXACT, {}), *((e.mechanism, e.config) for e in options.layer.errors)]
        if (length := _measured_length(costs, options.layer, name, config)) is not None
    ]
    if shorter:
        found.append(
            f"some costs were measured at {min(shorter)} tokens or more and extrapolated to {costs.length}: linearly, "
            "those of exact attention with the square"
        )
    if not exact:
        found.append("not all combinations could be kept; a plan that is better by a thousandth of the cost may exist")
    if per_head and any(o.exact_cost is not None and o.layer.num_kv_heads < 2 for o in given):
        found.append("layers with one key head are not mixed by head")
    return found


def _measured_length(costs: Costs, layer: LayerAudit, name: str, config: Config) -> int | None:
    try:
        return costs.of(layer, name, config).measured_length
    except MaclinError:
        return None


def row(options: LayerOptions, pick: int, weight: float, costs: Costs, budget: Budget) -> PlanRow:
    """What becomes of one layer, and why."""
    layer, option = options.layer, options.options[pick]
    best = best_linear(layer)
    exact, measured = options.exact_cost, costs.kind == "measured" and options.exact_cost is not None
    reason = _why(option, options, costs, budget) if option.changed else _why_exact(options, best, costs, budget)
    return PlanRow(
        layer=layer.layer,
        mechanism=option.mechanism,
        config=option.config,
        rel_error=option.rel_error,
        reason=reason,
        best_linear=None if best is None else best.mechanism,
        best_linear_config={} if best is None else best.config,
        best_linear_rel_error=None if best is None else best.rel_error,
        alternatives=options.alternatives,
        num_heads=layer.num_heads,
        head_dim=layer.head_dim,
        relative_cost=option.cost / exact if exact else None,
        latency_ms=option.cost / layer.calls if measured else None,
        exact_latency_ms=exact / layer.calls if measured and exact else None,
        weight=weight,
    )


def _why(option: Option, options: LayerOptions, costs: Costs, budget: Budget) -> str:
    relative = option.cost / (options.exact_cost or 1.0)
    share = f"{relative:.2f} of exact attention's {'time' if costs.kind == 'measured' else 'operations'}"
    if budget.fastest:
        reason = f"cheapest within {budget.tolerance:g}: {share}"
    else:
        reason = f"in the plan of least error: {share}"
    return reason + "".join(f"; {e.mechanism}: {e.note}" for e in options.layer.errors if e.reached is False and e.note)


def _why_exact(options: LayerOptions, best: MechanismError | None, costs: Costs, budget: Budget) -> str:
    layer, tolerance = options.layer, budget.tolerance
    if layer.refused is not None:
        return f"stays exact: {layer.refused}"
    if best is None:
        return "stays exact: no mechanism of linear cost could be applied"
    within = "" if tolerance is None else f" within {tolerance:g}"
    if any(option.changed and option.cost < options.options[0].cost for option in options.options):
        return f"stays exact: the budget is kept without what is{within or ' faster'}, at less error"
    if len(options.options) > 1:
        what = f"what is{within}" if within else "what could be applied"
        return f"stays exact: {what} is not cheaper than exact attention at {costs.length} tokens"
    if tolerance is None:
        return "stays exact: no mechanism of linear cost could be run here"
    if best.reached is False:
        return f"stays exact: {best.mechanism} did not reach the tolerance of its own configuration: {best.note}"
    unreached = [f"; {e.mechanism}: {e.note}" for e in layer.errors if e.reached is False and e.note]
    return (
        f"stays exact: the best of linear cost, {best.mechanism}, is at {best.rel_error:.3g}, above {tolerance:g}"
        + "".join(unreached)
    )
