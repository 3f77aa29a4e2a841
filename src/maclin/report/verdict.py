"""The verdict: go, go-after-healing or no-go, by one rule on the measured numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..records import BreakEven, FrontierPoint, ModelInfo, Plan, Timing, Verdict
from . import curves, words

GO_COSINE = 0.99
"""Least mean cosine of the embeddings, with against without conversion, for a go."""
GO_COSINE_P05 = 0.95
"""Least fifth percentile of the same cosine for a go."""
GO_AGREEMENT = 0.95
"""Least share of held-out documents whose nearest neighbour is unchanged for a go, where measured."""
HEALING_LEAVES = 0.11
"""Share of the distance 1 - cosine that healing left where we measured it: 0.53 became 0.06."""
HEALABLE_COSINE = round(1 - (1 - GO_COSINE) / HEALING_LEAVES, 2)
"""Least mean cosine from which healing of that strength would reach ``GO_COSINE``: 0.91."""

RULE = (
    f"Candidates are the frontier points with at least one linear layer. A candidate is faster if its median latency "
    f"is at least {curves.MARGIN:.0%} below that of the original at the longest length at which the whole model was "
    f"measured, and the quartile bands, where measured, do not overlap. "
    f"go: a faster candidate has a mean cosine of at least {GO_COSINE}, a fifth percentile of at least "
    f"{GO_COSINE_P05} and, where measured, at least {GO_AGREEMENT:.0%} unchanged nearest neighbours. "
    f"go-after-healing: no go, but a faster candidate has a mean cosine of at least {HEALABLE_COSINE}; healing as we "
    f"measured it leaves {HEALING_LEAVES:.0%} of the distance 1 - cosine, which would bring it to {GO_COSINE}. "
    f"no-go: everything else. Among several candidates the fastest is recommended. Memory and the tolerance of the "
    f"plan are stated, and decide nothing."
)
"""The rule in words, as every report carries it."""


@dataclass(frozen=True)
class Speed:
    """How a candidate compares with the original at the longest length at which both were measured."""

    length: int
    new_ms: float
    old_ms: float
    faster: bool
    pays_from: int | None

    @property
    def ratio(self) -> float:
        """New over old latency; below 1 is faster."""
        return self.new_ms / self.old_ms


def keeps_quality(point: FrontierPoint) -> bool:
    """Whether a frontier point meets the thresholds on quality that a go asks for."""
    agreement = point.neighbour_agreement
    return (
        point.cosine_mean >= GO_COSINE
        and point.cosine_p05 >= GO_COSINE_P05
        and (agreement is None or agreement >= GO_AGREEMENT)
    )


def point_to_time(frontier: Sequence[FrontierPoint], timings: Sequence[Timing] = ()) -> FrontierPoint | None:
    """The frontier point that ``decide`` would judge, and whose model is therefore worth timing at every length.

    The fastest point that keeps the quality; else the fastest from which healing is within reach; else the
    point with most linear layers, because where that does not pay, none does. Once that point was timed,
    ask again with the timings: if it did not get faster after all, the answer is the next one.

    Args:
        frontier: points 0, 1, ... all layers linear.
        timings: of the whole model, as far as they exist.

    Returns:
        The point, or None where no layer can become linear.
    """
    found = _candidates(frontier, timings)
    return found[0] if found else max(_linear(frontier), key=lambda point: point.num_linear, default=None)


def decide(
    frontier: Sequence[FrontierPoint],
    timings: Sequence[Timing],
    break_even: Sequence[BreakEven],
    plan: Plan,
    model: ModelInfo,
) -> Verdict:
    """Judge a conversion by the measured numbers.

    The rule is ``RULE``. Where a candidate was timed over the lengths (subject "converted", its num_linear),
    that curve decides whether it is faster; else the latencies of the frontier do.

    Args:
        frontier: points 0, 1, ... all layers linear; point 0 is the original.
        timings: of the attention alone and of the whole model.
        break_even: of the attention alone, to say from which length on it would pay.
        plan: the layers that became linear within the tolerance.
        model: for the number of layers and the limit in tokens.

    Returns:
        The verdict, its reason with the numbers in it, and the rule.

    Raises:
        ValueError: a timing of a converted model does not say how many layers were linear.
    """
    within = sum(row.mechanism != "softmax" for row in plan.rows)
    tail = (
        f" Judged layer by layer, {plan.budget} on the attention output, "
        f"{within} of {words.plural(len(plan.rows), 'layer')} can become linear."
        if plan.speedup is None
        else f" The plan {plan.budget} changes {within} of {words.plural(len(plan.rows), 'layer')}."
    )
    for point in _candidates(frontier, timings):
        speed = speed_of(point, frontier, timings)
        if speed is None:
            continue
        go = keeps_quality(point)
        reason = _reason_go(point, speed, model) if go else _reason_heal(point, speed, model)
        decision = "go" if go else "go-after-healing"
        return Verdict(decision, reason + tail, RULE, point.num_linear, speed.pays_from, "model")
    reason, pays, scope = _reason_no_go(frontier, timings, break_even, model)
    return Verdict("no-go", reason + tail, RULE, 0, pays, scope)


def speed_of(point: FrontierPoint, frontier: Sequence[FrontierPoint], timings: Sequence[Timing]) -> Speed | None:
    """The speed of a frontier point against the original, or None where that was not measured."""
    new, _ = curves.converted_curve(timings, point.num_linear)
    old = curves.curve(timings, "original", "model")
    pairs = curves.shared(new, old)
    if pairs:
        row, other = pairs[-1]
        if row.latency_ms is not None and other.latency_ms is not None:
            faster = curves.is_faster(row, other)
            return Speed(row.length, row.latency_ms, other.latency_ms, faster, curves.pays_from(new, old))
    base = next((p for p in frontier if p.num_linear == 0), None)
    if base is None or not base.latency_ms or not point.latency_ms or base.length != point.length:
        return None
    faster = point.latency_ms <= (1 - curves.MARGIN) * base.latency_ms
    return Speed(point.length, point.latency_ms, base.latency_ms, faster, point.length if faster else None)


def _linear(frontier: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    return [point for point in frontier if point.num_linear >= 1]


def _candidates(frontier: Sequence[FrontierPoint], timings: Sequence[Timing]) -> list[FrontierPoint]:
    """Points not known to be slow: those that keep the quality, then those that healing can reach; fastest first."""

    def not_slower(point: FrontierPoint) -> bool:
        speed = speed_of(point, frontier, timings)
        return speed is None or speed.faster

    def by_speed(point: FrontierPoint) -> tuple[float, int]:
        return (point.latency_ms if point.latency_ms else math.inf, -point.num_linear)

    points = sorted((point for point in _linear(frontier) if not_slower(point)), key=by_speed)
    kept = [point for point in points if keeps_quality(point)]
    return kept + [point for point in points if point.cosine_mean >= HEALABLE_COSINE and point not in kept]


def _quality(point: FrontierPoint) -> str:
    text = f"mean cosine {words.figure(point.cosine_mean)}, fifth percentile {words.figure(point.cosine_p05)}"
    if point.neighbour_agreement is not None:
        text += f", nearest neighbour unchanged for {words.percent(point.neighbour_agreement)}"
    return text


def _pace(speed: Speed) -> str:
    return (
        f"{words.times(speed.ratio)} at {words.count(speed.length)} tokens "
        f"({words.milliseconds(speed.new_ms)} instead of {words.milliseconds(speed.old_ms)})"
    )


def _reason_go(point: FrontierPoint, speed: Speed, model: ModelInfo) -> str:
    return (
        f"With {point.num_linear} of {words.plural(model.num_layers, 'layer')} linear the embeddings stay what they "
        f"were ({_quality(point)}) and the model is {_pace(speed)}; it pays from "
        f"{words.count(speed.pays_from)} tokens on."
    )


def _reason_heal(point: FrontierPoint, speed: Speed, model: ModelInfo) -> str:
    return (
        f"With {point.num_linear} of {words.plural(model.num_layers, 'layer')} linear the model is {_pace(speed)}, "
        f"from {words.count(speed.pays_from)} tokens on, but its embeddings move too far ({_quality(point)}; the rule "
        f"asks for {GO_COSINE}, {GO_COSINE_P05} and {GO_AGREEMENT:.0%}). Healing as we measured it could close that "
        f"gap: heal, then judge again."
    )


def _reason_no_go(
    frontier: Sequence[FrontierPoint], timings: Sequence[Timing], break_even: Sequence[BreakEven], model: ModelInfo
) -> tuple[str, int | None, str | None]:
    speeds = [(point, speed_of(point, frontier, timings)) for point in _linear(frontier)]
    measured = [(point, speed) for point, speed in speeds if speed is not None]
    alone, alone_from = _attention_alone(frontier, timings, break_even, model)
    scope = None if alone_from is None else "attention"
    if not speeds:
        return f"No layer of this model can be made linear.{alone}", alone_from, scope
    if not measured:
        reason = "The latency of the converted model was not measured, so nothing supports a go."
        return reason + alone, alone_from, scope
    faster = [(point, speed) for point, speed in measured if speed.faster]
    if faster:
        point, speed = max(faster, key=lambda pair: pair[0].cosine_mean)
        reason = (
            f"Linear attention makes this model faster, but its embeddings move beyond what healing brought back: the "
            f"best that is faster has {point.num_linear} of {words.plural(model.num_layers, 'layer')} linear, is "
            f"{_pace(speed)} and has a {_quality(point)}; healing needs {HEALABLE_COSINE} to start from."
        )
        return reason, speed.pays_from, "model"
    point, speed = min(measured, key=lambda pair: pair[1].ratio)
    limit = f" (its limit is {words.count(model.max_length)})" if model.max_length else ""
    reason = (
        f"The model does not get faster at the lengths it can take: at {words.count(speed.length)} tokens{limit} the "
        f"best conversion, {point.num_linear} of {words.plural(model.num_layers, 'layer')} linear, takes "
        f"{words.milliseconds(speed.new_ms)} and the original {words.milliseconds(speed.old_ms)}; "
        f"the rule asks for a gain of {curves.MARGIN:.0%} outside the noise."
    )
    return reason + alone, alone_from, scope


def _attention_alone(
    frontier: Sequence[FrontierPoint], timings: Sequence[Timing], break_even: Sequence[BreakEven], model: ModelInfo
) -> tuple[str, int | None]:
    """From which length on the attention alone pays: the earliest of the mechanisms that the frontier uses."""
    used = {name for point in frontier for name in point.mechanisms}
    rows = [row for row in break_even if row.scope == "attention" and row.subject in used]
    paying = [(row.length, row.subject) for row in rows if row.length is not None]
    if paying:
        length, name = min(paying)
        text = f" The attention alone ({name}) is faster than fused softmax from {words.count(length)} tokens on"
        beyond = model.max_length is not None and length > model.max_length
        return text + (", more than this model can take." if beyond else "."), length
    lengths = [row.length for row in timings if row.scope == "attention" and row.latency_ms is not None]
    if rows and lengths:
        return (
            f" The attention alone was not faster than fused softmax at any measured length, "
            f"up to {words.count(max(lengths))} tokens.",
            None,
        )
    return "", None
