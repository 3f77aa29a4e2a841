"""The rollout: four stages whose thresholds are the numbers that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..records import FrontierPoint, Indicator, Plan, RolloutStage, Timing, Verdict
from . import words
from .verdict import GO_AGREEMENT, GO_COSINE, GO_COSINE_P05, Speed, speed_of

SHADOW_SAMPLE = 1000
"""Mirrored requests between two looks at a share."""
CANARY_SHARE = 0.05
"""Share of the traffic that a canary answers."""
SLACK = 0.10
"""How far a latency or a memory in service may lie above the measured one."""


def rollout_stages(
    verdict: Verdict, frontier: Sequence[FrontierPoint], timings: Sequence[Timing], plan: Plan
) -> tuple[RolloutStage, ...]:
    """Offline, shadow, canary, full: what runs, what must hold, when to go back.

    Thresholds on quality are those measured at the recommended point (go), or those of the rule
    (go-after-healing: the healed model does not exist yet). Thresholds on latency and memory are the measured
    ratio to the original plus ``SLACK``. After a no-go only the offline stage is supported.

    Args:
        verdict: what ``decide`` said.
        frontier: points 0, 1, ... all layers linear.
        timings: of the whole model.
        plan: for the errors of the layers that become linear.

    Returns:
        Four stages, in order.
    """
    point = next((p for p in frontier if p.num_linear == verdict.recommended_num_linear >= 1), None)
    if verdict.decision == "no-go" or point is None:
        return _unsupported()
    speed = speed_of(point, frontier, timings)
    measured = verdict.decision == "go"
    quality = _quality(point, measured)
    cost = _cost(point, frontier, speed)
    below = _below_p05(point, measured)
    layers = words.plural(point.num_linear, "linear layer")
    prepare = (
        f"Convert {point.num_linear} of {len(plan.rows)} layers and compare with the original on held-out documents "
        f"of your own."
        if measured
        else f"Convert {point.num_linear} of {len(plan.rows)} layers, heal, and make this report again on the healed "
        f"model; go on only if its verdict is go."
    )
    bit_equal = Indicator(
        "restore", "the restored model gives bit-equal outputs", "check of the conversion in this report"
    )
    return (
        RolloutStage(
            "offline",
            prepare,
            0.0,
            (*quality, *cost, bit_equal),
            "all indicators hold on documents that were not used for calibration",
            "any indicator fails: convert fewer layers, or heal",
        ),
        RolloutStage(
            "shadow",
            f"The original answers; the converted model ({layers}) computes the same requests, and both embeddings are "
            f"compared.",
            0.0,
            (below, *cost),
            f"the indicators hold in each of five runs of {SHADOW_SAMPLE:,} mirrored requests",
            "an indicator fails in two runs in a row",
        ),
        RolloutStage(
            "canary",
            f"The converted model answers {words.percent(CANARY_SHARE)} of the requests; a sample of them is still "
            f"compared with the original.",
            CANARY_SHARE,
            (below, *cost, _task()),
            "the indicators hold for as long as the weekly pattern of the traffic needs, one week at least",
            "an indicator fails twice in a row: maclin.restore_ brings the original back without loading anything",
        ),
        RolloutStage(
            "full",
            "The converted model answers everything; the original stays at hand, and a sample is still compared. "
            "Stored embeddings are made anew, so that index and queries come from one model.",
            1.0,
            (below, *cost, _task()),
            "this is the last stage; make this report again when the model, the machine or the documents change",
            "an indicator fails twice in a row: back to the canary share",
        ),
    )


def allowed_below(share: float, sample: int) -> float:
    """Largest share still compatible with ``share`` in a sample: share + 3 sqrt(share (1 - share) / sample).

    Args:
        share: the expected share.
        sample: number of requests looked at.
    """
    return min(1.0, share + 3 * math.sqrt(share * (1 - share) / sample))


def _quality(point: FrontierPoint, measured: bool) -> tuple[Indicator, ...]:
    def source(value: float | None) -> str:
        if measured:
            return f"bar of the rule; measured here: {words.figure(value)}"
        return f"bar of the rule; before healing: {words.figure(value)}"

    rows = [
        Indicator("mean cosine to the original", f"at least {GO_COSINE}", source(point.cosine_mean)),
        Indicator("fifth percentile of the cosine", f"at least {GO_COSINE_P05}", source(point.cosine_p05)),
    ]
    if point.neighbour_agreement is not None:
        bar = f"at least {words.percent(GO_AGREEMENT)}"
        rows.append(Indicator("nearest neighbour unchanged", bar, source(point.neighbour_agreement)))
    return tuple(rows)


def _below_p05(point: FrontierPoint, measured: bool) -> Indicator:
    bound = point.cosine_p05 if measured else GO_COSINE_P05
    allowed = words.percent(allowed_below(0.05, SHADOW_SAMPLE))
    source = "fifth percentile measured on held-out documents" if measured else "bar of the rule for the healed model"
    return Indicator(
        f"share of requests with a cosine below {words.figure(bound)}",
        f"at most {allowed} of {SHADOW_SAMPLE:,} requests (5% by definition, plus three standard deviations)",
        source,
    )


def _cost(point: FrontierPoint, frontier: Sequence[FrontierPoint], speed: Speed | None) -> tuple[Indicator, ...]:
    rows = []
    if speed is not None:
        rows.append(
            Indicator(
                f"median latency over the original's, at {words.count(speed.length)} tokens",
                f"at most {words.figure(min(1.0, speed.ratio * (1 + SLACK)), 2)}",
                f"measured ratio {words.figure(speed.ratio, 2)}, plus {SLACK:.0%}, never above 1",
            )
        )
    base = next((p for p in frontier if p.num_linear == 0), None)
    if base is not None and base.peak_bytes and point.peak_bytes and base.length == point.length:
        ratio = point.peak_bytes / base.peak_bytes
        rows.append(
            Indicator(
                f"peak memory over the original's, at {words.count(point.length)} tokens",
                f"at most {words.figure(ratio * (1 + SLACK), 2)}",
                f"measured ratio {words.figure(ratio, 2)}, plus {SLACK:.0%}",
            )
        )
    return tuple(rows)


def _task() -> Indicator:
    return Indicator(
        "the task's own measure, such as clicks or accuracy",
        "not below that of the original, by a bar that its owner sets",
        "not measured in this report: it knows embeddings, not your task",
    )


def _unsupported() -> tuple[RolloutStage, ...]:
    offline = RolloutStage(
        "offline",
        "Only this stage is supported, and only after healing or for longer documents: make this report again on the "
        "healed model, or on a model that takes the lengths from which linear attention pays.",
        0.0,
        (Indicator("verdict of the new report", "go or go-after-healing", "the verdict of this report is no-go"),),
        "the verdict of the new report is go",
        "it stays no-go: keep the original",
    )
    rest = tuple(
        RolloutStage(
            name,
            "Not supported by this report.",
            0.0,
            (),
            "not before the offline stage ends in a go",
            "not applicable",
        )
        for name in ("shadow", "canary", "full")
    )
    return (offline, *rest)
