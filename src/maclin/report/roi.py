"""Return on investment: the measured curves of the whole model as money, with the formulas shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..records import Report, RoiResult
from . import curves, words

DAYS_PER_MONTH = 30.4
"""Mean days in a month."""


def roi(
    report: Report,
    *,
    price_per_hour: float,
    requests_per_day: float,
    lengths: Sequence[int],
    effort_cost: float | None = None,
    effort_hours: float | None = None,
    rate_per_hour: float | None = None,
    utilisation: float = 1.0,
    days_per_month: float = DAYS_PER_MONTH,
    currency: str = "USD",
) -> RoiResult:
    """Monthly cost before and after a conversion, from the latencies that a report measured.

    monthly cost = requests per day x covered share x days per month x mean latency in hours x price per hour
    / utilisation; payback = effort / monthly saving. The latency of a length between two measured ones is
    read straight in log-log scale. Requests outside the measured lengths are counted and left out.

    Args:
        report: the report; its timings of scope "model" are used, one request at a time.
        price_per_hour: of the machine that the report was measured on, in ``currency``.
        requests_per_day: requests.
        lengths: a sample of request lengths in tokens; only their distribution matters.
        effort_cost: one-off cost of the conversion in ``currency``; None: not stated.
        effort_hours: hours of work instead, with ``rate_per_hour``.
        rate_per_hour: price of an hour of that work.
        utilisation: share of the paid time in which the machine works on a request, in (0, 1].
        days_per_month: days.
        currency: a label; nothing is converted.

    Returns:
        Costs, savings, payback, the formulas with the numbers filled in, and notes on what is not covered.

    Raises:
        ValueError: an argument is out of range, the report has no timing of both whole models, or no length
            lies within the measured ones.
    """
    _positive("price_per_hour", price_per_hour)
    _positive("requests_per_day", requests_per_day)
    _positive("days_per_month", days_per_month)
    _positive("utilisation", utilisation)
    if utilisation > 1:
        raise ValueError(f"wanted a utilisation of at most 1, got {utilisation:g}; 0.5 means busy half of the time")
    effort = _effort(effort_cost, effort_hours, rate_per_hour)
    old, new, num_linear = _model_curves(report)
    low, high = max(old[0].length, new[0].length), min(old[-1].length, new[-1].length)
    if not lengths or min(lengths) < 1:
        got = "none" if not lengths else str(min(lengths))
        raise ValueError(f"wanted request lengths of at least 1 token, got {got}; pass one length for each request")
    covered = [length for length in lengths if low <= length <= high]
    if not covered:
        raise ValueError(
            f"wanted request lengths within the measured {low} to {high} tokens, got {min(lengths)} to {max(lengths)}; "
            f"measure the model at those lengths first"
        )
    threshold = curves.pays_from(new, old)
    before, after, dispatch = [], [], []
    for length in covered:
        a, b = _at(old, length), _at(new, length)
        before.append(a)
        after.append(b)
        dispatch.append(b if threshold is not None and length >= threshold else a)
    share = len(covered) / len(lengths)
    means = [math.fsum(column) / len(covered) for column in (before, after, dispatch)]
    hours = requests_per_day * share * days_per_month / 3_600_000 / utilisation  # per ms of mean latency
    costs = [hours * mean * price_per_hour for mean in means]
    savings = [costs[0] - costs[1], costs[0] - costs[2]]
    paybacks = [effort / saving if effort is not None and saving > 0 else None for saving in savings]
    shown = [
        f"covered share = {len(covered):,} of {len(lengths):,} lengths = {words.percent(share)} "
        f"({low:,} to {high:,} tokens)"
    ]
    for name, mean, cost in zip(("before", "after", "dispatch"), means, costs, strict=True):
        shown.append(
            f"monthly cost {name} = requests/day x covered share x days/month x mean latency / 3,600,000 ms/h "
            f"x price/hour / utilisation = {requests_per_day:,.0f} x {share:.4f} x {days_per_month:g} x {mean:.4f} ms "
            f"/ 3,600,000 x {price_per_hour:g} / {utilisation:g} = {cost:,.2f} {currency}"
        )
    for name, saving, payback in zip(("after", "dispatch"), savings, paybacks, strict=True):
        cost = costs[0] - saving
        shown.append(f"monthly saving {name} = {costs[0]:,.2f} - {cost:,.2f} = {saving:,.2f} {currency}")
        if effort is not None:
            result = "never, because nothing is saved" if payback is None else f"{payback:.2f} months"
            shown.append(f"payback {name} = effort / monthly saving = {effort:,.2f} / {saving:,.2f} = {result}")
    return RoiResult(
        currency=currency,
        price_per_hour=price_per_hour,
        requests_per_day=requests_per_day,
        utilisation=utilisation,
        days_per_month=days_per_month,
        num_linear=num_linear,
        num_lengths=len(lengths),
        num_shorter=sum(length < low for length in lengths),
        num_longer=sum(length > high for length in lengths),
        covered_share=share,
        covered_from_length=low,
        covered_to_length=high,
        dispatch_from_length=threshold,
        mean_latency_before_ms=means[0],
        mean_latency_after_ms=means[1],
        mean_latency_dispatch_ms=means[2],
        monthly_cost_before=costs[0],
        monthly_cost_after=costs[1],
        monthly_cost_dispatch=costs[2],
        monthly_saving_after=savings[0],
        monthly_saving_dispatch=savings[1],
        effort_cost=effort,
        payback_months_after=paybacks[0],
        payback_months_dispatch=paybacks[1],
        formulas=tuple(shown),
        notes=_notes(report, num_linear, share, low, high, threshold),
    )


def roi_rows(result: RoiResult) -> tuple[tuple[str, str, str, str], ...]:
    """The comparison as rows of text: name, before, after, dispatch."""

    def payback(months: float | None) -> str:
        if result.effort_cost is None:
            return "no effort stated"
        return "never" if months is None else f"{months:,.1f} months"

    def amount(value: float) -> str:
        return words.money(value, result.currency)

    return (
        (
            "Mean latency of a request",
            words.milliseconds(result.mean_latency_before_ms),
            words.milliseconds(result.mean_latency_after_ms),
            words.milliseconds(result.mean_latency_dispatch_ms),
        ),
        (
            "Cost a month",
            amount(result.monthly_cost_before),
            amount(result.monthly_cost_after),
            amount(result.monthly_cost_dispatch),
        ),
        ("Saving a month", "", amount(result.monthly_saving_after), amount(result.monthly_saving_dispatch)),
        ("Payback", "", payback(result.payback_months_after), payback(result.payback_months_dispatch)),
    )


def roi_columns(result: RoiResult) -> tuple[str, str, str, str]:
    """What the columns of ``roi_rows`` stand for."""
    layers = "" if result.num_linear is None else f" ({words.plural(result.num_linear, 'linear layer')})"
    threshold = result.dispatch_from_length
    dispatch = (
        "exact for every length"
        if threshold is None
        else f"exact below {words.count(threshold)} tokens, linear from there"
    )
    return ("", "before: original", f"after: converted{layers}", f"dispatch: {dispatch}")


def roi_markdown(result: RoiResult) -> str:
    """The result as Markdown: the comparison, what is not covered, and the formulas with their numbers."""
    header = roi_columns(result)
    lines = ["| " + " | ".join(header) + " |", "| --- | ---: | ---: | ---: |"]
    lines += ["| " + " | ".join(row) + " |" for row in roi_rows(result)]
    lines += ["", *(f"- {note}" for note in result.notes)]
    lines += ["", "Formulas:", "", *(f"- {formula}" for formula in result.formulas)]
    return "\n".join(lines) + "\n"


def roi_dict(result: RoiResult) -> dict[str, Any]:
    """The result as plain JSON values, field by field."""
    return asdict(result)


def _model_curves(report: Report) -> tuple[curves.Curve, curves.Curve, int | None]:
    old = curves.curve(report.timings, "original", "model")
    new, num_linear = curves.converted_curve(report.timings, report.verdict.recommended_num_linear or None)
    if not new:
        new, num_linear = curves.converted_curve(report.timings)
    if not old or not new:
        missing = "original" if not old else "converted"
        raise ValueError(
            f"wanted measured latencies of the whole model, original and converted, got none of the {missing} one; "
            f"make the report again with the model timed"
        )
    if old[0].length > new[-1].length or new[0].length > old[-1].length:
        raise ValueError(
            f"wanted both models measured at common lengths, got {old[0].length} to {old[-1].length} tokens for the "
            f"original and {new[0].length} to {new[-1].length} for the converted one; make the report again"
        )
    return old, new, num_linear


def _at(rows: curves.Curve, length: int) -> float:
    value = curves.latency_at(rows, length)
    if value is None:
        raise ValueError(f"wanted a latency at {length} tokens, which lies outside the measured lengths")
    return value


def _positive(name: str, value: float) -> None:
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"wanted {name} above 0, got {value:g}")


def _effort(cost: float | None, hours: float | None, rate: float | None) -> float | None:
    if (hours is None) != (rate is None):
        got = "effort_hours only" if rate is None else "rate_per_hour only"
        raise ValueError(f"wanted effort_hours and rate_per_hour together, got {got}; or pass effort_cost instead")
    if hours is not None and rate is not None:
        if cost is not None:
            raise ValueError("wanted effort_cost or effort_hours with rate_per_hour, got both; leave one out")
        cost = hours * rate
    if cost is not None and (not math.isfinite(cost) or cost < 0):
        raise ValueError(f"wanted an effort of at least 0, got {cost:g}")
    return cost


def _notes(
    report: Report, num_linear: int | None, share: float, low: int, high: int, threshold: int | None
) -> tuple[str, ...]:
    environment, verdict = report.environment, report.verdict
    notes = [
        f"Latencies are those of one request at a time on {environment.processor} ({environment.device}, "
        f"{environment.num_threads} threads, {environment.dtype}); the price must be that of this machine.",
    ]
    if share < 1:
        notes.append(
            f"{words.percent(1 - share)} of the requests lie outside the measured {low:,} to {high:,} tokens; they are "
            f"not covered, and all amounts are for the covered ones only."
        )
    if verdict.decision != "go":
        notes.append(
            f"The verdict of this report is {verdict.decision}: the amounts say what speed alone is worth, not that "
            f"the quality holds."
        )
    if verdict.recommended_num_linear and verdict.recommended_num_linear != num_linear:
        notes.append(
            f"The report recommends {words.plural(verdict.recommended_num_linear, 'linear layer')}, but the model that "
            f"was timed over the lengths has {num_linear}."
        )
    if threshold is None:
        notes.append(
            "At no measured length from which on it stays so is the converted model faster: dispatch is exact."
        )
    else:
        notes.append("Dispatch keeps both models in memory, and mixes their embeddings in one index.")
    return tuple(notes)
