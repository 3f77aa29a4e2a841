"""What every record is made of: the schema, configurations, the environment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = "1.1"
"""Version of ``report.json``: the first number changes when a reader of the old schema would be wrong."""


Config = dict[str, Any]
"""Constructor arguments of a mechanism, as passed to ``maclin.mechanism``; JSON values only."""


@dataclass(frozen=True)
class Environment:
    """Where and with what the figures were measured."""

    date_utc: str
    maclin_version: str
    python_version: str
    torch_version: str
    transformers_version: str | None
    platform: str
    processor: str
    device: str  # "cpu", "cuda:0"
    num_threads: int
    dtype: str

    def stem(self, name: str) -> str:
        """``name`` with date and hardware, for a file: ``speed_2026-01-31_a-processor-2-threads``."""
        hardware = re.sub(r"[^a-z0-9]+", "-", f"{self.processor} {self.num_threads} threads".lower()).strip("-")
        return f"{name}_{self.date_utc[:10]}_{hardware}"
