"""Where and with what figures were measured."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from maclin._version import __version__
from maclin.records import Environment


def environment(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Environment:
    """The record of this machine, these versions and this moment.

    Args:
        device: where the figures are measured; a CUDA device without an index means the current one.
        dtype: of the tensors that are measured.

    Returns:
        An ``Environment``; its ``processor`` is the name of the processor, on CUDA that of the GPU before it.
    """
    device = torch.device(device)
    processor = processor_name()
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        processor = f"{torch.cuda.get_device_name(index)}, {processor}"
    return Environment(
        date_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        maclin_version=__version__,
        python_version=platform.python_version(),
        torch_version=torch.__version__,
        transformers_version=_installed_version("transformers"),
        platform=platform.platform(),
        processor=processor,
        device=str(device),
        num_threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
    )


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name of the processor as the system gives it, or its architecture where it gives none."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), None) or platform.processor() or platform.machine()


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
