"""Series of electric meters: which appliance draws this current, or this power."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ...core.errors import InputError, OptionError
from ...progress import Progress
from ..archives import members
from ..fetch import fetch
from ..packages import SKTIME
from ..splits import Labelled, Ragged, hold_out
from ..task import Field, Kind, Preset, Splits, Task

_CLASSES = {"PLAID": 11, "ACSF1": 10}
_QUICK_STEPS = 4  # averaged to one


class Sensors(Task):
    """Series of up to 1,460 steps: the current of household appliances (PLAID), or a day of their power (ACSF1).

    Two channels: the series with mean 0 and standard deviation 1, and the logarithm of that deviation, the same at
    each step, because appliances differ in it by orders of magnitude.

    Args:
        data: ``PLAID`` or ``ACSF1``.
    """

    name: ClassVar[str] = "sensors"
    summary: ClassVar[str] = "which household appliance a series is of: PLAID (11 classes) or ACSF1 (10)"
    kind: ClassVar[Kind] = "classify"

    def __init__(self, data: str = "PLAID") -> None:
        if data not in _CLASSES:
            raise OptionError(f"wanted data among {', '.join(_CLASSES)}, got {data!r}")
        self.data = data
        self.field = Field("values", channels=2)
        self.num_classes = _CLASSES[data]
        length = {"PLAID": 1_344, "ACSF1": 1_460}[data]
        held = {"PLAID": 100, "ACSF1": 20}[data]
        self.presets = {
            "quick": Preset(length=length // _QUICK_STEPS, train=None, valid=held, test=None),
            "standard": Preset(length=length, train=None, valid=held, test=None),
            "paper": Preset(length=length, train=None, valid=held, test=None),
        }

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        names = {f"sktime/datasets/data/{self.data}/{self.data}_{part}.ts": part for part in ("TRAIN", "TEST")}
        files = {names[name]: content for name, content in members(fetch(SKTIME, progress), names.__contains__)}
        steps = self.presets["standard"].length // sizes.length
        parts = []
        for part in ("TRAIN", "TEST"):
            series, labels = series_file(files[part].decode("utf-8"))
            parts.append(Labelled(Ragged.of(channels(row, steps) for row in series), np.array(labels)))
        train, test = parts
        fit, held = hold_out(len(train), sizes.valid, seed)
        notes = [f"{self.data}: {len(fit)} series to train on, so expect a wide spread over seeds"]
        if steps > 1:
            notes.append(f"means of {steps} steps each: up to {sizes.length} positions of {sizes.length * steps:,}")
        return Splits(train.only(fit), train.only(held), test, sizes.length, tuple(notes))


def channels(series: np.ndarray, steps: int = 1) -> np.ndarray:
    """A series as two channels (n // steps, 2): standardised, and the log10 of what it was divided by.

    Args:
        series: (n,) numbers.
        steps: how many are averaged to one.
    """
    number = max(len(series) // steps, 1)
    means = series[: number * steps].reshape(number, -1).mean(1)
    spread = max(float(means.std()), 1e-12)
    standard = (means - means.mean()) / spread
    return np.stack([standard, np.full(number, np.log10(spread))], 1).astype(np.float32)


def series_file(text: str) -> tuple[list[np.ndarray], list[int]]:
    """Series and labels of a univariate .ts file, whose labels are counted from 0 in the order of its heading.

    Raises:
        InputError: it is not one.
    """
    classes: list[str] = []
    series, labels = [], []
    in_data = False
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not in_data:
            word, _, rest = line.partition(" ")
            if word.lower() == "@classlabel":
                classes = rest.split()[1:]
            in_data = word.lower() == "@data"
            continue
        values, _, label = line.rpartition(":")
        if ":" in values or label not in classes:
            raise InputError(
                f"wanted one series and a label among {', '.join(classes)} in line {number}, got {label!r}"
            )
        try:
            row = np.array([float(value) for value in values.split(",")])
        except ValueError as error:
            raise InputError(f"wanted numbers in line {number}: {error}") from error
        series.append(row[np.isfinite(row)])
        labels.append(classes.index(label))
    if not series:
        raise InputError("wanted a .ts file with @data and series below it, got none")
    return series, labels
