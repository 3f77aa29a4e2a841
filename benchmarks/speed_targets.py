"""Measure the targets for the speed of attention on this machine, and say which are met.

    python benchmarks/speed_targets.py --out benchmarks/results        # everything, about 15 minutes on two cores
    python benchmarks/speed_targets.py --only decode memory            # parts of it
    python benchmarks/speed_targets.py --longest 16384                 # no figure beyond that many tokens

Ratios are those of medians, timed in turns in one run: 8 heads of 64, batch 1, float32 unless said. The exit status is
1 if a target is missed; what this machine cannot tell is "not measured", never estimated. Nothing else should run
meanwhile: with as many threads as cores, whatever shares a core delays every operation of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from maclin.bench import (
    BenchJob,
    Target,
    bench,
    commit,
    environment,
    growth_exponent,
    interleaved,
    not_measured,
    parse_spec,
    ratio_target,
    result_path,
    row_of,
    targets_table,
    why,
)
from maclin.core.mechanisms import FeatureMechanism
from maclin.core.reference import feature_attention
from maclin.records import BenchResult, to_json

ROOT = Path(__file__).resolve().parents[1]
HEADS, HEAD_DIM, NUM_FEATURES = 8, 64, 128
SPLIT = "macformer:num_features=128:counts=[1,64,45,18]"  # 65 features exactly, 45 of degree 2, 18 of degree 3
RAW, DEFAULT = f"{SPLIT}:ppsbn=false", SPLIT  # raw q and k; with ppSBN of each token, the default
OURS = (RAW, DEFAULT)
MAPS = ("favor", "rfa", "elu", "efficient", "taylor")
PERFORMER = "performer-pytorch (pip)"
PROJECTIONS = 144  # 45 x 2 + 18 x 3 inner products with random vectors, which the floor N / 272 counts
FORWARD_LENGTHS = (256, 384, 512, 768, 1024, 4096, 16384, 65536)
GROWTH_LENGTHS = (4096, 16384, 65536, 262144)
WANTED = {1024: 2.7, 4096: 12.0, 16384: 48.0, 65536: 190.0}
BREAK_EVEN_WANTED = 384
SHARE_WANTED, SHARE_LENGTHS = 0.8, (4096, 16384)
PERFORMER_WANTED = {4096: 3.5, 16384: 6.0}
BACKWARD_WANTED, BACKWARD_LENGTH = 12.0, 4096
CAUSAL_WANTED = {4096: 5.0, 16384: 16.0}
DECODE_WANTED, POSITIONS = 1.1, (1024, 65536)
BF16_WANTED, BF16_ERROR_WANTED, BF16_LENGTH, BF16_ERROR_LENGTH = 1.5, 2.0, 4096, 1024
MEMORY_LENGTH, MEMORY_WANTED, STEP_WANTED = 65536, 64 * 2**20, 1.5
GROWTH_WANTED = 1.05
GPU_WANTED, GPU_SHARE_WANTED = {16384: 20.0, 131072: 150.0}, 0.6
GPU_BACKWARD_WANTED, GPU_BACKWARD_LENGTH = 12.0, 16384
GPU_BATCH = 8  # of 8 heads: 64 batch-heads
PARTS = ("forward", "backward", "causal", "decode", "bfloat16", "memory", "growth", "gpu")
BUSY_LOAD = 0.5  # processes that were running in the last minute


@dataclass
class Run:
    """What the command line says, and every result so far."""

    seconds: float
    longest: int
    results: dict[str, BenchResult] = field(default_factory=dict)

    def measured(self, name: str, **options: object) -> BenchResult:
        """One ``maclin bench``, at most at the longest length."""
        lengths = [n for n in options.pop("lengths") if n <= self.longest]  # pyright: ignore
        job = BenchJob(**{"lengths": tuple(lengths), "seconds_per_point": self.seconds, **options})  # pyright: ignore
        print(f"measuring {name}: {', '.join(spec.text for spec in job.specs)} at {lengths}", flush=True)
        result = self.results[name] = bench(job)
        for warning in result.warnings:
            print(f"  {warning}", flush=True)
        return result


def share_target(result: BenchResult, subject: str, length: int) -> Target:
    """The operations that a mechanism needs over what this machine does meanwhile; for the split as N / 272 counts."""
    label, asked = f"{short(subject)}: share of the floor, {length:,} tokens", f">= {100 * SHARE_WANTED:g} %"
    row = row_of(result, subject, length)
    if row is None or row.matrix_share is None or result.rates is None or not row.timing.latency_ms:
        return not_measured(label, asked, why(result, length, subject))
    how = f"{row.floor.flops / 1e9:.2f} GFLOP needed at {result.rates.matrix_flops_per_s / 1e9:.0f} GFLOP/s"  # pyright: ignore
    if subject in OURS:
        published = 4 * HEADS * length * HEAD_DIM * (PROJECTIONS + NUM_FEATURES)
        share = 1e3 * published / result.rates.matrix_flops_per_s / row.timing.latency_ms
        how += f"; {100 * share:.0f} % with {PROJECTIONS} random projections counted, as the floor N / 272 does"
    return Target(label, asked, f"{100 * row.matrix_share:.0f} %", row.matrix_share >= SHARE_WANTED, how)


def short(subject: str) -> str:
    """What a configuration is called in the table."""
    return {RAW: "macformer 65+45+18, raw", DEFAULT: "macformer 65+45+18, ppSBN"}.get(subject, subject)


def forward(run: Run) -> list[Target]:
    """Against softmax and performer-pytorch, and the share of the floor."""
    result = run.measured(
        "forward",
        mechanisms=",".join((*OURS, *MAPS)),
        lengths=FORWARD_LENGTHS,
        peers=True,
        only_peers=("performer-pytorch",),
        peer_features=NUM_FEATURES,
        max_seconds_per_run=200.0,
    )
    targets = []
    for subject in OURS:
        found = next((row for row in result.break_even if row.subject == subject), None)
        label, asked = f"{short(subject)}: faster than softmax", f"from {BREAK_EVEN_WANTED} tokens on"
        if found is None:
            targets.append(not_measured(label, asked, why(result, BREAK_EVEN_WANTED, subject)))
        else:
            said = "never" if found.length is None else f"from {found.length} on"
            met = found.length is not None and found.length <= BREAK_EVEN_WANTED
            targets.append(Target(label, asked, said, met, found.note))
        for length, wanted in WANTED.items():
            targets.append(ratio_target(result, f"{short(subject)}: against softmax", subject, length, wanted))
    targets += [share_target(result, subject, n) for subject in (*OURS, *MAPS) for n in SHARE_LENGTHS]
    for subject in OURS:
        for length, wanted in PERFORMER_WANTED.items():
            name = f"{short(subject)}: against performer-pytorch"
            targets.append(ratio_target(result, name, subject, length, wanted, PERFORMER))
    return targets


def backward(run: Run) -> list[Target]:
    """Forward and backward against those of softmax."""
    result = run.measured(
        "backward", mechanisms=",".join(OURS), lengths=(1024, BACKWARD_LENGTH), backward=True, max_seconds_per_run=60.0
    )
    name = "forward + backward against softmax"
    return [
        ratio_target(result, f"{short(subject)}: {name}", subject, BACKWARD_LENGTH, BACKWARD_WANTED) for subject in OURS
    ]


def causal(run: Run) -> list[Target]:
    """Causal against causal softmax."""
    result = run.measured(
        "causal", mechanisms=",".join(OURS), lengths=(1024, *CAUSAL_WANTED), causal=True, max_seconds_per_run=60.0
    )
    return [
        ratio_target(result, f"{short(subject)}: causal against softmax", subject, length, wanted)
        for subject in OURS
        for length, wanted in CAUSAL_WANTED.items()
    ]


def decode(run: Run) -> list[Target]:
    """One token late over one token early."""
    result = run.measured("decode", what="decode", mechanisms=",".join(OURS), lengths=(*POSITIONS, 4096, 16384))
    targets = []
    early, late = POSITIONS
    for subject in OURS:
        label = f"{short(subject)}: one token at position {late:,} over {early:,}"
        first, last = row_of(result, subject, early), row_of(result, subject, late)
        if first is None or last is None or not first.timing.latency_ms or not last.timing.latency_ms:
            targets.append(not_measured(label, f"<= {DECODE_WANTED:g}", why(result, late, subject)))
            continue
        ratio = last.timing.latency_ms / first.timing.latency_ms
        how = f"{last.timing.latency_ms:.3f} ms over {first.timing.latency_ms:.3f} ms"
        targets.append(Target(label, f"<= {DECODE_WANTED:g}", f"{ratio:.2f}", ratio <= DECODE_WANTED, how))
    return targets


def has_bf16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_bf16" in text or "avx512_bf16" in text


def bfloat16(run: Run) -> list[Target]:
    """bfloat16 against float32 in turns, and its error against that of the formula done naively in bfloat16."""
    names = ("bfloat16 over float32", "bfloat16 error over naive bfloat16")
    targets = []
    for subject in OURS:
        labels = [f"{short(subject)}: {name}" for name in names]
        if not has_bf16_units():
            why_not = "this processor has no bf16 units"
            targets.append(not_measured(labels[0], f">= {BF16_WANTED:g} times", why_not))
            targets.append(not_measured(labels[1], f"<= {BF16_ERROR_WANTED:g} times", why_not))
            continue
        print(f"measuring bfloat16: {subject}", flush=True)
        wide = parse_spec(subject).build(HEAD_DIM, HEADS)
        narrow = parse_spec(subject).build(HEAD_DIM, HEADS).bfloat16()
        assert isinstance(narrow, FeatureMechanism)
        qkv = drawn(BF16_LENGTH)
        halves = tuple(x.bfloat16() for x in qkv)
        calls = {"float32": lambda m=wide, x=qkv: m(*x), "bfloat16": lambda m=narrow, x=halves: m(*x)}
        times = interleaved(calls, max_seconds=4 * run.seconds)
        ratio = times["float32"].median_ms / times["bfloat16"].median_ms
        how = f"{times['float32'].median_ms:.2f} ms over {times['bfloat16'].median_ms:.2f} ms, {BF16_LENGTH:,} tokens"
        targets.append(Target(labels[0], f">= {BF16_WANTED:g} times", f"{ratio:.2f} times", ratio >= BF16_WANTED, how))
        # raw q and k of |q||k| / sqrt(D) = 1: beyond that no series of these features is near to anything
        radius = HEAD_DIM**-0.25 if subject == RAW else 1.0
        q, k, v = (x.bfloat16() for x in drawn(BF16_ERROR_LENGTH))
        own, naive = bf16_errors(narrow, (radius * q, radius * k, v))
        targets.append(
            Target(
                labels[1],
                f"<= {BF16_ERROR_WANTED:g} times",
                f"{own / naive:.2f} times",
                own <= BF16_ERROR_WANTED * naive,
                f"relative errors {own:.2e} and {naive:.2e} against the float64 oracle, {BF16_ERROR_LENGTH:,} tokens",
            )
        )
    return targets


@torch.no_grad()
def bf16_errors(mech: FeatureMechanism, qkv: tuple[Tensor, ...]) -> tuple[float, float]:
    """Relative errors of a mechanism and of the naive formula in bfloat16, against float64 with the same inputs."""
    q, k, v = qkv
    features = mech.features(mech.head_dim**-0.5)
    post: Callable[[Tensor], Tensor] = features.post or (lambda x: x)
    wide = [mech.query_map(q.double()), mech.feature_map(k.double()), v.double()]
    exact = post(feature_attention(*wide, floor=features.floor))
    phi_q, phi_k = mech.query_map(q).bfloat16(), mech.feature_map(k).bfloat16()
    naive = post((phi_q @ (phi_k.mT @ v)) / (phi_q @ phi_k.sum(-2, keepdim=True).mT))
    found = [((out.double() - exact).norm() / exact.norm()).item() for out in (mech(q, k, v), naive)]
    return found[0], found[1]


def drawn(length: int) -> tuple[Tensor, ...]:
    """q, k and v of standard normal numbers."""
    return tuple(torch.randn(3, 1, HEADS, length, HEAD_DIM, generator=torch.Generator().manual_seed(0)))


def memory(run: Run) -> list[Target]:
    """Beyond inputs and outputs, forward; all of a training step over the tensors that it cannot do without."""
    lengths = (1024, 4096, MEMORY_LENGTH)  # softmax would take minutes at the last and is left out there
    options = {"what": "memory", "mechanisms": ",".join(OURS), "lengths": lengths}
    results = [run.measured(f"memory{'-backward' * step}", **options, backward=step) for step in (False, True)]
    targets = []
    for subject in OURS:
        label = f"{short(subject)}: peak beyond inputs and outputs, {MEMORY_LENGTH:,} tokens"
        row = row_of(results[0], subject, MEMORY_LENGTH)
        asked = f"<= {MEMORY_WANTED / 2**20:g} MiB"
        if row is None or row.beyond_bytes is None:
            targets.append(not_measured(label, asked, why(results[0], MEMORY_LENGTH, subject)))
        else:
            found = f"{row.beyond_bytes / 2**20:.1f} MiB"
            targets.append(
                Target(label, asked, found, row.beyond_bytes <= MEMORY_WANTED, "reports of torch's allocator")
            )
        label = f"{short(subject)}: training step over q, k, v, out and their gradients, {MEMORY_LENGTH:,} tokens"
        row = row_of(results[1], subject, MEMORY_LENGTH)
        asked = f"<= {STEP_WANTED:g} times"
        if row is None or row.beyond_bytes is None or not row.tensor_bytes:
            targets.append(not_measured(label, asked, why(results[1], MEMORY_LENGTH, subject)))
        else:
            total = row.beyond_bytes + row.tensor_bytes
            how = f"{total / 2**20:.0f} MiB over {row.tensor_bytes / 2**20:.0f} MiB"
            ratio = total / row.tensor_bytes
            targets.append(Target(label, asked, f"{ratio:.2f} times", ratio <= STEP_WANTED, how))
    return targets


def growth(run: Run) -> list[Target]:
    """The exponent of time."""
    result = run.measured("growth", mechanisms=",".join(OURS), lengths=GROWTH_LENGTHS, max_seconds_per_run=20.0)
    targets = []
    for subject in OURS:
        label = f"{short(subject)}: growth exponent of time, {GROWTH_LENGTHS[0]:,} to {GROWTH_LENGTHS[-1]:,}"
        rows = {n: row_of(result, subject, n) for n in GROWTH_LENGTHS}
        times = {n: row.timing.latency_ms for n, row in rows.items() if row is not None and row.timing.latency_ms}
        if set(times) != set(GROWTH_LENGTHS):
            targets.append(not_measured(label, f"<= {GROWTH_WANTED:g}", why(result, GROWTH_LENGTHS[-1], subject)))
            continue
        exponent = growth_exponent(list(times), [time for time in times.values() if time])
        how = f"medians {', '.join(f'{time:.1f}' for time in times.values())} ms"
        targets.append(Target(label, f"<= {GROWTH_WANTED:g}", f"{exponent:.3f}", exponent <= GROWTH_WANTED, how))
    return targets


def gpu(run: Run) -> list[Target]:
    """On a CUDA device in bfloat16, 64 batch-heads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    options = {"dtype": "bfloat16", "device": "cuda", "batch": GPU_BATCH}
    targets = []
    if device is None:
        reason = "no CUDA device"
        for length, wanted in GPU_WANTED.items():
            name = f"H200, bf16: against softmax, {length:,} tokens"
            targets.append(not_measured(name, f">= {wanted:g} times", reason))
        targets.append(
            not_measured("H200, bf16: share of the larger floor", f">= {100 * GPU_SHARE_WANTED:g} %", reason)
        )
        name = f"H200, bf16: forward + backward, {GPU_BACKWARD_LENGTH:,} tokens"
        return [*targets, not_measured(name, f">= {GPU_BACKWARD_WANTED:g} times", reason)]
    result = run.measured("gpu", mechanisms=",".join(OURS), lengths=(1024, 4096, *GPU_WANTED), **options)
    step = run.measured(
        "gpu-backward", mechanisms=",".join(OURS), lengths=(1024, GPU_BACKWARD_LENGTH), backward=True, **options
    )
    for subject in OURS:
        label = f"{device}, bf16, {short(subject)}"
        for length, wanted in GPU_WANTED.items():
            targets.append(ratio_target(result, f"{label}: against softmax", subject, length, wanted))
            row, asked = row_of(result, subject, length), f">= {100 * GPU_SHARE_WANTED:g} %"
            name = f"{label}: share of the larger floor, {length:,} tokens"
            if row is None or row.share_of_floor is None:
                targets.append(not_measured(name, asked, why(result, length, subject)))
            else:
                how = f"floor {row.floor.ms:.3f} ms, median {row.timing.latency_ms:.3f} ms"  # pyright: ignore
                met = row.share_of_floor >= GPU_SHARE_WANTED
                targets.append(Target(name, asked, f"{100 * row.share_of_floor:.0f} %", met, how))
        name = f"{label}: forward + backward against softmax"
        targets.append(ratio_target(step, name, subject, GPU_BACKWARD_LENGTH, GPU_BACKWARD_WANTED))
    return targets


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--out", type=Path, help="folder for the JSON file; none is written without it")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each point (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=max(GROWTH_LENGTHS), help="tokens (default: %(default)s)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    where, load = environment(), os.getloadavg()[0]
    print(f"{where.processor}, {where.num_threads} threads, torch {where.torch_version}, load average {load:.2f}")
    if load > BUSY_LOAD:
        print("warning: this machine is busy with something else, and the figures will be wrong")
    run = Run(given.seconds, given.longest)
    parts: dict[str, Callable[[Run], list[Target]]] = {
        "forward": forward,
        "backward": backward,
        "causal": causal,
        "decode": decode,
        "bfloat16": bfloat16,
        "memory": memory,
        "growth": growth,
        "gpu": gpu,
    }
    targets = [target for name in PARTS if name in given.only for target in parts[name](run)]
    print()
    print(targets_table(targets))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        path = result_path(given.out, "speed-targets", where)
        figures = {
            "environment": dataclasses.asdict(where),
            "commit": commit(ROOT),
            "load_average_before": load,
            "targets": [dataclasses.asdict(target) for target in targets],
            "results": {name: json.loads(to_json(result)) for name, result in run.results.items()},
        }
        path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written to {path}")
    return 1 if any(target.met is False for target in targets) else 0


if __name__ == "__main__":
    sys.exit(main())
