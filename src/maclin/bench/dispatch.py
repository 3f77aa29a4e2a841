"""From which length on a mechanism pays on this device: measured once, kept in the user's cache, read by ``core``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from maclin.core.break_even import BreakEvenKey, cache_path, device_name, measured_lengths
from maclin.core.errors import MaclinError
from maclin.files import write_whole
from maclin.progress import Progress
from maclin.records import BenchResult

from .job import BenchJob
from .run import bench
from .specs import parse_spec

LENGTHS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Where it is looked for."""


def measure_break_even(
    mechanism: str = "macformer",
    *,
    num_heads: int = 8,
    head_dim: int = 64,
    dtype: str = "float32",
    device: str = "auto",
    causal: bool = False,
    backward: bool = False,
    lengths: Sequence[int] = LENGTHS,
    seconds_per_point: float = 0.3,
    again: bool = False,
    path: Path | None = None,
    progress: Progress | None = None,
) -> tuple[BreakEvenKey, int | None, BenchResult | None]:
    """The smallest of ``lengths`` from which on a mechanism is faster than fused softmax attention.

    What was measured for the same device, sizes and options is taken from the cache.

    Args:
        mechanism: name with options, as in ``maclin bench``.
        num_heads: H.
        head_dim: D.
        dtype: as ``BenchJob``.
        device: as ``BenchJob``.
        causal: causal attention.
        backward: forward and backward.
        lengths: where to measure.
        seconds_per_point: as ``BenchJob``.
        again: measure even if it is in the cache.
        path: of the cache, by default the user's.
        progress: is told of every step.

    Returns:
        The key in the cache, the length (None: at none of them), and the result, or None where nothing was measured.

    Raises:
        MaclinError: the mechanism's results are wrong, so that there is no speed; or the cache cannot be written.
    """
    job = BenchJob(
        "speed",
        mechanism,
        tuple(lengths),
        dtype,
        device,
        num_heads,
        head_dim,
        backward=backward,
        causal=causal,
        seconds_per_point=seconds_per_point,
    )
    spec = parse_spec(mechanism)
    key = BreakEvenKey(spec.text, device_name(job.torch_device), dtype, head_dim, num_heads, causal, backward)
    path = cache_path() if path is None else path
    known = measured_lengths(path)
    if not again and str(key) in known:
        return key, known[str(key)], None
    result = bench(job, progress)
    found = next((row for row in result.break_even if row.subject == spec.text), None)
    reasons = [row.timing.reason for row in result.rows if row.timing.subject == spec.text and row.timing.reason]
    if found is None or (found.length is None and reasons):
        raise MaclinError(reasons[0] if reasons else f"{mechanism} could not be measured beside softmax")
    keep({str(key): found.length}, path)
    return key, found.length, result


def keep(lengths: dict[str, int | None], path: Path) -> None:
    """Add lengths to the cache; another process that writes meanwhile loses nothing but its own last one.

    Raises:
        MaclinError: the file cannot be written.
    """
    record = {"lengths": dict(sorted({**measured_lengths(path), **lengths}.items()))}
    try:
        write_whole(path, json.dumps(record, indent=2).encode())
    except OSError as error:
        raise MaclinError(
            f"cannot write to {path}: {error.strerror or error}; set MACLIN_CACHE to another folder"
        ) from error
