"""What a mechanism costs on a layer of a model: latency as measured on this machine, or multiply-adds."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from maclin.adopt.hosts.base import AttentionLayer
from maclin.adopt.planning.cost_bench import GATHER, Cost, CostBench, Subject
from maclin.core import mechanisms as registry
from maclin.core.break_even import device_name
from maclin.core.errors import MaclinError, OptionError
from maclin.files import cache_dir, write_whole
from maclin.records import Audit, Config, LayerAudit

EXACT = "softmax"
"""What a layer is called that stays as it is."""

FILE = "costs.json"


class Costs(Protocol):
    """What costs are asked of."""

    @property
    def kind(self) -> str:
        """Either "measured", in milliseconds, or "operations"."""
        ...

    @property
    def length(self) -> int:
        """Tokens."""
        ...

    @property
    def device(self) -> str:
        """Processor and threads, or GPU; "" where it does not matter."""
        ...

    def of(self, layer: LayerAudit, name: str, config: Config, key_heads: int | None = None) -> Cost:
        """The cost of a mechanism on the heads of so many of a layer's key heads (default: all)."""
        ...

    def per_head(self, layer: LayerAudit) -> float:
        """What taking the heads of one layer apart and together costs."""
        ...


@dataclass(frozen=True)
class Operations:
    """Multiply-adds, the same on every machine."""

    length: int
    kind: str = "operations"
    device: str = ""

    def of(self, layer: LayerAudit, name: str, config: Config, key_heads: int | None = None) -> Cost:
        """Multiply-adds of a layer's heads, or of those of so many key heads."""
        sizes = {"head_dim": layer.head_dim, "num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
        made = registry.mechanism(name, **sizes, **config)
        heads = layer.num_heads * (1.0 if key_heads is None else key_heads / layer.num_kv_heads)
        return Cost(heads * made.cost(self.length, self.length, layer.value_dim or layer.head_dim))

    def per_head(self, layer: LayerAudit) -> float:
        """Copies are no multiply-adds."""
        return 0.0


@dataclass(frozen=True)
class Latencies:
    """Latencies as they were measured; of fewer heads than all on a line through two numbers of heads."""

    length: int
    device: str
    measured: Mapping[Subject, Cost]
    kind: str = "measured"

    def of(self, layer: LayerAudit, name: str, config: Config, key_heads: int | None = None) -> Cost:
        """Milliseconds; raises MaclinError where the mechanism was not measured on such a layer."""
        whole = self._known(Subject.of(layer, name, config), name)
        if key_heads is None or key_heads == layer.num_kv_heads:
            return whole
        few = _few(layer)
        less = self._known(Subject.of(layer, name, config, few), name)
        slope = max((whole.value - less.value) / (layer.num_kv_heads - few), 0.0)
        return Cost(max(less.value + slope * (key_heads - few), 0.0), whole.measured_length)

    def per_head(self, layer: LayerAudit) -> float:
        """Milliseconds."""
        return self._known(Subject.of(layer, GATHER, {}), GATHER).value

    def _known(self, subject: Subject, name: str) -> Cost:
        if subject not in self.measured:
            raise MaclinError(f"{name} was not measured in the sizes of this layer")
        return self.measured[subject]


def measure_costs(
    audit: Audit,
    length: int | None = None,
    *,
    per_head: bool = False,
    device: str | None = None,
    again: bool = False,
    path: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Latencies:
    """Measure what every audited mechanism costs on every layer, beside exact attention: for ``maclin.plan``.

    Median latency of one call without gradients, on one sequence of standard normal q, k and v in the layer's sizes;
    all take turns, so that they share whatever the machine does meanwhile. What would take longer than
    ``SECONDS_PER_RUN`` is measured at half and a quarter of the length, or less, and extrapolated as a + b N, or
    a N + b N² where the cost is quadratic. What was measured is kept in the user's cache, by device, threads and
    sizes; what is measured later is scaled by exact attention, which is measured again beside it.

    Args:
        audit: its layers and mechanisms.
        length: tokens (default: the longest audited document).
        per_head: also with a part of the heads, for plans per head.
        device: where to measure (default: that of the audited model).
        again: measure even what is in the cache.
        path: of the cache, by default the user's.
        progress: is told, in words, what has been done.

    Raises:
        OptionError: a length below 1, or a device that is not there.
    """
    tokens = max(audit.length if length is None else length, 1)
    if length is not None and length < 1:
        raise OptionError(f"wanted a length of at least 1 token, got {length}")
    where = _device(device or audit.device or "cpu")
    dtype = getattr(torch, audit.dtype or "float32")
    subjects = _subjects(audit, per_head)
    path = cache_dir() / FILE if path is None else path
    label = f"{device_name(where)}, {str(dtype).removeprefix('torch.')}, {tokens} tokens"
    kept = {} if again else _kept(path).get(label, {})
    found = {subject: kept[str(subject)] for subject in subjects if str(subject) in kept}
    missing = [subject for subject in subjects if subject not in found]
    if missing:
        exact = [s for s in subjects if s.name == EXACT]
        wanted = list(dict.fromkeys([*exact, *missing]))
        fresh = CostBench(where, dtype, tokens, progress).run(wanted)
        ratios = [found[s].value / fresh[s].value for s in exact if s in found and fresh.get(s)]
        ratio = statistics.median(ratios) if ratios else 1.0
        found |= {s: Cost(cost.value * ratio, cost.measured_length) for s, cost in fresh.items() if s not in found}
        _keep(path, label, {str(s): cost for s, cost in found.items()})
    return Latencies(tokens, device_name(where), found)


def _subjects(audit: Audit, per_head: bool) -> list[Subject]:
    """What is measured, each once: exact attention first."""
    found: list[Subject] = []
    for layer in audit.layers:
        if layer.refused is not None:
            continue
        tried = [(EXACT, {}), *((e.mechanism, e.config) for e in layer.errors if e.rel_error is not None)]
        for name, config in tried:
            found.append(Subject.of(layer, name, config))
            if per_head and layer.num_kv_heads > 1:
                found.append(Subject.of(layer, name, config, _few(layer)))
        if per_head:
            found.append(Subject.of(layer, GATHER, {}))
    return sorted(dict.fromkeys(found), key=lambda s: s.name != EXACT)


def _few(layer: LayerAudit) -> int:
    """Key heads that are measured beside all."""
    return max(1, layer.num_kv_heads // 3)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            f"wanted a device to measure on, got {name!r}, which is not there ({error}); pass device='cpu', or "
            "costs='operations'"
        ) from error
    return device


def _kept(path: Path) -> dict[str, dict[str, Cost]]:
    """What was measured before; a file that cannot be read is empty."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["latencies_ms"]
        return {
            str(label): {str(key): Cost(float(value), length) for key, (value, length) in rows.items() if value > 0}
            for label, rows in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _keep(path: Path, label: str, costs: Mapping[str, Cost]) -> None:
    known = _kept(path)
    known[label] = {**known.get(label, {}), **costs}
    text = json.dumps({"latencies_ms": dict(sorted(known.items()))}, indent=1)
    with contextlib.suppress(OSError):  # a cache that cannot be written is a cache that is not there
        write_whole(path, text.encode())


def relative_cost(name: str, config: Config, layer: LayerAudit | AttentionLayer, length: int) -> float:
    """Multiply-adds of a mechanism over those of exact attention, both on ``length`` tokens of one layer.

    Args:
        name: mechanism.
        config: its options.
        layer: supplies head counts and width.
        length: tokens.
    """
    sizes = {"head_dim": layer.head_dim, "num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    ours = registry.mechanism(name, **sizes, **config).cost(length, length, layer.head_dim)
    theirs = registry.mechanism(EXACT, **sizes).cost(length, length, layer.head_dim)
    return ours / theirs


def longest_measured(costs: Iterable[Cost]) -> int | None:
    """The largest number of tokens from which something was extrapolated; None where nothing was."""
    return max((cost.measured_length for cost in costs if cost.measured_length is not None), default=None)
