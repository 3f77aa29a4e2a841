"""What ``maclin bench`` measured: figures beside the least that this machine allows, and how two results compare."""

from __future__ import annotations

from dataclasses import dataclass, field

from .base import Config, Environment
from .timing import BreakEven, Timing


@dataclass(frozen=True)
class Rates:
    """How fast this machine moves and multiplies numbers, measured in the same run."""

    copy_bytes_per_s: float  # read and written
    matrix_flops_per_s: float  # two for each multiply-add
    copied_bytes: int  # of the tensor that was copied fastest
    matrix_shape: str  # of the product that was fastest
    dtype: str


@dataclass(frozen=True)
class Floor:
    """The least time of a call: what it must move and what it must multiply, at the measured rates."""

    bytes: int  # moved at least: what goes in is read once, what comes out is written once
    flops: int  # two for each multiply-add that the method needs
    copy_ms: float
    matrix_ms: float

    @property
    def ms(self) -> float:
        """The larger of both."""
        return max(self.copy_ms, self.matrix_ms)


@dataclass(frozen=True)
class BenchRow:
    """One subject at one length, or with decoding at one position; ``timing.reason`` says why a figure is missing."""

    timing: Timing
    kind: str  # "mechanism", "baseline" or "peer"
    floor: Floor | None = None  # None for peers, whose operations are not counted
    given_bytes: int | None = None  # of what is there before the call; with decoding of the state
    tensor_bytes: int | None = None  # q, k, v and out, with ``backward`` their gradients as well

    @property
    def share_of_floor(self) -> float | None:
        """The least time over the measured one; 1 is as fast as this machine allows."""
        latency = self.timing.latency_ms
        return None if self.floor is None or not latency else self.floor.ms / latency

    @property
    def matrix_share(self) -> float | None:
        """As ``share_of_floor``, of the multiply-adds alone."""
        latency = self.timing.latency_ms
        return None if self.floor is None or not latency else self.floor.matrix_ms / latency

    @property
    def beyond_bytes(self) -> int | None:
        """Peak memory beyond ``tensor_bytes``."""
        if self.timing.peak_bytes is None or self.given_bytes is None or self.tensor_bytes is None:
            return None
        return self.given_bytes + self.timing.peak_bytes - self.tensor_bytes


@dataclass(frozen=True)
class Growth:
    """The exponent e of quantity = c x length^e, fitted to the medians."""

    subject: str
    quantity: str  # "time" or "memory"
    exponent: float
    from_length: int
    to_length: int


@dataclass(frozen=True)
class BenchResult:
    """One run of ``maclin bench``; the JSON file is this record."""

    schema_version: str
    what: str  # "speed", "memory", "decode"
    environment: Environment
    settings: Config
    rates: Rates | None
    rows: tuple[BenchRow, ...]
    growth: tuple[Growth, ...] = ()
    break_even: tuple[BreakEven, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each step


@dataclass(frozen=True)
class Change:
    """One figure in two results. ``verdict``: "regressed", "improved", "same" or "not comparable"."""

    subject: str
    length: int
    quantity: str  # "time" or "memory"
    before: float | None  # ms or bytes
    after: float | None
    ratio: float | None  # after over before
    ratio_low: float | None  # with the quartiles that are nearest to, and farthest from each other
    ratio_high: float | None
    verdict: str
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two results, figure by figure; what differs between their machines and settings is in ``warnings``."""

    what: str
    before: Environment
    after: Environment
    threshold: float  # least change that counts, beyond noise
    changes: tuple[Change, ...]
    warnings: tuple[str, ...] = ()

    @property
    def regressed(self) -> tuple[Change, ...]:
        """What became slower, or takes more memory."""
        return tuple(change for change in self.changes if change.verdict == "regressed")
