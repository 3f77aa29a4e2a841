"""What the scripts under ``benchmarks/`` share: a target, the table of targets, and where their results go."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maclin.records import BenchResult, BenchRow, Environment


@dataclass(frozen=True)
class Target:
    """One target: what was wanted, what was measured and how, and whether that meets it; None where not measured."""

    name: str
    wanted: str
    measured: str
    met: bool | None
    how: str = ""

    @property
    def verdict(self) -> str:
        """``ok``, ``MISSED`` or ``not measured``."""
        return "not measured" if self.met is None else "ok" if self.met else "MISSED"


def not_measured(name: str, wanted: str, why: str) -> Target:
    """A target that this machine cannot tell anything of."""
    return Target(name, wanted, "-", None, why)


def row_of(result: BenchResult, subject: str, length: int) -> BenchRow | None:
    """A row that has a figure, or None."""
    for row in result.rows:
        if row.timing.subject == subject and row.timing.length == length and row.timing.reason is None:
            return row
    return None


def why(result: BenchResult, length: int, *subjects: str) -> str:
    """Why subjects have no figure at a length, as far as the result says."""
    if length not in {row.timing.length for row in result.rows}:
        return "this length was not asked for"
    rows = {row.timing.subject: row.timing.reason for row in result.rows if row.timing.length == length}
    reasons = [rows.get(name) or "" for name in subjects]
    reasons += [text for name in subjects if name not in rows for text in result.warnings if name.split()[0] in text]
    return "; ".join(filter(None, dict.fromkeys(reasons)))


def ratio_target(
    result: BenchResult, name: str, subject: str, length: int, wanted: float, against: str = "softmax"
) -> Target:
    """The median of another over that of a subject."""
    label, asked = f"{name}, {length:,} tokens", f">= {wanted:g} times"
    own, other = row_of(result, subject, length), row_of(result, against, length)
    if own is None or other is None or not own.timing.latency_ms or not other.timing.latency_ms:
        return not_measured(label, asked, why(result, length, subject, against))
    ratio = other.timing.latency_ms / own.timing.latency_ms
    return Target(
        label,
        asked,
        f"{ratio:.2f} times",
        ratio >= wanted,
        f"{other.timing.latency_ms:.2f} ms over {own.timing.latency_ms:.2f} ms, medians in turns",
    )


def targets_table(targets: Sequence[Target]) -> str:
    """The targets as lines of text, in columns."""
    head = ("", "target", "wanted", "measured", "how")
    rows = [head, *((t.verdict, t.name, t.wanted, t.measured, t.how) for t in targets)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def result_path(folder: Path, name: str, where: Environment, suffix: str = "json") -> Path:
    """Where a result goes: ``name`` with date and hardware, see ``Environment.stem``."""
    return folder / f"{where.stem(name)}.{suffix}"


def commit(folder: Path) -> str | None:
    """The commit of a working tree, with "-dirty" if files differ from it; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git
        return None
    return done.stdout.strip() or None
