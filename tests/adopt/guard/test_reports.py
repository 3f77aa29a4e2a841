"""Counters as dict, JSON lines and Prometheus text; the last read by a parser that knows the format's rules only."""

import json
import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch

from maclin.adopt.guard import GuardOptions, guard
from maclin.adopt.guard import budget as budgets
from maclin.adopt.guard.budget import Budget
from maclin.adopt.guard.counters import BOUNDS, LayerCounters
from maclin.adopt.guard.drift import Moments
from maclin.adopt.guard.estimate import Estimate
from maclin.adopt.guard.examine import Seen
from maclin.adopt.guard.text import json_lines, prometheus
from maclin.core.errors import MaclinError
from maclin.core.mechanisms import mechanism
from maclin.records import GuardRecord, from_json, to_json

LAYERS = ("encoder.layer.0", 'od"d\\na\nme')
STATISTICS = {"q_norm": 1.0, "k_norm": 2.0, "entropy_ratio": 0.5}

ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


@dataclass
class Metric:
    kind: str
    about: str
    samples: list[tuple[str, dict[str, str], float]] = field(default_factory=list)


def parsed(text: str) -> dict[str, Metric]:
    """The metrics of a text in Prometheus' exposition format 0.0.4; ValueError where it breaks a rule.

    Rules: lines end with a line feed; HELP and TYPE come once per metric and before its samples; all lines of a metric
    stand together; names and label names match their patterns; label values escape backslash, quote and line feed; no
    sample twice; a histogram has cumulative buckets up to +Inf, a sum and a count that equals the last bucket.
    """
    if not text.endswith("\n"):
        raise ValueError("the last line must end with a line feed")
    found: dict[str, Metric] = {}
    helps: dict[str, str] = {}
    current = ""
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            _, _, name, about = line.split(" ", 3)
            if name in helps or name in found:
                raise ValueError(f"second HELP or HELP behind samples of {name}")
            helps[name] = about
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            if name in found or kind not in {"counter", "gauge", "histogram", "summary", "untyped"}:
                raise ValueError(f"second or unknown TYPE of {name}: {kind}")
            found[name], current = Metric(kind, helps[name]), name
        else:
            match = re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([^ ]+)", line)
            if match is None:
                raise ValueError(f"no sample: {line!r}")
            name, labels, value = match.groups()
            metric = found[current]
            suffixes = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
            suffix = name.removeprefix(current)
            if not name.startswith(current) or suffix not in suffixes:
                raise ValueError(f"sample {name} under the TYPE of {current}")
            sample = (suffix, labels_of(labels or ""), number(value))
            if any(sample[:2] == other[:2] for other in metric.samples):
                raise ValueError(f"twice the same sample: {line}")
            metric.samples.append(sample)
    for name, metric in found.items():
        check(name, metric)
    return found


def labels_of(text: str) -> dict[str, str]:
    pattern = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(?:,|$)')
    labels: dict[str, str] = {}
    at = 0
    while at < len(text):
        match = pattern.match(text, at)
        if match is None or match[1] in labels:
            raise ValueError(f"bad labels {text!r}")
        labels[match[1]] = re.sub(r'\\[\\"n]', lambda found: ESCAPES[found[0]], match[2])
        at = match.end()
    return labels


def number(text: str) -> float:
    if text in {"+Inf", "-Inf", "NaN"}:
        return {"+Inf": math.inf, "-Inf": -math.inf, "NaN": math.nan}[text]
    return float(text)


def check(name: str, metric: Metric) -> None:
    if metric.kind == "counter" and any(not value >= 0 for _, _, value in metric.samples):
        raise ValueError(f"counter {name} below 0")
    if metric.kind != "histogram":
        return
    layers = {labels["layer"] for _, labels, _ in metric.samples}
    for layer in layers:
        mine = [(suffix, labels, value) for suffix, labels, value in metric.samples if labels["layer"] == layer]
        buckets = [(number(labels["le"]), value) for suffix, labels, value in mine if suffix == "_bucket"]
        rest = {suffix: value for suffix, _, value in mine if suffix != "_bucket"}
        if buckets != sorted(buckets) or [b for _, b in buckets] != sorted(b for _, b in buckets):
            raise ValueError("buckets must ascend and sum up")
        if buckets[-1][0] != math.inf or rest["_count"] != buckets[-1][1] or "_sum" not in rest:
            raise ValueError("a histogram ends at +Inf, with a sum and a count")


def counted(errors: tuple[float, ...] = (0.005, 0.01, 0.07, 3.0, 80.0, math.inf)) -> LayerCounters:
    counters = LayerCounters(2)
    for error in errors:
        reason = "error" if error > 1 else None
        counters.add([Seen(reason, Estimate(error, error / 2, error * 2, 64), STATISTICS, 0)], None)
    counters.add([Seen("nonfinite", None, {}, 0), Seen(None, None, {}, 0)], "budget")
    counters.skip(5, "decoding")
    return counters


def record(**options: Any) -> GuardRecord:
    layers = tuple(counted().record(name, "elu", 0.5, name == LAYERS[1], True) for name in LAYERS)
    times = {"forwards": 7, "forward_s": 2.0, "guard_s": 0.05, "exact_s": 0.25, "share": 0.025}
    return GuardRecord(layers=layers, action="exact", confidence=0.99, sample_rows=32, **{**times, **options})


def test_counters_of_a_layer_add_up() -> None:
    layer = record().layers[0]
    assert (layer.calls, layer.sequences, layer.checked) == (8, 13, 6)
    assert layer.sequences == layer.checked + sum(layer.not_checked.values())
    assert (layer.not_checked["budget"], layer.not_checked["decoding"]) == (2, 5)
    assert layer.flagged == {"error": 3, "bound": 0, "nonfinite": 1, "denominator": 0}
    assert layer.flagged_total == 4
    assert layer.rows == 6 * 64
    assert layer.rel_error.count == 6
    assert layer.rel_error.counts[:4] == (2, 0, 0, 1)  # a value on a bound is below it
    assert layer.rel_error.counts[-2:] == (1, 2)
    assert layer.rel_error.total == pytest.approx(83.085)
    assert layer.rel_error.bounds == BOUNDS


def test_prometheus_text_follows_the_rules_of_its_format() -> None:
    found = parsed(prometheus(record()))
    assert {metric.kind for metric in found.values()} == {"counter", "gauge", "histogram"}
    assert all(name.endswith("_total") == (metric.kind == "counter") for name, metric in found.items())
    assert {labels["layer"] for _, labels, _ in found["maclin_guard_calls_total"].samples} == set(LAYERS)

    def value(name: str, suffix: str = "", **labels: str) -> float:
        (one,) = [v for s, known, v in found[name].samples if s == suffix and known == {"layer": LAYERS[1], **labels}]
        return one

    assert value("maclin_guard_sequences_total") == 13
    assert value("maclin_guard_flagged_total", reason="error") == 3
    assert value("maclin_guard_not_checked_total", reason="decoding") == 5
    assert value("maclin_guard_held_exact") == 1
    assert value("maclin_guard_rel_error", "_bucket", le="0.1") == 3
    assert value("maclin_guard_rel_error", "_bucket", le="+Inf") == 6
    assert value("maclin_guard_last_rel_error", bound="estimate") == math.inf
    assert value("maclin_guard_drift", statistic="q_norm") == 0
    assert found["maclin_guard_share"].samples == [("", {}, 0.025)]
    assert found["maclin_guard_forwards_total"].samples == [("", {}, 7.0)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('le="+Inf"} 6', 'le="+Inf"} 5'),
        ("# TYPE maclin_guard_share gauge", "# TYPE maclin_guard_share number"),
        ('{layer="encoder.layer.0"} 8', '{layer="encoder".layer.0"} 8'),
        ("maclin_guard_share 0.025\n", "maclin_guard_share 0.025"),
        ("maclin_guard_forwards_total 7", "maclin_guard_forwards_total 7\nmaclin_guard_forwards_total 7"),
    ],
)
def test_the_parser_of_this_test_notices_broken_text(old: str, new: str) -> None:
    text = prometheus(record())
    assert old in text
    with pytest.raises((ValueError, KeyError)):
        parsed(text.replace(old, new))


def test_a_prefix_and_a_guard_that_has_seen_nothing() -> None:
    watching = guard(mechanism("elu", head_dim=4, num_heads=2).eval())
    found = parsed(watching.prometheus("serving"))
    assert all(name.startswith("serving_") for name in found)
    assert found["serving_share"].samples == []
    assert found["serving_calls_total"].samples == [("", {"layer": ""}, 0.0)]
    assert watching.counters()["layers"][0]["last"] is None


def test_json_lines_say_the_same() -> None:
    lines = json_lines(record()).splitlines()
    head, *layers = [json.loads(line) for line in lines]
    assert (head["kind"], head["share"], head["forwards"]) == ("guard", 0.025, 7)
    assert [(row["kind"], row["layer"]) for row in layers] == [("layer", name) for name in LAYERS]
    assert layers[0]["flagged"]["error"] == 3
    assert layers[0]["last"]["rel_error"] is None  # infinity is no JSON
    again = from_json(GuardRecord, to_json(record()))
    assert again.layers[0].rel_error == record().layers[0].rel_error


def test_a_counter_never_falls_while_the_model_serves() -> None:
    model = mechanism("elu", head_dim=4, num_heads=2).eval()
    qkv = [torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with torch.no_grad(), guard(model, tolerance=1e9) as watching:
        seen: list[dict[Any, float]] = []
        for _ in range(3):
            model(*qkv)
            text = parsed(watching.prometheus())
            seen.append(
                {
                    (name, s, tuple(labels.items())): v
                    for name, metric in text.items()
                    if metric.kind in {"counter", "histogram"}
                    for s, labels, v in metric.samples
                }
            )
        assert all(a.get(key, 0) <= b[key] for a, b in pairwise(seen) for key in b)
        assert watching.counters()["forwards"] == 3
        watching.reset()
        assert watching.counters()["forwards"] == watching.counters()["layers"][0]["calls"] == 0


# the budget, with a clock of the test's own


class Time:
    """A clock that goes on only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(budgets.time, "perf_counter", lambda: self.now)


def served(budget: Budget, clock: Time, cost: float, layers: int = 10) -> list[int]:
    """One forward of 10 ms beside the guard; the layers that were checked, each for ``cost`` seconds."""
    budget.begin()
    checked = [i for i in range(layers) if budget.has_turn(i)]
    for i in range(layers):
        clock.now += 1e-3
        if i in checked:
            clock.now += cost
            budget.spent(cost, 0.0, True)
    budget.end()
    return checked


def test_a_cheap_guard_checks_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time(monkeypatch)
    budget = Budget(10, 0.05)
    assert all(served(budget, clock, 2e-5) == list(range(10)) for _ in range(20))
    assert budget.share == pytest.approx(0.02)


def test_a_dear_guard_keeps_its_share_and_takes_the_layers_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time(monkeypatch)
    budget = Budget(10, 0.05)
    assert served(budget, clock, 2e-4) == list(range(10))  # without a first pass no cost is known
    checked = [served(budget, clock, 2e-4) for _ in range(400)]
    assert budget.share is not None
    assert 0.045 < budget.share <= 0.05 + 1e-9
    counts = [sum(layer in one for one in checked) for layer in range(10)]
    assert max(counts) - min(counts) <= 1
    assert max(len(one) for one in checked[20:]) <= 3


def test_what_is_answered_exactly_is_no_part_of_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time(monkeypatch)
    budget = Budget(1, 0.05)
    budget.begin()
    budget.begin()  # a pass inside a pass is one
    clock.now += 1.0
    budget.spent(0.1, 0.4, True)
    budget.end()
    budget.end()
    assert (budget.forwards, budget.forward_s, budget.exact_s) == (1, pytest.approx(0.5), 0.4)
    assert budget.share == pytest.approx(0.2)
    budget.spent(9.0, 9.0, True)  # outside of a pass nothing is compared
    assert budget.share == pytest.approx(0.2)
    assert Budget(3, None).has_turn(2)


def test_moments_are_those_of_the_whole() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double() + 100
    moments = Moments()
    for value in values.tolist():
        moments.add(value)
    assert moments.mean == pytest.approx(float(values.mean()))
    assert moments.std == pytest.approx(float(values.std()))


def test_options_say_what_was_wanted() -> None:
    with pytest.raises(MaclinError, match="wanted a share above 0 and at most 1"):
        GuardOptions(max_share=1.5)
    assert GuardOptions(tolerance={"a": 0.2}).tolerance_of("a") == 0.2
