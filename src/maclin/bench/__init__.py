"""Latency, memory and fidelity, measured side by side and handed over as records."""

from .attention import sweep_attention
from .break_even import break_even, growth_exponent
from .compare import compare
from .dispatch import measure_break_even
from .environment import environment
from .fidelity import EmbeddingFidelity, embedding_fidelity
from .floor import measure_rates
from .job import BenchJob
from .memory import MemoryTracker, free_bytes, largest_intermediate, peak_bytes
from .oracle import oracle_check
from .peers import PEERS, find_peers
from .run import bench
from .specs import Spec, parse_spec, parse_specs
from .sweep import sweep
from .targets import Target, commit, not_measured, ratio_target, result_path, row_of, targets_table, why
from .timing import TimingStats, interleaved

__all__ = [
    "PEERS",
    "BenchJob",
    "EmbeddingFidelity",
    "MemoryTracker",
    "Spec",
    "Target",
    "TimingStats",
    "bench",
    "break_even",
    "commit",
    "compare",
    "embedding_fidelity",
    "environment",
    "find_peers",
    "free_bytes",
    "growth_exponent",
    "interleaved",
    "largest_intermediate",
    "measure_break_even",
    "measure_rates",
    "not_measured",
    "oracle_check",
    "parse_spec",
    "parse_specs",
    "peak_bytes",
    "ratio_target",
    "result_path",
    "row_of",
    "sweep",
    "sweep_attention",
    "targets_table",
    "why",
]
