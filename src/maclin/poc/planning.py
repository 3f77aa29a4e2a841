"""From a model directory to a plan: load, audit, measure costs, choose. Writes nothing but the cache of costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from maclin.progress import Progress, Silent, Steps

from ..adopt import (
    Costs,
    audit,
    load,
    measure_costs,
    packaged_model,
    plan,
    plan_candidates,
    python_documents,
    read_documents,
)
from ..bench import interleaved
from ..core.errors import OptionError
from ..records import Audit, Plan
from .frontier import document_of
from .run import device_of


@dataclass(frozen=True)
class PlanJob:
    """What to plan for, and on what.

    Args:
        model: directory that transformers or sentence-transformers can load; None is the packaged model.
        data: files or directories with documents; None are those that ship with Python.
        tolerance: as ``maclin.plan``.
        speedup: as ``maclin.plan``.
        of: as ``maclin.plan``; the latency of the model is measured.
        min_layers: as ``maclin.plan``.
        max_layers: as ``maclin.plan``.
        per_head: as ``maclin.plan``.
        length: tokens that costs are measured at (default: the longest document).
        costs: "measured" or "operations".
        device: "auto", "cpu", "cuda" or "cuda:1".
        max_documents: use at most so many, spread over all lengths; a third calibrates.
        try_each: also try each mechanism in each layer alone: one more run for each of them, and a better choice.
    """

    model: str | os.PathLike[str] | None = None
    data: Sequence[str | os.PathLike[str]] | None = None
    tolerance: float | None = None
    speedup: float | None = None
    of: Literal["attention", "model"] = "attention"
    min_layers: int = 0
    max_layers: int | None = None
    per_head: bool = False
    length: int | None = None
    costs: Literal["measured", "operations"] = "measured"
    device: str = "auto"
    max_documents: int = 64
    try_each: bool = False

    def __post_init__(self) -> None:
        if self.max_documents < 1:
            raise OptionError(f"wanted at least 1 document, got {self.max_documents}")
        if self.length is not None and self.length < 1:
            raise OptionError(f"wanted a length of at least 1 token, got {self.length}")
        if self.of not in ("attention", "model"):
            raise OptionError(f"wanted a speed-up of attention or of the model, got {self.of!r}")
        if self.costs not in ("measured", "operations"):
            raise OptionError(f"wanted costs as measured or operations, got {self.costs!r}")
        if self.of == "model" and self.costs != "measured":
            raise OptionError("a speed-up of the model needs measured costs; pass costs as measured")
        if self.speedup is not None and not self.speedup > 1:
            raise OptionError(f"wanted a speed-up above 1 (3 is a third of the time), got {self.speedup}")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise OptionError(f"wanted a tolerance between 0 and 1 (0.1 is 10 %), got {self.tolerance}")


def plan_model(job: PlanJob, progress: Progress | None = None) -> tuple[Plan, Audit]:
    """The plan of a job, and the audit behind it; the model on disk is not touched.

    Args:
        job: what to plan for.
        progress: is told of steps and their parts.

    Raises:
        MaclinError: input that cannot be used, or a budget that no plan keeps; one sentence says what to do.
    """
    steps = Steps(progress or Silent())
    with steps.step("load model"):
        loaded = load(packaged_model() if job.model is None else job.model, device_of(job.device))
    if job.of == "model" and job.length is not None and job.length > loaded.max_length:
        raise OptionError(
            f"a speed-up of the model needs its latency at {job.length} tokens, and it takes {loaded.max_length}; pass "
            "a length up to that, or a speed-up of attention"
        )
    with steps.step("read documents"):
        texts = (python_documents() if job.data is None else read_documents(job.data)).spread(job.max_documents).texts
        batches = loaded.tokenize(texts, batch_size=4)
    parts = None if job.try_each else loaded.info().num_layers + len(batches)
    with steps.step("audit every mechanism on every layer", parts) as said:
        found = audit(
            loaded.model,
            batches,
            plan_candidates(loaded.info().head_dim, job.tolerance),
            progress=lambda done: said.advance(f"{done} of {len(batches)} batches"),
            calibrating=lambda layer: said.advance(f"{layer} calibrated"),
            sensitivities="each" if job.try_each else True,
            weighing=(lambda layer: said.advance(f"{layer} tried")) if job.try_each else None,
        )
    length = max(found.length, 1) if job.length is None else job.length
    costs: Costs | Literal["operations"] = "operations"
    if job.costs == "measured":
        with steps.step("measure what they cost", None) as said:
            costs = measure_costs(found, length, per_head=job.per_head, progress=said.advance)
    model_ms = None
    if job.costs == "measured" and length <= loaded.max_length:
        with steps.step("measure the whole model", None):
            batch = document_of(loaded, texts, length)
            timed = interleaved({"": lambda: loaded.embed(batch)}, max_seconds=2.0, device=device_of(job.device))
            model_ms = timed[""].median_ms
    chosen = plan(
        found,
        job.tolerance,
        length,
        speedup=job.speedup,
        of=job.of,
        model_ms=model_ms,
        min_layers=job.min_layers,
        max_layers=job.max_layers,
        per_head=job.per_head,
        costs=costs,
    )
    return chosen, found
