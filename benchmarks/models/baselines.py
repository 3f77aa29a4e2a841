"""What every model is worth with its attention averaged away, behind a window, and converted without healing."""

from __future__ import annotations

from typing import Any

import maclin
from maclin.adopt import audit
from maclin.adopt.hosts import host
from maclin.bench import Target
from maclin.core.errors import MaclinError

from .job import Job, Outcome
from .subjects import SUBJECTS

WINDOWS = {"rxnmapper": 4, "smollm": 128}  # 64 for the others; reactions are shorter than that
_METRICS = {
    "minilm": "mean_cosine",
    "rxnmapper": "same_atoms",
    "smollm": "ratio",
    "whisper": "words_right",
    "vit": "mean_correlation",
}


def baselines(job: Job) -> Outcome:
    """One line for each model; no target is set for them."""
    lines = [of_model(job, name) for name in SUBJECTS]
    return Outcome(
        [line.targets[0] for line in lines], {name: x.figures for name, x in zip(SUBJECTS, lines, strict=True)}
    )


def of_model(job: Job, name: str) -> Outcome:
    """Metrics of one model, all of its layers converted, unhealed; and the audit of its layers."""
    fewer: dict[str, dict[str, Any]] = {
        "minilm": {"number": job.few(100, 20), "classified": 0},
        "smollm": {"number": job.few(2, 1)},
        "vit": {"number": job.few(15, 3)},
    }
    subject = SUBJECTS[name](**fewer.get(name, {}), progress=job.progress)
    window = WINDOWS.get(name, 64)
    tried: dict[str, tuple[str, dict[str, Any]]] = {
        "uniform": ("mean", {}),
        f"window of {window}": ("window", {"window": window}),
        f"hybrid, window of {window}, random features": ("hybrid", {"window": window, "linear": "favor"}),
        "clusters": ("revisited_linformer", {}),
    }
    found: dict[str, Any] = {}
    for label, (mechanism, config) in tried.items():
        try:
            maclin.convert_(subject.root, mechanism, **config)
            found[label] = subject.measure(brief=True)
            job.say(f"{subject.name}, {label}: {found[label]}")
        except MaclinError as error:
            found[label] = {"refused": str(error)}
        finally:
            if host(subject.root).converted:
                maclin.restore_(subject.root)
    rows = audit(subject.root, subject.judged(job.few(4, 2)), [c for c in tried.values() if c[0] != "mean"]).layers
    layers = {
        row.layer: {"uniform": row.uniform_rel_error} | {error.mechanism: error.rel_error for error in row.errors}
        for row in rows
    }
    metric = _METRICS[name]
    words = ", ".join(f"{label} {_shown(row.get(metric))}" for label, row in found.items())
    target = Target(
        f"{subject.name}: {metric.replace('_', ' ')} without healing", "-", words, None, "all layers converted"
    )
    return Outcome([target], {"metrics": found, "layers": layers, "judged_on": dict(subject.data)})


def _shown(value: object) -> str:
    return "refused" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
