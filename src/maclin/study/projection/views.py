"""Tables of the projection study, and the measurements that everything shown is made from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...records import Cell, Config, StudyTable
from ..latencies import EXACT, latency
from .cells import ENERGIES, K_FREE, POOLED, linformer_name

if TYPE_CHECKING:
    from . import ProjectionStudy

CUT = "matrix cut at rank k"


@dataclass(frozen=True)
class Measurements:
    """The cells of every part, in the order they were measured, and the accuracy of the majority label."""

    spectra: Sequence[Config]
    errors: Sequence[Config]
    fits: Sequence[Config]
    timed: Sequence[Config]
    runs: Sequence[Config]
    majority: float

    def method_errors(self, method: str, projection: str | None = None, k: int | None = None) -> list[float]:
        """Relative error on held-out documents, layer by layer; empty where it was not measured."""
        wanted = (method, projection, k)
        return [
            row["rel_error"]
            for cell in self.errors
            for row in cell["errors"]
            if (row["method"], row["projection"], row["k"]) == wanted
        ]

    def cut_errors(self, k: int) -> list[float]:
        """Relative error of the output if every attention matrix is cut at rank k, layer by layer."""
        return [row["rel_error"] for cell in self.spectra for row in cell["svd_rel_error"] if row["k"] == k]

    def fit_errors(self, sharing: str, k: int, part: str = "held_out") -> list[float]:
        """Relative error of a fitted projection, layer by layer; ``part`` is "held_out" or "calibration"."""
        cells = [cell for cell in self.fits if (cell["sharing"], cell["k"]) == (sharing, k)]
        rows = sorted((row for cell in cells for row in cell["fitted"]), key=lambda row: row["layer"])
        return [row[f"{part}_rel_error"] for row in rows]

    def heads(self) -> list[Config]:
        """Spectra of all documents, heads and layers."""
        return [head for cell in self.spectra for head in cell["heads"]]

    def accuracies(self, method: str, projection: str | None, sharing: str | None, k: int | None) -> list[float]:
        """Held-out accuracy of each seed that ended with a finite loss."""
        wanted = (method, projection, sharing, k)
        return [
            run["accuracy"]
            for run in self.runs
            if (run["method"], run["projection"], run["sharing"], run["k"]) == wanted and run["accuracy"] is not None
        ]


def tables_of(job: ProjectionStudy, found: Measurements) -> tuple[StudyTable, ...]:
    """Error, error by layer, spectrum, latency, accuracy."""
    return (
        _error_table(job, found),
        _layer_table(job, found),
        _spectrum_table(found),
        _time_table(job, found),
        _accuracy_table(found),
    )


def middle(values: Sequence[float]) -> float | None:
    """Median, or None of nothing."""
    return statistics.median(values) if values else None


def _error_table(job: ProjectionStudy, found: Measurements) -> StudyTable:
    nothing = [None] * len(job.proj_lens)
    rows: list[tuple[Cell, ...]] = [(name, middle(found.method_errors(name)), *nothing) for name in K_FREE]
    for name in POOLED:
        if name in job.projections:
            rows.append((name, None, *(middle(found.method_errors("linformer", name, k)) for k in job.proj_lens)))
    for sharing in job.sharings if found.fits else ():
        for part, words in (("held_out", ""), ("calibration", ", on the calibration documents")):
            values = [middle(found.fit_errors(sharing, k, part)) for k in job.proj_lens]
            rows.append((f"learned, {sharing}{words}", None, *values))
    rows.append((CUT, None, *(middle(found.cut_errors(k)) for k in job.proj_lens)))
    return StudyTable(
        title="Relative error of the attention output on real text",
        columns=("mode", "without k", *(f"k = {k}" for k in job.proj_lens)),
        rows=tuple(rows),
        note=f"Median over {len(job.layers)} layers of all-MiniLM-L6-v2, {job.num_documents // 2} held-out documents "
        f"of {job.length} tokens, against exact softmax attention. uniform averages the values. Learned: E and F "
        f"fitted to the layer's exact output on {job.num_documents // 2} other documents, from mean pooling; n/a where "
        f"not fitted, or where k is above the {job.length} keys there are. {CUT}: what is left of each exact attention "
        "matrix if its largest k singular values are kept, the nearest matrix of that rank.",
    )


def reference_len(job: ProjectionStudy) -> int:
    """k of the table by layer: of the fitted ones that were measured everywhere, 64 or the middle one."""
    common = [k for k in job.real_lens if k in job.fitted_lens] or list(job.real_lens)
    return 64 if 64 in common else common[len(common) // 2]


def _layer_table(job: ProjectionStudy, found: Measurements) -> StudyTable:
    k = reference_len(job)
    columns: list[tuple[str, list[float]]] = [(name, found.method_errors(name)) for name in K_FREE]
    columns += [(name, found.method_errors("linformer", name, k)) for name in POOLED if name in job.projections]
    columns += [(f"learned, {sharing}", found.fit_errors(sharing, k)) for sharing in job.sharings]
    columns.append((CUT, found.cut_errors(k)))
    shown = [(name, values) for name, values in columns if values]
    return StudyTable(
        title=f"Relative error by layer, k = {k}",
        columns=("layer", *(name for name, _ in shown)),
        rows=tuple((str(layer), *(values[i] for _, values in shown)) for i, layer in enumerate(job.layers)),
        note="Held-out documents. uniform, efficient and revisited_linformer have no k.",
    )


def _spectrum_table(found: Measurements) -> StudyTable:
    fields = ("effective_rank", *(f"rank_{100 * e:g}" for e in ENERGIES))
    rows: list[tuple[Cell, ...]] = []
    for name, cells in [*((f"layer {c['layer']}", [c]) for c in found.spectra), ("all layers", found.spectra)]:
        heads = [head for cell in cells for head in cell["heads"]]
        for label, pick in (("median", statistics.median), ("largest", max)):
            rows.append((name, label, *(float(pick([head[field] for head in heads])) for field in fields)))
    rows.append(("uniform attention", None, *(1.0 for _ in fields)))
    return StudyTable(
        title="Singular values of the exact attention matrices",
        columns=(
            "layer",
            "over heads and documents",
            "effective rank",
            *(f"{100 * e:g} % of energy" for e in ENERGIES),
        ),
        rows=tuple(rows),
        note="How many singular values hold so much of the sum of squares. The effective rank is the exponential of "
        "the entropy of the singular values over their sum (Roy & Vetterli 2007).",
    )


def _time_table(job: ProjectionStudy, found: Measurements) -> StudyTable:
    subjects = [EXACT, *K_FREE, *(linformer_name(name, k) for name in job.projections for k in job.proj_lens)]
    return StudyTable(
        title="Latency in ms by length",
        columns=("method", *(f"{cell['length']} tokens" for cell in found.timed)),
        rows=tuple((name, *(latency(cell, name) for cell in found.timed)) for name in subjects),
        note=f"{job.num_heads} heads of width {job.head_dim}, median of runs made in turns; learned projections are "
        f"shared by all heads, E and F apart. {EXACT} is torch's fused scaled_dot_product_attention. n/a: k above the "
        "length, or a run would have taken longer than the limit.",
    )


def trained_name(run: Config) -> str:
    """What a trained model is called in the table."""
    shown = {"softmax": EXACT, "mean": "uniform"}.get(run["method"], run["method"])
    return " ".join(filter(None, [shown, run["projection"], run["sharing"]]))


def _accuracy_table(found: Measurements) -> StudyTable:
    rows: dict[tuple[str, Cell], list[Config]] = {}
    for run in found.runs:
        k = None if run["k"] is None else float(run["k"])
        rows.setdefault((trained_name(run), k), []).append(run)
    shown: list[tuple[Cell, ...]] = [("majority label", None, found.majority, None, None, None, None)]
    for (name, k), runs in rows.items():
        values = [run["accuracy"] for run in runs if run["accuracy"] is not None]
        losses = [run["held_out_loss"] for run in runs if run["held_out_loss"] is not None]
        seconds = statistics.median([run["seconds"] for run in runs])
        spread = (statistics.fmean(values), min(values), max(values)) if values else (None, None, None)
        shown.append((name, k, *spread, statistics.fmean(losses) if losses else None, seconds))
    first = found.runs[0]
    return StudyTable(
        title="Held-out accuracy after training",
        columns=("mechanism", "k", "accuracy, mean", "lowest seed", "highest seed", "loss, mean", "seconds a run"),
        rows=tuple(shown),
        note=f"Tiny Transformer (width 64, 2 heads, {first['num_layers']} layer(s)), {first['steps']} steps, windows "
        f"of {first['task_length']} bytes of source code labelled with their package, held-out windows from other "
        "files; one recipe for all. Learned projections start at random, as in the paper."
        + (" With one layer, sharing layerwise is key-value." if first["num_layers"] == 1 else ""),
    )
