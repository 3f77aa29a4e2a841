"""``maclin bench``: speed, memory and decoding of mechanisms, beside fused softmax, peers and the machine's limit."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from maclin.core.errors import CapabilityError
from maclin.core.mechanisms import Mechanism, row
from maclin.core.native import wait_for_kernels
from maclin.progress import Progress, Silent, Steps
from maclin.records import SCHEMA_VERSION, BenchResult, BenchRow, Floor, Growth, Rates, Timing

from .break_even import break_even, growth_exponent
from .decode import decode_rows
from .environment import environment
from .floor import attention_flops, best_of, floor, measure_rates, moved_bytes, tensor_bytes
from .job import BenchJob
from .oracle import oracle_check
from .peers import PEERS, find_peers
from .subjects import BASELINE, Subject, baseline, of_mechanism
from .sweep import sweep

_CHECKED_LENGTHS = (48, 777)  # the second is several blocks, the last of them not full
_GROWTH_FROM = 1024  # tokens; below, what a call costs by itself is not small
_ONE_RUN = 60.0  # seconds that the only run of a point may take where nothing is timed
_BUSY_LOAD = 0.5  # processes that were running in the last minute


def bench(job: BenchJob, progress: Progress | None = None) -> BenchResult:
    """Measure.

    All subjects of a length are timed in turns on the same q, k and v, of standard normal numbers. A mechanism whose
    results, with ``backward`` its gradients as well, are off the float64 oracle gets no figures but the reason.

    Args:
        job: what to measure.
        progress: is told of every step.
    """
    steps = Steps(progress or Silent())
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    warnings = []
    if load > _BUSY_LOAD:
        warnings.append(f"this machine was busy with something else (load average {load:.2f}) when this began")
    with steps.step("measure the machine"):
        wait_for_kernels()  # of the CPU: compiled now, rather than between two figures
        rates = measure_rates(job.torch_dtype, job.torch_device)
    with steps.step("check against the oracles") as told:
        mechanisms, reasons = job.built()
        for name, mech in mechanisms.items():
            wrong = check_mechanism(job, mech)
            if wrong is not None:
                reasons[name] = wrong
            told.advance(name)
    mechanisms = {name: mech for name, mech in mechanisms.items() if name not in reasons}
    if job.what == "decode":
        with steps.step("decode", len(job.points)) as told:
            rows = decode_rows(job, mechanisms, rates, told)
    else:
        rows, absent = _swept(job, mechanisms, rates, steps)
        warnings += absent
    # again at the end: what shares this machine may have come or gone meanwhile, and the floors take the best
    with steps.step("measure the machine again"):
        rates = best_of(rates, measure_rates(job.torch_dtype, job.torch_device))
    rows = [_with_rates(found, rates) for found in rows]
    for name, reason in reasons.items():
        rows += [BenchRow(Timing(name, "attention", n, None, reason=reason), "mechanism") for n in job.points]
    rows.sort(key=lambda found: found.timing.length)
    timings = [found.timing for found in rows]
    measured = any(found.subject == BASELINE and found.latency_ms is not None for found in timings)
    return BenchResult(
        schema_version=SCHEMA_VERSION,
        what=job.what,
        environment=environment(job.torch_device, job.torch_dtype),
        settings=job.settings() | _peer_parts(job),
        rates=rates,
        rows=tuple(rows),
        growth=tuple(growth(rows)),
        break_even=tuple(break_even(timings, "attention")) if measured else (),
        warnings=tuple(warnings),
        seconds=steps.seconds,
    )


def _peer_parts(job: BenchJob) -> dict[str, object]:
    """What of each peer is measured, for the settings."""
    return {"peer_parts": [f"{peer.title}: {peer.what}" for peer in PEERS]} if job.peers else {}


def check_mechanism(job: BenchJob, mech: Mechanism) -> str | None:
    """What is wrong with a mechanism's results, or None; see ``oracle_check``. To fail in the check is wrong, too."""
    try:
        return oracle_check(
            mech,
            dtype=job.torch_dtype,
            device=job.torch_device,
            backward=job.backward,
            lengths=_CHECKED_LENGTHS,
            causal=job.is_causal,
        )
    except Exception as error:
        return f"{mech.name} fails where it is compared with its oracle: {type(error).__name__}: {error}"


def growth(rows: Iterable[BenchRow]) -> list[Growth]:
    """The exponents of time and memory of each subject with three lengths, from 1,024 tokens on where there are."""
    found = []
    rows = list(rows)
    for subject in dict.fromkeys(found.timing.subject for found in rows):
        own = [found.timing for found in rows if found.timing.subject == subject]
        for quantity, of in (("time", lambda t: t.latency_ms), ("memory", lambda t: t.peak_bytes)):
            points = {t.length: of(t) for t in own if of(t)}
            long = {length: value for length, value in points.items() if length >= _GROWTH_FROM}
            points = long if len(long) >= 3 else points
            if len(points) >= 3:
                exponent = growth_exponent(list(points), list(points.values()))
                found.append(Growth(subject, quantity, exponent, min(points), max(points)))
    return found


def _swept(
    job: BenchJob, mechanisms: dict[str, Mechanism], rates: Rates, steps: Steps
) -> tuple[list[BenchRow], list[str]]:
    """Rows of ``speed`` and ``memory``, and why peers are missing."""
    subjects = {BASELINE: baseline(job.head_dim, is_causal=job.is_causal)}
    for name, mech in mechanisms.items():
        if name != BASELINE:
            subjects[name] = of_mechanism(name, mech, is_causal=job.is_causal)
    absent: list[str] = []
    if job.peers:
        peers, absent = find_peers(job.peer_sizes, job.torch_device, job.torch_dtype, job.only_peers)
        subjects |= peers
    sizes = {
        "batch": job.batch,
        "num_heads": job.num_heads,
        "num_kv_heads": job.num_heads,
        "head_dim": job.head_dim,
        "itemsize": job.torch_dtype.itemsize,
        "backward": job.backward,
    }
    inputs: list[tuple[Tensor, ...]] = []

    def make_inputs(length: int) -> tuple[Tensor, ...]:
        inputs.clear()
        for subject in subjects.values():
            subject.take_back()
        inputs.append(draw(job, length))
        return inputs[0]

    timed = job.what == "speed"
    copies = 2 if job.peers else 1  # peers may want q, k and v in another layout
    with steps.step(f"measure {job.what}", len(job.points) * len(subjects)) as told:
        timings = sweep(
            {name: _call(subject, job.backward) for name, subject in subjects.items()},
            job.points,
            make_inputs,
            scope="attention",
            before={name: _giving(subject, inputs, job.backward) for name, subject in subjects.items()},
            linear=[name for name, mech in mechanisms.items() if row(mech.name).linear],
            device=job.torch_device,
            input_bytes=lambda length: copies * tensor_bytes(length, **sizes),
            seconds_per_point=job.seconds_per_point,
            max_seconds_per_run=_ONE_RUN if job.max_seconds_per_run is None and not timed else job.max_seconds_per_run,
            timed=timed,
            progress=_told(told),
        )
    rows = []
    for timing in timings:
        subject = subjects[timing.subject]
        bytes_given = tensor_bytes(timing.length, **sizes) * (4 if job.backward else 3) // (8 if job.backward else 4)
        limit = _floor(job, subject, timing.length, moved_bytes(timing.length, **sizes), rates)
        rows.append(BenchRow(timing, subject.kind, limit, bytes_given, tensor_bytes(timing.length, **sizes)))
    return rows, absent


def draw(job: BenchJob, length: int) -> tuple[Tensor, ...]:
    """q, k and v of standard normal numbers."""
    shape = (job.batch, job.num_heads, length, job.head_dim)
    generator = torch.Generator(job.torch_device).manual_seed(job.seed)
    options = {"generator": generator, "dtype": job.torch_dtype, "device": job.torch_device}
    return tuple(torch.randn(shape, **options) for _ in range(3))


def _floor(job: BenchJob, subject: Subject, length: int, moved: int, rates: Rates) -> Floor | None:
    options = {"batch": job.batch, "is_causal": job.is_causal, "backward": job.backward}
    if subject.name == BASELINE:
        exact = row(BASELINE).cls(job.head_dim, job.num_heads)
        return floor(moved, attention_flops(exact, length, **options), rates)
    if subject.mechanism is None:
        return None
    try:
        return floor(moved, attention_flops(subject.mechanism, length, **options), rates)
    except CapabilityError:
        return None


def _with_rates(found: BenchRow, rates: Rates) -> BenchRow:
    limit = None if found.floor is None else floor(found.floor.bytes, found.floor.flops, rates)
    return BenchRow(found.timing, found.kind, limit, found.given_bytes, found.tensor_bytes)


def _call(subject: Subject, backward: bool) -> Callable[..., object]:
    return (lambda *_: subject.step()) if backward else (lambda *_: subject.forward())


def _giving(subject: Subject, inputs: list[tuple[Tensor, ...]], backward: bool) -> Callable[[], object]:
    return lambda: subject.give(inputs[0], backward)


def _told(told: Progress) -> Callable[[str], None]:
    """One part of the step for every subject at every length: its first run; other words only pass."""
    return functools.partial(_say, told)


def _say(told: Progress, text: str) -> None:
    if text.endswith("first run"):
        told.advance(text.removesuffix(": first run"))
