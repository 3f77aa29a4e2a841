"""From an audit to a plan: which mechanism each layer gets, by a table that can be read. Decides, never mutates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from maclin.adopt.planning.costs import Costs, Operations, measure_costs
from maclin.adopt.planning.knapsack import Choice, Solution, solve
from maclin.adopt.planning.options import LayerOptions, Option, layer_options
from maclin.adopt.planning.rows import Budget, notes, points, row
from maclin.core.errors import InputError, OptionError
from maclin.records import Audit, Plan

TOLERANCE = 0.1
"""Of a plan that is asked for nothing else."""


def plan(
    audit: Audit,
    tolerance: float | None = None,
    length: int | None = None,
    *,
    speedup: float | None = None,
    of: Literal["attention", "model"] = "attention",
    model_ms: float | None = None,
    min_layers: int = 0,
    max_layers: int | None = None,
    per_head: bool = False,
    costs: Literal["measured", "operations"] | Costs = "measured",
) -> Plan:
    """Choose what each layer becomes, so that a budget is kept: a tolerance, a speed-up, a number of layers.

    With ``speedup`` or ``min_layers`` the plan of least error that keeps them; with ``tolerance`` alone the fastest one
    whose layers all keep it. The error of a plan is sqrt(sum_l w_l e_l²), where e_l is the measured relative error of
    layer l and w_l what the audit found one unit of e_l² to do to the squared relative error of the model's output
    (``audit(..., sensitivities=True)``). Where mechanisms were tried in each layer alone (``sensitivities="each"``),
    what the output made of them stands in place of w_l e_l². So it predicts that error, to first order and for errors
    of layers that have nothing to do with each other; without sensitivities, w_l = 1 / layers.

    Costs are latencies measured on this machine at ``length`` tokens (``adopt.measure_costs``). The best choice is
    found exactly, as a multiple-choice knapsack; ``plan.frontier`` holds the plans that no other beats in cost and
    error both, and every row its alternatives with what spoke for and against them.

    Args:
        audit: what ``maclin.audit`` measured.
        tolerance: largest relative error of a layer's attention output, between 0 and 1; 0.1 where no other budget is
            given.
        length: tokens for which costs are compared (default: the longest audited document).
        speedup: how many times faster attention, or the model, is to become; above 1.
        of: what ``speedup`` is of: all layers' attention, or the whole model, for which ``model_ms`` is needed.
        model_ms: latency of the whole model as it is, on one sequence of ``length`` tokens, on this machine.
        min_layers: layers that are to become of linear cost, at least; a layer with exact heads does not count.
        max_layers: layers that may be changed, at most.
        per_head: also mix mechanisms within a layer, and keep heads exact that none follows (``by_head``). The heads of
            one key head stay together.
        costs: "measured"; "operations", multiply-adds, the same on every machine; or what ``adopt.measure_costs``
            returned, here or on another machine.

    Returns:
        The plan; ``print`` shows it.

    Raises:
        OptionError: a value that cannot be, or a budget that no plan keeps; the message says what the best reaches.
        InputError: an audit without layers, or per_head with an audit that does not say how much each head carries.

    Example:
        >>> audit = maclin.audit(model, batches)
        >>> print(maclin.plan(audit, speedup=3.0, length=4096))
        >>> maclin.convert_(model, maclin.plan(audit, tolerance=0.3), batches=batches)
    """
    if tolerance is None and speedup is None and not min_layers:
        tolerance = TOLERANCE
    budget = Budget(tolerance, speedup, of, model_ms, min_layers, max_layers)
    _check(audit, budget, length)
    costs = _costs(audit, costs, length, per_head)
    given = [layer_options(layer, costs, tolerance, per_head) for layer in audit.layers]
    weights, predicts = _weights(audit)
    solved = solve(
        [_choices(options, weight, predicts) for options, weight in zip(given, weights, strict=True)],
        min_layers,
        max_layers,
    )
    exact = sum(options.exact_cost or 0.0 for options in given)
    chosen = _chosen(solved.found, budget, exact, costs, given)
    rows = tuple(
        row(options, pick, weight, costs, budget)
        for options, pick, weight in zip(given, chosen.picks, weights, strict=True)
    )
    measured = costs.kind == "measured"
    return Plan(
        tolerance=tolerance,
        length=costs.length,
        rows=rows,
        audited=audit.architecture,
        costs=costs.kind,
        device=costs.device,
        speedup=speedup,
        speedup_of=of,
        relative_cost=chosen.cost / exact if exact else None,
        attention_ms=chosen.cost if measured and exact else None,
        exact_attention_ms=exact if measured and exact else None,
        model_ms=model_ms,
        rel_error=math.sqrt(max(chosen.error, 0.0)),
        predicts_output=predicts,
        frontier=points(solved.found, given, exact, measured),
        notes=tuple(notes(given, costs, solved.exact, per_head)),
    )


def _check(audit: Audit, budget: Budget, length: int | None) -> None:
    tolerance, speedup, model_ms = budget.tolerance, budget.speedup, budget.model_ms
    if tolerance is not None and not 0 < tolerance < 1:
        raise OptionError(f"wanted a tolerance between 0 and 1 (a relative error, 0.1 is 10 %), got {tolerance}")
    if length is not None and length < 1:
        raise OptionError(f"wanted a length of at least 1 token, got {length}")
    if speedup is not None and not (speedup > 1 and math.isfinite(speedup)):
        raise OptionError(f"wanted a speed-up above 1 (3 is a third of the time), got {speedup}")
    if budget.of not in ("attention", "model"):
        raise OptionError(f"wanted a speed-up of 'attention' or of the 'model', got {budget.of!r}")
    if budget.of == "model" and model_ms is None:
        raise OptionError("a speed-up of the model needs model_ms, its latency as it is; or pass of='attention'")
    if model_ms is not None and not (model_ms > 0 and math.isfinite(model_ms)):
        raise OptionError(f"wanted model_ms as a positive number of milliseconds, got {model_ms}")
    if not audit.layers:
        raise InputError("wanted an audit of at least one layer, got none; run maclin.audit on the model first")
    most = len(audit.layers)
    for label, number in (("min_layers", budget.min_layers), ("max_layers", budget.max_layers)):
        if number is not None and not 0 <= number <= most:
            raise OptionError(f"wanted {label} from 0 to the {most} layers of the audit, got {number}")
    if budget.max_layers is not None and budget.max_layers < budget.min_layers:
        raise OptionError(f"wanted max_layers of at least min_layers, got {budget.max_layers} and {budget.min_layers}")


def _costs(audit: Audit, costs: str | Costs, length: int | None, per_head: bool) -> Costs:
    tokens = max(audit.length if length is None else length, 1)
    if not isinstance(costs, str):
        if length is not None and length != costs.length:
            raise OptionError(f"wanted costs at {length} tokens, got those at {costs.length}; measure them there")
        return costs
    if costs == "operations":
        return Operations(tokens)
    if costs == "measured":
        return measure_costs(audit, tokens, per_head=per_head)
    raise OptionError(f"wanted costs as 'measured', 'operations' or what measure_costs returned, got {costs!r}")


def _weights(audit: Audit) -> tuple[list[float], bool]:
    """Of each layer's squared error, and whether the sum predicts that of the model's output."""
    known = [layer.sensitivity for layer in audit.layers if layer.refused is None]
    if known and all(value is not None for value in known):
        return [layer.sensitivity or 0.0 for layer in audit.layers], True
    return [1.0 / len(audit.layers)] * len(audit.layers), False


def _choices(options: LayerOptions, weight: float, predicts: bool) -> list[Choice]:
    return [Choice(o.cost, _change(o, weight, predicts), o.linear, o.changed) for o in options.options]


def _change(option: Option, weight: float, predicts: bool) -> float:
    """What an option changes of the output: measured, or estimated from its error."""
    if predicts and option.output_change is not None:
        return option.output_change
    return weight * option.rel_error**2


def _chosen(
    found: Sequence[Solution], budget: Budget, exact: float, costs: Costs, given: Sequence[LayerOptions]
) -> Solution:
    """The plan that is wanted, of those that no other beats, ascending in cost."""
    within = "" if budget.tolerance is None else f" within a tolerance of {budget.tolerance:g}"
    if not found:
        able = sum(any(o.linear for o in options.options) for options in given)
        raise OptionError(
            f"wanted at least {budget.min_layers} layers of linear cost, and {able} of {len(given)} can become so"
            f"{within}; pass min_layers={able} or less, or a wider tolerance"
        )
    if budget.fastest:
        return found[0]
    if budget.speedup is None:
        return found[-1]
    rest = 0.0
    if budget.of == "model":
        if costs.kind != "measured":
            raise OptionError("a speed-up of the model needs measured costs; pass costs='measured'")
        assert budget.model_ms is not None
        rest = budget.model_ms - exact
        if rest < 0:
            raise OptionError(
                f"wanted the latency of the whole model at {costs.length} tokens, got {budget.model_ms:g} ms, less "
                f"than the {exact:.3g} ms of its attention; measure it at that length on this device"
            )
    wanted = (exact + rest) / budget.speedup * (1 + 1e-9)
    kept = [solution for solution in found if solution.cost + rest <= wanted]
    if kept:
        return kept[-1]
    best = (exact + rest) / max(found[0].cost + rest, 1e-300)
    raise OptionError(
        f"no plan of these mechanisms makes the {budget.of} {budget.speedup:g} times as fast at {costs.length} tokens"
        f"{within}; the fastest makes it {best:.2f} times as fast, at an error of {math.sqrt(found[0].error):.3g}: "
        f"pass a speedup up to {math.floor(100 * best) / 100:g}, a larger length, a wider tolerance, or audit other "
        "mechanisms"
    )
