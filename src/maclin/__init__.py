"""maclin: linear-complexity attention for Transformers, and in numbers what it costs and saves.

>>> import maclin
>>> mech = maclin.mechanism("macformer", head_dim=64, num_heads=8)   # build one
>>> out = maclin.attention(q, k, v, mechanism="efficient")           # or call one
>>> maclin.convert_(model, "revisited_linformer")                    # or move a model, and back:
>>> maclin.restore_(model)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .core import mechanisms
from .core.errors import CapabilityError, InputError, MaclinError, OptionError
from .core.functional import attention
from .core.kernels import KERNELS, Kernel
from .core.mechanisms import Mechanism, mechanism
from .core.mechanisms.base import calibrate
from .core.statistics import guarded

if TYPE_CHECKING:
    from . import arena, bench, nn, records, testing
    from .adopt import (
        audit,
        choose,
        convert_,
        diagnose,
        guard,
        heal,
        load_converted,
        plan,
        restore_,
        save_converted,
        unguard,
    )
    from .records import Audit, Choice, Diagnosis, Plan, Report

__all__ = [
    "KERNELS",
    "Audit",
    "CapabilityError",
    "Choice",
    "Diagnosis",
    "InputError",
    "Kernel",
    "MaclinError",
    "Mechanism",
    "OptionError",
    "Plan",
    "Report",
    "__version__",
    "arena",
    "attention",
    "audit",
    "bench",
    "calibrate",
    "choose",
    "convert_",
    "diagnose",
    "guard",
    "guarded",
    "heal",
    "load_converted",
    "mechanism",
    "mechanisms",
    "nn",
    "plan",
    "records",
    "restore_",
    "save_converted",
    "testing",
    "unguard",
]

# Loaded at first use, so that ``import maclin`` costs little more than ``import torch``.
_LAZY = {
    "audit": "maclin.adopt",
    "choose": "maclin.adopt",
    "diagnose": "maclin.adopt",
    "guard": "maclin.adopt",
    "plan": "maclin.adopt",
    "convert_": "maclin.adopt",
    "load_converted": "maclin.adopt",
    "restore_": "maclin.adopt",
    "save_converted": "maclin.adopt",
    "heal": "maclin.adopt",
    "unguard": "maclin.adopt",
    "Audit": "maclin.records",
    "Choice": "maclin.records",
    "Diagnosis": "maclin.records",
    "Plan": "maclin.records",
    "Report": "maclin.records",
    "arena": None,
    "bench": None,
    "nn": None,
    "records": None,
    "testing": None,
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'maclin' has no attribute {name!r}")
    home = _LAZY[name]
    value = importlib.import_module(f"maclin.{name}") if home is None else getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
