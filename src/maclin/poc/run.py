"""From a model directory to a report: load, audit, plan, convert, measure, judge. Writes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from maclin.progress import Progress, Silent, Steps

from ..adopt import (
    Documents,
    Loaded,
    Step,
    audit,
    calibrated_layers,
    default_config,
    frontier_order,
    load,
    packaged_model,
    plan,
    python_documents,
    read_documents,
)
from ..bench import break_even, environment, sweep, sweep_attention
from ..bench.oracle import oracle_check
from ..core import mechanisms as registry
from ..core.errors import CapabilityError, OptionError
from ..records import SCHEMA_VERSION, Audit, DataInfo, FrontierPoint, Report, Timing
from ..report import decide, point_to_time, rollout_stages
from .frontier import check_host, document_of, measure_frontier, switch_

DEFAULT_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Tokens at which the attention alone is measured unless told otherwise."""


@dataclass(frozen=True)
class ProofOfConcept:
    """What to judge, and on what.

    Args:
        model: directory that transformers or sentence-transformers can load; None is the packaged model.
        data: files or directories with documents; None are those that ship with Python.
        lengths: tokens at which the attention alone is measured; the model up to its own limit.
        tolerance: largest relative error of a layer's attention output that the plan accepts, in (0, 1); 0.1 where
            no speed-up is wanted.
        speedup: of the attention that the plan is to reach, with the least error.
        per_head: let the plan mix mechanisms within a layer.
        device: "auto", "cpu", "cuda" or "cuda:1".
        max_documents: at most so many documents are used, half of them held out; spread over all lengths.
        seconds_per_point: wall time for the latency of one thing at one length.
    """

    model: str | os.PathLike[str] | None = None
    data: Sequence[str | os.PathLike[str]] | None = None
    lengths: Sequence[int] = DEFAULT_LENGTHS
    tolerance: float | None = None
    speedup: float | None = None
    per_head: bool = False
    device: str = "auto"
    max_documents: int = 64
    seconds_per_point: float = 0.5

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise OptionError(f"wanted lengths of at least 1 token, got {list(self.lengths)}")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise OptionError(f"wanted a tolerance between 0 and 1 (0.1 is 10 %), got {self.tolerance}")
        if self.speedup is not None and not self.speedup > 1:
            raise OptionError(f"wanted a speed-up above 1 (3 is a third of the time), got {self.speedup}")
        if self.max_documents < 2:
            raise OptionError(f"wanted at least 2 documents, one of them held out, got {self.max_documents}")
        if not self.seconds_per_point > 0:
            raise OptionError(f"wanted a positive time per point, got {self.seconds_per_point}")


def run(job: ProofOfConcept, progress: Progress | None = None) -> Report:
    """Run a proof of concept; the model on disk is not touched, and nothing is written.

    Args:
        job: what to judge, and on what.
        progress: is told of steps and their parts.

    Returns:
        The report; ``maclin.report.write_report`` writes it.

    Raises:
        MaclinError: input that cannot be used; one sentence says what was wanted, what was got, what to do.
    """
    steps = Steps(progress or Silent())
    device = device_of(job.device)
    with steps.step("load model"):
        loaded = load(packaged_model() if job.model is None else job.model, device)
        info = loaded.info()
    with steps.step("read documents"):
        documents = python_documents() if job.data is None else read_documents(job.data)
        calibration, held_out = documents.spread(job.max_documents).split()
        data = _data_info(loaded, documents, calibration, held_out)
    batches = loaded.tokenize(calibration.texts, batch_size=4)
    with steps.step("audit every mechanism on every layer", info.num_layers + len(batches)) as said:
        found = audit(
            loaded.model,
            batches,
            progress=lambda done: said.advance(f"{done} of {len(batches)} batches"),
            calibrating=lambda layer: said.advance(f"{layer} calibrated"),
        )
    with steps.step("plan", None):
        chosen = plan(found, job.tolerance, speedup=job.speedup, per_head=job.per_head)
    order = frontier_order(found)
    if not order:
        refused = "; ".join(f"{row.layer}: {row.refused}" for row in found.layers if row.refused)
        raise CapabilityError(f"no attention layer of {info.name} can be converted: {refused or 'none was found'}")
    with steps.step("check the conversion", 1) as said:
        original = loaded.encode(held_out.texts)
        check = check_host(loaded, held_out.texts, original, loaded.max_length)
        said.advance(f"largest difference {check.softmax_max_abs_error:.1e}")
    with steps.step("calibrate what each layer becomes", None):
        ready = calibrated_layers(loaded.model, {step.layer: (step.mechanism, step.config) for step in order}, batches)
    longest = _longest(loaded, max(data.document_tokens))
    with steps.step("convert layer by layer", len(order) + 2) as said:
        frontier = measure_frontier(
            loaded,
            order,
            ready,
            held_out.texts,
            original,
            length=longest,
            device=device,
            seconds_per_point=job.seconds_per_point,
            progress=said,
        )
    with steps.step("measure the attention alone", None) as said:
        attention = _attention_timings(found, sorted(set(job.lengths)), device, job.seconds_per_point, said)
    with steps.step("measure the whole model", None) as said:
        model_timings = _model_timings(loaded, order, ready, frontier, held_out.texts, job, device, said)
    timings = (*attention, *model_timings)
    even = (*break_even(timings, "attention"), *break_even(timings, "model"))
    verdict = decide(frontier, timings, even, chosen, info)
    dtype = next(loaded.model.parameters()).dtype
    return Report(
        schema_version=SCHEMA_VERSION,
        environment=environment(device, dtype),
        model=info,
        data=data,
        audit=found,
        plan=chosen,
        frontier=frontier,
        timings=timings,
        break_even=even,
        verdict=verdict,
        rollout=rollout_stages(verdict, frontier, timings, chosen),
        host_check_max_abs_error=check.softmax_max_abs_error,
        restore_is_bit_equal=check.restore_is_bit_equal,
        seconds=steps.seconds,
        warnings=tuple(_warnings(found, check.softmax_max_abs_error, check.restore_is_bit_equal)),
    )


def device_of(name: str) -> str:
    """The device of that name, of "auto" the GPU where there is one; raises OptionError where it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"wanted a device such as auto, cpu or cuda:0, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"wanted {name}, but torch sees no CUDA device here; pass --device cpu")
    return name


def _data_info(loaded: Loaded, documents: Documents, calibration: Documents, held_out: Documents) -> DataInfo:
    tokens = [loaded.token_counts(part.texts) for part in (calibration, held_out)]
    cut = []
    if loaded.default_length < loaded.max_length:
        cut.append(
            f"documents are read up to the model's {loaded.max_length} positions, where its own pipeline cuts them at "
            f"{loaded.default_length} tokens"
        )
    return DataInfo(
        source=documents.source,
        num_calibration_documents=len(calibration),
        num_held_out_documents=len(held_out),
        num_calibration_tokens=sum(tokens[0]),
        num_held_out_tokens=sum(tokens[1]),
        document_tokens=(*tokens[0], *tokens[1]),
        warnings=(*documents.warnings, *cut),
    )


def _longest(loaded: Loaded, tokens: int) -> int:
    """Length for the frontier: the longest document, which is the model's limit where documents were cut."""
    return max(min(loaded.max_length, tokens), 2)


def _attention_timings(
    found: Audit, lengths: Iterable[int], device: str, seconds_per_point: float, said: Progress
) -> list[Timing]:
    """Every mechanism over the lengths, in the sizes of the model's first convertible layer.

    In the configuration that was the most accurate there, whose shapes say what it costs.
    """
    layer = next(row for row in found.layers if row.refused is None)
    built = {}
    for name in registry.names():
        if name == "by_head":
            continue  # made of the others
        tried = [e for e in layer.errors if e.mechanism == name and e.rel_error is not None]
        best = min(tried, key=lambda error: error.rel_error or 0.0, default=None)
        mech = registry.mechanism(
            name,
            head_dim=layer.head_dim,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            **(default_config(name, layer.head_dim) if best is None else best.config),
        )
        built[name] = mech.to(device).eval()
    return sweep_attention(
        built,
        lengths,
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        linear=[name for name in built if registry.row(name).linear],
        device=device,
        seconds_per_point=seconds_per_point,
        max_seconds_per_run=240 * seconds_per_point,
        check=lambda mech: oracle_check(mech, device=device),
        progress=said.advance,
    )


def _model_timings(
    loaded: Loaded,
    order: Sequence[Step],
    ready: Mapping[str, nn.Module],
    frontier: Sequence[FrontierPoint],
    texts: Sequence[str],
    job: ProofOfConcept,
    device: str,
    said: Progress,
) -> list[Timing]:
    """The original beside the converted model that the verdict is about, over the lengths it can take."""
    point = point_to_time(frontier)
    if point is None:
        return []
    limit = loaded.max_length
    lengths = sorted({length for length in job.lengths if 2 <= length <= limit} | {limit})
    chosen = order[: point.num_linear]
    try:
        rows = sweep(
            {"original": loaded.embed, "converted": loaded.embed},
            lengths,
            lambda length: (document_of(loaded, texts, length),),
            scope="model",
            before={
                "original": lambda: switch_(loaded, (), ready),
                "converted": lambda: switch_(loaded, chosen, ready),
            },
            device=device,
            seconds_per_point=job.seconds_per_point,
            max_seconds_per_run=240 * job.seconds_per_point,
            progress=said.advance,
        )
    finally:
        switch_(loaded, (), ready)
    return [replace(row, num_linear=point.num_linear) if row.subject == "converted" else row for row in rows]


def _warnings(found: Audit, difference: float, bit_equal: bool) -> Iterable[str]:
    yield from found.warnings
    if difference > 1e-5:
        yield (
            f"converted to exact attention the model differs from the original by {difference:.1e} where 1e-5 is "
            "expected: do not trust the errors of this report before that is explained"
        )
    if not bit_equal:
        yield "the restored model does not give bit-equal outputs; on some devices its kernels are not deterministic"
