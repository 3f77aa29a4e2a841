"""From which length on a mechanism is faster than fused softmax attention, as measured on this device or by default.

``maclin bench break-even`` measures it once per device and keeps it in the user's cache. What is shipped stands in
where nothing was measured, and errs towards exact attention.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import cache_dir
from .native import native_status

FILE = "break_even.json"

IN_TORCH = "cpu, in torch"

DEFAULTS: dict[str, dict[bool, int]] = {  # device -> causal -> tokens; 8 heads of 64, float32, batch 1
    "cpu": {False: 384, True: 512},
    IN_TORCH: {False: 512, True: 2048},
    "cuda": {False: 4096, True: 4096},
}
"""Where nothing was measured. Those of the CPU are macformer's with 128 features on two cores (``benchmarks/results``),
with the compiled kernels and without them, which need not be those of others; those of GPUs are guesses on the side of
exact attention."""


@dataclass(frozen=True)
class BreakEvenKey:
    """What a break-even length depends on.

    Args:
        mechanism: name with options, as in ``maclin bench``.
        device: the processor's or GPU's name, and on the CPU the threads.
        dtype: of q, k and v.
        head_dim: D.
        num_heads: H.
        is_causal: causal attention.
        backward: forward and backward.
    """

    mechanism: str
    device: str
    dtype: str
    head_dim: int
    num_heads: int
    is_causal: bool = False
    backward: bool = False

    def __str__(self) -> str:
        """The key in the file."""
        kind = f"{'causal' if self.is_causal else 'bidirectional'}, {'backward' if self.backward else 'forward'}"
        return f"{self.mechanism} | {self.device} | {self.dtype} | {self.num_heads} x {self.head_dim} | {kind}"


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name of the processor as the system gives it, or its architecture where it gives none."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), None) or platform.processor() or platform.machine()


def device_name(device: torch.device | str) -> str:
    """What break-even lengths of a device are kept under: the GPU's name, or the processor's and the threads.

    A processor whose compiled kernels are not to be had, or turned off, says so.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads{'' if _compiled() else ', in torch'}"


def cache_path() -> Path:
    """The file with what was measured."""
    return cache_dir() / FILE


def measured_lengths(path: Path | None = None) -> dict[str, int | None]:
    """What was measured on this and other devices, by key; None is never. A file that cannot be read is empty."""
    try:
        found = json.loads((cache_path() if path is None else path).read_text(encoding="utf-8"))
        lengths = found["lengths"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if not isinstance(lengths, Mapping):
        return {}
    return {str(key): value for key, value in lengths.items() if value is None or _is_length(value)}


def break_even_length(key: BreakEvenKey, device_type: str, path: Path | None = None) -> int | None:
    """The length from which on the mechanism is faster than fused softmax attention; None is never.

    Args:
        key: what was measured.
        device_type: "cpu", "cuda", ..., for the default where it was not.
        path: of the file, by default the user's.
    """
    found = measured_lengths(path)
    if str(key) in found:
        return found[str(key)]
    if device_type not in DEFAULTS or (device_type == "cpu" and not _compiled()):
        device_type = IN_TORCH
    return DEFAULTS[device_type][key.is_causal]


def _compiled() -> bool:
    """Whether this process computes with compiled kernels, or will as soon as they are compiled."""
    return native_status().state in ("ready", "building")


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
