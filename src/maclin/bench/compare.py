"""Two results of ``maclin bench``, figure by figure: what changed by more than the noise of both."""

from __future__ import annotations

from maclin.core.errors import InputError, OptionError
from maclin.records import BenchResult, BenchRow, Change, Comparison, Environment, Rates

THRESHOLD = 0.05
"""Least change that counts, as a share, where it is beyond the noise."""
_MACHINE = 0.1  # share by which the rates of two machines may differ before it is said
_ALIKE = ("processor", "device", "num_threads", "dtype", "torch_version", "python_version")


def compare(before: BenchResult, after: BenchResult, *, threshold: float = THRESHOLD) -> Comparison:
    """What became slower or faster, or takes more or less memory.

    The ratio is that of the medians, after over before. Its band reaches from the lower quartile after over the upper
    one before to the upper one after over the lower one before. A change counts where the band leaves out 1 and the
    ratio is beyond the threshold. Memory has no noise, only the threshold. A figure that is there before but refused
    after has regressed; lengths and subjects that only one of them asked for are not comparable.

    Args:
        before: the earlier result.
        after: the later one.
        threshold: least change that counts, as a share.

    Raises:
        InputError: the results are of different kinds, or have no figure in common.
        OptionError: a negative threshold.
    """
    if threshold < 0:
        raise OptionError(f"wanted a threshold of at least 0, such as 0.05, got {threshold}")
    if before.what != after.what:
        raise InputError(f"wanted two results of one kind, got {before.what} and {after.what}")
    old = {_key(row): row for row in before.rows}
    new = {_key(row): row for row in after.rows}
    if not old.keys() & new.keys():
        raise InputError(
            f"these results have nothing in common: the first has {_subjects(before)}, the second {_subjects(after)}"
        )
    changes: list[Change] = []
    for key in [*old, *(key for key in new if key not in old)]:
        if after.what != "memory":
            changes.append(_time(key, old.get(key), new.get(key), threshold))
        changes.append(_memory(key, old.get(key), new.get(key), threshold))
    return Comparison(
        after.what,
        before.environment,
        after.environment,
        threshold,
        tuple(change for change in changes if change.before is not None or change.after is not None),
        tuple(_differences(before, after)),
    )


def _key(row: BenchRow) -> tuple[str, int]:
    return row.timing.subject, row.timing.length


def _subjects(result: BenchResult) -> str:
    rows = list(dict.fromkeys(row.timing.subject for row in result.rows))
    lengths = sorted({row.timing.length for row in result.rows})
    return f"{', '.join(rows)} at {', '.join(map(str, lengths))}"


def _time(key: tuple[str, int], old: BenchRow | None, new: BenchRow | None, threshold: float) -> Change:
    a = None if old is None else old.timing.latency_ms
    b = None if new is None else new.timing.latency_ms
    if old is None or new is None or not a or not b:
        return _absent(key, "time", a, b, old, new)
    low_a, high_a = old.timing.latency_ms_low or a, old.timing.latency_ms_high or a
    low_b, high_b = new.timing.latency_ms_low or b, new.timing.latency_ms_high or b
    return _judged(key, "time", a, b, low_b / high_a, high_b / low_a, threshold)


def _memory(key: tuple[str, int], old: BenchRow | None, new: BenchRow | None, threshold: float) -> Change:
    a = None if old is None else old.timing.peak_bytes
    b = None if new is None else new.timing.peak_bytes
    if not a or not b:
        return _absent(key, "memory", a, b, old, new)
    return _judged(key, "memory", a, b, b / a, b / a, threshold)


def _judged(
    key: tuple[str, int], quantity: str, a: float, b: float, low: float, high: float, threshold: float
) -> Change:
    ratio = b / a
    verdict, note = "same", ""
    if ratio > 1 + threshold:
        verdict = "regressed" if low > 1 else "same"
    elif ratio < 1 / (1 + threshold):
        verdict = "improved" if high < 1 else "same"
    if verdict == "same" and not 1 / (1 + threshold) <= ratio <= 1 + threshold:
        note = "within noise"
    return Change(*key, quantity, a, b, ratio, low, high, verdict, note)


def _absent(
    key: tuple[str, int],
    quantity: str,
    a: float | None,
    b: float | None,
    old: BenchRow | None,
    new: BenchRow | None,
) -> Change:
    if new is None or old is None:
        return Change(*key, quantity, a, b, None, None, None, "not comparable", "measured in one of them only")
    if a and not b and new.timing.reason is not None:
        return Change(*key, quantity, a, b, None, None, None, "regressed", f"no figure any more: {new.timing.reason}")
    return Change(*key, quantity, a, b, None, None, None, "not comparable", old.timing.reason or "")


def _differences(before: BenchResult, after: BenchResult) -> list[str]:
    """What else is different between both runs, in words."""
    found = [_difference(name, before.environment, after.environment) for name in _ALIKE]
    names = sorted({*before.settings, *after.settings} - {"lengths", "mechanisms"})
    found += [
        f"setting {name} is {before.settings.get(name)!r} in the first and {after.settings.get(name)!r} in the second"
        for name in names
        if before.settings.get(name) != after.settings.get(name)
    ]
    if before.rates is not None and after.rates is not None:
        found += _rates(before.rates, after.rates)
    found += [f"the first: {text}" for text in before.warnings] + [f"the second: {text}" for text in after.warnings]
    return [text for text in found if text]


def _difference(name: str, a: Environment, b: Environment) -> str:
    one, other = getattr(a, name), getattr(b, name)
    return "" if one == other else f"{name} is {one} in the first and {other} in the second"


def _rates(a: Rates, b: Rates) -> list[str]:
    ratios = {
        "copies": b.copy_bytes_per_s / a.copy_bytes_per_s,
        "multiplies": b.matrix_flops_per_s / a.matrix_flops_per_s,
    }
    return [
        f"the machine of the second {what} {ratio:.2f} times as fast as that of the first"
        for what, ratio in ratios.items()
        if not 1 - _MACHINE < ratio < 1 + _MACHINE
    ]
