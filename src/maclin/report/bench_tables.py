"""The words and tables of a result of ``maclin bench``, for every rendering the same."""

from __future__ import annotations

import json
import math

from ..records import BenchResult, BenchRow, Change, Comparison, Floor, text_table
from . import words
from .sections import environment_rows
from .tables import NONE, Table

BASELINE = "softmax"
_ORDER = ("regressed", "improved", "same", "not comparable")
_FLOOR_NOTE = (
    "The floor is the larger of two times: the bytes that must be moved over the copy bandwidth of this machine, and "
    "the operations that the method needs over its matrix rate. The share is floor over latency; 100% cannot be beaten."
)
_BACKWARD_NOTE = "Forward and backward together need three times the operations of the forward pass."


def bench_title(result: BenchResult) -> str:
    """What was measured, in one line."""
    what = {
        "speed": "Speed of attention",
        "memory": "Memory of attention",
        "decode": "Decoding one token",
    }.get(result.what, result.what)
    kinds = [
        *(["causal"] if result.settings.get("causal") and result.what != "decode" else []),
        *(["forward and backward"] if result.settings.get("backward") else []),
        result.environment.dtype,
        result.environment.device,
    ]
    return f"{what}: {', '.join(kinds)}"


def bench_findings(result: BenchResult) -> tuple[str, ...]:
    """Sentences on the longest length: what is fastest there, how near to the limit, and since when it pays."""
    found = []
    key = _memory if result.what == "memory" else _latency
    longest = _longest(result)
    if longest is not None:
        rows = {row.timing.subject: row for row in result.rows if row.timing.length == longest and key(row)}
        others = {name: row for name, row in rows.items() if row.kind == "mechanism"}
        base = rows.get(BASELINE)
        if others and base is not None:
            best = min(others, key=lambda name: key(others[name]) or math.inf)
            ratio = (key(base) or math.nan) / (key(others[best]) or math.nan)
            if result.what == "memory":
                found.append(
                    f"At {_at(result, longest)}, {best} takes {words.size(_memory(others[best]))} beyond its inputs, "
                    f"softmax {words.size(_memory(base))}."
                )
            else:
                found.append(
                    f"At {_at(result, longest)}, {best} is the fastest: {words.times(1 / ratio)} as softmax, "
                    f"{words.milliseconds(_latency(others[best]))} against {words.milliseconds(_latency(base))}."
                )
                shares = [(name, row.share_of_floor) for name, row in others.items() if row.share_of_floor]
                if shares:
                    near, share = max(shares, key=lambda pair: pair[1])
                    found.append(f"{near} is nearest to the limit of this machine there: {words.percent(share)} of it.")
    mechanisms = {row.timing.subject for row in result.rows if row.kind == "mechanism"}
    wins = [row for row in result.break_even if row.length is not None and row.subject in mechanisms]
    if wins:
        first = min(wins, key=lambda row: row.length or 0)
        at = _at(result, first.length or 0)
        found.append(f"{first.subject} is faster than softmax from {at} on, the earliest of the mechanisms.")
    elif result.break_even and result.what != "memory":
        found.append("No mechanism was faster than softmax at the lengths that were measured.")
    refused = list(dict.fromkeys(row.timing.subject for row in result.rows if row.timing.reason is not None))
    if refused:
        found.append(f"Without a figure at some length, for the reason in the table: {', '.join(refused)}.")
    return tuple(found) or ("Nothing was measured.",)


def rows_table(result: BenchResult) -> Table:
    """Every figure, beside softmax and the floor."""
    base = {row.timing.length: row for row in result.rows if row.timing.subject == BASELINE}
    is_memory = result.what == "memory"
    columns = ["Attention", "Kind", "Position" if result.what == "decode" else "Tokens"]
    if not is_memory:
        columns += ["Latency", "Quartiles", "Softmax over it", "Floor", "Share of floor", "Limit"]
    columns += ["Peak memory", "State" if result.what == "decode" else "Beyond in- and outputs"]
    rows: list[tuple[str, ...]] = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in result.rows:
        timing = row.timing
        cells = [timing.subject, row.kind, words.count(timing.length)]
        if not is_memory:
            ratio = _ratio(base.get(timing.length), row)
            cells += [
                NONE if timing.latency_ms is None else words.milliseconds(timing.latency_ms),
                _quartiles(row),
                NONE if ratio is None else words.figure(ratio, 2),
                NONE if row.floor is None else words.milliseconds(row.floor.ms),
                NONE if row.share_of_floor is None else words.percent(row.share_of_floor),
                NONE if row.floor is None else limit(row.floor),
            ]
        cells.append(NONE if timing.peak_bytes is None else words.size(timing.peak_bytes))
        held = row.given_bytes if result.what == "decode" else row.beyond_bytes
        cells.append(NONE if held is None or timing.peak_bytes is None else words.size(held))
        rows.append(tuple(cells))
        if timing.reason is not None:
            reasons.setdefault((timing.subject, timing.reason.rstrip(".")), []).append(f"{timing.length:,}")
    notes = [f"{name} at {', '.join(lengths)}: {reason}." for (name, reason), lengths in reasons.items()]
    if not is_memory:
        notes.append(_FLOOR_NOTE)
        if result.settings.get("backward"):
            notes.append(_BACKWARD_NOTE)
    if any(row.kind == "peer" for row in result.rows):
        notes.append("Of peers only the attention is timed, on q, k and v in the layout that each works on.")
    return Table("Figures", tuple(columns), tuple(rows), tuple(notes), 2)


def summary(result: BenchResult) -> str:
    """The figures as lines of text, for a terminal."""
    table = rows_table(result)
    kept = [i for i, name in enumerate(table.columns) if name not in ("Kind", "Quartiles", "Floor", "Limit")]
    return text_table(tuple(table.columns[i] for i in kept), [tuple(row[i] for i in kept) for row in table.rows])


def limit(floor: Floor) -> str:
    """Which of the two floors is the larger."""
    return "moving" if floor.copy_ms >= floor.matrix_ms else "multiplying"


def growth_table(result: BenchResult) -> Table:
    """The exponents, subject by subject."""
    found: dict[str, dict[str, str]] = {}
    for row in result.growth:
        text = f"{row.exponent:.2f} ({row.from_length:,} to {row.to_length:,})"
        found.setdefault(row.subject, {})[row.quantity] = text
    rows = tuple((name, cells.get("time", NONE), cells.get("memory", NONE)) for name, cells in found.items())
    note = "Time or memory grows with the length to this power, by least squares on logarithms of the medians."
    return Table("Growth with the length", ("Attention", "Time", "Peak memory"), rows, (note,), 1)


def break_even_table(result: BenchResult) -> Table:
    """From which length on each is faster than softmax."""
    if result.what == "memory":
        return Table("Break-even with softmax", (), ())
    rows = tuple(
        (row.subject, "never" if row.length is None else words.count(row.length), row.note) for row in result.break_even
    )
    return Table(
        "Break-even with softmax",
        ("Attention", "From position" if result.what == "decode" else "From (tokens)", "Note"),
        rows,
        (),
        3,
    )


def method_table(result: BenchResult) -> Table:
    """Settings, machine, its rates, and times."""
    rates = result.rates
    measured: list[tuple[str, str]] = []
    if rates is not None:
        measured = [
            (
                "Copy bandwidth",
                f"{rates.copy_bytes_per_s / 1e9:.1f} GB/s read and written, best with {words.size(rates.copied_bytes)}",
            ),
            ("Matrix rate", f"{rates.matrix_flops_per_s / 1e9:,.0f} GFLOP/s, best with {rates.matrix_shape}"),
        ]
    rows = (
        *((f"Setting {name}", _setting(value)) for name, value in result.settings.items()),
        *environment_rows(result.environment),
        *measured,
        *((f"Time to {name}", f"{seconds:.1f} s") for name, seconds in result.seconds.items()),
    )
    return Table("Conditions", ("What", "Value"), rows, (), 2)


def change_table(comparison: Comparison) -> Table:
    """Every change, what regressed first."""
    ordered = sorted(comparison.changes, key=lambda change: (_ORDER.index(change.verdict), change.subject))
    rows = tuple(
        (
            change.verdict,
            change.subject,
            change.quantity,
            words.count(change.length),
            _amount(change, change.before),
            _amount(change, change.after),
            NONE if change.ratio is None else f"{change.ratio:.3f}",
            NONE if change.ratio_low is None else f"{change.ratio_low:.3f} to {change.ratio_high:.3f}",
            change.note,
        )
        for change in ordered
    )
    columns = ("Verdict", "Attention", "Quantity", "Length", "Before", "After", "Ratio", "Noise", "Note")
    return Table("Changes", columns, rows, (), 3)


def _amount(change: Change, value: float | None) -> str:
    if value is None:
        return NONE
    return words.milliseconds(value) if change.quantity == "time" else words.size(value)


def _at(result: BenchResult, length: int) -> str:
    return f"position {length:,}" if result.what == "decode" else f"{length:,} tokens"


def _latency(row: BenchRow) -> float | None:
    return row.timing.latency_ms


def _memory(row: BenchRow) -> float | None:
    return row.timing.peak_bytes


def _longest(result: BenchResult) -> int | None:
    """The longest length at which softmax and something else were measured; else the longest of all."""
    key = _memory if result.what == "memory" else _latency
    measured: dict[int, set[str]] = {}
    for row in result.rows:
        if key(row):
            measured.setdefault(row.timing.length, set()).add(row.timing.subject)
    both = [length for length, names in measured.items() if BASELINE in names and len(names) > 1]
    return max(both or measured, default=None)


def _ratio(base: BenchRow | None, row: BenchRow) -> float | None:
    if base is None or not base.timing.latency_ms or not row.timing.latency_ms:
        return None
    return base.timing.latency_ms / row.timing.latency_ms


def _quartiles(row: BenchRow) -> str:
    low, high = row.timing.latency_ms_low, row.timing.latency_ms_high
    return NONE if low is None or high is None else f"{words.milliseconds(low)} to {words.milliseconds(high)}"


def _setting(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value)
