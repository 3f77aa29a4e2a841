"""What a report says, in which order and in which words; the renderings only set it."""

from __future__ import annotations

from dataclasses import dataclass

from ..records import Environment, Report, RoiResult
from . import words
from .plan_tables import alternatives_table, plan_frontier_table, plan_table
from .roi import roi, roi_columns, roi_rows
from .tables import (
    Table,
    audit_table,
    break_even_table,
    frontier_table,
    guarded_table,
    head_tables,
    indicators_table,
    rollout_table,
    statistics_tables,
    timing_tables,
)
from .verdict import RULE

DECISIONS = {
    "go": "Go: the conversion holds its quality and pays",
    "go-after-healing": "Go after healing: it pays once the quality is healed",
    "no-go": "No go: as measured, keep this model as it is",
}
"""The verdict as a headline."""

GLOSSARY = (
    ("Attention", "the part of a Transformer in which every token looks at every other; its cost grows with the square "
     "of the length."),
    ("Linear attention", "a replacement whose cost grows in proportion to the length; it is an approximation."),
    ("Relative error", "how far the output of a layer's attention is off, as a share of its size: 0 is exact, 1 means "
     "as wrong as giving nothing."),
    ("Uniform", "the baseline that looks at all tokens equally and thus only averages; a mechanism that is no better "
     "has learned nothing about the text."),
    ("Tolerance", "the relative error that a layer may have to be made linear by the plan."),
    ("Cosine", "how alike two embeddings of the same document are: 1 is the same direction, 0 unrelated."),
    ("5th percentile", "the value that 95% of the documents exceed; it shows the bad cases that a mean hides."),
    ("Same nearest neighbour", "share of the documents for which a search would still return the same first hit."),
    ("Frontier", "quality and cost with 0, 1, ... all layers made linear, the least harmful first."),
    ("Break-even length", "the number of tokens from which on the linear way is the faster one."),
    ("Fused softmax", "exact attention in the fastest form that the machine offers; the honest opponent."),
    ("Healing", "a short training that teaches the converted model to give the original's outputs."),
    ("Entropy ratio", "1 if a head looks at everything equally, 0 if it looks at one token."),
    ("Logit spread", "how sharply a head tells tokens apart; sharp heads are hard to approximate."),
    ("Radius", "largest product of the sizes of a query and a key; random features hold up to about 2."),
    ("Dispatch", "serving short documents with the original and long ones with the converted model."),
    ("Shadow", "a stage in which the converted model computes the same requests, but the original answers."),
    ("Canary", "a stage in which the converted model answers a small share of the requests."),
)  # fmt: skip
"""Terms for a reader who has to sign, a line each."""


@dataclass(frozen=True)
class Headline:
    """One of the three numbers at the top."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Chart:
    """A chart and what to read off it, which is also its text alternative."""

    key: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, what it is about, and its charts, tables and lists."""

    key: str
    title: str
    lead: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    items: tuple[str, ...] = ()
    command: str = ""  # to type, for one's own figures


def headlines(report: Report) -> tuple[Headline, Headline, Headline]:
    """Share linear within the tolerance, cosine at the point that was judged, length from which on it pays."""
    verdict, plan = report.verdict, report.plan
    within = sum(row.mechanism != "softmax" for row in plan.rows)
    changed = f"{within} of {len(plan.rows)}"
    if plan.speedup is None and plan.tolerance is not None:
        alone = f"each judged alone, at a relative error of at most {plan.tolerance:g}"
        share = Headline(
            "Layers linear within the tolerance", changed, f"{alone}; the verdict looks at the whole model"
        )
    else:
        share = Headline("Layers changed by the plan", changed, f"{plan.budget}; the verdict looks at the whole model")
    linear = [point for point in report.frontier if point.num_linear >= 1]
    chosen = next((point for point in linear if point.num_linear == verdict.recommended_num_linear), None)
    shown = chosen or max(linear, key=lambda point: point.num_linear, default=None)
    if shown is None:
        cosine = Headline("Mean cosine to the original", words.MISSING, "no layer can be made linear")
    else:
        which = "recommended" if chosen else "none is recommended; shown is the most linear model"
        cosine = Headline(
            "Mean cosine to the original",
            words.figure(shown.cosine_mean),
            f"with {words.plural(shown.num_linear, 'linear layer')} ({which})",
        )
    return share, cosine, _pays(report)


def warnings(report: Report) -> tuple[str, ...]:
    """Every warning of the report, each once."""
    return tuple(dict.fromkeys((*report.warnings, *report.data.warnings, *report.audit.warnings)))


def _pays(report: Report) -> Headline:
    verdict, limit = report.verdict, report.model.max_length
    if verdict.pays_from_length is None:
        return Headline("Pays from", "nowhere", "at no measured length is the linear way faster")
    value = f"{words.count(verdict.pays_from_length)} tokens"
    if verdict.pays_scope == "attention":
        beyond = limit is not None and verdict.pays_from_length > limit
        tail = f"; this model takes {words.count(limit)}" if beyond else ""
        return Headline("Attention alone pays from", value, f"measured without the rest of the model{tail}")
    tokens = report.data.document_tokens
    if not tokens:
        return Headline("Pays from", value, "of a document")
    long = sum(length >= verdict.pays_from_length for length in tokens) / len(tokens)
    return Headline("Pays from", value, f"{words.percent(long)} of the documents here are that long")


def _calibrated(report: Report) -> str:
    """What mechanisms that learn from data have seen; nothing where there were none."""
    number = report.audit.num_calibration_documents
    if not number:
        return ""
    return f"Those that learn from data were calibrated on {words.plural(number, 'other document')}. "


def sections(report: Report) -> tuple[Section, ...]:
    """Everything below the verdict, in reading order."""
    return (
        Section(
            "frontier",
            "What converting costs: the frontier",
            "The least harmful layer is made linear first, then the next. Quality is that of the embeddings of "
            "held-out documents against the original; the verdict is read off these numbers.",
            (Chart("frontier", _frontier_caption(report)),),
            (frontier_table(report),),
        ),
        Section(
            "latency",
            "What converting saves: latency",
            "Medians. The opponent is fused softmax, the fastest exact attention of this machine.",
            (
                Chart(
                    "latency-attention",
                    "Attention alone. Read off where a line crosses that of fused softmax: from "
                    "there on the mechanism is faster. Thick lines are what the frontier uses.",
                ),
                Chart(
                    "latency-model",
                    "Whole model, up to its own limit. Attention is only a part of it, so the gain "
                    "is smaller than above.",
                ),
            ),
            (*timing_tables(report, "latency_ms"), break_even_table(report)),
        ),
        Section(
            "memory",
            "What converting saves: memory",
            "Peak memory beyond the inputs, output included.",
            (
                Chart("memory-attention", "Attention alone. A line below that of fused softmax needs less memory."),
                Chart("memory-model", "Whole model, up to its own limit."),
            ),
            timing_tables(report, "peak_bytes"),
        ),
        Section(
            "audit",
            "How wrong each mechanism is",
            f"Relative error of the attention output against exact attention, on {report.audit.num_documents} "
            f"documents of up to {words.count(report.audit.length)} tokens, without any training. "
            f"{_calibrated(report)}The first column is the baseline: a mechanism that is no better than uniform is of "
            "no use on that layer.",
            (
                Chart(
                    "audit",
                    "Layers down, mechanisms across. Green is close to exact, red as wrong as giving nothing; "
                    "compare each cell with the first of its row.",
                ),
            ),
            (audit_table(report.audit), *_some(guarded_table(report.audit)), *head_tables(report.audit)),
        ),
        Section(
            "heads",
            "What the heads do",
            "Sharp heads, those with low entropy and a wide logit spread, are hard to approximate.",
            (),
            statistics_tables(report.audit),
        ),
        Section(
            "plan",
            *_plan_words(report),
            (),
            (plan_table(report), *_some(plan_frontier_table(report)), alternatives_table(report)),
            report.plan.notes,
        ),
        Section(
            "rollout",
            "Rollout",
            "Thresholds are numbers of this report. What it does not support is marked as such.",
            (),
            (rollout_table(report), indicators_table(report)),
        ),
        _roi_section(report),
        _method_section(report),
    )


def _plan_words(report: Report) -> tuple[str, str]:
    """Title and lead of the section on the plan."""
    plan = report.plan
    share = f"{words.percent(plan.linear_share)} of the layers become linear."
    if plan.rel_error is not None:
        share += f" {plan.summary[:1].upper()}{plan.summary[1:]}."
    if plan.speedup is None and plan.tolerance is not None:
        return (
            "The plan within the tolerance",
            f"For each layer the cheapest mechanism whose error is at most {plan.tolerance:g}; exact where there is "
            f"none. {share}",
        )
    return f"The plan {plan.budget}", f"The choice for all layers together that has the least error. {share}"


def _frontier_caption(report: Report) -> str:
    chosen = report.verdict.recommended_num_linear
    tail = f" Recommended are {words.plural(chosen, 'linear layer')}." if chosen else " No point is recommended."
    return (
        "Above, quality against the number of linear layers: the higher the better, and the dashed line is the bar for "
        "the mean cosine. Below, the latency of the same models: it has to fall for the conversion to pay." + tail
    )


def _roi_section(report: Report) -> Section:
    lead = (
        "What the measured latencies are worth. The example assumes 100,000 requests a day with the lengths of the "
        "documents of this report, 2.50 USD an hour for the machine, and 40 hours of work at 100 USD; put in your own:"
    )
    command = "maclin roi report.json --price-per-hour 2.5 --requests-per-day 100000 --lengths-from FILE"
    try:
        result: RoiResult = roi(
            report,
            price_per_hour=2.5,
            requests_per_day=100_000,
            lengths=report.data.document_tokens,
            effort_hours=40,
            rate_per_hour=100,
        )
    except ValueError as error:
        return Section("roi", "Return on investment", lead, (), (), (f"No example: {error}.",), command)
    table = Table("Example, not your figures", roi_columns(result), roi_rows(result))
    return Section("roi", "Return on investment", lead, (), (table,), (*result.notes, *result.formulas), command)


def _method_section(report: Report) -> Section:
    m, d = report.model, report.data
    rows = [
        *environment_rows(report.environment),
        ("Model", f"{m.name} ({m.architecture}, through {m.host})"),
        ("Size", f"{m.num_layers} layers, {m.num_heads} heads ({m.num_kv_heads} of keys) of {m.head_dim}, width "
                 f"{m.embed_dim}, {words.count(m.num_parameters)} parameters"),
        ("Limit", "none" if m.max_length is None else f"{words.count(m.max_length)} tokens"),
        ("Documents", d.source),
        ("Calibration", f"{d.num_calibration_documents:,} documents, {d.num_calibration_tokens:,} tokens"),
        ("Held out", f"{d.num_held_out_documents:,} documents, {d.num_held_out_tokens:,} tokens"),
        ("Adapter check, largest difference", words.MISSING if report.host_check_max_abs_error is None
         else f"{report.host_check_max_abs_error:.1e} between the model with our softmax and the untouched one"),
        ("Restoring", {True: "bit-equal to the original", False: "not bit-equal to the original",
                       None: "not checked"}[report.restore_is_bit_equal]),
        *((f"Time for {name}", f"{seconds:.1f} s") for name, seconds in report.seconds.items()),
    ]  # fmt: skip
    return Section(
        "method",
        "How it was measured",
        "Without these the numbers mean nothing.",
        (),
        (Table("Conditions", ("What", "Value"), tuple(rows), (), 2),),
        (f"Rule of the verdict: {report.verdict.rule or RULE}",),
    )


def environment_rows(e: Environment) -> tuple[tuple[str, str], ...]:
    """Where and with what something was measured, as rows of two cells."""
    return (
        ("Date (UTC)", e.date_utc),
        ("Versions", f"maclin {e.maclin_version}, Python {e.python_version}, torch {e.torch_version}, "
                     f"transformers {e.transformers_version or 'not installed'}"),
        ("Machine", f"{e.processor}, {e.platform}"),
        ("Device", f"{e.device}, {words.plural(e.num_threads, 'thread')}, {e.dtype}"),
    )  # fmt: skip


def _some(table: Table | None) -> tuple[Table, ...]:
    return () if table is None else (table,)
