"""Where and with what figures were measured."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata

import torch

from maclin._version import __version__
from maclin.core.break_even import processor_name
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


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
