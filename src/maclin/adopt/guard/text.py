"""Counters as JSON lines and as Prometheus' text exposition format (version 0.0.4)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict

from maclin.records import GuardLayer, GuardRecord

Sample = tuple[str, dict[str, str], float]
"""Suffix of the name, labels, value."""


def json_lines(record: GuardRecord) -> str:
    """One JSON object a line: the guard itself, then each layer; ``kind`` says which. Infinity and NaN are null."""
    head = {key: value for key, value in asdict(record).items() if key != "layers"}
    rows = [{"kind": "guard", **head}, *({"kind": "layer", **asdict(layer)} for layer in record.layers)]
    return "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prometheus(record: GuardRecord, prefix: str = "maclin_guard") -> str:
    """The counters for Prometheus to scrape, every metric with its help and type, each line ended.

    Args:
        record: the counters.
        prefix: of every metric's name.
    """
    layers = record.layers
    lines: list[str] = []

    def metric(name: str, kind: str, about: str, samples: Iterable[Sample]) -> None:
        lines.append(f"# HELP {prefix}_{name} {about}")
        lines.append(f"# TYPE {prefix}_{name} {kind}")
        lines.extend(f"{prefix}_{name}{suffix}{_labels(labels)} {_number(value)}" for suffix, labels, value in samples)

    def of_layers(name: str, kind: str, about: str, field: str) -> None:
        metric(name, kind, about, [("", {"layer": one.layer}, float(getattr(one, field))) for one in layers])

    def by_reason(name: str, about: str, field: str) -> None:
        metric(
            name,
            "counter",
            about,
            [
                ("", {"layer": one.layer, "reason": reason}, float(count))
                for one in layers
                for reason, count in getattr(one, field).items()
            ],
        )

    of_layers("calls_total", "counter", "Calls of a converted layer.", "calls")
    of_layers("sequences_total", "counter", "Sequences of those calls.", "sequences")
    of_layers("checked_total", "counter", "Sequences whose error was estimated.", "checked")
    by_reason("not_checked_total", "Sequences whose error was not estimated, by reason.", "not_checked")
    by_reason("flagged_total", "Flagged sequences, by reason.", "flagged")
    of_layers("exact_total", "counter", "Sequences answered by exact attention.", "answered_exactly")
    of_layers("nonfinite_inputs_total", "counter", "Flagged sequences with NaN in q, k or v.", "nonfinite_inputs")
    of_layers("rows_total", "counter", "Query rows computed exactly, over all heads.", "rows")
    of_layers("bad_denominators_total", "counter", "Denominators that were negative or replaced.", "bad_denominators")
    of_layers("counted_denominators_total", "counter", "Denominators that were looked at.", "counted_denominators")
    of_layers("held_exact", "gauge", "1 while a layer stays exact.", "held_exact")
    of_layers("attached", "gauge", "1 while the guarded mechanism stands in the model.", "attached")
    of_layers("tolerance", "gauge", "Relative error above which a sequence is flagged.", "tolerance")
    metric(
        "rel_error", "histogram", "Estimated relative error of checked sequences.",
        [sample for one in layers for sample in _histogram(one)],
    )  # fmt: skip
    known = [(one.layer, one.last) for one in layers if one.last is not None]
    metric(
        "last_rel_error", "gauge", "Estimate of the last checked sequence, and its bounds.",
        [
            ("", {"layer": layer, "bound": bound}, value)
            for layer, last in known
            for bound, value in (("low", last.low), ("estimate", last.rel_error), ("high", last.high))
        ],
    )  # fmt: skip
    metric(
        "drift", "gauge", "Shift of the input from the calibration, in its standard deviations.",
        [
            ("", {"layer": one.layer, "statistic": row.statistic}, row.shift)
            for one in layers
            for row in one.drift
            if row.shift is not None
        ],
    )  # fmt: skip
    for name, kind, about, value in (
        ("forwards_total", "counter", "Forward passes of the model.", float(record.forwards)),
        ("forward_seconds_total", "counter", "Time of the model alone.", record.forward_s),
        ("seconds_total", "counter", "Time of the guard.", record.guard_s),
        ("exact_seconds_total", "counter", "Time of exact attention that the guard asked for.", record.exact_s),
        ("share", "gauge", "Time of the guard over that of the model alone.", record.share),
    ):
        metric(name, kind, about, [] if value is None else [("", {}, value)])
    return "".join(line + "\n" for line in lines)


def _histogram(layer: GuardLayer) -> list[Sample]:
    """Buckets summed up, as Prometheus wants them, with the sum and the count."""
    found: list[Sample] = []
    passed = 0
    for bound, count in zip((*layer.rel_error.bounds, math.inf), layer.rel_error.counts, strict=True):
        passed += count
        found.append(("_bucket", {"layer": layer.layer, "le": _number(bound)}, float(passed)))
    found.append(("_sum", {"layer": layer.layer}, layer.rel_error.total))
    found.append(("_count", {"layer": layer.layer}, float(passed)))
    return found


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    escaped = {key: text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for key, text in labels.items()}
    return "{" + ",".join(f'{key}="{text}"' for key, text in escaped.items()) + "}"


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(value)
