"""Latency, memory and fidelity, measured side by side and handed over as records."""

from .attention import sweep_attention
from .break_even import break_even, growth_exponent
from .environment import environment
from .fidelity import EmbeddingFidelity, embedding_fidelity
from .memory import MemoryTracker, free_bytes, largest_intermediate, peak_bytes
from .oracle import oracle_check
from .sweep import sweep
from .timing import TimingStats, interleaved

__all__ = [
    "EmbeddingFidelity",
    "MemoryTracker",
    "TimingStats",
    "break_even",
    "embedding_fidelity",
    "environment",
    "free_bytes",
    "growth_exponent",
    "interleaved",
    "largest_intermediate",
    "oracle_check",
    "peak_bytes",
    "sweep",
    "sweep_attention",
]
