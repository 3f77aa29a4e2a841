"""Memory that a computation takes beyond its inputs, and memory that is free to take.

On CUDA the allocator keeps the peak. On the CPU torch's allocator reports every block that it gives and takes
back, scratch memory of kernels and of custom operators included, and the largest sum is the peak. It does not see
what a library takes by itself, such as the packed operands of a matrix product.

``MemoryTracker`` watches the operations instead: it also knows the largest single tensor, and works on any device, but
it does not see scratch memory that a kernel takes and gives back inside one operation, such as the blocks of
``scaled_dot_product_attention``. It looks into custom operators that are written in Python with
``torch.library.custom_op``.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._library import custom_ops as _custom_ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """Context that counts the bytes of tensors allocated within it.

    Only storages made inside count, from the operation that makes them until the last tensor on them dies.
    Views and results in place share a storage and count once. Composite operations (einsum, linear, ...)
    are taken apart, so that their intermediates count too.

    Attributes:
        live_bytes: allocated inside and alive now.
        peak_bytes: the largest ``live_bytes`` so far.
        largest_bytes: the largest single storage allocated inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.largest_bytes = 0
        self._sizes: dict[int, int] = {}  # by the address of the storage
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation, and count the storages of its results that were not among its arguments."""
        kwargs = kwargs or {}
        with self:
            written_in_python = _python_kernel(func, args)
            if written_in_python is not None:
                return written_in_python(*args, **kwargs)
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            self._count(storage, was_given=storage._cdata in given)
        return result

    def _count(self, storage: torch.UntypedStorage, was_given: bool) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._sizes:
            self.live_bytes += size - self._sizes[address]  # resized in place
        elif was_given:
            return  # made outside
        else:
            self.live_bytes += size
            self._references[address] = weakref.ref(storage, lambda _: self._forget(address))
        self._sizes[address] = size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.largest_bytes = max(self.largest_bytes, size)

    def _forget(self, address: int) -> None:
        self.live_bytes -= self._sizes.pop(address)
        del self._references[address]


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and leaf.device.type != "meta"
    ]


def _python_kernel(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The function behind a custom operator for the device of its arguments, or None for any other operation."""
    if func.namespace in ("aten", "prim", "prims"):
        return None
    definition = getattr(_custom_ops, "OPDEFS", {}).get(func._schema.name)
    if definition is None:
        return None
    devices = [leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    kernels = definition._backend_fns
    return kernels.get(devices[0] if devices else "cpu", kernels.get(None, definition._init_fn))


def peak_bytes(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The largest number of bytes that ``fn`` holds at one time, beyond what was there before, results included.

    What ``fn`` makes once and keeps (a cached table) counts in its first run only; run it before, to leave
    that out.

    Args:
        fn: what to measure, called once without arguments and without gradients.
        device: where it computes; see the module for who counts. Where torch's reports are not to be had, and on
            other devices, the tensors are counted.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            result = fn()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    reported = _reported(fn) if torch.device(device).type == "cpu" else None
    return _tracked(fn).peak_bytes if reported is None else reported


def _reported(fn: Callable[[], object]) -> int | None:
    """The peak by the reports of torch's CPU allocator; None where they cannot be had."""
    autograd: Any = torch.autograd  # what follows has no stubs
    inner: Any = torch._C
    try:
        experimental = inner._profiler._ExperimentalConfig()
        kind = autograd.ProfilerState.CPU
        # memory, but no shapes, stacks, operations or modules
        autograd._enable_profiler_legacy(autograd.ProfilerConfig(kind, False, True, False, False, False, experimental))
    except (AttributeError, TypeError, RuntimeError):  # another torch, or somebody is profiling already
        return None
    records: Any = []
    try:
        with torch.inference_mode():
            result = fn()
    finally:
        records = autograd._disable_profiler_legacy()
    del result
    live = top = 0
    for record in (record for thread in records for record in thread if record.kind() == "memory_alloc"):
        live += record.cpu_memory_usage()
        top = max(top, live)
    return top


def largest_intermediate(fn: Callable[[], object]) -> int:
    """Bytes of the largest single tensor that ``fn`` allocates, results included, on any device.

    Doubling the length of what ``fn`` works on must at most double this, or something in it is quadratic.

    Args:
        fn: what to measure, called once without arguments and without gradients.
    """
    return _tracked(fn).largest_bytes


def _tracked(fn: Callable[[], object]) -> MemoryTracker:
    with torch.inference_mode(), MemoryTracker() as tracker:
        fn()
    return tracker


def free_bytes(
    device: torch.device | str = "cpu",
    *,
    meminfo: Path = Path("/proc/meminfo"),
    cgroup: Path = Path("/sys/fs/cgroup"),
) -> int | None:
    """Bytes that can be allocated now without swapping, or None where the system does not tell.

    Args:
        device: CUDA asks the driver and adds what torch holds in reserve; everything else asks the system,
            within the limit of the container.
        meminfo: the kernel's table of memory; where it is missing, psutil is asked, if it is installed.
        cgroup: the folder of the container's limits.
    """
    if torch.device(device).type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    free = _available(meminfo)
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and used is not None:
        within = max(limit - used, 0)
        free = within if free is None else min(free, within)
    return free


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        try:
            return int(importlib.import_module("psutil").virtual_memory().available)
        except ImportError:
            return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such limit, or "max"
        return None
