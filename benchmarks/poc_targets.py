"""Measure the targets for speed, memory and set-up on this machine, and say which are met.

    python benchmarks/poc_targets.py --out benchmarks/results     # speed, memory, import
    python benchmarks/poc_targets.py --make                       # set-up, main job and tests in a fresh clone, too

The exit status is 1 if a target is missed. Nothing else should run meanwhile: with as many threads as
cores, whatever shares a core delays every operation of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import maclin
from maclin.adopt import audit, default_config, load, packaged_model, python_documents
from maclin.bench import (
    Target,
    break_even,
    commit,
    environment,
    interleaved,
    peak_bytes,
    result_path,
    sweep_attention,
    targets_table,
)
from maclin.records import Audit, BreakEven, Timing

ROOT = Path(__file__).resolve().parents[1]
MECHANISMS = ("macformer", "efficient", "revisited_linformer")
HEADS, HEAD_DIM, NUM_FEATURES = 8, 64, 128
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
BREAK_EVEN_WANTED = 1024  # tokens
RATIO_WANTED, RATIO_LENGTH = 16.0, 8192
MEMORY_LENGTHS = (4096, 16384)
MEMORY_SHARE_WANTED = 0.1  # of what storing the features of the additional tokens would take
IMPORT_WANTED_S = 0.1
ERROR_WANTED, WORST_WANTED = 0.75, 1.0  # of the error of mean-pool Linformer with k = 2 D
MAKE_WANTED_S = 600.0
BUSY_LOAD = 0.5  # processes that were running in the last minute


def build(name: str) -> maclin.Mechanism:
    """The mechanism that the targets are about, drawn from a fixed seed."""
    options = {"num_features": NUM_FEATURES, "generator": torch.Generator().manual_seed(0)}
    mech = maclin.mechanism(name, head_dim=HEAD_DIM, num_heads=HEADS, **(options if name == "macformer" else {}))
    return mech.eval()


def speed_targets(timings: Sequence[Timing], found: Sequence[BreakEven]) -> list[Target]:
    """Break-even and the ratio at the longest length, of each mechanism against fused softmax."""
    latency = {(row.subject, row.length): row.latency_ms for row in timings}
    reasons = {row.subject: row.reason for row in timings if row.reason is not None}
    softmax = latency.get(("softmax", RATIO_LENGTH))
    targets = []
    for row in found:
        targets.append(
            Target(
                f"{row.subject}: break-even",
                f"at most {BREAK_EVEN_WANTED} tokens",
                reasons.get(row.subject) or ("never" if row.length is None else f"{row.length} tokens"),
                row.length is not None and row.length <= BREAK_EVEN_WANTED,
                row.note,
            )
        )
        own = latency.get((row.subject, RATIO_LENGTH))
        ratio = None if own is None or softmax is None else softmax / own
        targets.append(
            Target(
                f"{row.subject}: speed-up at {RATIO_LENGTH} tokens",
                f"at least {RATIO_WANTED:g} times",
                reasons.get(row.subject) or "not measured" if ratio is None else f"{ratio:.1f} times",
                ratio is not None and ratio >= RATIO_WANTED,
                "" if ratio is None else f"median of softmax {softmax:.1f} ms over median {own:.1f} ms, in turns",
            )
        )
    return targets


def memory_target(name: str) -> Target:
    """Growth of the memory beyond q, k, v and out, against that of stored features."""
    mech = build(name)
    beyond = []
    for length in MEMORY_LENGTHS:
        q, k, v = torch.randn(3, 1, HEADS, length, HEAD_DIM, generator=torch.Generator().manual_seed(0))
        mech(q, k, v)
        beyond.append(peak_bytes(lambda q=q, k=k, v=v: mech(q, k, v)) - q.nbytes)
    width = NUM_FEATURES if name == "macformer" else HEAD_DIM
    features = (MEMORY_LENGTHS[1] - MEMORY_LENGTHS[0]) * width * HEADS * 4
    share = (beyond[1] - beyond[0]) / features
    return Target(
        f"{name}: memory beyond q, k, v and out",
        f"grows by at most {MEMORY_SHARE_WANTED:g} of N x M floats",
        f"{share:.3f}",
        share <= MEMORY_SHARE_WANTED,
        f"{' and '.join(f'{n / 2**20:.2f} MiB' for n in beyond)} at {' and '.join(map(str, MEMORY_LENGTHS))} tokens, "
        f"peak of live tensors, M = {width}",
    )


def error_target(found: Audit) -> Target:
    """Error of revisited_linformer over that of mean-pool Linformer with k = 2 D, layer by layer of a real model."""
    ratios = []
    for layer in found.layers:
        error = {row.mechanism: row.rel_error for row in layer.errors}
        ratios.append((error["revisited_linformer"] or math.nan) / (error["linformer"] or math.nan))
    mean, worst = math.exp(sum(map(math.log, ratios)) / len(ratios)), max(ratios)
    return Target(
        "revisited_linformer: error over mean-pool Linformer",
        f"geometric mean at most {ERROR_WANTED:g}, no layer above {WORST_WANTED:g}",
        f"{mean:.3f}, worst {worst:.3f}",
        mean <= ERROR_WANTED and worst <= WORST_WANTED,
        f"layers {', '.join(f'{ratio:.3f}' for ratio in ratios)}; {found.num_documents} documents of up to "
        f"{found.length} tokens",
    )


def packaged_audit() -> Audit:
    """Both mechanisms on the packaged model and the documents that ship with Python."""
    loaded = load(packaged_model())
    return audit(
        loaded.model,
        loaded.tokenize(python_documents().texts, batch_size=4),
        [("linformer", default_config("linformer", loaded.info().head_dim)), "revisited_linformer"],
    )


def import_target(runs: int = 11) -> Target:
    """What ``import maclin`` adds to ``import torch``, each in a process of its own."""

    def process(module: str) -> None:
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    stats = interleaved(
        {module: lambda module=module: process(module) for module in ("torch", "maclin")}, min_runs=runs, max_runs=runs
    )
    added = (stats["maclin"].median_ms - stats["torch"].median_ms) / 1e3
    return Target(
        "import maclin",
        f"adds at most {IMPORT_WANTED_S:g} s to import torch",
        f"{added:.3f} s",
        added <= IMPORT_WANTED_S,
        f"medians of {runs} processes each, in turns: "
        f"{stats['maclin'].median_ms / 1e3:.3f} s and {stats['torch'].median_ms / 1e3:.3f} s",
    )


def make_targets() -> list[Target]:
    """The main job with set-up, and then the tests, in a fresh clone of the last commit."""
    targets = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "maclin"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        for command, how in (("poc", "in a fresh clone, set-up included"), ("test", "after that, in the same clone")):
            start = time.perf_counter()
            done = subprocess.run(["make", command], cwd=clone, check=False)
            seconds = time.perf_counter() - start
            failed = f", exit status {done.returncode}" if done.returncode else ""
            targets.append(
                Target(
                    f"make {command}",
                    f"at most {MAKE_WANTED_S:g} s",
                    f"{seconds:.0f} s{failed}",
                    not done.returncode and seconds <= MAKE_WANTED_S,
                    how,
                )
            )
    return targets


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the JSON file; none is written without it")
    parser.add_argument("--make", action="store_true", help="also time make poc and make test in a fresh clone")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each point (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    where, load = environment(), os.getloadavg()[0]
    print(f"{where.processor}, {where.num_threads} threads, torch {where.torch_version}, load average {load:.2f}")
    if load > BUSY_LOAD:
        print("warning: this machine is busy with something else, and the figures will be wrong")

    mechanisms = {name: build(name) for name in MECHANISMS}
    timings = sweep_attention(
        mechanisms, LENGTHS, num_heads=HEADS, head_dim=HEAD_DIM, seconds_per_point=options.seconds, progress=print
    )
    found = break_even(timings, "attention")
    targets = speed_targets(timings, found)
    targets += [memory_target(name) for name in MECHANISMS]
    targets.append(error_target(packaged_audit()))
    targets.append(import_target())
    if options.make:
        targets += make_targets()
    print(targets_table(targets))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = result_path(options.out, "poc-targets", where)
        figures = {
            "environment": dataclasses.asdict(where),
            "commit": commit(ROOT),
            "load_average_before": load,
            "targets": [dataclasses.asdict(target) for target in targets],
            "timings": [dataclasses.asdict(row) for row in timings],
            "break_even": [dataclasses.asdict(row) for row in found],
        }
        path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written to {path}")
    return 0 if all(target.met for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
