"""A complete report, in the three kinds that end in the three verdicts."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from maclin.records import (
    SCHEMA_VERSION,
    Alternative,
    Audit,
    BreakEven,
    DataInfo,
    Environment,
    FrontierPoint,
    HeadStatistics,
    LayerAudit,
    MechanismError,
    ModelInfo,
    Plan,
    PlanRow,
    Report,
    Timing,
)
from maclin.report import decide, rollout_stages

UNIFORM = (0.68, 0.74, 0.83, 0.79, 0.72, 0.70)
ERRORS = {  # mechanism -> configuration, error over that of uniform, ms per token, bytes per token
    "clusters": ({"num_slots": 32}, 0.55, 0.0031, 5200),
    "linformer": ({"proj_len": 64, "projection": "mean"}, 0.78, 0.0024, 4100),
    "segment_means": ({"num_segments": 32}, 0.84, 0.0022, 3900),
    "efficient": ({}, 0.93, 0.0020, 3800),
    "maclaurin": ({"num_features": 130, "law": "split"}, 0.97, 0.0042, 7800),
    "taylor": ({"degree": 1}, 1.02, 0.0036, 6600),
    "elu": ({}, 1.04, 0.0019, 3600),
    "positive": ({"num_features": 128}, 1.14, 0.0046, 8100),
}
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COSINES = {
    "no-go": (1.0, 0.981, 0.944, 0.871, 0.742, 0.655, 0.532),
    "go-after-healing": (1.0, 0.986, 0.958, 0.931, 0.894, 0.851, 0.790),
    "go": (1.0, 0.9991, 0.9978, 0.9961, 0.9934, 0.9821, 0.9412),
}


def sample_report(kind: str = "no-go") -> Report:
    """A report like that of a small text encoder (no-go), or of one that takes 8,192 tokens."""
    random.seed(7)
    limit = 512 if kind == "no-go" else 8192
    layers = tuple(f"encoder.layer.{i}.attention.self" for i in range(6))
    model = ModelInfo("all-MiniLM-L6-v2", "sentence-transformers", "BertModel", 6, 12, 12, 32, 384, limit, 22_713_216)
    data = DataInfo(
        source="notes <draft> & memos.jsonl",
        num_calibration_documents=32,
        num_held_out_documents=96,
        num_calibration_tokens=8211,
        num_held_out_tokens=24_117,
        document_tokens=tuple(int(random.triangular(40, limit, limit / 3)) for _ in range(128)),
        warnings=("17 documents were cut at the model's limit.",),
    )
    audit = Audit(tuple(_layer(name, UNIFORM[i]) for i, name in enumerate(layers)), limit, 32)
    plan = Plan(0.1, limit, tuple(_row(layer) for layer in audit.layers), "BertModel")
    timings = (*_attention(), *_model(kind, limit))
    frontier = _frontier(kind, layers, limit)
    break_even = tuple(
        BreakEven(name, "attention", _first_faster(timings, name), "smallest length from which on it stays faster")
        for name in ERRORS
    )
    verdict = decide(frontier, timings, break_even, plan, model)
    return Report(
        schema_version=SCHEMA_VERSION,
        environment=Environment(
            "2026-05-04T09:12:00Z",
            "0.1.0",
            "3.11.9",
            "2.11.0",
            "5.2.0",
            "Linux 6.1",
            "8-core server",
            "cpu",
            8,
            "float32",
        ),
        model=model,
        data=data,
        audit=audit,
        plan=plan,
        frontier=frontier,
        timings=timings,
        break_even=break_even,
        verdict=verdict,
        rollout=rollout_stages(verdict, frontier, timings, plan),
        host_check_max_abs_error=4.1e-7,
        restore_is_bit_equal=True,
        seconds={"capture": 6.2, "audit": 21.4, "frontier": 88.0, "timings": 131.5},
        warnings=("Only 96 held-out documents: a fifth percentile rests on five of them.",),
    )


def _layer(name: str, uniform: float) -> LayerAudit:
    heads = tuple(
        HeadStatistics(
            random.uniform(0.35, 0.95), random.uniform(1.3, 6), random.uniform(3, 6), random.uniform(3, 6), 9.5
        )
        for _ in range(12)
    )
    errors = [
        MechanismError(
            mechanism,
            dict(config),
            uniform * factor * random.uniform(0.93, 1.07),
            tuple(min(1.3, uniform * factor * random.uniform(0.6, 1.3)) for _ in range(12)),
            guarded_share=0.013 if mechanism == "maclaurin" else 0.0,
            negative_share=0.041 if mechanism == "maclaurin" else 0.0,
        )
        for mechanism, (config, factor, _, _) in ERRORS.items()
    ]
    if name.endswith("2.attention.self"):
        errors[-1] = MechanismError("positive", {"num_features": 128}, None, reason="radius 41 is beyond its domain")
    by_head = tuple(uniform * random.uniform(0.8, 1.1) for _ in range(12))
    return LayerAudit(name, 12, 12, 32, 8211, heads, uniform, by_head, tuple(errors))


def _row(layer: LayerAudit) -> PlanRow:
    measured = [error for error in layer.errors if error.rel_error is not None]
    best = min(measured, key=lambda error: error.rel_error or 0)
    options = tuple(
        Alternative(error.mechanism, error.config, error.rel_error, 0.4, False, "error above the tolerance")
        for error in measured
    )
    return PlanRow(
        layer.layer,
        "softmax",
        {},
        0.0,
        f"no mechanism is within 0.1; the best leaves {best.rel_error:.2f}",
        best.mechanism,
        best.config,
        best.rel_error,
        options,
    )


def _attention() -> list[Timing]:
    rows = []
    for length in LENGTHS:
        exact = 0.03 + 1.6e-6 * length**2 + 4e-4 * length
        if length == LENGTHS[-1]:
            rows.append(Timing("softmax", "attention", length, None, reason="out of memory"))
        else:
            rows.append(Timing("softmax", "attention", length, exact, exact * 0.98, exact * 1.03, 30, 3000 * length))
        for name, (_, _, per_token, memory) in ERRORS.items():
            ms = 0.35 + per_token * length
            rows.append(Timing(name, "attention", length, ms, ms * 0.97, ms * 1.04, 30, memory * length))
    return rows


def _model_ms(length: int, num_linear: int) -> float:
    exact, linear = 1.6e-6 * length**2 + 4e-4 * length, 0.35 + 0.0026 * length
    return 2 + 0.012 * length + (6 - num_linear) * exact + num_linear * linear


def _model(kind: str, limit: int) -> list[Timing]:
    timed = {"no-go": 6, "go": 4, "go-after-healing": 3}[kind]
    rows = []
    for length in (length for length in LENGTHS if length <= limit):
        old, new = _model_ms(length, 0), _model_ms(length, timed)
        rows.append(Timing("original", "model", length, old, old * 0.98, old * 1.02, 20, 90_000_000 + 9000 * length))
        rows.append(
            Timing(
                "converted", "model", length, new, new * 0.98, new * 1.02, 20, 90_000_000 + 7000 * length, None, timed
            )
        )
    return rows


def _frontier(kind: str, layers: tuple[str, ...], limit: int) -> tuple[FrontierPoint, ...]:
    order = (layers[5], layers[0], layers[4], layers[1], layers[3], layers[2])
    points = []
    for number, cosine in enumerate(COSINES[kind]):
        p05 = 1 - 2.4 * (1 - cosine)
        agreement = 1 - 4 * (1 - cosine) if cosine > 0.8 else 0.2
        points.append(
            FrontierPoint(
                number,
                order[:number],
                ("clusters",) * number,
                cosine,
                p05,
                agreement,
                _model_ms(limit, number),
                90_000_000 + 9000 * limit - 400 * number * limit,
                limit,
            )
        )
    return tuple(points)


def _first_faster(timings: tuple[Timing, ...], name: str) -> int | None:
    rows = {(row.subject, row.length): row.latency_ms for row in timings if row.scope == "attention"}
    found = None
    for length in reversed(LENGTHS):
        new, old = rows[name, length], rows["softmax", length]
        if new is not None and old is not None and new >= old:
            break
        found = length if old is not None else found
    return found


@pytest.fixture(scope="session")
def make_report() -> Callable[[str], Report]:
    return sample_report


@pytest.fixture(scope="session")
def report() -> Report:
    return sample_report()
