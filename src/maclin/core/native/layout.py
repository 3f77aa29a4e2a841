"""What the kernels are given: the C structures, and the tensors of a map as they want them, kept between calls."""

from __future__ import annotations

import ctypes
import os
from collections import OrderedDict
from ctypes import c_double, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..fast.kept import fingerprint
from ..fast.spec import Side, Spec
from ..norms import EPS
from .library import library

FAMILIES = ("product", "positive", "fourier", "elu", "softmax", "identity")
NORMS = ("", "unit", "token", "batch")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MOST_RANKS = 32
_MOST_BYTES = 1 << 25  # of all layouts that are kept


class MapStruct(ctypes.Structure):
    """``Map`` of features.h."""

    _fields_ = [
        *((name, c_int64) for name in ("family", "norm", "head_dim", "projections", "products", "constants")),
        *((name, c_int64) for name in ("linear", "weighted", "num_ranks", "index_stride")),
        ("scale", c_double),
        *((name, c_void_p) for name in ("ranks", "matrix", "offset", "index", "shift", "mean", "root")),
    ]


class ArrayStruct(ctypes.Structure):
    """``Array`` of features.h."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("type", "batch", "head", "token", "entry")),
    ]


class Layout:
    """One side of a map in the form of the kernels; holds the memory that the structure points to."""

    def __init__(self, spec: Spec, side: Side, head_dim: int) -> None:
        self.side = side
        self.struct = struct = MapStruct()
        self._held: list[Any] = []
        struct.family, struct.norm = FAMILIES.index(spec.family), NORMS.index(spec.norm)
        struct.head_dim, struct.linear, struct.weighted = head_dim, spec.linear, spec.weighted
        struct.scale = spec.scale
        if spec.family == "product":
            struct.products, struct.constants = (spec.ranks[0] if spec.ranks else 0), spec.constants
            struct.num_ranks = len(spec.ranks)
            ranks = (c_int64 * max(len(spec.ranks), 1))(*spec.ranks)
            self._held.append(ranks)
            struct.ranks = ctypes.addressof(ranks)
        if side.projection is not None:
            struct.projections = side.projection.shape[-1]
            struct.matrix = self._floats(side.projection.mT)
            struct.offset = self._floats(side.offset)
            if spec.ranks:
                struct.index, struct.index_stride = self._index(spec, side)
        struct.shift, struct.mean = self._floats(side.shift), self._floats(side.mean)
        if side.variance is not None:
            struct.root = self._floats((side.variance.float() + EPS).rsqrt())
        held = [x for x in (*self.side, *self._held) if isinstance(x, Tensor)]
        self.size = 1024 + sum(x.numel() * x.element_size() for x in held)
        """Bytes, about: those of the given tensors count as well."""

    def _floats(self, x: Tensor | None) -> int | None:
        if x is None:
            return None
        held = x.detach().to(torch.float32).contiguous()
        self._held.append(held)
        return held.data_ptr()

    def _index(self, spec: Spec, side: Side) -> tuple[int, int]:
        assert side.projection is not None
        if spec.gathered:
            assert side.index is not None
            index, stride = side.index.to(torch.int32).contiguous(), side.index.shape[-1]
            lowest, highest = index.aminmax()
            if lowest < 0 or highest >= side.projection.shape[-1]:
                raise IndexError(f"an index of factors is outside of {side.projection.shape[-1]} projections")
        else:
            first, *more = spec.ranks
            rows, start = list(range(first)), spec.products
            for count in more:
                rows += range(start, start + count)
                start += count
            index, stride = torch.tensor(rows, dtype=torch.int32), 0
        self._held.append(index)
        return index.data_ptr(), stride


_LAYOUTS: OrderedDict[tuple[Any, ...], Layout] = OrderedDict()


def layout_of(spec: Spec, side: Side, head_dim: int) -> Layout:
    """The layout of a side, kept for the next call with the same tensors."""
    key = (spec, head_dim, *map(fingerprint, side))
    found = _LAYOUTS.get(key)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = _LAYOUTS[key] = Layout(spec, side, head_dim)
        while len(_LAYOUTS) > 1 and sum(layout.size for layout in _LAYOUTS.values()) > _MOST_BYTES:
            _LAYOUTS.popitem(last=False)
    return found


def array_of(x: Tensor) -> ArrayStruct:
    """A tensor (B, h, N, D) of any strides."""
    return ArrayStruct(x.data_ptr(), TYPES[x.dtype], *x.stride())


def pointer(x: Tensor | None) -> int | None:
    """Of a contiguous float32 tensor, which the caller holds."""
    return None if x is None else x.data_ptr()


def takes(spec: Spec, side: Side, *tensors: Tensor) -> bool:
    """Whether the kernels compute this: on the CPU, in single or half precision, and nobody watches operations."""
    kernels = library()
    if kernels is None or len(spec.ranks) > _MOST_RANKS or not _unwatched():
        return False
    if any(x is not None and x.device.type != "cpu" for x in side):
        return False
    return all(_taken(x.dtype, kernels) and x.device.type == "cpu" and x.layout == torch.strided for x in tensors)


def _taken(dtype: torch.dtype, kernels: ctypes.CDLL) -> bool:
    return dtype in TYPES and (dtype != torch.float16 or _has_half(kernels))


@lru_cache(maxsize=4)
def _has_half(kernels: ctypes.CDLL) -> bool:
    return bool(kernels.maclin_has_half())


def _unwatched() -> bool:
    """Whether no mode, tracer or transform stands between tensors and their memory."""
    return (
        torch._C._len_torch_dispatch_stack() == 0  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        and not torch._C._get_tracing_state()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    )


def _of_torch() -> int | None:
    """Address of the entry of the OpenMP that torch runs on, so that both share one team of threads."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError, TypeError):
        return None


_TEAM: list[int | None] = []


def team() -> int | None:
    """What runs a function on several threads; None where the kernels are to start threads themselves."""
    if not _TEAM:
        _TEAM.append(_of_torch())
    return _TEAM[0]


def _forget_team() -> None:
    # a child has none of the team's threads, and would wait for them forever
    _TEAM[:] = [None]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_team)


def run(name: str, arguments: ctypes.Structure) -> None:
    """Call a kernel, on as many threads as torch has."""
    kernels = library()
    assert kernels is not None
    status = getattr(kernels, name)(ctypes.byref(arguments), c_int64(torch.get_num_threads()), c_void_p(team()))
    if status:
        reason = "the library has another layout" if status == 1 else "no memory for its blocks"
        raise RuntimeError(f"{name} failed: {reason}")
